"""Load a checkpoint the way a stranger would, and report what came out, or its KL to a reference.

`quantize.py` runs this file in a process of its own, with transformers and bitsandbytes or
compressed-tensors, but without spi_utils: `python -P fresh_check.py request.json answer.json`. The model is
used as its card says: real text behind a start token, and `generate` on a prompt, in the dtype that the file
ships with.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import AutoHfQuantizer

TOKENS = 24  # positions of the logits that are compared
ROWS = 64  # positions whose KL is computed at once
ANSWER = 24  # tokens generated at most
PROMPT = "Explain in two sentences why the sky is blue."


@torch.no_grad()
def main(request_path: str, answer_path: str) -> None:
    """Answer a request: what every module holds and, if asked for, logits against an in-memory model."""
    request = json.loads(Path(request_path).read_text())
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    config = AutoConfig.from_pretrained(request["model"], trust_remote_code=request["trust"])
    answer: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__}
    if "reference" in request:
        answer["kl"] = score(load(request, request["model"]), request)
        answer["kl_16bit"] = score(load(request, request["source"], dtype=config.dtype), request)
    elif not request["load"]:
        answer["modules"] = describe(on_meta(request, config))
    else:
        expected = in_memory(request, config) if request["forward"] else None
        model = load(request, request["model"])
        answer["modules"] = describe(model)  # before the forward: some CPUs repack weights in it
        if expected is not None:
            own = found = logits(model, config)
            if (broken := first_nonfinite(model, request["windows"])) is None:
                answer["generation"] = generate(model, request)
            else:
                answer["first_nonfinite"] = broken
            if "nf4" in answer["modules"].values():
                # 4-bit kernels round otherwise than a 16-bit product, and some repack the weights that they
                # multiply: the values are compared in a model that is dequantized before it is run
                del model
                found = logits(load(request, request["model"]).dequantize(), config)
            answer["max_logit_difference"] = (found - expected).abs().max().item()
            answer["logit_spread"] = expected.std().item()
            answer["finite"] = bool(own.isfinite().all())
    answer["spi_utils"] = "spi_utils" in sys.modules
    Path(answer_path).write_text(json.dumps(answer))


def load(request: dict[str, Any], folder: str, **options: Any) -> Any:
    """`from_pretrained`, as in the model card."""
    options |= {"device_map": {"": request["device"]}, "trust_remote_code": request["trust"]}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def in_memory(request: dict[str, Any], config: Any) -> torch.Tensor:
    """Logits of the original model, with the values of every quantized matrix worked out from the files by
    hand: neither bitsandbytes nor compressed-tensors has a part in them."""
    model = load(request, request["source"], dtype=config.dtype)
    groups = (getattr(config, "quantization_config", None) or {}).get("config_groups", {}).values()
    bits = {target: group["weights"]["num_bits"] for group in groups for target in group["targets"]}
    files = [safe_open(path, framework="pt") for path in sorted(Path(request["model"]).glob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118
    for name, stem in request["stems"].items():
        own = [key for key in where if key.startswith(stem + "weight")]
        part = {key.removeprefix(stem): where[key].get_tensor(key) for key in own}
        module = model.get_submodule(name)
        weight = module.weight.T if type(module).__name__ == "Conv1D" else module.weight
        value = integer_values(part, bits[name]) if name in bits else nf4_values(part)
        weight.copy_(value.view(weight.shape).to(weight.dtype))
    return logits(model, config)


def nf4_values(part: dict[str, torch.Tensor]) -> torch.Tensor:
    """Level times absmax, float32, flat: a byte holds two codes, the first in its high half; a block of 64
    shares an absmax, which double quantization keeps as code, level, absmax of 256 blocks, and an offset."""
    codes, absmax = part["weight"].view(-1), part["weight.absmax"]
    if "weight.nested_absmax" in part:
        state = json.loads(bytes(part["weight.quant_state.bitsandbytes__nf4"].tolist()))
        factor = part["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(absmax)]
        absmax = part["weight.nested_quant_map"][absmax.int()] * factor + state["nested_offset"]
    index = torch.stack([codes >> 4, codes & 15], dim=1).view(-1).int()
    return part["weight.quant_map"][index] * absmax.repeat_interleave(64)[: len(index)]


def integer_values(part: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """code * scale: a word holds 32 / bits codes, the first in its lowest bits, each raised by
    2 ** (bits - 1)."""
    scale, (rows, cols) = part["weight_scale"], part["weight_shape"].tolist()
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    fields = (part["weight_packed"].to(torch.int64)[..., None] >> shifts) & (2**bits - 1)
    code = (fields.flatten(1) - 2 ** (bits - 1))[:, :cols].view(rows, scale.shape[1], -1)
    return code.to(scale.dtype) * scale[:, :, None]


def on_meta(request: dict[str, Any], config: Any) -> torch.nn.Module:
    """The modules as the quantizer of transformers makes them, without weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=request["trust"])
    if getattr(config, "quantization_config", None):
        quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        quantizer.preprocess_model(model=model, device_map={"": request["device"]})
    return model


def describe(model: torch.nn.Module) -> dict[str, Any]:
    """What every module with a matrix of its own holds it as: "nf4", a packed one's [bits, group, symmetric],
    else its dtype."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        weight, scheme = getattr(module, "weight", None), getattr(module, "quantization_scheme", None)
        if hasattr(module, "weight_packed") and scheme is not None:
            found[name] = [scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.symmetric]
        elif isinstance(weight, torch.nn.Parameter) and weight.ndim == 2:
            plain = str(weight.dtype).removeprefix("torch.")
            found[name] = "nf4" if type(module).__name__ == "Linear4bit" else plain
    return found


def logits(model: Any, config: Any) -> Any:
    """float32 logits (TOKENS, vocabulary) of token ids spread over the vocabulary."""
    ids = torch.linspace(0, config.get_text_config().vocab_size - 1, TOKENS).long()
    return run(model, ids.tolist()).float().cpu()


def run(model: Any, ids: list[int]) -> Any:
    """Logits (T, vocabulary) of one window of token ids, as the model computes them."""
    return model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]


def score(model: Any, request: dict[str, Any]) -> float | None:
    """Mean KL(reference ‖ a loaded model) over every predicted position of the windows, in nats a token; None
    where a logit is not finite. The reference's log-probabilities lie in a file (T, V) a window."""
    total, count = 0.0, 0
    for ids, path in zip(request["windows"], request["reference"], strict=True):
        expected = torch.from_numpy(np.load(path))[:-1]
        for own, held in zip(run(model, ids)[:-1].split(ROWS), expected.split(ROWS), strict=True):
            if not bool(own.isfinite().all()):
                return None
            log_q = torch.log_softmax(own.float(), -1).cpu()
            total += float((held.exp() * (held - log_q)).sum(dtype=torch.float64))
            count += len(held)
    return total / count


def first_nonfinite(model: Any, windows: list[list[int]]) -> str | None:
    """Run windows of token ids, one at a time: None where the logits of every position are finite, else the
    name of the first module, in order of execution, whose output isn't."""
    names = {module: name for name, module in model.named_modules() if not list(module.children())}
    broken = []

    def note(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if module in names and isinstance(value, torch.Tensor) and not value.isfinite().all():
            broken.append(names[module])

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    finite = all(bool(run(model, ids).isfinite().all()) for ids in windows)
    handle.remove()
    return None if finite else (broken or ["the logits"])[0]


def generate(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The prompt, with the checkpoint's own chat template where there is one, and what the model answers."""
    tokenizer = AutoTokenizer.from_pretrained(request["model"], trust_remote_code=request["trust"])
    prompt, chat = PROMPT, bool(tokenizer.chat_template)
    if chat:
        messages = [{"role": "user", "content": PROMPT}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    options = {"add_special_tokens": not chat, "return_token_type_ids": False}
    inputs = tokenizer(prompt, return_tensors="pt", **options).to(model.device)
    made = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)
    ids = made[0, inputs["input_ids"].shape[1] :].tolist()
    text, special = tokenizer.decode(ids, skip_special_tokens=True), set(tokenizer.all_special_ids)
    count = sum(token not in special for token in ids)
    return {"prompt": PROMPT, "chat_template": chat, "text": text, "tokens": count}


if __name__ == "__main__":
    main(*sys.argv[1:])
