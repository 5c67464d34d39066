"""Load a checkpoint the way a stranger would, and report what came out.

`verify.py` runs this file in a process of its own, with transformers and bitsandbytes or compressed-tensors,
but without spi_utils: `python -P fresh_check.py request.json answer.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers import AutoHfQuantizer

TOKENS = 24  # positions of the logits that are compared


def main(request_path: str, answer_path: str) -> None:
    """Answer a request: classes of all modules and, if asked for, logits against an in-memory model."""
    request = json.loads(Path(request_path).read_text())
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    config = AutoConfig.from_pretrained(request["model"], trust_remote_code=request["trust"])
    answer: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__}
    if request["load"]:
        expected = in_memory(request, config) if request["forward"] else None
        model = load(request, request["model"])
        answer |= {"modules": describe(model)}  # before the forward: some CPUs repack weights in it
        if expected is not None:
            answer |= compare(logits(model, config), expected)
    else:
        answer |= {"modules": describe(on_meta(request, config))}
    answer["spi_utils"] = "spi_utils" in sys.modules
    Path(answer_path).write_text(json.dumps(answer))


def load(request: dict[str, Any], folder: str, **options: Any) -> transformers.PreTrainedModel:
    """`from_pretrained`, as in the model card."""
    device = {"": request["device"]}
    trust = request["trust"]
    return AutoModelForCausalLM.from_pretrained(folder, device_map=device, trust_remote_code=trust, **options)


def in_memory(request: dict[str, Any], config: transformers.PretrainedConfig) -> torch.Tensor:
    """Logits of the original weights: quantized by transformers and bitsandbytes as they are loaded, or with
    the packed weights of compressed-tensors worked out by hand."""
    options = {"dtype": config.dtype}
    held = dict(getattr(config, "quantization_config", None) or {})
    if held.get("quant_method") == "compressed-tensors":
        model = load(request, request["source"], **options)
        unpack_into(model, Path(request["model"]), held, request["stems"])
        return logits(model, config)
    if held:
        options["quantization_config"] = BitsAndBytesConfig.from_dict(held)
    return logits(load(request, request["source"], **options), config)


@torch.no_grad()
def unpack_into(model: torch.nn.Module, folder: Path, held: dict[str, Any], stems: dict[str, str]) -> None:
    """Put (code - zero) * scale of every packed matrix into a model that holds the original weights.

    A word holds 32 / bits codes, the first in its lowest bits, each raised by 2 ** (bits - 1); zero points
    lie along the column. `stems` says how the files begin a module's tensors: "model.layers.0.mlp.up_proj.".
    """
    bits = {
        t: group["weights"]["num_bits"] for group in held["config_groups"].values() for t in group["targets"]
    }
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def read(key: str) -> torch.Tensor:
        return where[key].get_tensor(key)

    for name, stem in stems.items():
        scale = read(f"{stem}weight_scale")
        rows, cols = read(f"{stem}weight_shape").tolist()
        code = unpacked(read(f"{stem}weight_packed"), bits[name])[:, :cols].view(rows, scale.shape[1], -1)
        if f"{stem}weight_zero_point" in where:
            zero = unpacked(read(f"{stem}weight_zero_point").T, bits[name]).T[:rows]
            code = code - zero[:, :, None]
        value = code.to(scale.dtype) * scale[:, :, None]
        weight = model.get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        weight.copy_(value.view(rows, cols))


def unpacked(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes (rows, words * 32 / bits) of int32 words (rows, words)."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    fields = (words.to(torch.int64)[..., None] >> shifts) & (2**bits - 1)
    return fields.flatten(1) - 2 ** (bits - 1)


def on_meta(request: dict[str, Any], config: transformers.PretrainedConfig) -> torch.nn.Module:
    """The modules as the quantizer of transformers makes them, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=request["trust"])
    if getattr(config, "quantization_config", None):
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        quantizer.preprocess_model(model=model, device_map={"": request["device"]})
    return model


def describe(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Class, dtype and device of every module that has a matrix of its own; of a packed one its scheme."""
    packed = {name: module for name, module in model.named_modules() if hasattr(module, "weight_packed")}
    return {
        name: {
            "class": f"{type(module).__module__}.{type(module).__name__}",
            "dtype": "packed",
            "device": module.weight_packed.device.type,
            "scheme": [scheme.num_bits, scheme.group_size, scheme.symmetric],
        }
        for name, module in packed.items()
        for scheme in [module.quantization_scheme.weights]
    } | {
        name: {
            "class": f"{type(module).__module__}.{type(module).__name__}",
            "dtype": str(module.weight.dtype).removeprefix("torch."),
            "device": module.weight.device.type,
        }
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.nn.Parameter) and module.weight.ndim == 2
    }


@torch.inference_mode()
def logits(model: transformers.PreTrainedModel, config: transformers.PretrainedConfig) -> torch.Tensor:
    """float32 logits (TOKENS, vocabulary) of token ids spread over the vocabulary."""
    vocabulary = config.get_text_config().vocab_size
    ids = torch.linspace(0, vocabulary - 1, TOKENS).long()[None]
    return model.eval()(ids.to(model.device), use_cache=False).logits[0].float().cpu()


def compare(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float | bool]:
    """Largest difference of two logit tables, and the spread of the expected one to judge it by."""
    return {
        "max_logit_difference": (found - expected).abs().max().item(),
        "logit_spread": expected.std().item(),
        "finite": bool(found.isfinite().all()),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
