"""Load a checkpoint the way a stranger would, and report what came out.

`verify.py` runs this file in a process of its own, with transformers and bitsandbytes but without spi_utils:
`python -P fresh_check.py request.json answer.json`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
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
    """Logits of the original weights, quantized by transformers and bitsandbytes as they are loaded."""
    options = {"dtype": config.dtype}
    if getattr(config, "quantization_config", None):
        options["quantization_config"] = BitsAndBytesConfig.from_dict(dict(config.quantization_config))
    return logits(load(request, request["source"], **options), config)


def on_meta(request: dict[str, Any], config: transformers.PretrainedConfig) -> torch.nn.Module:
    """The modules as the quantizer of transformers makes them, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=request["trust"])
    if getattr(config, "quantization_config", None):
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        quantizer.preprocess_model(model=model, device_map={"": request["device"]})
    return model


def describe(model: torch.nn.Module) -> dict[str, dict[str, str]]:
    """Class, dtype and device of every module that has a matrix of its own."""
    return {
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
