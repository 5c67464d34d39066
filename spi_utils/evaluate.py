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

import gc
import hashlib
import importlib.util
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

from spi_utils import chat, models, quantize, runs, stats
from spi_utils.checkpoint import disk_bytes, put_saved, weight_files
from spi_utils.claims import SURVIVAL, Evaluation, audit, is_random
from spi_utils.controls import FULL, QUICK, Variant, make_variants
from spi_utils.errors import EvaluationError
from spi_utils.plan import ProtectionPlan
from spi_utils.progress import progress
from spi_utils.rounding import Codes
from spi_utils.scoring import Head, Switch, TokenScores, reference_states, token_scores
from spi_utils.speed import measure_in_subprocess
from spi_utils.texts import CHAT, Text, check_windows, load_texts, make_windows, start_token, window_texts

STOCK_WINDOWS = 4  # of the first text, its own first ones, that the model as loaded is scored on
STOCK_ALLOWED = 0.005  # nats a token, beside what the dtype costs the 16-bit model twice over
UNPROVEN = "notebook 03_quantize could not run the checkpoint on this machine"
ANSWERING = ("reference", "nf4", "plan")  # variants that multiple-choice tasks are put to
CONVENTION = (
    "disjoint windows of one length, spread evenly over the text; the model sees only its window, which "
    "begins with the start token; every later token is predicted once; natural logarithms"
)
KERNEL = (
    "NF4 dequantized by bitsandbytes ({device}), int4 and int8 as compressed-tensors decompresses them, "
    "rounded to the storage dtype; products by torch in {dtype} on the {device}; log-softmax in float32"
)


@dataclass(frozen=True)
class Profile:
    """How much is scored: windows of `length` tokens for each text, how many texts, which controls."""

    windows: int
    length: int
    texts: int
    controls: tuple[str, ...]


PROFILES = {"quick": Profile(24, 256, 1, QUICK), "full": Profile(96, 512, 2, FULL)}


@dataclass(frozen=True)
class Sample:
    """A text as evaluation.json describes it, its windows (W, T), and which of the predicted tokens count,
    bool (W, T - 1) or True for all; a chat has no window before the model has answered."""

    text: dict[str, Any]
    windows: torch.Tensor
    counted: NDArray[np.bool_] | bool = True


def evaluate(
    run: runs.Run,
    source: models.ModelSource,
    *,
    profile: str = "quick",
    texts: str | Path | Sequence[str | Path] = "auto",
    windows: int | None = None,
    length: int | None = None,
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
        texts: as `texts.load_texts` takes them.
        seed: of the random controls (seed … seed + random_seeds − 1), the noise and the bootstrap.
        rivals: further checkpoints that transformers loads: folders or Hub ids.
        speed_repeats: timed generations of the saved checkpoint and of the 16-bit model; 0 leaves speed out.
        lm_eval_tasks: multiple-choice tasks for lm-evaluation-harness, `lm_eval_limit` samples each.
        force: do it again even if the same evaluation is there.

    Raises:
        EvaluationError: bad profile, control, text, window or rival; logits that are not numbers.
        RunError: an earlier stage is missing. CheckpointError: model/ isn't what the plan says.
    """
    if profile not in PROFILES:
        raise EvaluationError(f"there is no profile {profile!r}; choose {' or '.join(PROFILES)}.")
    if lm_eval_tasks and importlib.util.find_spec("lm_eval") is None:
        raise EvaluationError("lm_eval_tasks need lm-evaluation-harness: `pip install lm_eval`, or leave it.")
    chosen, place = PROFILES[profile], models.resolve_device(device)
    settings: dict[str, Any] = {"profile": profile, "windows": windows or chosen.windows}
    settings |= {"length": length or chosen.length, "texts": chosen.texts}
    settings["controls"] = list(chosen.controls if controls is None else controls)
    settings |= {"random_seeds": random_seeds, "seed": seed}
    # What is published names no path of this machine.
    settings |= {"rivals": [Path(one).name if Path(one).expanduser().exists() else one for one in rivals]}
    settings |= {"lm_eval": [*lm_eval_tasks, lm_eval_limit] if lm_eval_tasks else [], "device": str(place)}
    settings |= {"dtype": str(models.resolve_dtype(dtype, place)).removeprefix("torch.")}
    quantized = runs.run_info(run)["stages"].get("quantize", {})
    proven = quantized.get("proof") is not None  # that notebook 03 could use the checkpoint here
    for name, held in quantized.get("outputs", {}).items():
        path = run.path / name
        if not path.is_file() or runs.sha256_file(path) != held["sha256"]:
            raise EvaluationError(
                f"{path} is not the file that notebook 03_quantize wrote and proved: it was changed, damaged "
                "or removed since. Run notebook 03_quantize again; it makes the checkpoint anew."
            )
    layers, table_mark = runs.read_layers(run), runs.layers_fingerprint(run)
    plan = ProtectionPlan.read(run.plan_json, model=source.identity(), layers_fingerprint=table_mark)
    variants, skipped = make_variants(layers, plan, settings["controls"], random_seeds, seed)
    tokenizer, others = models.load_tokenizer(source), find_rivals(rivals)
    judged = load_texts(texts, at_least=chosen.texts, template=bool(tokenizer.chat_template))
    codes = list(run.rounded.glob("*.safetensors"))
    hashes = {
        "weights": source.sha256,
        "layers": table_mark,
        "plan": runs.sha256_file(run.plan_json),
        "checkpoint": runs.checkpoint_hash(weight_files(run.model_dir)),
        "code": runs.code_hash(),
        **({"rounded": runs.checkpoint_hash(codes)} if codes else {}),
        **{f"text:{text.name}": text.sha256 for text in judged},
        **{key: runs.checkpoint_hash(weight_files(folder)) for key, folder in others.items()},
    }
    # An upgrade of this package alone doesn't void an evaluation; its file says which code made it.
    inputs = {**settings, "hashes": {name: value for name, value in hashes.items() if name != "code"}}
    inputs |= {"speed_repeats": speed_repeats, "stock_windows": STOCK_WINDOWS, "proven": proven}
    with runs.stage(run, "evaluate", inputs, ["evaluation.json"], force=force) as stage:
        if stage.finished:
            return Evaluation.read(run.evaluation_json)
        samples = make_samples(source, tokenizer, judged, settings["windows"], settings["length"])
        # What other code has scored is not mixed with this one's scores.
        folder = run.partial / "evaluate" / hashes["code"][:12]
        kept = [folder / f"reference.{index}.npy" for index in range(min(STOCK_WINDOWS, settings["windows"]))]
        variants |= rival_variants(others, int(layers["numel"].sum()))
        samples, scores, tasks = score(
            run, source, plan, settings, variants, others, samples, folder, kept if proven else []
        )
        found: list[dict[str, Any]] = []
        for index, sample in enumerate(samples):
            text = sample.text
            numbers = {key: variant_numbers(one[index], text, sample.counted) for key, one in scores.items()}
            numbers = {key: _describe(variants[key]) | one for key, one in numbers.items()}
            compare(numbers, seed=seed)
            found.append({"text": text, "variants": numbers})
        stock: dict[str, Any] = {"agrees": None, "reason": UNPROVEN}
        if proven:
            stock = score_stock(run, source, settings["device"], samples[0], scores["plan"][0], kept)
        held = list(plan.formats.values())  # of the file too: `put_saved` has refused any other
        evaluation = Evaluation(
            model=source.identity(),
            plan=_describe_plan(run, plan, layers),
            settings=settings,
            text=found[0]["text"],
            variants=found[0]["variants"],
            other_texts=found[1:],
            skipped=skipped,
            checkpoint={fmt: held.count(fmt) for fmt in ("16bit", *sorted(set(held) - {"16bit"}))},
            checkpoint_sha256=hashes["checkpoint"],
            hashes=hashes,
            kernel=KERNEL.format(dtype=settings["dtype"], device="CUDA" if place.type == "cuda" else "CPU"),
            tasks=tasks,
            stock=stock,
        )
        evaluation = replace(evaluation, claims=audit(evaluation))
        evaluation.write(run.evaluation_json)
        if speed_repeats:
            stage.record(**_time(run, source, settings["device"], speed_repeats))
    return evaluation


def _time(run: runs.Run, source: models.ModelSource, device: str, repeats: int) -> dict[str, Any]:
    """Speed and memory of the checkpoint ("plan") and of the 16-bit model ("reference"), for run.json.

    Both in the dtype that the checkpoint ships with: what users will run. A failure is said and noted: the
    scores stand without it.
    """
    options = {"device": device, "dtype": _shipped_dtype(run), "repeats": repeats}
    options |= {"trust_remote_code": source.trust_remote_code}
    folders = {"plan": run.model_dir, "reference": source.directory}
    print("evaluate: speed and memory of the checkpoint, then of the 16-bit model", flush=True)
    try:
        return {"speed": {key: measure_in_subprocess(one, **options) for key, one in folders.items()}}
    except EvaluationError as error:
        print(f"Speed was not measured: {error}", flush=True)
        return {"speed_failed": str(error)}


def _shipped_dtype(run: runs.Run) -> str:
    return str(runs.read_json(run.model_dir / "config.json", what="config.json").get("dtype") or "float16")


# --- scoring ---------------------------------------------------------------------------------------------


def make_samples(
    source: models.ModelSource,
    tokenizer: Any,
    texts: Sequence[Text],
    windows: int,
    length: int,
) -> list[Sample]:
    """Cut every text into windows with the source's tokenizer; a chat waits for the model (`answered`).

    Words and bytes are of the raw text behind the windows, as lm-evaluation-harness counts them. Raises
    EvaluationError as `texts.make_windows` does.
    """
    config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    start = start_token(tokenizer, config)
    samples = []
    for text in texts:
        described: dict[str, Any] = {"name": text.name, "source": text.source, "sha256": text.sha256}
        described |= {"tokens": windows * (length - 1), "windows": windows, "window_length": length}
        if text.name == CHAT:
            check_windows(windows, length, None, config)
            described |= {"start_token": None, "convention": chat.CONVENTION}
            samples.append(Sample(described, torch.empty(0, length, dtype=torch.long)))
            continue
        ids = make_windows(text, tokenizer, windows, length, start, config=config)
        pieces = window_texts(text, tokenizer, windows, length, start)
        described |= {"start_token": start, **_counts(pieces), "convention": CONVENTION}
        samples.append(Sample(described, ids))
    return samples


def _counts(pieces: Sequence[str]) -> dict[str, int]:
    words = sum(len(re.split(r"\s+", piece)) for piece in pieces)
    return {"words": words, "bytes": sum(len(piece.encode()) for piece in pieces)}


def answered(
    run: runs.Run,
    source: models.ModelSource,
    plan: ProtectionPlan,
    seed: int,
    own: Any,
    chatting: Sample,
    file: Path,
) -> Sample:
    """A chat's windows, read from `file`, or sampled from the 16-bit model `own` once and kept there.

    Words and bytes are of the answers, `sha256` is that of the token ids (int64), and `in_distribution` says
    that the plan's costs or codes were made on the model's own text, as this one is: with other prompts and
    other draws, yet no text of other people. Raises EvaluationError as `chat.converse` does.
    """
    text, tokenizer = chatting.text, models.load_tokenizer(source)
    held = _read_arrays(file)
    if held is None:
        ids, answers = chat.converse(own, tokenizer, text["windows"], text["window_length"], seed)
        held = {"ids": ids.numpy(), "answers": answers}
        _write_arrays(file, held)
    pairs = zip(held["ids"], held["answers"], strict=True)
    pieces = [str(tokenizer.decode(row[mine], skip_special_tokens=True)) for row, mine in pairs]
    counted = held["answers"][:, 1:]  # no window begins with an answer
    described = text | _counts(pieces) | {"tokens": int(counted.sum())}
    described |= {"sha256": hashlib.sha256(held["ids"].tobytes()).hexdigest()}
    analysis = runs.run_info(run)["stages"].get("analyze", {})
    kind = analysis.get("inputs", {}).get("sensitivity")
    guided = kind == "self" or (kind in ("measured", "none") and plan.rounding == "guided")
    described["in_distribution"] = guided and "own_text" not in (analysis.get("sensitivity") or {})
    return Sample(described, torch.from_numpy(held["ids"]), counted)


def score(
    run: runs.Run,
    source: models.ModelSource,
    plan: ProtectionPlan,
    settings: Mapping[str, Any],
    variants: Mapping[str, Variant],
    rivals: Mapping[str, Path],
    samples: Sequence[Sample],
    folder: Path,
    kept: Sequence[Path],
) -> tuple[list[Sample], dict[str, list[TokenScores]], dict[str, dict[str, Any]]]:
    """Load the model once, and score every variant and rival on every text.

    All variants are the one model, changed in place; the plan is read from the saved file. Each pair of
    variant and text is a file in `folder` as soon as it is scored, and is then never scored again: a killed
    evaluation goes on where it stopped. The stage empties that folder when its inputs change.

    Returns:
        the samples with the chat's windows, {variant: its scores, one a sample} in the order of `variants`,
        and {task: {variant: accuracy}}. The reference's log-probabilities on the first windows, float32
        (T, V) each, are written to the paths of `kept` for `score_stock`.
    """
    device, dtype = torch.device(settings["device"]), getattr(torch, settings["dtype"])
    scores: dict[str, list[TokenScores | None]] = {}
    for key in variants:
        held = [_read_arrays(_scores_file(folder, key, index)) for index in range(len(samples))]
        scores[key] = [None if one is None else TokenScores(**one) for one in held]
    tasks: dict[str, dict[str, Any]] = {name: {} for name in settings["lm_eval"][:-1]}
    asked = ANSWERING if tasks else ("reference",)
    todo = [key for key, held in scores.items() if None in held or key in asked]
    codes = Codes(run.rounded) if plan.rounding == "guided" else {}
    options = {"double_quant": plan.double_quant, "seed": settings["seed"]}
    with models.open_weights(source) as weights:
        own = models.load_model(source, device=device, dtype=dtype)
        switch = Switch(own, weights, list(plan.formats), codes=codes, **options)
        seed, file = settings["seed"], folder / "chat.npz"
        samples = [
            answered(run, source, plan, seed, own, one, file) if one.text["name"] == CHAT else one
            for one in samples
        ]
        head, references = Head(own), [reference_states(own, one.windows) for one in samples]
        for key in progress(todo, len(scores), "evaluate: variants", done=len(scores) - len(todo)):
            model, heads = own, head
            if key in rivals:
                model = load_rival(key, rivals[key], own, device)
                heads = TwoHeads(model, head)
            else:
                switch.to(variants[key].formats)
            if key == "plan":
                put_saved(model, weights, plan.formats, run.model_dir)
            for index, sample in enumerate(samples):
                if scores[key][index] is not None:
                    continue
                ids = sample.windows
                made = references[index].scores()
                if key != "reference":
                    made = token_scores(model, ids, references[index], label=key, head=heads)
                _write_arrays(_scores_file(folder, key, index), vars(made))
                scores[key][index] = made
            if key == "reference":
                _save_reference(model, samples[0].windows, kept)
            if key in ANSWERING and tasks:
                for name, answer in ask_tasks(model, source, settings).items():
                    tasks[name][key] = answer
            if key == "plan":
                switch.renew()  # the file's 16-bit layers may be a cast of the source's
            del model, heads  # one rival in memory at a time
    del own, switch, head, references
    gc.collect()
    torch.cuda.empty_cache()  # fresh processes need what this one keeps of a GPU's memory
    return list(samples), scores, tasks  # type: ignore[return-value]  # none is None now


def _scores_file(folder: Path, key: str, index: int) -> Path:
    return folder / f"{key.replace('/', '_')}.{index}.npz"


def _read_arrays(path: Path) -> dict[str, Any] | None:
    """Arrays that are there and whole; None for others: damaged ones are said, and made again."""
    try:
        with np.load(path) as held:
            return dict(held)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        print(f"evaluate: {path} is damaged ({error}) and made again", flush=True)
        return None


def _write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    with runs.atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


@torch.inference_mode()
def _save_reference(model: Any, windows: torch.Tensor, paths: Sequence[Path]) -> None:
    for path, ids in zip(paths, windows, strict=False):
        logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0]
        np.save(path, torch.log_softmax(logits.float(), -1).cpu().numpy())


# --- the numbers -----------------------------------------------------------------------------------------


def all_numbers(
    sample: Sample, variants: Mapping[str, Variant], scored: Sequence[TokenScores], seed: int
) -> dict[str, dict[str, Any]]:
    """{variant: what it is, its own numbers and every comparison}, from its scores on one text."""
    numbers = {
        key: _describe(variants[key]) | variant_numbers(one, sample.text, sample.counted)
        for key, one in zip(variants, scored, strict=True)
    }
    compare(numbers, seed=seed)
    return numbers


def variant_numbers(scored: TokenScores, text: Mapping[str, Any], counted: Any = True) -> dict[str, Any]:
    """A variant's own numbers, without comparisons: perplexities, KL, flips, Δp and its window means.

    `text` holds the counts of `words` and `bytes` behind the windows, `counted` (W, T − 1) which tokens
    count. `nll` and `kl_mean` are means over windows, all else is over tokens. KL quantiles are linearly
    interpolated; `kl_survival` is the KL that a share of `SURVIVAL` of the tokens reaches or exceeds, shares
    below one token left out.
    """
    nll = scored.nll.mean(axis=1, dtype=np.float64, where=counted)  # (W,): one mean a window
    total, mean = float(scored.nll.sum(dtype=np.float64, where=counted)), float(nll.mean())
    window_kl = scored.kl.mean(axis=1, dtype=np.float64, where=counted)
    chosen = np.broadcast_to(counted, scored.nll.shape)
    kl, dp = scored.kl[chosen].astype(np.float64), scored.dp[chosen].astype(np.float64)  # (tokens,)
    median, p99, p999 = np.quantile(kl, (0.5, 0.99, 0.999)).tolist()
    found = {"nll": mean, "nll_se": float(stats.cluster_se(nll)), "perplexity": _exp(mean)}
    found |= {f"{unit}_perplexity": _exp(total / text[f"{unit}s"]) for unit in ("word", "byte")}
    found |= {"kl_mean": float(window_kl.mean()), "kl_median": median, "kl_p99": p99, "kl_p999": p999}
    found |= {"same_top1": float(scored.same_top1[chosen].mean())}
    found |= {"dp_mean": float(dp.mean()), "dp_rms": float(np.sqrt((dp**2).mean()))}
    survival = np.quantile(kl, [1 - share for share in SURVIVAL if share * kl.size >= 1])
    windows = {"window_nll": nll, "window_kl": window_kl, "kl_survival": survival}
    # float32 scores carry 7 digits; 10 decimals lose nothing and keep the file small.
    return found | {name: [round(float(one), 10) for one in held] for name, held in windows.items()}


def compare(variants: dict[str, dict[str, Any]], *, seed: int = 0) -> None:
    """Add every comparison over windows to {variant: its description and `variant_numbers`}, in place.

    `kl` (interval of the mean KL), `delta` (loss minus the reference's, with Holm's p over all variants),
    `perplexity_ratio` with its interval, the windows behind it, and for those of `equal_bytes` that are not
    random themselves `vs_random`: loss and KL minus the mean of the random controls, Holm over those.
    """

    def windows(name: str, keys: Sequence[str]) -> NDArray[np.float64]:
        return np.array([variants[key][f"window_{name}"] for key in keys]).T  # (W, V)

    def family(keys: Sequence[str], values: NDArray[np.float64]) -> dict[str, stats.Estimate]:
        return stats.holm_family(dict(zip(keys, stats.estimates(values, seed=seed), strict=True)))

    others = [key for key in variants if key != "reference"]
    loss = windows("nll", others) - windows("nll", ["reference"])
    kls = stats.estimates(windows("kl", others), seed=seed)
    for column, (key, delta) in enumerate(family(others, loss).items()):
        variants[key]["kl"] = kls[column].as_dict()
        variants[key]["delta"] = delta.as_dict()
        variants[key]["perplexity_ratio"] = list(map(_exp, (delta.mean, delta.low, delta.high)))
        variants[key]["effect"] = stats.effect_windows(loss[:, column])
    randoms = [key for key in variants if is_random(key)]
    equal = [key for key, one in variants.items() if one["equal_bytes"] and not is_random(key)]
    for name in ("nll", "kl") if randoms else ():
        drawn = windows(name, randoms)  # (W, R)
        gains = family(equal, windows(name, equal) - drawn.mean(axis=1, keepdims=True))
        for key, one in gains.items():
            beats = int((drawn.mean(axis=0) > np.mean(variants[key][f"window_{name}"])).sum())
            held = variants[key].setdefault("vs_random", {"controls": len(randoms)})
            held |= {name: one.as_dict(), f"{name}_beats": beats}


def _exp(value: float) -> float:
    return math.exp(min(value, 700.0))


def _describe(variant: Variant) -> dict[str, Any]:
    kept = asdict(variant)
    formats = list(kept.pop("formats").values())
    return kept | {"layers": {fmt: formats.count(fmt) for fmt in sorted(set(formats))}}


def _describe_plan(run: runs.Run, plan: ProtectionPlan, layers: pd.DataFrame) -> dict[str, Any]:
    """What the plan keeps and weighs: what the audit needs."""
    planned = layers[layers["quantizable"]]
    kept = planned[planned["name"].isin(plan.protected)]
    found = {name: getattr(plan, name) for name in ("score", "direction", "rule", "reason", "double_quant")}
    found |= {"protected": len(plan.protected), "planned": len(planned)}
    for name, rows in (("weights", layers), ("matrix_weights", planned), ("protected_weights", kept)):
        found[name] = int(rows["numel"].sum())
    found |= {"bytes": dict(plan.bytes), "bytes_on_disk": disk_bytes(run.model_dir)}
    return found | {name: getattr(plan, name) for name in ("bits_per_weight", "matrix_bits", "predicted_kl")}


# --- the model as a user loads it ------------------------------------------------------------------------


def score_stock(
    run: runs.Run,
    source: models.ModelSource,
    device: str,
    sample: Sample,
    plan: TokenScores,
    reference: Sequence[Path],
) -> dict[str, Any]:
    """The `stock` entry of evaluation.json: is the model as loaded the one that was measured?

    The evaluation's numbers are float32 arithmetic on the file's tensors. Here a fresh process without this
    package loads the checkpoint with the model card's line, in the dtype that it ships with and on its own
    kernels. Its KL to the same reference must be the file's, within what the dtype costs the 16-bit model
    anyway.

    Args:
        sample, plan: the first text, and the plan's scores on it from the file's tensors.
        reference: the reference's log-probabilities, a file a window.

    Returns:
        `kl` (stock as loaded), `kl_file`, `kl_16bit` (the stock 16-bit model in the same dtype), all to the
        evaluation's reference and in nats a token; `tolerance`, `agrees`, and where and in what it ran.

    Raises:
        EvaluationError: logits that are not numbers, or a KL that isn't the file's.
        CheckpointError: stock transformers can't load the checkpoint.
    """
    text, windows, dtype = sample.text, sample.windows[: len(reference)], _shipped_dtype(run)
    print("evaluate: the checkpoint as stock transformers loads it, then the 16-bit model", flush=True)
    request: dict[str, Any] = {
        "model": str(run.model_dir.resolve()),
        "source": str(source.directory.resolve()),
    }
    request |= {"trust": source.trust_remote_code, "device": device, "threads": torch.get_num_threads()}
    request |= {"windows": windows.tolist(), "reference": [str(path.resolve()) for path in reference]}
    answer = quantize.ask(request)
    kl, kl_16bit = answer["kl"], answer["kl_16bit"]
    kl_file = float(plan.kl[: len(windows)].mean(dtype=np.float64))
    # Where the 16-bit model itself breaks in that dtype there is nothing to excuse a difference by.
    tolerance = max(STOCK_ALLOWED, 2 * (kl_16bit or 0.0))
    if kl is None or not abs(kl - kl_file) <= tolerance:
        gives = "logits that are not numbers" if kl is None else f"a KL of {kl:.4f} nats a token"
        raise EvaluationError(
            f"Loaded by stock transformers in {dtype}, the checkpoint gives {gives} on {text['name']}; from "
            f"its file's tensors the KL is {kl_file:.4f}, give or take {tolerance:.4f}. What was measured "
            "isn't what users would get. Run notebook 03_quantize again, with storage_dtype='bfloat16' if it "
            "was float16. If that changes nothing, please report the versions."
        )
    found: dict[str, Any] = {"dtype": dtype, "device": device, "transformers": answer["transformers"]}
    found |= {"text": text["name"], "windows": len(windows), "length": windows.shape[1], "kl": kl}
    return found | {"kl_file": kl_file, "kl_16bit": kl_16bit, "tolerance": tolerance, "agrees": True}


# --- checkpoints of others -------------------------------------------------------------------------------
# GPTQ, AWQ, HQQ, compressed-tensors, an earlier run's `model/`: a rival is scored on the same token ids and
# against the same reference.


def find_rivals(specs: Sequence[str]) -> dict[str, Path]:
    """{key: folder} of folders and Hub ids.

    Raises EvaluationError for one that holds no checkpoint, ModelError where the Hub refuses one.
    """
    found: dict[str, Path] = {}
    for spec in map(str, specs):
        folder = models.download(spec)[0] if models.is_hub_id(spec) else Path(spec).expanduser()
        if not (folder / "config.json").exists() or not any(folder.glob("*.safetensors")):
            raise EvaluationError(
                f"the rival {spec!r}: no config.json or no safetensors file there. Expected a folder or a "
                "Hub id of a checkpoint that transformers loads."
            )
        key = "rival:" + re.sub(r"[^A-Za-z0-9._-]+", "-", spec.rstrip("/").split("/")[-1])
        same = sum(other.split("#")[0] == key for other in found)  # every run's folder is called "model"
        found[f"{key}#{same + 1}" if same else key] = folder
    return found


def rival_variants(rivals: Mapping[str, Path], weights: int) -> dict[str, Variant]:
    """Rivals as variants: their size is what lies on disk, how matrices are packed is their own affair."""
    found = {}
    for key, folder in rivals.items():
        config = runs.read_json(folder / "config.json", what="config.json")
        method = (config.get("quantization_config") or {}).get("quant_method", "16bit")
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        label = f"{key.removeprefix('rival:')} ({method})"
        found[key] = Variant(label, {}, size, 8 * size / weights, None, None, False, 0.0)  # type: ignore[arg-type]
    return found


def load_rival(key: str, folder: Path, own: Any, device: torch.device) -> Any:
    """Load a rival and call it once: compressed-tensors unpacks then, scoring calls only what is below.

    Raises EvaluationError if it doesn't load or run, or has another vocabulary than `own`, the source's.
    """
    options = {"dtype": own.dtype, "device_map": {"": str(device)}, "use_safetensors": True}
    packed = AutoConfig.from_pretrained(folder).to_dict().get("quantization_config")
    if packed and not AutoHfQuantizer.supports_quant_method(packed):  # it would load without its weights
        method = packed.get("quant_method")
        raise EvaluationError(
            f"the {key} is packed by {method}, which transformers can't load; leave it out."
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, **options)
        with torch.no_grad():
            model(torch.zeros(1, 2, dtype=torch.long, device=device))
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        raise EvaluationError(
            f"the {key} can't be loaded and run on {device}: {error}. Install what its format needs, "
            "evaluate on a device that its kernels know, or leave it out."
        ) from error
    sizes = [one.config.get_text_config().vocab_size for one in (model, own)]
    if sizes[0] != sizes[1]:
        raise EvaluationError(
            f"the {key} has a vocabulary of {sizes[0]}, this model one of {sizes[1]}: it is no version of it."
        )
    return model


class TwoHeads(Head):
    """A rival's logits from the rival's head, quantized perhaps; the reference's from the reference's."""

    def __init__(self, model: Any, reference: Head) -> None:
        self.__dict__ |= vars(reference)
        self.module, self.reference = model.get_output_embeddings(), reference

    def raw(self, hidden: torch.Tensor, buffer: str) -> torch.Tensor:
        """As `Head.raw`; the rival's head runs as the module that it is."""
        return self.reference.raw(hidden, buffer) if buffer == "reference" else self.module(hidden)


# --- multiple-choice tasks -------------------------------------------------------------------------------


def ask_tasks(model: Any, source: models.ModelSource, settings: Mapping[str, Any]) -> dict[str, Any]:
    """{task: accuracy on the first questions, with its standard error}, from the model in memory.

    The harness' own model class wraps it, so the 16-bit reference, pure NF4 and the plan answer the same
    questions from the same weights. Raises EvaluationError for a task without accuracy.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    *names, limit = settings["lm_eval"]
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"), settings["seed"])
    wrapped = HFLM(pretrained=model, tokenizer=models.load_tokenizer(source), batch_size=1)
    said = simple_evaluate(model=wrapped, tasks=names, limit=limit, bootstrap_iters=0, **seeds)
    found = {}
    for name in names:
        held = said["results"].get(name, {})
        if "acc,none" not in held:
            raise EvaluationError(f"the task {name!r} has no accuracy: choose a multiple-choice task.")
        count = said["n-samples"][name]["effective"]
        found[name] = {"value": held["acc,none"], "stderr": held["acc_stderr,none"], "samples": count}
    return found
