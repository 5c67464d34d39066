"""How fast a saved checkpoint runs, and how much memory it takes: measured in a process of its own.

A fresh process loads the folder as anyone would (`AutoModelForCausalLM.from_pretrained`), so the peak memory
is the checkpoint's own and the kernels are the stock ones. Batch 1, greedy; `generate` reports each token
through a streamer, whose clock gives the time to the first token and the decoding rate of one and the same
call. Rates are tokens a second, times are seconds, memory is in units of 10⁹ bytes.

`python -m spi_utils.speed '{"model_dir": …, "device": …, "dtype": …}'` prints one JSON object.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from spi_utils.errors import EvaluationError
from spi_utils.runs import peak_rss_bytes
from spi_utils.tokens import without_token

if TYPE_CHECKING:
    import torch

PROBE_ROWS = {"cuda": 8192, "cpu": 4096}  # the bandwidth probe multiplies a square matrix with a vector


def measure_in_subprocess(model_dir: Path, **options: Any) -> dict[str, Any]:
    """`measure` of a model folder in a fresh Python process; `options` are its keywords.

    Raises EvaluationError with the process' last lines if it fails (out of memory, unreadable folder).
    """
    asked = json.dumps({"model_dir": str(model_dir), **options})
    package_home = str(Path(__file__).resolve().parents[1])  # also where the package isn't installed
    search = os.pathsep.join([package_home, os.environ.get("PYTHONPATH", "")])
    environment = without_token(os.environ) | {"PYTHONPATH": search}
    command = [sys.executable, "-m", "spi_utils.speed", asked]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise EvaluationError(
            f"measuring the speed of {model_dir} failed (exit {done.returncode}):\n{tail}\n"
            "Check that the folder loads with transformers, or set speed_repeats=0 to leave speed out."
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(
    model_dir: str,
    *,
    device: str,
    dtype: str,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Load a checkpoint in this process and time it; see the module's first lines for the units.

    Returns `prefill` and `decode` tokens a second and `first_token_s`, each `[median, least, most]` over
    `repeats` after one warm-up, peak memory, bytes read a token, the device's measured bandwidth, the
    decoding rate that this bandwidth allows, and which modules ran.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_grad_enabled(False)
    kind, cuda = getattr(torch, dtype), device.startswith("cuda")
    options = {"dtype": kind, "device_map": {"": device}, "trust_remote_code": trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(model_dir, **options).eval()
    vocabulary, generator = model.config.get_text_config().vocab_size, torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator).to(device)
    # compressed-tensors unpacks a model at its first forward pass: what is measured then reads 16 bits.
    if any(hasattr(module, "weight_packed") for module in model.modules()):
        model(ids[:, :1], use_cache=False)
    moved = bytes_per_token(model)  # before bitsandbytes repacks its weights
    kinds = [type(module) for module in model.modules()]
    names = ("Linear", "Conv1D", "HQQLinear")
    matrices = [f"{m.__module__.split('.')[0]}.{m.__name__}" for m in kinds if m.__name__.startswith(names)]
    firsts, rates = zip(*[_one_run(model, ids, new_tokens) for _ in range(repeats + 1)][1:], strict=True)
    bandwidth, memory = measure_bandwidth(device, kind), {"peak_rss_gb": peak_rss_bytes() / 1e9}
    if cuda:
        memory["peak_allocated_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        memory["peak_reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    found: dict[str, Any] = {"device": torch.cuda.get_device_name(device) if cuda else platform.machine()}
    found |= {"threads": torch.get_num_threads(), "kernel_path": kernel_path(device), "dtype": dtype}
    found |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repeats": repeats}
    rated = {"prefill": [prompt_tokens / first for first in firsts], "decode": rates, "first_token_s": firsts}
    found |= {name: [statistics.median(values), min(values), max(values)] for name, values in rated.items()}
    found |= {"gb_per_token": moved / 1e9, "bandwidth_gb_s": bandwidth / 1e9}
    kernels = {"modules": dict(sorted(Counter(matrices).items()))}
    return found | {"decode_bound": bandwidth / moved, "memory": memory, "kernels": kernels}


def _one_run(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens a second of those after it; prompt (1, T)."""
    times: list[float] = []  # of each token's arrival; the prompt is the first
    clock = SimpleNamespace(put=lambda _: times.append(time.perf_counter()), end=lambda: None)
    counts = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "pad_token_id": 0}
    mask = prompt.new_ones(prompt.shape)
    mask[0, 0].item()  # waits for the device
    start = time.perf_counter()
    model.generate(prompt, attention_mask=mask, do_sample=False, streamer=clock, **counts)
    return times[1] - start, (new_tokens - 1) / (times[-1] - times[1])


def bytes_per_token(model: Any) -> int:
    """Bytes of weights that decoding one token reads: all but an embedding that is only looked up.

    A tied embedding is read as the head. The KV cache and activations come on top and are not counted, nor is
    the constant code table of a bitsandbytes QuantState; its scales are.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    total = 0
    for parameter in model.parameters():  # each once, however often it is tied
        if parameter is embedding.weight and parameter is not head.weight:
            continue
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # scales, and the scales of scales where those are quantized too
            total += state.absmax.nbytes
            state = getattr(state, "state2", None)
    return total


def measure_bandwidth(device: str, dtype: torch.dtype, repeats: int = 5) -> float:
    """Bytes a second that a matrix–vector product reads on this device: best of `repeats`.

    The product is what decoding does, so the bound is one that a kernel can reach.
    """
    import torch

    rows = PROBE_ROWS[torch.device(device).type]
    matrix = torch.ones(rows, rows, dtype=dtype, device=device)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (matrix @ matrix[0])[0].item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return matrix.nbytes / min(times[1:])


def kernel_path(device: str) -> str:
    """bitsandbytes' version and which of its code runs on a device: "bitsandbytes 0.49.1, CUDA kernels"."""
    import bitsandbytes
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    kernels = "CUDA kernels" if device.startswith("cuda") else "native CPU kernels"
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        kernels = "no native library: torch's own operations"
    return f"bitsandbytes {bitsandbytes.__version__}, {kernels}"


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
