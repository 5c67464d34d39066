"""What a checkpoint is worth: its tokens' losses and divergence beside controls, on the same windows.

The page follows the evaluation: `evaluate` from what is asked to evaluation.json, the one loop that scores
the variants of `controls.py`, the numbers that token scores give, the model as stock transformers load it,
the checkpoints of others, and multiple-choice tasks. One model is loaded, once, and its layers are switched
in place through every variant; the plan alone is scored from the tensors saved in `model/`.

Definitions. With N scored tokens, `nll` = −Σ ln p(token)/N in nats, `perplexity` = e^nll; as
lm-evaluation-harness defines them, `word_perplexity` = e^(Σnll/words) and `byte_perplexity` = e^(Σnll/bytes),
words = `len(re.split(r"\\s+", text))`, bytes in UTF-8, both of the raw text behind the windows. KL is
Σ_v p_ref(v)·ln(p_ref(v)/p_var(v)) for each token, as llama.cpp's perplexity tool reports it; `same_top1` the
share of tokens where both rank the same token first; Δp = p_var(token) − p_ref(token).

evaluation.json holds no time: the same inputs and seed give the same file. Speed and memory go to `run.json`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import re
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.quantizers import AutoHfQuantizer

from spi_utils import quantize, runs, stats
from spi_utils.checkpoint import disk_bytes, put_saved, weight_files
from spi_utils.claims import SURVIVAL, Evaluation, audit, is_random
from spi_utils.controls import FULL, QUICK, Variant, make_variants
from spi_utils.errors import EvaluationError
from spi_utils.models import (
    ModelSource,
    load_model,
    load_tokenizer,
    open_weights,
    resolve_device,
    resolve_dtype,
)
from spi_utils.plan import ProtectionPlan
from spi_utils.progress import progress
from spi_utils.rounding import Codes
from spi_utils.scoring import Head, Switch, TokenScores, default_batch, reference_states, token_scores
from spi_utils.speed import measure_in_subprocess
from spi_utils.texts import Text, load_texts, make_windows, window_texts
from spi_utils.texts import start_token as find_start
from spi_utils.tokens import hub_token

BATCH = 8  # windows that a variant is run on at once, at most
STOCK_WINDOWS = 4  # of the first text, its own first ones, that the model as loaded is scored on
STOCK_ALLOWED = 0.005  # nats a token, beside what the dtype costs the 16-bit model twice over
UNPROVEN = "notebook 03_quantize could not run the checkpoint on this machine"
CONVENTION = (
    "disjoint windows of one length, spread evenly over the text; the model sees only its window, which "
    "begins with the start token; every later token is predicted once; natural logarithms"
)


@dataclass(frozen=True)
class Profile:
    """How much is scored: windows of `length` tokens for each text, how many texts, which controls."""

    windows: int
    length: int
    texts: int
    controls: tuple[str, ...]


PROFILES = {"quick": Profile(24, 256, 1, QUICK), "full": Profile(96, 512, 2, FULL)}


def evaluate(
    run: runs.Run,
    source: ModelSource,
    *,
    profile: str = "quick",
    texts: str | Path | Sequence[str | Path] = "auto",
    windows: int | None = None,
    length: int | None = None,
    start_token: str | int | None = "auto",
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    controls: Sequence[str] | None = None,
    random_seeds: int = 5,
    rivals: Sequence[str] = (),
    speed_repeats: int = 5,
    lm_eval_tasks: Sequence[str] = (),
    lm_eval_limit: int = 200,
    force: bool = False,
) -> Evaluation:
    """Score the run's checkpoint beside its controls, and write evaluation.json.

    Args:
        run: a run with layers.csv, plan.json and model/. source: the model that it belongs to.
        profile: "quick" or "full"; `windows`, `length` (tokens a window, start token included) and
            `controls` (names of `FULL`) replace its parts.
        texts, start_token: as `texts.load_texts` and `texts.start_token` take them.
        seed: of the random controls (seed … seed + random_seeds − 1), the noise and the bootstrap.
        rivals: further checkpoints that transformers loads: folders or Hub ids.
        speed_repeats: timed generations of the saved checkpoint and of the 16-bit model; 0 leaves speed out.
        lm_eval_tasks: multiple-choice tasks for lm-evaluation-harness, `lm_eval_limit` samples each.
        force: do it again even if the same evaluation is there.

    Raises:
        EvaluationError: bad profile, control, text, window or rival; logits that are not numbers.
        RunError: an earlier stage is missing. CheckpointError: model/ isn't what the plan says.
    """
    rivals = check_names("rivals", rivals, "folders or Hub ids")
    lm_eval_tasks = check_names("lm_eval_tasks", lm_eval_tasks, "names of lm-evaluation-harness' tasks")
    check_harness(lm_eval_tasks, lm_eval_limit)
    if profile not in PROFILES:
        raise EvaluationError(f"there is no profile {profile!r}; choose {' or '.join(PROFILES)}.")
    chosen, place = PROFILES[profile], resolve_device(device)
    settings: dict[str, Any] = {
        "profile": profile,
        "windows": windows or chosen.windows,
        "length": length or chosen.length,
        "texts": chosen.texts,
        "controls": list(chosen.controls if controls is None else controls),
        "start_token": start_token,
        "random_seeds": random_seeds,
        "seed": seed,
        "rivals": list(rivals),
        "lm_eval": [*lm_eval_tasks, lm_eval_limit] if lm_eval_tasks else [],
        "device": str(place),
        "dtype": str(resolve_dtype(dtype, place)).removeprefix("torch."),
    }
    quantized = runs.run_info(run)["stages"].get("quantize", {})
    proven = quantized.get("proof") is not None  # that notebook 03 could use the checkpoint here
    for name, held in quantized.get("outputs", {}).items():
        path = run.path / name
        if not path.is_file() or runs.sha256_file(path) != held["sha256"]:
            raise EvaluationError(
                f"{path} is not the file that notebook 03_quantize wrote and proved: it was changed, damaged "
                "or removed since. Run notebook 03_quantize again; it makes the checkpoint anew."
            )
    layers = runs.read_layers(run)
    table_mark = runs.layers_fingerprint(run)
    plan = ProtectionPlan.read(run.plan_json, model=source.identity(), layers_fingerprint=table_mark)
    variants, skipped = make_variants(layers, plan, settings["controls"], random_seeds, seed)
    judged = load_texts(texts, at_least=chosen.texts)
    others = find_rivals(rivals)
    codes = list(run.rounded.glob("*.safetensors"))
    hashes = {
        "weights": source.sha256,
        "layers": table_mark,
        "plan": runs.sha256_file(run.plan_json),
        "checkpoint": runs.checkpoint_hash(weight_files(run.model_dir)),
        "code": runs.code_hash(),
        **({"rounded": runs.checkpoint_hash(codes)} if codes else {}),
        **{f"text:{text.name}": text.sha256 for text in judged},
        **{rival.key: runs.checkpoint_hash(weight_files(rival.directory)) for rival in others},
    }
    # An upgrade of this package alone doesn't void an evaluation; its file says which code made it.
    inputs = {**settings, "hashes": {name: value for name, value in hashes.items() if name != "code"}}
    inputs |= {"speed_repeats": speed_repeats, "stock_windows": STOCK_WINDOWS, "proven": proven}
    with runs.stage(run, "evaluate", inputs, ["evaluation.json"], force=force) as stage:
        if stage.finished:
            return Evaluation.read(run.evaluation_json)
        samples = make_samples(source, judged, settings["windows"], settings["length"], start_token)
        opened = partial(open_models, run, source, plan, settings, variants, others, samples)
        # What other code has scored is not mixed with this one's scores.
        folder = run.partial / "evaluate" / hashes["code"][:12]
        scores, seconds = score_variants(opened, [*variants, *(one.key for one in others)], samples, folder)
        stage.record(seconds_by_variant={key: round(value, 3) for key, value in seconds.items()})
        described = {key: _describe(one) for key, one in variants.items()}
        described |= {one.key: _describe_rival(one, int(layers["numel"].sum())) for one in others}
        found = []
        for index, sample in enumerate(samples):
            text = _describe_text(sample)
            numbers = {key: described[key] | variant_numbers(one[index], text) for key, one in scores.items()}
            compare(numbers, seed=seed)
            found.append({"text": text, "variants": numbers})
        stock: dict[str, Any] = {"agrees": None, "reason": UNPROVEN}
        if proven:
            stock = score_stock(opened, run, source, settings["device"], samples[0], scores["plan"][0])
        tasks = score_tasks(opened, source, seed, lm_eval_tasks, lm_eval_limit) if lm_eval_tasks else {}
        held = list(plan.formats.values())  # of the file too: `put_saved` has refused any other
        evaluation = Evaluation(
            model=source.identity(),
            plan=_describe_plan(run, plan, layers),
            settings={**settings, "rivals": [_public_name(rival) for rival in others]},
            text=found[0]["text"],
            variants=found[0]["variants"],
            other_texts=found[1:],
            skipped=skipped,
            checkpoint={fmt: held.count(fmt) for fmt in ("16bit", *sorted(set(held) - {"16bit"}))},
            checkpoint_sha256=hashes["checkpoint"],
            hashes=hashes,
            kernel=_kernel(settings),
            tasks=tasks,
            stock=stock,
        )
        evaluation = replace(evaluation, claims=audit(evaluation))
        evaluation.write(run.evaluation_json)
        if speed_repeats:
            stage.record(**_time(run, source, settings["device"], speed_repeats))
    return evaluation


def _time(run: runs.Run, source: ModelSource, device: str, repeats: int) -> dict[str, Any]:
    """Speed and memory of the checkpoint ("plan") and of the 16-bit model ("reference"), for run.json.

    Both in the dtype that the checkpoint ships with: what users will run. A failure is said and noted: the
    scores stand without it.
    """
    config = runs.read_json(run.model_dir / "config.json", what="config.json")
    options: dict[str, Any] = {
        "device": device,
        "dtype": str(config.get("dtype") or "float16"),
        "repeats": repeats,
        "trust_remote_code": source.trust_remote_code,
    }
    gc.collect()
    torch.cuda.empty_cache()  # the processes that are timed need what this one keeps of a GPU's memory
    print("evaluate: speed and memory of the checkpoint, then of the 16-bit model", flush=True)
    try:
        folders = {"plan": run.model_dir, "reference": source.directory}
        return {"speed": {key: measure_in_subprocess(one, **options) for key, one in folders.items()}}
    except EvaluationError as error:
        print(f"Speed was not measured: {error}", flush=True)
        return {"speed_failed": str(error)}


# --- scoring ---------------------------------------------------------------------------------------------

Become = Callable[[str], Any]  # a variant's or a rival's key -> its model
Opened = Callable[[], contextlib.AbstractContextManager[Become]]


@dataclass(frozen=True)
class Sample:
    """A text cut into windows: `ids` (W, T) with the start token first, and the raw text behind each."""

    text: Text
    ids: torch.Tensor
    pieces: tuple[str, ...]
    start: int | None


def make_samples(
    source: ModelSource, texts: Sequence[Text], windows: int, length: int, start_token: str | int | None
) -> list[Sample]:
    """Cut every text into windows with the source's tokenizer.

    Raises EvaluationError as `texts.make_windows` and `texts.start_token` do.
    """
    config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    tokenizer = load_tokenizer(source)
    start = find_start(tokenizer, config, start_token)
    samples = []
    for text in texts:
        ids = make_windows(text, tokenizer, windows, length, start, config=config)
        pieces = window_texts(text, tokenizer, windows, length, start)
        samples.append(Sample(text, ids, tuple(pieces), start))
    return samples


@contextlib.contextmanager
def open_models(
    run: runs.Run,
    source: ModelSource,
    plan: ProtectionPlan,
    settings: Mapping[str, Any],
    variants: Mapping[str, Variant],
    rivals: Sequence[Rival],
    samples: Sequence[Sample],
) -> Iterator[Become]:
    """Load the source's model; yields what turns a variant's or a rival's key into the model that it names.

    All variants are the one model, changed in place; it begins as the reference. The plan is read from the
    saved file. A rival is a model of its own, which the caller lets go before the next.
    """
    device, dtype = torch.device(settings["device"]), getattr(torch, settings["dtype"])
    with open_weights(source) as weights:
        model = load_model(source, device=device, dtype=dtype)
        switch = Switch(
            model,
            weights,
            list(variants["reference"].formats),
            double_quant=plan.double_quant,
            seed=settings["seed"],
            codes=Codes(run.rounded) if plan.rounding == "guided" else {},
        )
        held = "reference"

        def become(key: str) -> Any:
            nonlocal held
            if held == "plan":
                switch.renew()  # the file's 16-bit layers may be a cast of the source's
            held = key
            if key not in variants:
                rival = next(rival for rival in rivals if rival.key == key)
                return load_rival(rival, source, samples[0], device, dtype)
            switch.to(variants[key].formats)
            if key == "plan":
                put_saved(model, weights, plan.formats, run.model_dir)
            return model

        yield become


def score_variants(
    opened: Opened, keys: Sequence[str], samples: Sequence[Sample], folder: Path
) -> tuple[dict[str, list[TokenScores]], dict[str, float]]:
    """Score every variant and rival on every text.

    Each such pair is a file in `folder` as soon as it is scored, and is then never scored again: a killed
    evaluation goes on where it stopped. The stage empties that folder when its inputs change.

    Returns:
        {variant: its scores, one a sample}, and {variant: seconds spent on it in this process}.
    """
    files = {key: [folder / f"{key.replace('/', '_')}.{i}.npz" for i in range(len(samples))] for key in keys}
    scores = {key: [_read_scores(file) for file in files[key]] for key in keys}
    missing = [key for key in keys if any(one is None for one in scores[key])]
    seconds: dict[str, float] = {}
    if missing:
        with opened() as become:
            began = time.monotonic()
            model = become("reference")
            own_head, references = Head(model), [reference_states(model, sample.ids) for sample in samples]
            seconds["reference"] = time.monotonic() - began
            done = len(keys) - len(missing)
            for key in progress(missing, len(keys), "evaluate: variants", done=done):
                began = time.monotonic()
                model = become(key)
                head = TwoHeads(model, own_head) if key.startswith("rival:") else own_head
                for index, (sample, reference) in enumerate(zip(samples, references, strict=True)):
                    if scores[key][index] is not None:
                        continue
                    if key == "reference":
                        made = reference.scores()
                    else:
                        batch = min(BATCH, default_batch(model.device, sample.ids.shape[1]))
                        made = token_scores(model, sample.ids, reference, batch=batch, label=key, head=head)
                    _write_scores(files[key][index], made)
                    scores[key][index] = made
                del model, head  # one rival in memory at a time
                seconds[key] = seconds.get(key, 0.0) + time.monotonic() - began
    return scores, seconds  # type: ignore[return-value]  # none is None now


def _write_scores(path: Path, scores: TokenScores) -> None:
    columns: dict[str, Any] = dict(vars(scores))
    with runs.atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **columns)


def _read_scores(path: Path) -> TokenScores | None:
    """Scores that are there and whole; None for others, and damaged ones are said."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as held:
            return TokenScores(**{name: held[name] for name in held.files})
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        print(f"evaluate: {path.name} is damaged ({error}) and scored again.", flush=True)
        return None


# --- the numbers -----------------------------------------------------------------------------------------


def count_text(pieces: Sequence[str]) -> dict[str, int]:
    """Words and bytes of the raw text behind the windows, as lm-evaluation-harness counts them."""
    words = sum(len(re.split(r"\s+", piece)) for piece in pieces)
    return {"words": words, "bytes": sum(len(piece.encode("utf-8")) for piece in pieces)}


def variant_numbers(scored: TokenScores, text: Mapping[str, Any]) -> dict[str, Any]:
    """A variant's own numbers, without comparisons: perplexities, KL, flips, Δp and its window means.

    `text` holds the counts of `words` and `bytes` behind the windows. KL quantiles are over tokens, linearly
    interpolated; `kl_survival` is the KL that a share of `SURVIVAL` of the tokens reaches or exceeds, shares
    below one token left out.
    """
    nll = scored.nll.mean(axis=1, dtype=np.float64)  # (W,): one mean a window
    total, mean = float(scored.nll.sum(dtype=np.float64)), float(nll.mean())
    kl, dp = np.asarray(scored.kl, np.float64), np.asarray(scored.dp, np.float64)  # (W, T - 1)
    median, p99, p999 = np.quantile(kl, (0.5, 0.99, 0.999))
    shares = [share for share in SURVIVAL if share * kl.size >= 1]
    return {
        "nll": mean,
        "nll_se": float(stats.cluster_se(nll)),
        "perplexity": _exp(mean),
        "word_perplexity": _exp(total / text["words"]),
        "byte_perplexity": _exp(total / text["bytes"]),
        "kl_mean": float(kl.mean()),
        "kl_median": float(median),
        "kl_p99": float(p99),
        "kl_p999": float(p999),
        "same_top1": float(np.asarray(scored.same_top1).mean()),
        "dp_mean": float(dp.mean()),
        "dp_rms": float(np.sqrt((dp**2).mean())),
        "window_nll": _rounded(nll),
        "window_kl": _rounded(kl.mean(axis=1)),
        "kl_survival": _rounded(np.quantile(kl, [1 - share for share in shares])),
    }


def compare(variants: dict[str, dict[str, Any]], *, draws: int = stats.DRAWS, seed: int = 0) -> None:
    """Add every comparison over windows to {variant: its description and `variant_numbers`}, in place.

    `kl` (interval of the mean KL), `delta` (loss minus the reference's, with Holm's p over all variants),
    `perplexity_ratio` with its interval, the windows behind it, and for those of `equal_bytes` that are not
    random themselves `vs_random`: loss and KL minus the mean of the random controls, Holm over those.
    """
    estimates = partial(stats.estimates, draws=draws, seed=seed)

    def windows(name: str, keys: Sequence[str]) -> NDArray[np.float64]:
        return np.array([variants[key][name] for key in keys]).T  # (W, V)

    others = [key for key in variants if key != "reference"]
    if not others:
        return
    loss = windows("window_nll", others) - windows("window_nll", ["reference"])
    deltas = stats.holm_family(dict(zip(others, estimates(loss), strict=True)))
    for column, (key, kl) in enumerate(zip(others, estimates(windows("window_kl", others)), strict=True)):
        variants[key]["kl"] = kl.as_dict()
        variants[key]["delta"] = deltas[key].as_dict()
        variants[key]["perplexity_ratio"] = list(stats.ratio(deltas[key]))
        variants[key]["effect"] = stats.effect_windows(loss[:, column])
    randoms = [key for key in variants if is_random(key)]
    equal = [key for key, one in variants.items() if one["equal_bytes"] and not is_random(key)]
    if not randoms or not equal:
        return
    for key in equal:
        variants[key]["vs_random"] = {"controls": len(randoms)}
    for name in ("nll", "kl"):
        drawn = windows(f"window_{name}", randoms)  # (W, R)
        gain = windows(f"window_{name}", equal) - drawn.mean(axis=1, keepdims=True)
        for key, one in stats.holm_family(dict(zip(equal, estimates(gain), strict=True))).items():
            beats = (drawn.mean(axis=0) > np.mean(variants[key][f"window_{name}"])).sum()
            variants[key]["vs_random"] |= {name: one.as_dict(), f"{name}_beats": int(beats)}


def _rounded(values: NDArray[np.float64]) -> list[float]:
    # float32 scores carry 7 digits; 10 decimals lose nothing and keep the file small.
    return [round(float(value), 10) for value in values]


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _describe_text(sample: Sample) -> dict[str, Any]:
    windows, length = sample.ids.shape
    return {
        "name": sample.text.name,
        "source": sample.text.source,
        "sha256": sample.text.sha256,
        "tokens": windows * (length - 1),
        "windows": windows,
        "window_length": length,
        "start_token": sample.start,
        **count_text(sample.pieces),
        "convention": CONVENTION,
    }


def _describe(variant: Variant) -> dict[str, Any]:
    kept = asdict(variant)
    formats = list(kept.pop("formats").values())
    return kept | {"layers": {fmt: formats.count(fmt) for fmt in sorted(set(formats))}}


def _describe_rival(rival: Rival, weights: int) -> dict[str, Any]:
    """A rival's size is what lies on disk; how its matrices are packed is its own affair."""
    return {
        "label": f"{rival.key.removeprefix('rival:')} ({rival.method})",
        "bytes": rival.bytes,
        "bits_per_weight": 8 * rival.bytes / weights,
        "matrix_bits": None,
        "predicted_kl": None,
        "equal_bytes": False,
        "bytes_miss": 0.0,
        "layers": {},
    }


def _describe_plan(run: runs.Run, plan: ProtectionPlan, layers: pd.DataFrame) -> dict[str, Any]:
    """What the plan keeps, and the layer whose format is predicted to cost most: what the audit needs."""
    planned = layers[layers["quantizable"]]
    kept = planned["name"].isin(plan.protected)
    costs = [
        (float(row[f"predicted_{fmt}"]), row["name"], fmt)
        for _, row in planned.iterrows()
        if (fmt := plan.formats[row["name"]]) != "16bit" and np.isfinite(row.get(f"predicted_{fmt}", np.nan))
    ]
    cost, name, fmt = max(costs, default=(np.nan, "", ""))
    return {
        "score": plan.score,
        "direction": plan.direction,
        "rule": plan.rule,
        "reason": plan.reason,
        "double_quant": plan.double_quant,
        "protected": len(plan.protected),
        "planned": len(planned),
        "weights": int(layers["numel"].sum()),
        "matrix_weights": int(planned["numel"].sum()),
        "protected_weights": int(planned.loc[kept, "numel"].sum()),
        "bytes": dict(plan.bytes),
        "bytes_on_disk": disk_bytes(run.model_dir),
        "bits_per_weight": plan.bits_per_weight,
        "matrix_bits": plan.matrix_bits,
        "predicted_kl": plan.predicted_kl,
        "dearest": {"name": name, "format": fmt, "predicted_kl": cost} if costs else None,
    }


def _kernel(settings: Mapping[str, Any]) -> str:
    place = "CUDA" if settings["device"].startswith("cuda") else "CPU"
    return (
        f"NF4 dequantized by bitsandbytes ({place}), int4 and int8 as compressed-tensors decompresses them, "
        "rounded to the storage dtype; products by torch in "
        f"{settings['dtype']} on the {place}; log-softmax in float32"
    )


# --- the model as a user loads it ------------------------------------------------------------------------


def score_stock(
    opened: Opened, run: runs.Run, source: ModelSource, device: str, sample: Sample, plan: TokenScores
) -> dict[str, Any]:
    """The `stock` entry of evaluation.json: is the model as loaded the one that was measured?

    The evaluation's numbers are float32 arithmetic on the file's tensors. Here a fresh process without this
    package loads the checkpoint with the model card's line, in the dtype that it ships with and on its own
    kernels. Its KL to the same reference must be the file's, within what the dtype costs the 16-bit model
    anyway.

    Args:
        opened: loads the reference once more. sample, plan: the first text, and the plan's scores on it from
            the file's tensors.

    Returns:
        `kl` (stock as loaded), `kl_file`, `kl_16bit` (the stock 16-bit model in the same dtype), all to the
        evaluation's reference and in nats a token; `tolerance`, `agrees`, and where and in what it ran.

    Raises:
        EvaluationError: logits that are not numbers, or a KL that isn't the file's.
        CheckpointError: stock transformers can't load the checkpoint.
    """
    assert plan.kl is not None
    windows = sample.ids[:STOCK_WINDOWS]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{index}.npy" for index in range(len(windows))]
        _save_reference(opened, windows, paths)
        gc.collect()
        torch.cuda.empty_cache()  # the fresh process needs what this one keeps of a GPU's memory
        print("evaluate: the checkpoint as stock transformers loads it, then the 16-bit model", flush=True)
        answer = quantize.ask(
            {
                "model": str(run.model_dir.resolve()),
                "source": str(source.directory.resolve()),
                "trust": source.trust_remote_code,
                "device": device,
                "threads": torch.get_num_threads(),
                "windows": windows.tolist(),
                "reference": list(map(str, paths)),
            }
        )
    dtype = str(runs.read_json(run.model_dir / "config.json", what="config.json").get("dtype"))
    kl, kl_16bit = answer["kl"], answer["kl_16bit"]
    kl_file = float(plan.kl[: len(windows)].mean(dtype=np.float64))
    # Where the 16-bit model itself breaks in that dtype there is nothing to excuse a difference by.
    tolerance = max(STOCK_ALLOWED, 2 * (kl_16bit or 0.0))
    loaded = f"Loaded by stock transformers in {dtype}, the checkpoint"
    if kl is None:
        raise EvaluationError(
            f"{loaded} gives logits that are not numbers on the evaluation's own text ({sample.text.name}). "
            "Run notebook 03_quantize with storage_dtype='bfloat16'."
        )
    if not abs(kl - kl_file) <= tolerance:
        raise EvaluationError(
            f"{loaded} has a KL of {kl:.4f} nats a token, from its file's tensors {kl_file:.4f}; they may "
            f"differ by {tolerance:.4f}. What was measured isn't what users would get. Run notebook "
            "03_quantize again, with storage_dtype='bfloat16' if it was float16. If that changes nothing, "
            "please report the versions."
        )
    return {
        "dtype": dtype,
        "device": device,
        "transformers": answer["transformers"],
        "text": sample.text.name,
        "windows": len(windows),
        "length": windows.shape[1],
        "kl": kl,
        "kl_file": kl_file,
        "kl_16bit": kl_16bit,
        "tolerance": tolerance,
        "agrees": True,
    }


@torch.inference_mode()
def _save_reference(opened: Opened, windows: torch.Tensor, paths: Sequence[Path]) -> None:
    """The reference's log-probabilities, a float32 file (T, V) a window; the model is let go on return."""
    with opened() as become:
        model = become("reference")
        for path, ids in zip(paths, windows, strict=True):
            logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
            np.save(path, torch.log_softmax(logits.float(), -1).cpu().numpy())


# --- checkpoints of others -------------------------------------------------------------------------------
# GPTQ, AWQ, HQQ, compressed-tensors, an earlier run's `model/`: a rival is scored on the same token ids and
# against the same reference.

RIVAL_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")


@dataclass(frozen=True)
class Rival:
    """A further checkpoint: `spec` as the user named it, its folder, bytes on disk, quantization method."""

    key: str
    spec: str
    directory: Path
    bytes: int
    method: str


def find_rivals(specs: Sequence[str]) -> list[Rival]:
    """Resolve folders and Hub ids; raises EvaluationError for one that is neither or holds no safetensors."""
    found: dict[str, Rival] = {}
    for spec in map(str, specs):
        directory = Path(spec).expanduser()
        if not directory.is_dir():
            directory = _download(spec)
        config, files = directory / "config.json", list(directory.glob("*.safetensors"))
        if not config.exists() or not files:
            raise EvaluationError(
                f"the rival {spec!r} has no config.json or no safetensors file; expected a folder or a Hub "
                "id of a checkpoint that transformers loads."
            )
        packed = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
        key = "rival:" + re.sub(r"[^A-Za-z0-9._-]+", "-", spec.rstrip("/").split("/")[-1])
        same = sum(other.split("#")[0] == key for other in found)  # every run's folder is called "model"
        key = f"{key}#{same + 1}" if same else key
        size = sum(file.stat().st_size for file in files)
        found[key] = Rival(key, spec, directory, size, packed.get("quant_method", "16bit"))
    return list(found.values())


def _download(spec: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        token = hub_token()
        value = None if token is None else token.value
        return Path(snapshot_download(spec, allow_patterns=list(RIVAL_FILES), token=value))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise EvaluationError(
            f"the rival {spec!r} is no folder here and can't be fetched from the Hub "
            f"({type(error).__name__}). Check the path or the id; log in if the repository is gated."
        ) from None  # a Hub that echoes the request would put its header into the traceback


def _public_name(rival: Rival) -> str:
    """A rival's Hub id, or its folder's name: evaluation.json is published, a path of this machine is not."""
    return rival.key.removeprefix("rival:") if Path(rival.spec).expanduser().exists() else rival.spec


def load_rival(
    rival: Rival, source: ModelSource, sample: Sample, device: torch.device, dtype: torch.dtype
) -> Any:
    """Load a rival and check that it reads the same tokens.

    Raises EvaluationError if it doesn't load or run, or has another vocabulary or tokenizer than the source.
    """
    packed = AutoConfig.from_pretrained(rival.directory).to_dict().get("quantization_config")
    if packed and not AutoHfQuantizer.supports_quant_method(packed):  # it would load without its weights
        raise EvaluationError(
            f"the rival {rival.spec!r} is packed by {rival.method}, which transformers can't load; leave "
            "it out."
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            rival.directory, dtype=dtype, device_map={"": str(device)}, use_safetensors=True
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise EvaluationError(
            f"the rival {rival.spec!r} ({rival.method}) can't be loaded: {error}. Install what its format "
            "needs, or leave it out."
        ) from error
    config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    size, own = (one.get_text_config().vocab_size for one in (model.config, config))
    if size != own:
        raise EvaluationError(
            f"the rival {rival.spec!r} has a vocabulary of {size}, {source.id} one of {own}: it is not a "
            "version of this model."
        )
    if any(rival.directory.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(rival.directory)
        cut = tokenizer(sample.pieces[0], add_special_tokens=False, verbose=False)["input_ids"]
        body = sample.ids[0, int(sample.start is not None) :].tolist()
        # A window may begin inside a word, which tokenizes differently alone: compare the second half.
        if cut[-len(body) // 2 :] != body[-len(body) // 2 :]:
            raise EvaluationError(
                f"the rival {rival.spec!r} tokenizes the text differently: its losses can't be paired with "
                "ours."
            )
    model.requires_grad_(False).eval()
    run_once(rival, model, sample.ids[:1, :2].to(device))
    return model


def run_once(rival: Rival, model: Any, ids: torch.Tensor) -> None:
    """Call the whole model once: compressed-tensors unpacks then, and scoring calls only what is below it."""
    try:
        with torch.no_grad():
            model(ids)
    except (RuntimeError, NotImplementedError, ImportError) as error:
        raise EvaluationError(
            f"the rival {rival.spec!r} ({rival.method}) loads but doesn't run on {ids.device}: {error}. "
            "Evaluate on a device that its kernels know, or leave it out."
        ) from error


class TwoHeads(Head):
    """A rival's logits from the rival's head, quantized perhaps; the reference's from the reference's."""

    def __init__(self, model: Any, reference: Head) -> None:
        self.module = model.get_output_embeddings()
        self.reference = reference
        self.weight, self.adjust = reference.weight, reference.adjust
        self.chunk, self.rows = reference.chunk, reference.rows

    def raw(self, hidden: torch.Tensor, buffer: str) -> torch.Tensor:
        """As `Head.raw`; the rival's head runs as the module that it is."""
        if buffer == "reference":
            return self.reference.raw(hidden, buffer)
        return self.module(hidden)


# --- multiple-choice tasks -------------------------------------------------------------------------------

ANSWERING = ("reference", "nf4", "plan")


def check_names(parameter: str, given: Any, what: str) -> tuple[str, ...]:
    """A parameter's list of names or paths, as texts; EvaluationError if it is anything else."""
    if not isinstance(given, list | tuple):
        hint = f" Write {parameter}=[{str(given)!r}]." if isinstance(given, str | Path) and str(given) else ""
        raise EvaluationError(f"{parameter}={given!r}: expected a list of {what}, [] for none.{hint}")
    for one in given:
        if not isinstance(one, str | Path) or not str(one).strip():
            raise EvaluationError(f"{parameter}={given!r}: {one!r} is none of the {what} that are expected.")
    return tuple(map(str, given))


def check_harness(names: Sequence[str], limit: Any) -> None:
    """Refuse tasks before scoring where lm_eval is missing or the limit is no number of questions."""
    if not names:
        return
    if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
        raise EvaluationError(f"lm_eval_limit={limit!r}: expected a number of questions, 1 or more.")
    try:
        importlib.import_module("lm_eval")
    except ImportError as error:
        raise EvaluationError(
            f"lm_eval_tasks={list(names)} needs lm-evaluation-harness: `pip install lm_eval`, or leave it."
        ) from error


def score_tasks(
    opened: Opened, source: ModelSource, seed: int, names: Sequence[str], limit: int
) -> dict[str, dict[str, Any]]:
    """Accuracy on the first `limit` questions: {task: {variant: {"value", "stderr", "samples"}}}.

    The harness' own model class wraps the model in memory, so the 16-bit reference, pure NF4 and the plan
    answer the same questions from the same weights. Raises EvaluationError for a task without accuracy.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"), seed)
    options = {"tasks": list(names), "limit": limit, "bootstrap_iters": 0, **seeds}
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    tokenizer = load_tokenizer(source)
    with opened() as become:
        for key in ANSWERING:
            wrapped = HFLM(pretrained=become(key), tokenizer=tokenizer, batch_size=1)
            said = simple_evaluate(model=wrapped, **options)
            for name in names:
                held = said["results"].get(name, {})
                if "acc,none" not in held:
                    raise EvaluationError(
                        f"the task {name!r} has no accuracy: choose a multiple-choice task."
                    )
                samples = said["n-samples"][name]["effective"]
                found[name][key] = {
                    "value": held["acc,none"],
                    "stderr": held["acc_stderr,none"],
                    "samples": samples,
                }
    return found
