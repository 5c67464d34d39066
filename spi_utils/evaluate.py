"""What a checkpoint is worth: its tokens' losses and divergence beside controls, on the same windows.

One model is loaded, once, and its layers are switched in place through every variant of `controls.py`; the
plan alone is scored from the tensors saved in `model/`. `session.py` does the scoring, resumable by block of
windows; `measures.py` defines the numbers; `claims.py` audits the claim. `evaluation.json` holds no time: the
same inputs and seed give the same file. Speed, memory and a sample of text go to `run.json`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

import spi_utils
from spi_utils import measures, runs
from spi_utils.claims import audit
from spi_utils.controls import FULL, QUICK, Variant, make_variants
from spi_utils.errors import EvaluationError
from spi_utils.plan import ProtectionPlan
from spi_utils.speed import measure_run

if TYPE_CHECKING:
    from spi_utils.models import ModelSource
    from spi_utils.rivals import Rival
    from spi_utils.scoring import TokenScores
    from spi_utils.session import Sample, Session
    from spi_utils.texts import Text

SCHEMA = 1
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


@dataclass(frozen=True)
class Evaluation:
    """The content of evaluation.json.

    `model` is the source's identity, `plan` what the plan keeps and weighs, `settings` what was asked for,
    `text` the first text and its windows, `variants` {key: numbers} on it (`measures.py` defines them),
    `other_texts` [{"text", "variants"}] the same on further texts, `skipped` {control: why},
    `checkpoint` what the saved file was found to hold and `checkpoint_sha256` which file that was, `hashes` of
    everything that went in, `kernel` which arithmetic ran, `tasks` multiple-choice scores, `claims` the audit's rows.
    """

    model: dict[str, Any]
    plan: dict[str, Any]
    settings: dict[str, Any]
    text: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    other_texts: list[dict[str, Any]]
    skipped: dict[str, str]
    checkpoint: dict[str, Any]
    checkpoint_sha256: str
    hashes: dict[str, str]
    kernel: str
    tasks: dict[str, Any] = field(default_factory=dict)
    claims: list[dict[str, Any]] = field(default_factory=list)

    def write(self, path: Path) -> None:
        """Write evaluation.json atomically."""
        runs.write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read evaluation.json; RunError if it is missing, truncated or of another schema."""
        held = runs.read_json(path, SCHEMA, "evaluation", runs.NOTEBOOKS["evaluate"])
        del held["schema"]
        return cls(**held)

    def table(self) -> pd.DataFrame:
        """A row a variant: what a notebook shows. Sizes in GB (10⁹ bytes), losses in nats a token."""
        return pd.DataFrame([_table_row(one) for one in self.variants.values()], index=list(self.variants))


def _table_row(one: Mapping[str, Any]) -> dict[str, Any]:
    delta = one.get("delta", {})
    return {
        "variant": one["label"],
        "GB": one["bytes"] / 1e9,
        "matrix bits": one["matrix_bits"],
        "perplexity": one["perplexity"],
        "Δ loss": delta.get("mean", 0.0),
        "Δ low": delta.get("low", 0.0),
        "Δ high": delta.get("high", 0.0),
        "KL": one["kl_mean"],
        "KL 99.9 %": one["kl_p999"],
        "same top-1": one["same_top1"],
        "predicted KL": one["predicted_kl"],
    }


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
    prompt: str = "The capital of France is",
    lm_eval_tasks: Sequence[str] = (),
    lm_eval_limit: int = 200,
    force: bool = False,
) -> Evaluation:
    """Score the run's checkpoint beside its controls, and write evaluation.json.

    Args:
        run: a run with layers.csv, plan.json and model/. source: the model that it belongs to.
        profile: "quick" or "full"; `windows`, `length` (tokens a window, start token included) and
            `controls` (keys of `controls.FULL`) replace its parts.
        texts, start_token: as `texts.load_texts` and `texts.start_token` take them; the first text is the
            headline.
        seed: of the random controls (seed … seed + random_seeds − 1), the noise and the bootstrap.
        rivals: further checkpoints that transformers loads: folders or Hub ids.
        speed_repeats: timed generations of the saved checkpoint and of the 16-bit model; 0 leaves speed and
            the sample of text out. prompt: what the saved checkpoint continues.
        lm_eval_tasks: multiple-choice tasks for lm-evaluation-harness, `lm_eval_limit` samples each.
        force: do it again even if the same evaluation is there.

    Raises:
        EvaluationError: bad profile, control, text, window or rival; logits that are not numbers.
        RunError: an earlier stage is missing. CheckpointError: model/ isn't what the plan says.
    """
    settings = _settings(profile, windows, length, controls) | {
        "start_token": start_token,
        "random_seeds": random_seeds,
        "seed": seed,
        "rivals": [str(rival) for rival in rivals],
        "lm_eval": [*lm_eval_tasks, lm_eval_limit] if lm_eval_tasks else [],
        **_where(device, dtype),
    }
    job = _prepare(run, source, settings, texts)
    # An upgrade of this package alone doesn't void an evaluation; its file says which code made it.
    hashes = {name: value for name, value in job.hashes.items() if name != "code"}
    inputs = {**settings, "hashes": hashes, "speed_repeats": speed_repeats, "prompt": prompt}
    with runs.stage(run, "evaluate", inputs, ["evaluation.json"], force=force) as stage:
        if stage.finished:
            return Evaluation.read(run.evaluation_json)
        evaluation = _evaluate(job, stage)
        evaluation.write(run.evaluation_json)
        if speed_repeats:
            stage.record(speed=measure_run(run.model_dir, source, settings, speed_repeats, prompt))
    return evaluation


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


@dataclass(frozen=True)
class _Job:
    """Everything that an evaluation needs to begin, read and checked before any scoring."""

    run: runs.Run
    source: ModelSource
    settings: dict[str, Any]
    layers: pd.DataFrame
    plan: ProtectionPlan
    variants: dict[str, Variant]
    skipped: dict[str, str]
    texts: list[Text]
    rivals: list[Rival]
    hashes: dict[str, str]


def _prepare(
    run: runs.Run, source: ModelSource, settings: dict[str, Any], texts: str | Path | Sequence[str | Path]
) -> _Job:
    from spi_utils.rivals import find_rivals
    from spi_utils.texts import load_texts

    layers = runs.read_layers(run)
    plan = ProtectionPlan.read(run.plan_json, model=source.identity())
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
    return _Job(run, source, settings, layers, plan, variants, skipped, loaded, rivals, hashes)


def _hashes(
    run: runs.Run, source: ModelSource, texts: Sequence[Text], rivals: Sequence[Rival]
) -> dict[str, str]:
    """SHA-256 of everything that the numbers depend on."""
    from spi_utils.saved import checkpoint_hash

    return {
        "weights": source.sha256,
        "layers": runs.layers_fingerprint(run),
        "plan": runs.sha256_file(run.plan_json),
        "checkpoint": checkpoint_hash(run.model_dir),
        "code": code_hash(),
        **{f"text:{text.name}": text.sha256 for text in texts},
        **{rival.key: checkpoint_hash(rival.directory) for rival in rivals},
    }


def code_hash() -> str:
    """SHA-256 over the package's version and its modules' sources, in name order."""
    total = hashlib.sha256(spi_utils.__version__.encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):
        total.update(f"{file.name} {runs.sha256_file(file)}\n".encode())
    return total.hexdigest()


def _evaluate(job: _Job, stage: runs.Stage) -> Evaluation:
    """Score, compute the numbers and audit the claim."""
    import torch

    from spi_utils.session import Session, make_samples

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
        folder=job.run.partial / "evaluate",
        device=torch.device(settings["device"]),
        dtype=getattr(torch, settings["dtype"]),
        double_quant=job.plan.double_quant,
        seed=settings["seed"],
    )
    scores = session.score()
    evaluation = _assemble(job, session, scores)
    if settings["lm_eval"]:
        from spi_utils.tasks import score_tasks

        *names, limit = settings["lm_eval"]
        evaluation = replace(evaluation, tasks=score_tasks(session, names, limit))
    stage.record(seconds_by_variant={key: round(value, 3) for key, value in session.seconds.items()})
    return replace(evaluation, claims=audit(evaluation))


def _assemble(job: _Job, session: Session, scores: Mapping[str, list[TokenScores]]) -> Evaluation:
    """The evaluation without the audit."""
    first, *others = (
        {"text": _text_info(sample), "variants": _numbers(job, sample, {k: v[i] for k, v in scores.items()})}
        for i, sample in enumerate(session.samples)
    )
    return Evaluation(
        model=job.source.identity(),
        plan=_plan_info(job),
        settings=job.settings,
        text=first["text"],
        variants=first["variants"],
        other_texts=others,
        skipped=job.skipped,
        checkpoint=session.checkpoint(),
        checkpoint_sha256=job.hashes["checkpoint"],
        hashes=job.hashes,
        kernel=_kernel(job.settings),
    )


def _text_info(sample: Sample) -> dict[str, Any]:
    windows, length = sample.ids.shape
    return {
        "name": sample.text.name,
        "source": sample.text.source,
        "sha256": sample.text.sha256,
        "tokens": windows * (length - 1),
        "windows": windows,
        "window_length": length,
        "start_token": sample.start,
        **measures.count_text(sample.pieces),
        "convention": CONVENTION,
    }


def _numbers(job: _Job, sample: Sample, scores: Mapping[str, TokenScores]) -> dict[str, dict[str, Any]]:
    counts = measures.count_text(sample.pieces)
    numbers = {key: measures.variant_numbers(one, counts) for key, one in scores.items()}
    equal = [key for key, variant in job.variants.items() if variant.equal_bytes]
    measures.compare(numbers, equal, seed=job.settings["seed"])
    described = {key: _describe(variant) for key, variant in job.variants.items()}
    described |= {rival.key: _describe_rival(rival, job.layers) for rival in job.rivals}
    return {key: described[key] | numbers[key] for key in numbers}


def _describe(variant: Variant) -> dict[str, Any]:
    kept = asdict(variant)
    formats = kept.pop("formats")
    del kept["key"]
    return kept | {
        "layers": {fmt: list(formats.values()).count(fmt) for fmt in sorted(set(formats.values()))}
    }


def _describe_rival(rival: Rival, layers: pd.DataFrame) -> dict[str, Any]:
    """A rival's size is what lies on disk; how its matrices are packed is its own affair."""
    return {
        "label": f"{rival.key.removeprefix('rival:')} ({rival.method})",
        "bytes": rival.bytes,
        "bits_per_weight": 8 * rival.bytes / int(layers["numel"].sum()),
        "matrix_bits": None,
        "predicted_kl": None,
        "equal_bytes": False,
        "bytes_miss": 0.0,
        "layers": {},
    }


def _plan_info(job: _Job) -> dict[str, Any]:
    """What the plan keeps, in numbers that the audit needs."""
    from spi_utils.saved import disk_bytes

    plan, layers = job.plan, job.layers
    planned = layers[layers["quantizable"]]
    kept = planned["name"].isin(plan.protected)
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
        "bytes_on_disk": disk_bytes(job.run.model_dir),
        "bits_per_weight": plan.bits_per_weight,
        "matrix_bits": plan.matrix_bits,
        "predicted_kl": plan.predicted_kl,
    }


def _kernel(settings: Mapping[str, Any]) -> str:
    place = "CUDA" if settings["device"].startswith("cuda") else "CPU"
    return (
        f"NF4 dequantized by bitsandbytes ({place}), rounded to the storage dtype; products by torch in "
        f"{settings['dtype']} on the {place}; log-softmax in float32"
    )
