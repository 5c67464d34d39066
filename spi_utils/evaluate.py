"""What a checkpoint is worth: its tokens' losses and divergence beside controls, on the same windows.

One model is loaded, once, and its layers are switched in place through every variant of `controls.py`; the
plan alone is scored from the tensors saved in `model/`. `session.py` does the scoring, resumable by block of
windows; `measures.py` defines the numbers, `evaluation.py` the file; `claims.py` audits the claim.
`evaluation.json` holds no time: the same inputs and seed give the same file. Speed and memory go
to `run.json`.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spi_utils import runs
from spi_utils.errors import EvaluationError
from spi_utils.judging.claims import audit
from spi_utils.judging.controls import FULL, QUICK, make_variants
from spi_utils.judging.evaluation import STOCK_WINDOWS, Evaluation, Job, assemble
from spi_utils.judging.speed import measure_run
from spi_utils.judging.tasks import check_harness, check_names
from spi_utils.plan import ProtectionPlan

if TYPE_CHECKING:
    from spi_utils.judging.rivals import Rival
    from spi_utils.models import ModelSource
    from spi_utils.texts import Text


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
            `controls` (keys of `controls.FULL`) replace its parts.
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
    settings = _settings(profile, windows, length, controls) | {
        "start_token": start_token,
        "random_seeds": random_seeds,
        "seed": seed,
        "rivals": list(rivals),
        "lm_eval": [*lm_eval_tasks, lm_eval_limit] if lm_eval_tasks else [],
        **_where(device, dtype),
    }
    _check_delivered(run)
    job = _prepare(run, source, settings, texts)
    # An upgrade of this package alone doesn't void an evaluation; its file says which code made it.
    hashes = {name: value for name, value in job.hashes.items() if name != "code"}
    proof = runs.run_info(run)["stages"].get("quantize", {}).get("proof")
    inputs = {**settings, "hashes": hashes, "speed_repeats": speed_repeats}
    inputs |= {"stock_windows": STOCK_WINDOWS, "proven": proof is not None}
    with runs.stage(run, "evaluate", inputs, ["evaluation.json"], force=force) as stage:
        if stage.finished:
            return Evaluation.read(run.evaluation_json)
        evaluation = _evaluate(job, stage, proof)
        evaluation.write(run.evaluation_json)
        if speed_repeats:
            stage.record(**_speed(run, source, settings, speed_repeats))
    return evaluation


def _check_delivered(run: runs.Run) -> None:
    """Refuse a checkpoint that is no longer, byte for byte, what notebook 03 wrote and proved."""
    outputs = runs.run_info(run)["stages"].get("quantize", {}).get("outputs", {})
    for name, held in outputs.items():
        path = run.path / name
        if not path.is_file() or runs.sha256_file(path) != held["sha256"]:
            raise EvaluationError(
                f"{path} is not the file that notebook 03_quantize wrote and proved: it was changed, damaged "
                "or removed since. Run notebook 03_quantize again; it makes the checkpoint anew."
            )


def _speed(run: runs.Run, source: ModelSource, settings: dict[str, Any], repeats: int) -> dict[str, Any]:
    """Speed and memory, for run.json; a failure is said and noted: the scores stand without it."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()  # the processes that are timed need what this one keeps of a GPU's memory
    try:
        return {"speed": measure_run(run.model_dir, source, settings, repeats)}
    except EvaluationError as error:
        print(f"Speed was not measured: {error}", flush=True)
        return {"speed_failed": str(error)}


def _settings(
    profile: str, windows: int | None, length: int | None, controls: Sequence[str] | None
) -> dict[str, Any]:
    if profile not in PROFILES:
        raise EvaluationError(f"there is no profile {profile!r}; choose {' or '.join(PROFILES)}.")
    chosen = PROFILES[profile]
    return {
        "profile": profile,
        "windows": windows or chosen.windows,
        "length": length or chosen.length,
        "texts": chosen.texts,
        "controls": list(chosen.controls if controls is None else controls),
    }


def _where(device: str, dtype: str) -> dict[str, str]:
    from spi_utils.models import resolve_device, resolve_dtype

    place = resolve_device(device)
    return {"device": str(place), "dtype": str(resolve_dtype(dtype, place)).removeprefix("torch.")}


def _prepare(
    run: runs.Run, source: ModelSource, settings: dict[str, Any], texts: str | Path | Sequence[str | Path]
) -> Job:
    from spi_utils.judging.rivals import find_rivals
    from spi_utils.texts import load_texts

    layers = runs.read_layers(run)
    plan = ProtectionPlan.read(
        run.plan_json, model=source.identity(), layers_fingerprint=runs.layers_fingerprint(run)
    )
    variants, skipped = make_variants(
        layers,
        plan,
        settings["controls"],
        random_seeds=settings["random_seeds"],
        seed=settings["seed"],
    )
    loaded = load_texts(texts, at_least=settings["texts"])
    rivals = find_rivals(settings["rivals"])
    hashes = _hashes(run, source, loaded, rivals)
    return Job(run, source, settings, layers, plan, variants, skipped, loaded, rivals, hashes)


def _hashes(
    run: runs.Run, source: ModelSource, texts: Sequence[Text], rivals: Sequence[Rival]
) -> dict[str, str]:
    """SHA-256 of everything that the numbers depend on."""
    from spi_utils.checkpoint import weight_files

    codes = list(run.rounded.glob("*.safetensors"))
    return {
        "weights": source.sha256,
        "layers": runs.layers_fingerprint(run),
        "plan": runs.sha256_file(run.plan_json),
        "checkpoint": runs.checkpoint_hash(weight_files(run.model_dir)),
        "code": runs.code_hash(),
        **({"rounded": runs.checkpoint_hash(codes)} if codes else {}),
        **{f"text:{text.name}": text.sha256 for text in texts},
        **{rival.key: runs.checkpoint_hash(weight_files(rival.directory)) for rival in rivals},
    }


def _evaluate(job: Job, stage: runs.Stage, proof: Mapping[str, Any] | None) -> Evaluation:
    """Score, compute the numbers and audit the claim."""
    import torch

    from spi_utils.judging.session import Session, make_samples
    from spi_utils.judging.stock import score_stock
    from spi_utils.rounding import Codes

    settings = job.settings
    samples = make_samples(
        job.source,
        job.texts,
        windows=settings["windows"],
        length=settings["length"],
        start_token=settings["start_token"],
    )
    session = Session(
        source=job.source,
        variants=job.variants,
        rivals=job.rivals,
        samples=samples,
        model_dir=job.run.model_dir,
        # Blocks that other code has scored are not mixed with this one's.
        folder=job.run.partial / "evaluate" / job.hashes["code"][:12],
        device=torch.device(settings["device"]),
        dtype=getattr(torch, settings["dtype"]),
        double_quant=job.plan.double_quant,
        seed=settings["seed"],
        codes=Codes(job.run.rounded) if job.plan.rounding == "guided" else {},
    )
    scores = session.score()
    evaluation = assemble(job, session, scores)
    evaluation = replace(evaluation, stock=score_stock(session, scores["plan"][0], proof))
    if settings["lm_eval"]:
        from spi_utils.judging.tasks import score_tasks

        *names, limit = settings["lm_eval"]
        evaluation = replace(evaluation, tasks=score_tasks(session, names, limit))
    stage.record(seconds_by_variant={key: round(value, 3) for key, value in session.seconds.items()})
    return replace(evaluation, claims=audit(evaluation))
