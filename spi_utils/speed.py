"""How fast a saved checkpoint runs, and how much memory it takes: measured in a process of its own.

A fresh process loads the folder as anyone would (`AutoModelForCausalLM.from_pretrained`), so the peak memory
is the checkpoint's own and the kernels are the stock ones. Batch 1, greedy; `generate` reports each token
through a streamer, whose clock gives the time to the first token and the decoding rate of one and the same
call. Rates are tokens a second, times are seconds, memory is in units of 10⁹ bytes.

`python -m spi_utils.speed MODEL_DIR` prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spi_utils.errors import EvaluationError
from spi_utils.runs import peak_rss_bytes
from spi_utils.tokens import without_token

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROBE_ROWS = 8192  # the bandwidth probe multiplies a PROBE_ROWS × PROBE_ROWS matrix with a vector


def measure_in_subprocess(
    model_dir: Path, *, device: str, dtype: str, trust_remote_code: bool = False, **counts: int
) -> dict[str, Any]:
    """`measure` of a model folder in a fresh Python process; `counts` are its `prompt_tokens` and so on.

    Raises EvaluationError with the process' last lines if it fails (out of memory, unreadable folder).
    """
    command = [sys.executable, "-m", "spi_utils.speed", str(model_dir), "--device", device, "--dtype", dtype]
    for name, count in counts.items():
        command += [f"--{name.replace('_', '-')}", str(count)]
    command += ["--trust-remote-code"] * trust_remote_code
    package_home = str(Path(__file__).resolve().parents[1])  # also where the package isn't installed
    search = os.pathsep.join(filter(None, [package_home, os.environ.get("PYTHONPATH", "")]))
    environment = {**without_token(os.environ), "PYTHONPATH": search}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.strip().splitlines()[-5:])
        raise EvaluationError(
            f"measuring the speed of {model_dir} failed (exit {done.returncode}):\n{tail}\n"
            "Check that the folder loads with transformers, or set speed_repeats=0 to leave speed out."
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure(
    model_dir: Path,
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
    decoding rate that this bandwidth allows, and which modules and kernels ran.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=getattr(torch, dtype),
        device_map={"": device},
        trust_remote_code=trust_remote_code,
    ).eval()
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, (1, prompt_tokens), generator=generator).to(device)
    # compressed-tensors unpacks a model at its first forward pass: what is measured then reads 16 bits.
    if any(hasattr(module, "weight_packed") for module in model.modules()):
        with torch.inference_mode():
            model(ids[:, :1], use_cache=False)
    moved = bytes_per_token(model)
    kernels = model_kernels(model)  # before the first generation: bitsandbytes repacks weights in it
    firsts, rates = zip(*[_one_run(model, ids, new_tokens) for _ in range(repeats + 1)][1:], strict=True)
    bandwidth = measure_bandwidth(device, getattr(torch, dtype))
    memory = {"peak_rss_gb": peak_rss_bytes() / 1e9}
    if device.startswith("cuda"):
        memory["peak_allocated_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        memory["peak_reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "kernel_path": kernel_path(device),
        "dtype": dtype,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "prefill": _spread([prompt_tokens / first for first in firsts]),
        "decode": _spread(rates),
        "first_token_s": _spread(firsts),
        "gb_per_token": moved / 1e9,
        "bandwidth_gb_s": bandwidth / 1e9,
        "decode_bound": bandwidth / moved,
        "memory": memory,
        "kernels": kernels,
    }


class _Clock:
    """A transformers streamer that notes when each token arrives (the prompt is its first call)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _one_run(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens a second of those after it; prompt (1, T)."""
    import torch

    clock = _Clock()
    if prompt.is_cuda:
        torch.cuda.synchronize(prompt.device)
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            streamer=clock,
            pad_token_id=0,
        )
    first, last = clock.times[1], clock.times[-1]
    return first - start, (new_tokens - 1) / (last - first)


def _spread(values: Any) -> list[float]:
    """[median, least, most]."""
    return [statistics.median(values), min(values), max(values)]


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights that decoding one token reads: all but an embedding that is only looked up.

    A tied embedding is read as the head. The KV cache and activations come on top and are not counted, nor is
    the constant code table of a bitsandbytes QuantState; its scales are.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    looked_up = set() if tied else {id(p) for p in embedding.parameters()}
    total = 0
    for parameter in model.parameters():  # each once, however often it is tied
        if id(parameter) in looked_up:
            continue
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        while state is not None:  # scales, and the scales of scales where those are quantized too
            total += state.absmax.numel() * state.absmax.element_size()
            state = getattr(state, "state2", None)
    return total


def measure_bandwidth(device: str, dtype: torch.dtype, repeats: int = 5) -> float:
    """Bytes a second that a matrix–vector product reads on this device: best of `repeats`.

    The product is what decoding does, so the bound is one that a kernel can reach.
    """
    import torch

    rows = PROBE_ROWS if device.startswith("cuda") else PROBE_ROWS // 2
    matrix = torch.ones(rows, rows, dtype=dtype, device=device)
    vector = torch.ones(rows, dtype=dtype, device=device)
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        (matrix @ vector)[0].item()  # .item() waits for the device
        times.append(time.perf_counter() - start)
    return matrix.numel() * matrix.element_size() / min(times[1:])


def kernel_path(device: str) -> str:
    """bitsandbytes' version and which of its code runs on a device: "bitsandbytes 0.49.1, CUDA kernels"."""
    import bitsandbytes
    from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib

    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        kernels = "no native library: torch's own operations"
    else:
        kernels = "CUDA kernels" if device.startswith("cuda") else "native CPU kernels"
    return f"bitsandbytes {bitsandbytes.__version__}, {kernels}"


def model_kernels(model: PreTrainedModel) -> dict[str, Any]:
    """Which code runs the model: matrix module classes, attention, 4-bit and linear-attention kernels."""
    from bitsandbytes.functional import has_avx512bf16
    from transformers.utils.import_utils import (
        is_causal_conv1d_available,
        is_flash_linear_attention_available,
    )

    classes = Counter(
        f"{type(m).__module__.split('.')[0]}.{type(m).__name__}"
        for m in model.modules()
        if type(m).__name__.startswith(("Linear", "Conv1D", "HQQLinear"))
    )
    found = {
        "modules": dict(sorted(classes.items())),
        "attention": model.config._attn_implementation,
        "cpu_avx512_bf16": bool(has_avx512bf16()) if model.device.type == "cpu" else None,
    }
    if "linear_attention" in (getattr(model.config, "layer_types", None) or ()):
        fast = is_flash_linear_attention_available() and is_causal_conv1d_available()
        found["linear_attention"] = "flash-linear-attention" if fast else "torch fallback (slow)"
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure one folder and print the result as one line of JSON."""
    parser = argparse.ArgumentParser(description="speed and memory of a checkpoint, as JSON")
    parser.add_argument("model_dir", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--trust-remote-code", action="store_true")
    print(json.dumps(measure(**vars(parser.parse_args(arguments)))))


if __name__ == "__main__":
    main()
