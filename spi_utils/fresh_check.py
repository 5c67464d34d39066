"""Load a checkpoint the way a stranger would, and report what came out, or its KL to a reference.

`quantize.py` runs this file in a process of its own, with transformers and bitsandbytes or
compressed-tensors, but without spi_utils: `python -P fresh_check.py request.json answer.json`. The model is
used as its card says: real text behind a start token, and `generate` on a prompt, in the dtype that the file
ships with.
"""

import functools
import json
import math
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


def main(request_path: str, answer_path: str) -> None:
    """Answer a request: classes of all modules and, if asked for, logits against an in-memory model."""
    request = json.loads(Path(request_path).read_text())
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(request["threads"])
    config = AutoConfig.from_pretrained(request["model"], trust_remote_code=request["trust"])
    answer: dict[str, Any] = {"transformers": transformers.__version__, "torch": torch.__version__}
    if "reference" in request:
        answer |= {"kl": score(request, request["model"])}
        answer |= {"kl_16bit": score(request, request["source"], dtype=config.dtype)}
        Path(answer_path).write_text(json.dumps(answer))
        return
    if request["load"]:
        expected = in_memory(request, config) if request["forward"] else None
        model = load(request, request["model"])
        answer |= {"modules": describe(model)}  # before the forward: some CPUs repack weights in it
        if expected is not None:
            own = logits(model, config)
            answer["text"] = read_text(model, request["windows"])
            if answer["text"]["finite"]:
                answer["generation"] = use(model, request)
            if any("Linear4bit" in module["class"] for module in answer["modules"].values()):
                # 4-bit kernels round otherwise than a 16-bit product, and some repack the weights that they
                # multiply: the values are compared in a model that is dequantized before it is run
                answer["kernel_difference"] = compare(own, expected)["max_logit_difference"]
                del model
                shown = compare(logits(load(request, request["model"]).dequantize(), config), expected)
                answer |= shown | {"finite": bool(own.isfinite().all())}
            else:
                answer |= compare(own, expected)
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
    """Logits of the original model, with the values of every quantized matrix worked out from the files by
    hand: neither bitsandbytes nor compressed-tensors has a part in them."""
    model = load(request, request["source"], dtype=config.dtype)
    held = dict(getattr(config, "quantization_config", None) or {})
    files = [safe_open(path, framework="pt") for path in sorted(Path(request["model"]).glob("*.safetensors"))]
    where = {key: file for file in files for key in file.keys()}  # noqa: SIM118

    def read(key: str) -> torch.Tensor | None:
        return where[key].get_tensor(key) if key in where else None

    bits = {
        target: group["weights"]["num_bits"]
        for group in held.get("config_groups", {}).values()
        for target in group["targets"]
    }
    with torch.no_grad():
        for name, stem in request["stems"].items():
            weight = model.get_submodule(name).weight
            assert isinstance(weight, torch.Tensor)
            part = functools.partial(lambda stem, end: read(stem + end), stem)
            value = nf4_values(part) if name not in bits else integer_values(part, bits[name])
            conv1d = type(model.get_submodule(name)).__name__ == "Conv1D"
            value = value.view(weight.shape[::-1]).T if conv1d else value.view(weight.shape)
            weight.copy_(value.to(weight.dtype))
    return logits(model, config)


def nf4_values(part: Any) -> torch.Tensor:
    """Level times absmax, float32, flat: a byte holds two codes, the first in its high half; a block of 64
    shares an absmax, which double quantization keeps as code, level, absmax of 256 blocks, and an offset."""
    codes, levels, absmax = (part(end) for end in ("weight", "weight.quant_map", "weight.absmax"))
    if (second := part("weight.nested_absmax")) is not None:
        state = json.loads(bytes(part("weight.quant_state.bitsandbytes__nf4").tolist()))
        factor = second.repeat_interleave(state["nested_blocksize"])[: len(absmax)]
        absmax = part("weight.nested_quant_map")[absmax.int()] * factor + state["nested_offset"]
    index = torch.stack([codes.view(-1) >> 4, codes.view(-1) & 15], dim=1).view(-1).int()
    return levels[index] * absmax.repeat_interleave(64)[: len(index)]


def integer_values(part: Any, bits: int) -> torch.Tensor:
    """(code - zero) * scale: a word holds 32 / bits codes, the first in its lowest bits, each raised by
    2 ** (bits - 1); zero points lie along the column."""
    scale, (rows, cols) = part("weight_scale"), part("weight_shape").tolist()
    code = unpacked(part("weight_packed"), bits)[:, :cols].view(rows, scale.shape[1], -1)
    if (zeros := part("weight_zero_point")) is not None:
        code = code - unpacked(zeros.T, bits).T[:rows, :, None]
    return code.to(scale.dtype) * scale[:, :, None]


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
    found: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        kind = f"{type(module).__module__}.{type(module).__name__}"
        weight = getattr(module, "weight", None)
        if hasattr(module, "weight_packed"):
            scheme = module.quantization_scheme.weights
            how = [scheme.num_bits, scheme.group_size, scheme.symmetric]
            place = module.weight_packed.device.type
            found[name] = {"class": kind, "dtype": "packed", "device": place, "scheme": how}
        elif isinstance(weight, torch.nn.Parameter) and weight.ndim == 2:
            dtype = str(weight.dtype).removeprefix("torch.")
            found[name] = {"class": kind, "dtype": dtype, "device": weight.device.type}
    return found


@torch.inference_mode()
def logits(model: transformers.PreTrainedModel, config: transformers.PretrainedConfig) -> torch.Tensor:
    """float32 logits (TOKENS, vocabulary) of token ids spread over the vocabulary."""
    vocabulary = config.get_text_config().vocab_size
    ids = torch.linspace(0, vocabulary - 1, TOKENS).long()[None]
    return model.eval()(ids.to(model.device), use_cache=False).logits[0].float().cpu()


@torch.inference_mode()
def score(request: dict[str, Any], folder: str, **options: Any) -> float | None:
    """Mean KL(reference ‖ a loaded model) over every predicted position of the windows, in nats a token; None
    where a logit is not finite. The reference's log-probabilities lie in a file (T, V) a window."""
    model = load(request, folder, **options).eval()
    total, count = 0.0, 0
    for ids, path in zip(request["windows"], request["reference"], strict=True):
        logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0, :-1]
        expected = torch.from_numpy(np.load(path))[:-1]
        for own, held in zip(logits.split(ROWS), expected.split(ROWS), strict=True):
            if not bool(own.isfinite().all()):
                return None
            log_q = torch.log_softmax(own.float(), -1).cpu()
            total += float((held.exp() * (held - log_q)).sum(dtype=torch.float64))
            count += len(held)
    return total / count


@torch.inference_mode()
def read_text(model: transformers.PreTrainedModel, windows: list[list[int]]) -> dict[str, Any]:
    """Run windows of token ids, one at a time: are the logits of every position finite, and if not, the name
    of the first module, in order of execution, whose output isn't."""
    broken: list[str] = []

    def note(name: str, module: Any, inputs: Any, output: Any) -> None:
        value = output[0] if isinstance(output, tuple) else output
        if isinstance(value, torch.Tensor) and value.is_floating_point() and not value.isfinite().all():
            broken.append(name)

    leaves = [(name, module) for name, module in model.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(functools.partial(note, name)) for name, module in leaves]
    finite = True
    for ids in windows:
        found = model(torch.tensor([ids], device=model.device), use_cache=False).logits
        finite = finite and bool(found.isfinite().all())
        if not finite:
            break
    for handle in handles:
        handle.remove()
    return {"finite": finite, "first_nonfinite": None if finite else next(iter(broken), "the logits")}


def use(model: transformers.PreTrainedModel, request: dict[str, Any]) -> dict[str, Any]:
    """Generate greedily from a prompt and say what is wrong with the answer, if anything.

    That one token is repeated is not the checkpoint's fault where the 16-bit model does the same, or is
    untrained: no better on real text than guessing evenly.
    """
    answer = generate(model, request)
    if answer["problem"] == "repeats one token":
        original = load(request, request["source"], dtype=model.dtype)
        if generate(original, request)["problem"] == answer["problem"]:
            answer |= {"problem": None, "note": "repeats one token, as the 16-bit model does"}
        elif guesses(original, request["windows"]):
            answer |= {"problem": None, "note": "repeats one token; the 16-bit model is untrained"}
    return answer


@torch.inference_mode()
def guesses(model: transformers.PreTrainedModel, windows: list[list[int]]) -> bool:
    """Whether a model's loss on the windows is within a tenth of ln(vocabulary)."""
    ids = torch.tensor(windows[:1], device=model.device)
    scores = model(ids, use_cache=False).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(scores, ids[0, 1:]).item()
    return loss > 0.9 * math.log(scores.shape[-1])


@torch.inference_mode()
def generate(model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """The prompt, with the checkpoint's own chat template where there is one, and what the model answers."""
    tokenizer = AutoTokenizer.from_pretrained(request["model"], trust_remote_code=request["trust"])
    prompt, chat = PROMPT, bool(tokenizer.chat_template)
    if chat:
        messages = [{"role": "user", "content": PROMPT}]
        prompt = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(model.device)
    given = {key: inputs[key] for key in ("input_ids", "attention_mask") if key in inputs}
    made = model.generate(**given, max_new_tokens=ANSWER, do_sample=False)[0, given["input_ids"].shape[1] :]
    ids = made.tolist()
    said = [token for token in ids if token not in set(tokenizer.all_special_ids)]
    vocabulary = model.config.get_text_config().vocab_size
    problem = None
    if any(not 0 <= token < vocabulary for token in ids):
        problem = "holds tokens outside the vocabulary"
    elif not said:
        problem = "is empty"
    elif len(said) > 2 and len(set(said)) == 1:
        problem = "repeats one token"
    text = tokenizer.decode([token for token in ids if token < vocabulary], skip_special_tokens=True)
    found = {"prompt": PROMPT, "chat_template": chat, "text": text}
    return found | {"tokens": len(ids), "problem": problem}


def compare(found: torch.Tensor, expected: torch.Tensor) -> dict[str, float | bool]:
    """Largest difference of two logit tables, and the spread of the expected one to judge it by."""
    return {
        "max_logit_difference": (found - expected).abs().max().item(),
        "logit_spread": expected.std().item(),
        "finite": bool(found.isfinite().all()),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
