"""What a model card says: the base's licence, read and never guessed, and what the run measured and made.

A quantized checkpoint is a derivative of its base, so the base's licence decides whether it may be passed on.
It is read from the base's own card or licence file; where it can't be read the answer is "unknown", and a
person has to state it. The card's text is one template, `card.md.jinja`; every number in it comes from the
run's own files, so that two rehearsals of one run give the same card.
"""

from __future__ import annotations

import re
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spi_utils.claims import Evaluation, headline_of
from spi_utils.errors import ModelError, PublishError
from spi_utils.models import is_transport_error, weights_hash
from spi_utils.plan import (
    AUTO_GROUP,
    RULES,
    SCORES,
    TIERS,
    ProtectionPlan,
    fused_groups,
    held_words,
    nominal_bits,
)
from spi_utils.platforms import repository_url
from spi_utils.presets import PRESETS
from spi_utils.rounding import guidable
from spi_utils.stats import Estimate, verdict

if TYPE_CHECKING:
    import pandas as pd
    from huggingface_hub import ModelCard

# --- the licence -----------------------------------------------------------------------------------------

# What the card of the bundled model's base says; the bundled file's own metadata say the same.
BUNDLED_CARD = {"license": "apache-2.0", "language": ["en"]}

# Licence ids of the Hub that forbid passing on a changed work.
FORBIDDING = re.compile(r"(^|-)nd(-|$)|no-?deriv|^unlicensed$|^proprietary$|all-rights-reserved")

# Parts of ids that allow it under conditions, which the publisher has to meet.
CONDITIONS = {
    "llama": "Meta's Llama licence: the repository's name must begin with “Llama”, and “Built with Llama”, "
    "the licence and its notice must be shown.",
    "gemma": "Gemma's terms of use, its use restrictions included, must be passed on.",
    "cc-by-nc": "Non-commercial use only.",
    "openrail": "The use restrictions of the OpenRAIL licence must be passed on.",
}

# Ids of the Hub, as its model cards may name them; any other name is no licence that is known here.
KNOWN = frozenset(
    {
        "apache-2.0", "mit", "openrail", "openrail++", "bigscience-openrail-m", "creativeml-openrail-m",
        "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
        "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0",
        "cc-by-2.5", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0",
        "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
        "cdla-sharing-1.0", "cdla-permissive-1.0", "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0",
        "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2", "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0",
        "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "ms-pl", "mpl-2.0", "odc-by", "odbl", "openmdw-1.0",
        "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense", "zlib", "pddl", "lgpl-lr", "lppl-1.3c",
        "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4", "gemma", "grok2-community",
    }
)  # fmt: skip

# First words of licence files, for bases that state no id.
TEXTS = {
    "apache-2.0": "apache license version 2.0",
    "mit": "permission is hereby granted, free of charge, to any person obtaining a copy",
    "gpl-3.0": "gnu general public license version 3",
}
TITLE_WITHIN = 250  # characters, copyright lines before it included
# Words that take something back, and that none of the licences of TEXTS holds.
RESTRICTING = re.compile(
    r"\bnon[- ]*commercial\b|\bcommercial (use|purposes?|exploitation)\b|\bnot\b[^.]{0,60}\bcommercially\b|"
    r"\b(research|academic|evaluation|educational|personal) (use|purposes?)\b|\bcommons clause\b|"
    r"\bno[- ]?deriv|\bacceptable use\b|\buse restrictions?\b|\bmonthly active users\b|\bprohibited\b|"
    r"\byou may not use (the|this|these|our) (software|model|weights|work)"
)


@dataclass(frozen=True)
class Licence:
    """A licence id as the Hub spells it (None: unknown), where it was found, and what it asks for."""

    id: str | None
    found: str
    stated: bool = False  # by the person who publishes, not found in the base

    @property
    def forbids(self) -> bool:
        """True where the base's licence allows no derivative."""
        return self.id is not None and bool(FORBIDDING.search(self.id.lower()))

    @property
    def usable(self) -> bool:
        """True where publishing may go on: a known licence that allows it, or a person's own statement."""
        return self.stated or ((self.id or "").lower() in KNOWN and not self.forbids)

    @property
    def condition(self) -> str | None:
        """What the licence asks of the publisher, in a sentence; None for nothing beyond the usual notice."""
        name = (self.id or "").lower()
        return next((text for part, text in CONDITIONS.items() if part in name), None)


def read_base(
    identity: Mapping[str, Any],
    model_dir: Path,
    allow: str | None = None,
    *,
    location: str | None = None,
    ask: bool = True,
) -> tuple[Licence, list[str]]:
    """The base's licence, and the languages that its card names (none are guessed).

    Args:
        identity: `run.json["model"]`.
        model_dir: the checkpoint's folder, which the base's licence file may have travelled to.
        allow: a licence id that the publisher states; it overrides what is found, and is recorded as stated.
        location: `run.json["location"]`: where a local base lies; read only if it still holds that base.
        ask: ask the Hub where nothing on this machine tells the licence.
    """
    cards = list(_cards_here(identity, model_dir, location))
    licence = next(filter(None, (_licence_of(*card) for card in cards)), None)
    if licence is None and identity["kind"] != "hub":
        licence = Licence(None, "no licence file and no model card with a licence beside the weights")
    elif licence is None and not ask:
        missing = f"the card of {identity['id']} is not in this machine's cache"
        licence = Licence(None, f"a rehearsal asks nobody, and {missing}")
    elif licence is None:
        where = f"the card of {identity['id']}"
        try:
            cards.append((_hub_card(identity["id"], identity.get("revision")), where))
            licence = _licence_of(*cards[-1]) or Licence(None, f"{where} has none")
        except Exception as error:
            if not is_transport_error(error):
                raise
            licence = Licence(None, f"the Hub could not be asked for {where} ({type(error).__name__})")
    if allow is not None:
        said = f"the base says {licence.id}" if licence.id else "none was found in the base"
        licence = Licence(allow, f"stated by the publisher ({said})", stated=True)
    return licence, next(filter(None, (_languages_of(data) for data, _ in cards)), [])


def _cards_here(
    identity: Mapping[str, Any], model_dir: Path, location: str | None
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """(YAML of a card or of what a licence file is, where that was read), without the network."""
    from huggingface_hub import try_to_load_from_cache

    if identity["kind"] == "bundled":
        yield BUNDLED_CARD, f"the card of {identity['id']}"
        return
    yield from _cards_of_folder(model_dir, "the base's model card")
    if identity["kind"] == "local" and location:
        beside = list(_cards_of_folder(Path(location), "the base's model card"))
        if beside and _holds(Path(location), identity["sha256"]):
            yield from beside
    if identity["kind"] == "hub":
        card = try_to_load_from_cache(identity["id"], "README.md", revision=identity.get("revision"))
        if isinstance(card, str):
            yield _yaml_of(Path(card)), f"the card of {identity['id']}"


def _cards_of_folder(folder: Path, where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The card of a folder, then its licence file; of several files each must be one that is known."""
    if (folder / "README.md").is_file():
        yield _yaml_of(folder / "README.md"), where
    files = sorted(folder.glob("LICEN[CS]E*"))
    names = [_licence_of_words(path) for path in files]
    if files and all(names):
        yield {"license": names[0]}, f"the base's file {files[0].name}"


def _yaml_of(card: Path) -> Mapping[str, Any]:
    from huggingface_hub import ModelCard

    return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()


def _holds(folder: Path, sha256: str) -> bool:
    """Whether a folder's weights still are those that were analysed: another model lends no licence."""
    try:
        return folder.is_absolute() and weights_hash(folder) == sha256
    except ModelError:  # its weights are gone, or no longer whole: not that base
        return False


def _licence_of_words(path: Path) -> str | None:
    """The id of a licence file that begins with a licence's title and adds no restriction to it."""
    words = " ".join(path.read_text(encoding="utf-8", errors="replace").lower().split())
    if RESTRICTING.search(words):
        return None
    places = {name: words.find(start) for name, start in TEXTS.items()}
    titled = (name for name, place in places.items() if 0 <= place < TITLE_WITHIN)
    return next((name for name in titled if " not " not in f" {words[: places[name]]}"), None)


def _hub_card(model_id: str, revision: str | None) -> Mapping[str, Any]:
    """The YAML of the base's card on the Hub."""
    from huggingface_hub import HfApi

    data = HfApi().model_info(model_id, revision=revision).card_data
    return {} if data is None else data.to_dict()


def _licence_of(data: Mapping[str, Any], where: str) -> Licence | None:
    value = data.get("license")
    named = [str(one) for one in (value if isinstance(value, list) else [value]) if one]
    if named == ["other"]:  # the name beside it says more
        named = [str(data.get("license_name") or "other")]
    found = [Licence(one, where) for one in named]
    # All of several must allow it: the first that doesn't speaks for them.
    return next((one for one in found if not one.usable), found[0]) if found else None


def _languages_of(data: Mapping[str, Any]) -> list[str]:
    value = data.get("language")
    return [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str) and one]


# --- the card --------------------------------------------------------------------------------------------

TAGS = ("mixed-precision", "quantized", "spectral-analysis")
BACKEND_TAGS = {
    "bitsandbytes": ("nf4", "bitsandbytes", "4-bit"),
    "compressed-tensors": ("compressed-tensors",),
}
# What a text's source is called on the Hub: (dataset id, config, split).
DATASETS = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}
# Rows of the table by variant key; "random" stands for the mean over its seeds.
ROWS = {
    "reference": "16-bit (the base)",
    "nf4": "NF4 everywhere",
    "nf4_nearest": "NF4 everywhere, rounded to nearest as bitsandbytes does",
    "plan": "**this model**",
    "plan_nearest": "this model's layers, rounded to nearest as bitsandbytes does",
    "random": "random layers, equal bytes",
    "other_direction": "the score's other end, equal bytes",
    "fisher": "chosen by Fisher information, equal bytes",
    "fisher_int8": "chosen by Fisher information from NF4, 8-bit and 16-bit, equal bytes",
    "fisher_int4": "chosen by Fisher information from 4-bit integers, 8-bit and 16-bit, equal bytes",
    "int8": "8-bit everywhere",
    "int4": "4-bit integers (groups of 64) everywhere",
}
AVERAGED = ("bytes", "perplexity", "kl_mean", "kl_p999", "same_top1")
EQUAL_BYTES = 0.005  # "equal bytes" as the evaluation's controls mean it
# (pattern below figures/, what it shows); the first match of each is shown.
FIGURES = (("*plan*.png", "Which layers stay in 16-bit."), ("*bytes*.png", "Quality against bytes."))


def base_of(identity: Mapping[str, Any]) -> tuple[str | None, str]:
    """The base's id on the Hub (None where it has none), and its name: never a path of this machine."""
    base = str(identity["id"]) if identity["kind"] in ("hub", "bundled") else None
    return base, base or Path(str(identity["id"])).name


def make_card(
    repo_id: str,
    plan: ProtectionPlan,
    evaluation: Evaluation,
    layers: pd.DataFrame,
    *,
    identity: Mapping[str, Any],
    licence: Licence,
    languages: Sequence[str] = (),
    figures: Sequence[str] = (),
    file_bytes: int,
    remote_code: bool = False,
) -> ModelCard:
    """The card, its YAML built and checked by huggingface_hub.

    Args:
        repo_id: the repository's `owner/name`.
        layers: the layer table.
        identity: `run.json["model"]`.
        figures: paths relative to the repository.
        file_bytes: size of the safetensors files.
        remote_code: the checkpoint runs code of its own.

    Raises:
        PublishError: the YAML doesn't survive being written and read again.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData
    from jinja2 import Environment, PackageLoader, StrictUndefined

    base, base_name = base_of(identity)
    lower = sorted(set(plan.formats.values()) - {"16bit"}, key=nominal_bits)
    backend = "bitsandbytes" if set(lower) <= {"nf4"} else "compressed-tensors"
    text, own = evaluation.text, evaluation.variants["plan"]
    source = str(text.get("name") or text["source"])
    dataset, config, split = DATASETS.get(source, (source, None, None))
    measured = {
        "perplexity": ("Perplexity", own["perplexity"]),
        "kl_divergence": ("Mean KL to the 16-bit base, nats a token", own["kl_mean"]),
    }
    known = licence.id is None or licence.id.lower() in KNOWN
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        license=(licence.id or "unknown") if known else "other",
        license_name=None if known else licence.id,
        license_link=None if known else "LICENSE",
        language=list(languages) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            *(BACKEND_TAGS[backend] if lower else ()),
            *(tag for tag in ("int4", "int8") if any(fmt.startswith(tag) for fmt in lower)),
            *TAGS,
            plan.score,
        ],
        datasets=[dataset] if source in DATASETS else None,
        model_name=repo_id.rsplit("/", maxsplit=1)[-1],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type=dataset,
                dataset_name=source,
                dataset_config=config,
                dataset_split=split,
                metric_type=kind,
                metric_name=label,
                metric_value=round(float(value), 5),
                metric_args={"convention": str(text["convention"])},
            )
            for kind, (label, value) in measured.items()
        ],
    )
    planned = layers[layers["quantizable"]]
    held = planned["name"].map(plan.formats)
    used = sorted(set(held), key=nominal_bits, reverse=True)
    depths = sorted(planned.loc[held == "16bit", "depth"].unique())
    widths = zip(held, planned["cols"], strict=True)
    guided = {fmt for fmt, cols in widths if plan.rounding == "guided" and guidable(fmt, int(cols))}
    preset, command = _recipe(plan, backend, identity)
    options: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    templates = Environment(loader=PackageLoader("spi_utils", "."), **options)
    body = templates.get_template("card.md.jinja").render(
        repo_id=repo_id,
        base=base,
        base_name=base_name,
        identity=identity,
        licence=licence,
        plan=plan,
        evaluation=evaluation,
        headline=headline_of(evaluation),
        source=source,
        rows=_rows(evaluation.variants),
        better=_better(evaluation.variants),
        verdict=_verdict(own),
        parameters=int(layers["numel"].sum()),
        file_bytes=file_bytes,
        lower=lower,
        packages=["transformers", "accelerate", *([backend] if lower else [])],
        backend=backend,
        remote_code=remote_code,
        torn=_torn(plan, backend) if lower else [],
        held=held_words(plan.formats.values()),
        guided=held_words(guided),
        nearest=held_words(set(lower) - guided),
        score_title=SCORES[plan.score].title,
        rule_title=RULES[plan.rule].title,
        preset=preset,
        command=command,
        span=[depths[0], depths[-1]] if depths else [],
        used=used,
        types=[
            (kind, [int((of == fmt).sum()) for fmt in used])
            for kind, of in held.groupby(planned["type"], sort=False)
        ],
        figures=shown_figures(figures),
        repository=repository_url(),
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")
    if card.data.to_dict() != data.to_dict():
        raise PublishError(
            f"the card's YAML reads back differently from what was written for {repo_id}: "
            f"{data.to_dict()} became {card.data.to_dict()}. Please report this with the run's plan.json."
        )
    return card


def _rows(variants: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """(label, numbers) of each row; the mean over random draws holds the range of their Δ loss as `range`."""
    draws = [one for key, one in variants.items() if key.startswith("random_")]
    means: dict[str, Any] = {}
    if draws:
        means = {name: statistics.fmean(draw[name] for draw in draws) for name in AVERAGED}
        deltas = [draw["delta"]["mean"] for draw in draws]
        means["range"] = (statistics.fmean(deltas), min(deltas), max(deltas))
    held = {**variants, "random": means}
    labels = ROWS | {"random": f"{ROWS['random']} (mean of {len(draws)})"}
    return [(labels[key], held[key]) for key in ROWS if held.get(key)]


def _better(variants: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Rows of the table that are no larger than this model and nearer to the base."""
    own = variants["plan"]
    return [
        label
        for key, label in ROWS.items()
        if key in variants and key != "plan"
        if variants[key]["bytes"] <= own["bytes"] * (1 + EQUAL_BYTES)
        if variants[key]["kl_mean"] < own["kl_mean"]
    ]


def _verdict(own: Mapping[str, Any]) -> str | None:
    """What `stats.verdict` says of "a lower KL than random choices"; None where there were none."""
    held = own.get("vs_random")
    return None if held is None else verdict(Estimate.from_dict(held["kl"]), "lower")


def _torn(plan: ProtectionPlan, backend: str) -> list[str]:
    """The first group of matrices that vLLM merges and could not load from this file; empty if there is none.

    By its public source, which was read and not run. compressed-tensors: merged layers must share a format
    (compressed_tensors/utils.py, should_ignore_layer). bitsandbytes: layers that stay in 16-bit are looked up
    by the merged layer's own name, which no checkpoint lists (vllm-bnb-plugin 0.0.3, is_layer_skipped_bnb).
    """
    names = list(plan.formats)
    for group in fused_groups(names):
        formats = {plan.formats[names[place]] for place in group}
        if len(group) > 1 and (len(formats) > 1 or (backend == "bitsandbytes" and formats != {"nf4"})):
            return [names[place] for place in group]
    return []


def _choices(plan: ProtectionPlan, backend: str) -> dict[str, Any]:
    """The parameters that make this plan: score, rule, rounding and whatever differs from the defaults."""
    given: dict[str, Any] = {"score": plan.score, "direction": plan.direction, "rule": plan.rule}
    if plan.rule != "claim":
        given["value"] = plan.value
    given |= {"backend": backend, "rounding": plan.rounding}
    # With a menu of just the formats in use a budget's best plan is the same one.
    spends = plan.rule == "max_kl" or bool(RULES[plan.rule].unit)
    adds_up = SCORES[plan.score].additive and plan.direction == "high"
    menu = {*plan.formats.values(), "16bit"}
    if menu != set(TIERS[backend][1 if adds_up and spends else 0]):
        given["formats"] = sorted(menu, key=nominal_bits)
    if plan.double_quant:
        given["double_quant"] = "true"
    if plan.options.get("group", AUTO_GROUP[backend]) != AUTO_GROUP[backend]:
        given["group"] = plan.options["group"] or "none"
    wishes = {name: plan.options.get(name) for name in ("force_16bit", "forbid_16bit", "seed")}
    return given | {name: value for name, value in wishes.items() if value}


def _recipe(plan: ProtectionPlan, backend: str, identity: Mapping[str, Any]) -> tuple[str | None, str]:
    """The preset whose choices this plan's are, and the command that makes such a file."""
    given = _choices(plan, backend)
    set_by = {name: {k: v for k, v in row.items() if v not in (None, [])} for name, row in PRESETS.items()}
    preset = next((name for name, row in set_by.items() if row == given), None)
    names = {"bundled": "bundled", "hub": str(identity["id"])}
    source: dict[str, Any] = {"model": names.get(identity["kind"], "MODEL")}
    if identity["kind"] == "hub" and identity.get("revision"):
        source["revision"] = identity["revision"]
    asked = source | (given if preset is None else {"preset": preset})
    return preset, "python -m spi_utils run " + " ".join(f"-p {name} {_word(v)}" for name, v in asked.items())


def _word(value: Any) -> str:
    """A parameter's value as a shell takes it."""
    if isinstance(value, list | tuple):
        return shlex.quote(f"[{', '.join(map(str, value))}]")
    return shlex.quote(str(int(value) if isinstance(value, float) and value.is_integer() else value))


def shown_figures(figures: Sequence[str]) -> list[tuple[str, str]]:
    """The figures that the card shows, with their captions."""
    found = ((next((one for one in figures if Path(one).match(pattern)), None), c) for pattern, c in FIGURES)
    return [(path, caption) for path, caption in found if path is not None]
