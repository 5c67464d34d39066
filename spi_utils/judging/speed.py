"""How fast a saved checkpoint runs, and how much memory it takes: measured in a process of its own.

A fresh process loads the folder as anyone would (`AutoModelForCausalLM.from_pretrained`), so the peak memory
is the checkpoint's own and the kernels are the stock ones. Batch 1, greedy; `generate` reports each token
through a streamer, whose clock gives the time to the first token and the decoding rate of one and the same
call. Rates are tokens a second, times are seconds, memory is in units of 10⁹ bytes.

`python -m spi_utils.judging.speed MODEL_DIR` prints one JSON object.
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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spi_utils.errors import EvaluationError
from spi_utils.runs import read_json
from spi_utils.tokens import without_token

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from spi_utils.models import ModelSource

PROBE_ROWS = 8192  # the bandwidth probe multiplies a PROBE_ROWS × PROBE_ROWS matrix with a vector


class Clock:
    """A transformers streamer that notes when each token arrives (the prompt is its first call)."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        """Note the time of the prompt, then of every new token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do when generation ends."""


def measure_in_subprocess(
    model_dir: Path,
    *,
    device: str,
    dtype: str,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`measure` of a model folder in a fresh Python process.

    Raises EvaluationError with the process' last lines if it fails (out of memory, unreadable folder).
    """
    command = [
        sys.executable,
        "-m",
        "spi_utils.judging.speed",
        str(model_dir),
        "--device",
        device,
        "--dtype",
        dtype,
    ]
    command += ["--prompt-tokens", str(prompt_tokens), "--new-tokens", str(new_tokens)]
    command += ["--repeats", str(repeats)]
    command += ["--trust-remote-code"] * trust_remote_code
    package_home = str(Path(__file__).resolve().parents[2])  # also where the package isn't installed
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
    _unpack(model, ids)
    moved = bytes_per_token(model)
    kernels = kernel_path(model)  # before the first forward: bitsandbytes repacks weights in it
    runs = [_one_run(model, ids, new_tokens) for _ in range(repeats + 1)][1:]
    bandwidth = measure_bandwidth(device, getattr(torch, dtype))
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
        "prefill": spread([prompt_tokens / first for first, _ in runs]),
        "decode": spread([rate for _, rate in runs]),
        "first_token_s": spread([first for first, _ in runs]),
        "gb_per_token": moved / 1e9,
        "bandwidth_gb_s": bandwidth / 1e9,
        "decode_bound": bandwidth / moved,
        "memory": peak_memory(device),
        "kernels": kernels,
    }


def _unpack(model: Any, ids: torch.Tensor) -> None:
    """compressed-tensors unpacks a model at its first forward pass: what is measured then reads 16 bits."""
    import torch

    if any(hasattr(module, "weight_packed") for module in model.modules()):
        with torch.inference_mode():
            model(ids[:, :1], use_cache=False)


def _one_run(model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens a second of those after it; prompt (1, T)."""
    import torch

    clock = Clock()
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


def spread(values: list[float]) -> list[float]:
    """[median, least, most]."""
    return [statistics.median(values), min(values), max(values)]


def bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of weights that decoding one token reads: all but an embedding that is only looked up.

    A tied embedding is read as the head. The KV cache and activations come on top and are not counted.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    skipped = set() if tied else {id(p) for p in embedding.parameters()}
    total = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in skipped:
                continue
            skipped.add(id(parameter))
            state = getattr(parameter, "quant_state", None)
            total += parameter.numel() * parameter.element_size()
            total += 0 if state is None else state_bytes(state)
    return total


def state_bytes(state: Any) -> int:
    """Bytes of a bitsandbytes QuantState: its absmax, nested or not (the code table is a constant)."""
    nested = getattr(state, "state2", None)
    own = state.absmax.numel() * state.absmax.element_size()
    return own + (0 if nested is None else state_bytes(nested))


def measure_run(
    model_dir: Path, source: ModelSource, settings: Mapping[str, Any], repeats: int
) -> dict[str, Any]:
    """Speed and memory of a saved checkpoint ("plan") and of the 16-bit model ("reference"), both in the
    dtype that the checkpoint ships with: what users will run."""
    options: dict[str, Any] = {
        "device": settings["device"],
        "dtype": str(read_json(model_dir / "config.json", what="config.json").get("dtype") or "float16"),
        "repeats": repeats,
        "trust_remote_code": source.trust_remote_code,
    }
    print("evaluate: speed and memory of the checkpoint, then of the 16-bit model", flush=True)
    return {
        "plan": measure_in_subprocess(model_dir, **options),
        "reference": measure_in_subprocess(source.directory, **options),
    }


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


def peak_memory(device: str) -> dict[str, float]:
    """Peak memory of this process so far: resident on the host, allocated and reserved on a GPU."""
    import torch

    peaks = {"peak_rss_gb": _peak_rss() / 1e9}
    if device.startswith("cuda"):
        peaks["peak_allocated_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        peaks["peak_reserved_gb"] = torch.cuda.max_memory_reserved(device) / 1e9
    return peaks


def _peak_rss() -> int:
    """Peak resident bytes. On Linux from VmHWM: `ru_maxrss` of a child starts at its parent's size."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    from spi_utils.runs import peak_rss_bytes

    return peak_rss_bytes()


def kernel_path(model: PreTrainedModel) -> dict[str, Any]:
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
    on_cpu = model.device.type == "cpu"
    path = {
        "modules": dict(sorted(classes.items())),
        "attention": model.config._attn_implementation,
        "cpu_avx512_bf16": bool(has_avx512bf16()) if on_cpu else None,
    }
    if "linear_attention" in (getattr(model.config, "layer_types", None) or ()):
        fast = is_flash_linear_attention_available() and is_causal_conv1d_available()
        path["linear_attention"] = "flash-linear-attention" if fast else "torch fallback (slow)"
    return path


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
