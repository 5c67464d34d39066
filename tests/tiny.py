"""Tiny random checkpoints of real architectures, for tests: safetensors, config and a real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 320  # 256 bytes, four special tokens, the rest unused

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "bos_token_id": 257,
    "eos_token_id": 258,
    "pad_token_id": 259,
}
_QWEN35 = {
    **_DECODER,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    # 32 value heads: bitsandbytes' AVX512-BF16 kernel wants out_features in multiples of 32
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_DECODER, "tie_word_embeddings": True},
    "llama_untied": {"model_type": "llama", **_DECODER, "tie_word_embeddings": False},
    "qwen3_5": {"model_type": "qwen3_5_text", **_QWEN35},
    "gemma3": {
        "model_type": "gemma3_text",
        **_DECODER,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "tie_word_embeddings": True,
    },
    "phi3": {"model_type": "phi3", **_DECODER, "tie_word_embeddings": False},
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 128,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 512,
        "bos_token_id": 257,
        "eos_token_id": 258,
    },
    "mixtral": {
        "model_type": "mixtral",
        **_DECODER,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    },
}
ARCHITECTURES = (*CONFIGS, "qwen3_5_multimodal")


def make_tiny(arch: str, directory: Path, *, dtype: str = "float16", seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny random checkpoint of `arch` and return its directory.

    `qwen3_5_multimodal` stores the text part under `model.language_model.`, with a vision config beside it,
    as the published Qwen3.5 files do.
    """
    directory = Path(directory)
    multimodal = arch == "qwen3_5_multimodal"
    values = {**CONFIGS["qwen3_5" if multimodal else arch], **overrides}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).to(getattr(torch, dtype))
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    if multimodal:
        _as_multimodal(directory)
    return directory


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: one token a byte, then <unk>, <s>, </s>, <pad>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    for index, special in enumerate(("<unk>", "<s>", "</s>", "<pad>"), start=256):
        vocabulary[special] = index
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _as_multimodal(directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = directory / "model.safetensors"
    tensors = load_file(file)
    renamed = {name.replace("model.", "model.language_model.", 1): value for name, value in tensors.items()}
    vision = {"model.visual.patch_embed.proj.weight": torch.randn(32, 3, 2, 4, 4, dtype=torch.float16)}
    save_file(renamed | vision, file, metadata={"format": "pt"})
    text = json.loads((directory / "config.json").read_text())
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "text_config": text,
        "vision_config": {"model_type": "qwen3_5", "depth": 1, "hidden_size": 32, "num_heads": 2},
        "tie_word_embeddings": True,
        "dtype": "float16",
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2))


class Originals:
    """16-bit copies of a model's own weights, with the `read` of `models.Weights`."""

    def __init__(self, model: Any, layers: list[str], dtype: Any) -> None:
        held = {f"{name}.weight": model.get_submodule(name).weight for name in layers}
        self._held = {name: weight.detach().to("cpu", dtype, copy=True) for name, weight in held.items()}

    def read(self, name: str) -> Any:
        return self._held[name]
