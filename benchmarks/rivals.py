"""Beside what people would use instead: other quantizers on the same model, windows and scoring.

    python -m benchmarks.rivals --text FILE --json out.json          # the bundled model
    python -m benchmarks.rivals --model DIRECTORY --text FILE ...    # another, such as one of healed.py
    python -m benchmarks.rivals --only hqq,gptq ...                  # rows whose key contains one of these
    python -m benchmarks.rivals --checkpoint DIRECTORY ...           # and one that transformers loads
    python -m benchmarks.rivals --draw out.json,other.json --figure docs/rivals.png

Every rival works in a virtual environment of its own, pinned, below `--envs`; it leaves dequantized weights,
and this process scores them all: float32, the first half of a text, KL against the 16-bit model, 95 %
intervals over windows. Only the matrices that our plans decide on are quantized, everywhere; embeddings stay
16-bit. Data is the model's own text (`own`), pydoc (`real`), or the other half of the evaluation's text
(`kind`). A row that is done is kept below bench-out/, so a killed run goes on with the next rival; one that
fails is listed with its error.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).parents[1]))
from spi_utils.errors import EvaluationError, SPIError
from spi_utils.evaluate import TwoHeads, find_rivals, load_rival
from spi_utils.models import list_layers, load_model, load_tokenizer, resolve
from spi_utils.runs import fingerprint, write_json, write_text
from spi_utils.scoring import Head, reference_states, token_scores
from spi_utils.sensitivity import sample_windows
from spi_utils.stats import estimate
from spi_utils.texts import Text, load_text, make_windows, start_token

ROOT = Path(__file__).resolve().parent.parent
WORKERS = ROOT / "benchmarks" / "workers"
STACK = ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0", "safetensors==0.8.0", "numpy==2.4.6")
# name -> (requirements, pip options). "main" is the environment that this runs in.
ENVIRONMENTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "autoround": ((*STACK, "auto-round==0.16.1", "datasets==5.2.0"),),
    "llmcompressor": (("llmcompressor==0.14.0.1", "transformers==5.17.0", "compressed-tensors==0.19.0"),),
    "hqq": ((*STACK, "hqq==0.2.8.post1"),),
    # its own dependencies would fetch evaluation harnesses and GPU kernels
    "sinq": (
        (*STACK, "datasets==5.2.0", "einops==0.8.2", "termcolor==3.3.0", "scipy==1.17.1"),
        ("--no-deps", "sinq==0.2.0"),
    ),
    "nncf": ((*STACK, "nncf==3.4.0", "torchao==0.18.0"),),
    "llamacpp": ((*STACK, "ik-llama-cpp-python==0.1.5", "gguf==0.19.0", "sentencepiece==0.2.3"),),
    "bitpolar": ((*STACK, "bitpolar==0.3.3"),),
}
PINS_ITSELF = ("llmcompressor", "vllm")  # other versions than ours (vllm is benchmarks/serving.py's)
MIX: dict[str, Any] = {"formats": ["int4_g64", "int8", "16bit"], "group": "fused"}


@dataclass(frozen=True)
class Rival:
    """A row: its worker and environment, what it is asked, the text it sees; `after`, a row it needs."""

    key: str
    label: str
    env: str
    worker: str
    settings: dict[str, Any] = field(default_factory=dict)
    data: str = ""
    after: str = ""


def ours(key: str, label: str, after: str = "", **settings: Any) -> Rival:
    return Rival(f"ours_{key}", label, "main", "run_ours", settings, "own", after or "ours_analysis")


def table() -> Iterator[Rival]:
    """Every row, cheap ones first."""
    yield from data_free()
    for bits, text in product((5, 6), ("own", "real")):
        scheme = {"avg_bits": bits, "iters": 0, "group": 64}
        label = f"AutoRound AutoScheme at {bits}, untuned"
        key = f"autoscheme_{bits}_{text}"
        yield Rival(key, label, "autoround", "run_autoround", scheme, text)
        yield ours(f"as_{key}", f"AutoScheme's choice at {bits}, our rounding", key, allocation=key)
        yield ours(f"beside_{key}", "fisher's choice at those bits, our rounding", key, like=key, **MIX)
    gptq, awq = ({"method": name, "group": 64} for name in ("gptq", "awq"))
    untuned, tuned = ({"iters": iters, "group": 64} for iters in (0, 50))
    with_data = (
        ("gptq_own", "GPTQ int4 (llm-compressor)", "llmcompressor", gptq),
        ("gptq_real", "GPTQ int4 (llm-compressor)", "llmcompressor", gptq),
        ("gptq_kind", "GPTQ int4 (llm-compressor)", "llmcompressor", gptq),
        ("awq_own", "AWQ int4 (llm-compressor)", "llmcompressor", awq),
        ("awq_real", "AWQ int4 (llm-compressor)", "llmcompressor", awq),
        ("autoround_0_real", "AutoRound int4, untuned", "autoround", untuned),
        ("autoround_own", "AutoRound int4, 50 steps", "autoround", tuned),
        ("autoround_real", "AutoRound int4, 50 steps", "autoround", tuned),
        ("autoround_kind", "AutoRound int4, 50 steps", "autoround", tuned),
    )
    for key, label, env, settings in with_data:
        yield Rival(key, label, env, f"run_{env}", settings, key.rsplit("_", 1)[1])
    for bits in (4, 8, 3, 5, 6):
        yield Rival(f"bitpolar_{bits}", f"BitPolar, {bits} bits", "bitpolar", "run_bitpolar", {"bits": bits})


def data_free() -> Iterator[Rival]:
    """Rivals without data, and our plans."""
    for kind, label in (("nf4", "bitsandbytes NF4"), ("int8", "bitsandbytes LLM.int8")):
        yield Rival(f"bnb_{kind}", label, "main", "run_bitsandbytes", {"kind": kind})
    for name, bits in product(("hqq", "sinq"), (4, 5, 6, 8)):
        settings = {"bits": bits, "group": 64}
        yield Rival(f"{name}_{bits}", f"{name.upper()}, {bits} bits", name, f"run_{name}", settings)
    for key, label, ratio in (
        ("int4", "int4", 1.0),
        ("5", "int4 + int8 at 5", 0.80),
        ("6", "int4 + int8 at 6", 0.536),
        ("int8", "int8", 0.0),
    ):
        yield Rival(f"nncf_{key}", f"NNCF {label}", "nncf", "run_nncf", {"ratio": ratio, "group": 64})
    for kind in ("Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"):
        yield Rival(f"gguf_{kind}", f"llama.cpp {kind}", "llamacpp", "run_llamacpp", {"type": kind})
    yield Rival("ours_analysis", "ours: analysis", "main", "run_ours", {"analysis": True}, "own")
    for fmt, label in (
        ("int4_g64", "guided int4, groups of 64"),
        ("int4_g32", "guided int4, groups of 32"),
        ("nf4", "guided NF4"),
        ("nf4_dq", "guided NF4, double quantization"),
        ("int8", "nearest int8"),
    ):
        yield ours(fmt, f"ours: {label}", uniform=fmt)
    for budget in (4.5, 5.0, 6.0, 8.0):
        yield ours(f"mix_{budget:g}", f"ours: int4 + int8 + 16-bit at {budget:g}", bits=budget, **MIX)
    yield ours("small", "ours: preset small", bits=4.6, formats=["nf4", "16bit"], group=None)
    yield ours("balanced", "ours: preset balanced", bits=5.5, **MIX)
    yield ours("near-lossless", "ours: preset near-lossless", bits=8.1, **MIX)
    recipe: dict[str, Any] = {"formats": ["nf4", "int8", "16bit"], "group": None, "recipe": True}
    yield ours("recipe", "ours: NF4 + int8 at 5 (no writer)", bits=5.0, **recipe)
    rules = {"type": "Q8_0", "rules": "llama_cpp.tensor-types.txt"}
    yield Rival("gguf_ours", "llama.cpp, our recipe", "llamacpp", "run_llamacpp", rules, "", "ours_recipe")


# What others say of themselves and can't be run here. UltraCompress: `uc catalog` of ultracompress 0.6.27.
PUBLISHED = [
    {
        "key": "ultracompress",
        "label": "UltraCompress (published, of SmolLM2-1.7B)",
        "version": "ultracompress 0.6.27",
        "matrix_bits": 5.0,
        "perplexity_ratio": 1.008,
        "published": True,
        "remark": "its codec isn't distributed; a larger model, FineWeb-edu",
    }
]
# Pairs whose difference of KL answers a question: (question, first, second).
PAIRS = (
    *(("guided int4, own text, beside", "ours_int4_g64", f"{who}_{text}")
      for who in ("gptq", "awq", "autoround") for text in ("own", "real", "kind")),
    *(("fisher's choice beside AutoScheme's, same rounding and bits", f"ours_beside_{key}", f"ours_as_{key}")
      for key in (f"autoscheme_{bits}_{text}" for bits in (5, 6) for text in ("own", "real"))),
    ("the mix at 5 bits beside", "ours_mix_5", "nncf_5"),
    ("the mix at 6 bits beside", "ours_mix_6", "nncf_6"),
    ("our recipe beside", "gguf_ours", "gguf_Q4_K_M"),
    ("int8 beside", "ours_int8", "gguf_Q8_0"),
)  # fmt: skip


class RivalError(SPIError):
    """A rival that can't be installed, fails, or leaves weights that aren't this model's."""


# --- a rival's environment and its work -------------------------------------------------------------------


def environment(name: str, folder: Path, base: Path | None, pip_args: list[str]) -> Path:
    """The Python of an environment, made and filled if it isn't there; RivalError with pip's reason."""
    if name == "main":
        return Path(sys.executable)
    home = folder / f"{name}-{fingerprint(ENVIRONMENTS[name])[:8]}"
    python, ready = home / "bin" / "python", home / ".ready"
    if ready.exists():
        return python
    shutil.rmtree(home, ignore_errors=True)
    steps = [[sys.executable, "-m", "venv", str(home)]]
    for wanted in ENVIRONMENTS[name]:
        constraints = [] if name in PINS_ITSELF else ["-c", str(ROOT / "constraints.txt")]
        steps.append([str(python), "-m", "pip", "install", "--quiet", *pip_args, *constraints, *wanted])
    for step in steps:
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or [done.stderr]
            raise RivalError(f"its environment can't be made: {lines[-1].strip()[:300]}")
        if base and not (link := next(home.glob("lib/*/site-packages")) / "zz_base.pth").exists():
            write_text(link, f"{base}\n")  # packages that are there already aren't fetched again
    ready.touch()
    return python


def call(python: Path, worker: str, job: Path, log: Path, limit: float, threads: int) -> dict[str, float]:
    """Run a worker; its wall and CPU seconds and its peak memory (10⁹ bytes). RivalError if it fails."""
    held = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    held |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    started = time.monotonic()
    with log.open("wb") as file:
        work = subprocess.Popen(
            [python, WORKERS / f"{worker}.py", job], stdout=file, stderr=file, env=held, cwd=job.parent,
            start_new_session=True,
        )  # fmt: skip
    try:
        while True:
            pid, status, used = os.wait4(work.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() - started > limit:
                raise RivalError(f"it took more than {limit / 60:.0f} minutes")
            time.sleep(0.5)
    except BaseException:
        os.killpg(work.pid, signal.SIGKILL)
        raise
    work.returncode = os.waitstatus_to_exitcode(status)
    if work.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing said"]
        last = re.sub(r"(/[^/\s'\"]+)+/", "", said[-1].strip())  # without this machine's folders
        raise RivalError(f"exit {work.returncode}: {last[:300]}")
    return {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gb": round(used.ru_maxrss / 1e6, 2),
    }


# --- the same scoring for all -----------------------------------------------------------------------------


class Judge:
    """One model, its windows of evaluation, and the texts that rivals may see."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.source = resolve(args.model)
        self.model = load_model(self.source, device="cpu", dtype=torch.float32)
        self.tokenizer = load_tokenizer(self.source)
        self.start = start_token(self.tokenizer, self.model.config)
        whole, real = load_text(args.text), load_text(args.real)
        if whole.sha256 == real.sha256:
            raise EvaluationError(f"--real {args.real} is the text of the evaluation; name another text.")
        middle = len(whole.text) // 2
        self.text = Text(whole.name, whole.source, whole.text[:middle], whole.sha256)
        cut = (self.tokenizer, args.windows, args.length, self.start)
        self.windows = make_windows(self.text, *cut, config=self.model.config)
        self.reference = reference_states(self.model, self.windows)
        layers = [layer for layer in list_layers(self.source) if layer.quantizable]
        self.layers = {layer.name: (layer.rows, layer.cols) for layer in layers}
        self.numel = sum(layer.numel for layer in layers)
        self.parameters = dict(self.model.named_parameters())
        self.rest = 2 * (sum(p.numel() for p in self.parameters.values()) - self.numel)
        self.args = args
        self.calibration = {"real": real.text, "kind": whole.text[middle:]}

    def data(self, kind: str, folder: Path) -> tuple[str | None, str | None]:
        """Files of a text's windows, as ids and as strings; made once."""
        if not kind:
            return None, None
        ids_file, texts_file = folder / f"{kind}.json", folder / f"{kind}.texts.json"
        if not texts_file.exists():
            count, length = self.args.own, self.args.length
            if kind == "own":
                ids = sample_windows(self.model, count, length, self.start, seed=0)
            else:
                ids = make_windows(self.calibration[kind], self.tokenizer, count, length, self.start)
            body = ids[:, int(self.start is not None) :]
            write_json(ids_file, ids.tolist())
            write_json(texts_file, [self.tokenizer.decode(row) for row in body])
        return str(ids_file), str(texts_file)

    def score(self, folder: Path) -> dict[str, Any]:
        """KL and Δ loss of the weights in a folder, put into the model and taken out again."""
        with safe_open(folder / "weights.safetensors", "pt") as file:
            names = list(file.keys())
            missing = [name for name in self.layers if f"{name}.weight" not in names]
            if missing:
                raise RivalError(f"it left no weights of {missing[0]}")
            kept = {}
            try:
                for name in names:
                    value = file.get_tensor(name)
                    own = self.parameters.get(name)
                    if own is None or own.shape != value.shape:
                        raise RivalError(
                            f"{name} {tuple(value.shape)} is no parameter of {self.source.id}"
                            + (
                                f", whose is {tuple(own.shape)}: another vocabulary?"
                                if own is not None
                                else ""
                            )
                        )
                    if not value.isfinite().all():
                        raise RivalError(f"{name} holds values that are no numbers")
                    kept[name] = own.detach().clone()
                    own.detach().copy_(value)
                return self.measured(token_scores(self.model, self.windows, self.reference))
            finally:
                for name, value in kept.items():
                    self.parameters[name].detach().copy_(value)

    def measured(self, scores: Any) -> dict[str, Any]:
        """A row's figures from token scores."""
        kl = scores.kl.mean(axis=1)
        delta = (scores.nll - np.asarray(self.reference.nll)).mean(axis=1)
        found, lost = (estimate(one).as_dict() for one in (kl, delta))
        return {
            "kl": found["mean"],
            "kl_ci": [found["low"], found["high"]],
            "delta": lost["mean"],
            "delta_ci": [lost["low"], lost["high"]],
            "same_top1": float(scores.same_top1.mean()),
            "window_kl": [round(float(one), 6) for one in kl],
        }

    def checkpoint(self, spec: str) -> dict[str, Any]:
        """The row of a checkpoint that transformers loads; EvaluationError names what is wrong with it."""
        ((key, folder),) = find_rivals([spec]).items()
        model = load_rival(key, folder, self.model, torch.device("cpu"))
        head = TwoHeads(model, Head(self.model))
        row = self.measured(token_scores(model, self.windows, self.reference, head=head))
        method = getattr(model.config, "quantization_config", None)
        method = method and method.to_dict().get("quant_method")
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        return {"key": key, "label": spec, "bytes": size, "version": str(method or "16bit")} | row


def row_of(judge: Judge, rival: Rival, folder: Path, rows: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Do a rival's work and score it."""
    args = judge.args
    analysis = "ours_analysis" if rival.worker == "run_ours" and rival.key != "ours_analysis" else ""
    for needed in filter(None, (rival.after, analysis)):
        if "error" in rows.get(needed, {"error": ""}):
            raise RivalError(f"{needed} is missing, which it needs")
    work = folder / "work" / rival.key
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    settings = dict(rival.settings)
    if rival.worker == "run_ours":
        settings |= {
            "run": str(folder / "run"),
            "model": args.model,
            "windows": args.own,
            "length": args.length,
        }
    if key := settings.get("allocation"):
        settings["allocation"] = rows[key]["allocation"]
    if key := settings.pop("like", None):
        settings |= {"bits": rows[key]["matrix_bits"] + 1e-3, "group": None}
    if file := settings.get("rules"):
        rules = (folder / "run" / "recipes" / file).read_text(encoding="utf-8").split()
        settings["rules"] = rules
    ids, texts = judge.data(rival.data, folder)
    job = {"model": str(judge.source.directory), "layers": judge.layers, "ids": ids, "texts": texts}
    write_json(work / "job.json", job | {"settings": settings, "out": str(work)})
    python = environment(rival.env, args.envs, args.base, args.pip_args.split())
    cost = call(python, rival.worker, work / "job.json", work / "log.txt", 60 * args.minutes, args.threads)
    told = json.loads((work / "worker.json").read_text(encoding="utf-8"))
    if analysis:
        shared = rows[analysis]  # plans share one analysis: each would have needed it
        cost = {k: round(v + shared[k], 1) if k != "peak_gb" else max(v, shared[k]) for k, v in cost.items()}
    row = {"version": told["version"], "data": rival.data, **cost, "remark": told.get("remark", "")}
    if told.get("allocation"):
        row["allocation"] = told["allocation"]
    if told["bits"]:
        row |= {"bytes": told.get("bytes", judge.rest + round(told["bits"] / 8))}
        row |= {"matrix_bits": told["bits"] / judge.numel}
        row |= judge.score(work)
    (work / "weights.safetensors").unlink()
    return row


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Every row of one model; finished rows of an earlier run are kept."""
    judge = Judge(args)
    folder = args.folder / f"{judge.source.slug}-{judge.source.sha256[:8]}-{args.windows}x{args.length}"
    rows: dict[str, dict[str, Any]] = {}
    chosen = [one for one in args.only.split(",") if one]
    for rival in table():
        mark = fingerprint([rival.settings, rival.data, judge.text.sha256, args.own, judge.text.name])
        path = folder / "rows" / f"{rival.key}.json"
        held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        wanted = not chosen or any(one in rival.key for one in chosen)
        fresh = held.get("mark") == mark and "error" not in held
        if not wanted or fresh:
            if held:
                rows[rival.key] = held
            continue
        row: dict[str, Any] = {"key": rival.key, "label": rival.label, "mark": mark}
        try:
            row |= row_of(judge, rival, folder, rows)
        except (SPIError, OSError) as error:
            row["error"] = str(error)
        write_json(path, row)
        rows[rival.key] = row
        show(row)
    for spec in args.checkpoint:
        try:
            row = judge.checkpoint(spec)
        except SPIError as error:
            row = {"key": spec, "label": spec, "error": str(error)}
        rows[row["key"]] = row
        show(row)
    made = judge.source.directory / "made.json"
    return {
        "model": judge.source.id,
        "made": json.loads(made.read_text(encoding="utf-8")) if made.exists() else None,
        "text": judge.text.name,
        "windows": args.windows,
        "length": args.length,
        "own": args.own,
        "threads": args.threads,
        "rows": [tidy(row) for row in rows.values()] + PUBLISHED,
        "pairs": pairs(rows),
    }


def tidy(row: dict[str, Any]) -> dict[str, Any]:
    """A row as it is published."""
    return {k: v for k, v in row.items() if k not in ("mark", "allocation")}


def pairs(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Paired differences of KL, first less second, with their intervals."""
    found = []
    for question, first, second in PAIRS:
        one, other = rows.get(first, {}), rows.get(second, {})
        if "window_kl" in one and "window_kl" in other:
            d = estimate(np.array(one["window_kl"]) - np.array(other["window_kl"])).as_dict()
            row: dict[str, Any] = {"question": question, "first": first, "second": second}
            row |= {
                "difference": [d[end] for end in ("mean", "low", "high")],
                "ratio": one["kl"] / other["kl"],
            }
            found.append(row)
    return found


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    if "error" in row:
        said = row["error"]
    elif "kl" in row:
        low, high = (math.nan if end is None else end for end in row["kl_ci"])
        said = f"{row.get('matrix_bits', math.nan):.2f} bits  KL {row['kl']:.4f} ({low:.4f}-{high:.4f})"
    else:
        said = ""
    spent = f"  {row['seconds']:.0f} s, {row['cpu_seconds']:.0f} CPU s" if "seconds" in row else ""
    print(f"{row['key']:28} {said}{spent}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="bundled", help="what models.resolve takes")
    parser.add_argument("--text", default="auto", help="of the evaluation: its first half is scored")
    parser.add_argument("--real", default="pydoc", help="the real text that rivals with data see")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--own", type=int, default=32, help="windows of every text for calibration")
    parser.add_argument("--only", default="", help="parts of keys, with commas; all rows by default")
    parser.add_argument(
        "--checkpoint", action="append", default=[], help="a checkpoint that transformers loads"
    )
    parser.add_argument("--folder", type=Path, default=Path("bench-out/rivals").absolute())
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "spi_utils" / "rivals")
    parser.add_argument("--base", type=Path, help="a site-packages whose packages the environments see too")
    parser.add_argument("--pip-args", default="", help="for pip, such as an index")
    parser.add_argument("--minutes", type=float, default=120, help="that a row may take")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--draw", help="JSON files of earlier runs, with commas: draw them, measure nothing")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    if args.draw:
        results = [json.loads(Path(one).read_text(encoding="utf-8")) for one in args.draw.split(",")]
    else:
        results = [benchmark(args)]
        if args.json:
            write_json(args.json, results[0])
    if args.figure:
        from benchmarks.rivals_figure import draw

        draw(results).savefig(args.figure, dpi=110)


if __name__ == "__main__":
    main()
