"""evaluation.json: what it holds, and how it is put together from token scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from spi_utils import runs
from spi_utils.checkpoint import disk_bytes
from spi_utils.errors import RunError
from spi_utils.judging import measures
from spi_utils.judging.controls import Variant
from spi_utils.plan import ProtectionPlan

if TYPE_CHECKING:
    from spi_utils.judging.rivals import Rival
    from spi_utils.judging.session import Sample, Session
    from spi_utils.models import ModelSource
    from spi_utils.scoring import TokenScores
    from spi_utils.texts import Text

SCHEMA = 1
STOCK_WINDOWS = 4  # of the first text, its own first ones, that the model as loaded is scored on
KINDS: dict[str, type] = {"dict": dict, "list": list, "str": str}  # what JSON makes of a field's type
CONVENTION = (
    "disjoint windows of one length, spread evenly over the text; the model sees only its window, which "
    "begins with the start token; every later token is predicted once; natural logarithms"
)


@dataclass(frozen=True)
class Evaluation:
    """The content of evaluation.json.

    `model` is the source's identity, `plan` what the plan keeps and weighs, `settings` what was asked for,
    `text` the first text and its windows, `variants` {key: numbers} on it (`measures.py` defines them),
    `other_texts` [{"text", "variants"}] the same on further texts, `skipped` {control: why},
    `checkpoint` what the saved file was found to hold and `checkpoint_sha256` which file that was, `hashes`
    of everything that went in, `kernel` which arithmetic ran, `tasks` multiple-choice scores, `claims` the
    audit's rows, `stock` what the model as loaded gave (`stock.py`; empty in evaluations of before).
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
    stock: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write evaluation.json atomically."""
        runs.write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Evaluation:
        """Read evaluation.json; RunError if it is missing, truncated, damaged or of another schema."""
        held = runs.read_json(path, SCHEMA, "evaluation", runs.NOTEBOOKS["evaluate"])
        del held["schema"]
        names = {one.name for one in fields(cls)}
        needed = {one.name for one in fields(cls) if one.default_factory is MISSING}
        if odd := sorted(needed - held.keys()) + sorted(held.keys() - names):
            raise RunError(
                f"{path}: this evaluation lacks entries or has unknown ones: {', '.join(odd)}. "
                f"Run notebook {runs.NOTEBOOKS['evaluate']} again with force=True."
            )
        kinds = {one.name: KINDS[str(one.type).split("[", maxsplit=1)[0]] for one in fields(cls)}
        if wrong := next((name for name, value in held.items() if not isinstance(value, kinds[name])), None):
            raise RunError(
                f"{path}: {wrong!r} should be a {kinds[wrong].__name__}, found {held[wrong]!r:.60}. "
                f"Run notebook {runs.NOTEBOOKS['evaluate']} again with force=True."
            )
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


@dataclass(frozen=True)
class Job:
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


def assemble(job: Job, session: Session, scores: Mapping[str, list[TokenScores]]) -> Evaluation:
    """The evaluation without tasks and audit.

    scores {variant: token scores on each of the session's samples}.
    """
    first, *others = (
        {"text": _text_info(sample), "variants": _numbers(job, sample, {k: v[i] for k, v in scores.items()})}
        for i, sample in enumerate(session.samples)
    )
    return Evaluation(
        model=job.source.identity(),
        plan=_plan_info(job),
        settings={**job.settings, "rivals": [_public_name(rival) for rival in job.rivals]},
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


def _numbers(job: Job, sample: Sample, scores: Mapping[str, TokenScores]) -> dict[str, dict[str, Any]]:
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


def _public_name(rival: Rival) -> str:
    """A rival's Hub id, or its folder's name: evaluation.json is published, a path of this machine is not."""
    return rival.key.removeprefix("rival:") if Path(rival.spec).expanduser().exists() else rival.spec


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


def _plan_info(job: Job) -> dict[str, Any]:
    """What the plan keeps, in numbers that the audit needs."""
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
        "dearest": _dearest(plan, planned),
    }


def _dearest(plan: ProtectionPlan, planned: pd.DataFrame) -> dict[str, Any] | None:
    """The layer whose format is predicted to cost most of those that the plan quantized; None if unknown."""
    costs = [
        (float(row[f"predicted_{fmt}"]), row["name"], fmt)
        for _, row in planned.iterrows()
        if (fmt := plan.formats[row["name"]]) != "16bit" and np.isfinite(row.get(f"predicted_{fmt}", np.nan))
    ]
    if not costs:
        return None
    kl, name, fmt = max(costs)
    return {"name": name, "format": fmt, "predicted_kl": kl}


def _kernel(settings: Mapping[str, Any]) -> str:
    place = "CUDA" if settings["device"].startswith("cuda") else "CPU"
    return (
        f"NF4 dequantized by bitsandbytes ({place}), int4 and int8 as compressed-tensors decompresses them, "
        "rounded to the storage dtype; products by torch in "
        f"{settings['dtype']} on the {place}; log-softmax in float32"
    )
