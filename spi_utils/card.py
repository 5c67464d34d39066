"""What a model card says: the base's licence, read and never guessed, and what the run measured and made.

A quantized checkpoint is a derivative of its base, so the base's licence decides whether it may be passed on.
It is read from the base's own card; where that doesn't tell, the answer is "unknown", and a person has to
state it. The card's text is one template, `card.md.jinja`; every number in it comes from the run's own files,
so that two rehearsals of one run give the same card.
"""

from __future__ import annotations

import contextlib
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from jinja2 import Environment, PackageLoader, StrictUndefined

from spi_utils.claims import Evaluation, headline_of, stock_sentence
from spi_utils.errors import ModelError
from spi_utils.models import weights_hash
from spi_utils.plan import AUTO_GROUP, RULES, SCORES, ProtectionPlan, held_words, nominal_bits
from spi_utils.platforms import repository_url
from spi_utils.runs import Run, read_json, read_layers, run_info, typed_model

# --- the licence -----------------------------------------------------------------------------------------

# What the card of the bundled model's base says; the bundled file's own metadata say the same.
BUNDLED_CARD = {"license": "apache-2.0", "language": ["en"]}

# Licence ids of the Hub that forbid passing on a changed work.
FORBIDDING = re.compile(r"(^|-)nd(-|$)|no-?deriv|^unlicensed$|^proprietary$|all-rights-reserved")

# Parts of ids that allow it under conditions, which the publisher has to meet.
CONDITIONS = {
    "llama": "The repository's name must begin with “Llama”, “Built with Llama” and the licence be shown.",
    "gemma": "Gemma's terms of use, its use restrictions included, must be passed on.",
    "cc-by-nc": "Non-commercial use only.",
    "openrail": "The use restrictions of the OpenRAIL licence must be passed on.",
}

# Ids of the Hub, as its model cards may name them; any other name is no licence that is known here.
KNOWN = {
    "apache-2.0", "mit", "openrail", "openrail++", "bigscience-openrail-m", "creativeml-openrail-m",
    "bigscience-bloom-rail-1.0", "bigcode-openrail-m", "afl-3.0", "artistic-2.0", "bsl-1.0", "bsd",
    "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear", "c-uda", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "cdla-sharing-1.0", "cdla-permissive-1.0",
    "cdla-permissive-2.0", "wtfpl", "ecl-2.0", "epl-1.0", "epl-2.0", "etalab-2.0", "eupl-1.1", "eupl-1.2",
    "agpl-3.0", "gfdl", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "ms-pl",
    "mpl-2.0", "odc-by", "odbl", "openmdw-1.0", "osl-3.0", "postgresql", "ofl-1.1", "ncsa", "unlicense",
    "zlib", "pddl", "lgpl-lr", "lppl-1.3c", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3", "llama4",
    "gemma", "grok2-community",
}  # fmt: skip


@dataclass(frozen=True)
class Licence:
    """A licence id as the Hub spells it (None: unknown), where it was found, and what it asks for."""

    id: str | None
    found: str
    stated: bool = False  # by the person who publishes, not found in the base

    @property
    def forbids(self) -> bool:
        """True where the base's licence allows no derivative."""
        return bool(FORBIDDING.search((self.id or "").lower()))

    @property
    def usable(self) -> bool:
        """True where publishing may go on: a known licence that allows it, or a person's own statement."""
        return self.stated or ((self.id or "").lower() in KNOWN and not self.forbids)

    @property
    def condition(self) -> str | None:
        """What the licence asks of the publisher, in a sentence; None for nothing beyond the usual notice."""
        return next((text for part, text in CONDITIONS.items() if part in (self.id or "").lower()), None)


def read_base(
    identity: Mapping[str, Any], location: str | None = None, allow: str | None = None, *, ask: bool = True
) -> tuple[Licence, list[str]]:
    """The base's licence, and the languages that its card names (none are guessed).

    Args:
        identity: `run.json["model"]`.
        location: `run.json["location"]`: where a local base lies; its card is read only if the weights there
            still are that base's: another model lends no licence.
        allow: a licence id that the publisher states; it overrides what is found, and is recorded as stated.
        ask: ask the Hub for a card that is not in this machine's cache.
    """
    where, data = f"the card of {identity['id']}", {}
    why = "no model card with a licence beside the weights"
    if identity["kind"] == "bundled":
        data = BUNDLED_CARD
    elif identity["kind"] == "hub":
        try:
            revision = identity.get("revision")
            file = hf_hub_download(identity["id"], "README.md", revision=revision, local_files_only=not ask)
            data, why = _yaml_of(file), f"{where} has none"
        except (EntryNotFoundError, HfHubHTTPError) as error:
            why = f"a rehearsal asks nobody, and {where} is not in this machine's cache"
            why = f"the Hub could not be asked for {where} ({type(error).__name__})" if ask else why
    elif location and Path(location).is_absolute() and Path(location, "README.md").is_file():
        with contextlib.suppress(ModelError):  # its weights are gone, or no longer whole: not that base
            if weights_hash(Path(location)) == identity["sha256"]:
                data = _yaml_of(Path(location, "README.md"))
    named = _listed(data.get("license"))
    if named == ["other"]:  # the name beside it says more
        named = [str(data.get("license_name") or "other")]
    found = [Licence(one, where) for one in named] or [Licence(None, why)]
    # All of several must allow it: the first that doesn't speaks for them.
    licence = next((one for one in found if not one.usable), found[0])
    if allow is not None:
        said = f"the base says {licence.id}" if licence.id else "none was found in the base"
        licence = Licence(allow, f"stated by the publisher ({said})", stated=True)
    return licence, _listed(data.get("language"))


def _yaml_of(card: str | Path) -> dict[str, Any]:
    return ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()


def _listed(value: Any) -> list[str]:
    """An entry of a card that may be one or several, as a list."""
    return [str(one) for one in (value if isinstance(value, list) else [value]) if one]


# --- the card --------------------------------------------------------------------------------------------

# What a text's source is called on the Hub: (dataset id, config, split).
DATASETS = {"wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")}
# (pattern below figures/, what it shows); the first match of each is shown.
FIGURES = (("*plan*.png", "Which layers stay in 16-bit."), ("*bytes*.png", "Quality against bytes."))
METRICS = (  # the Hub's kind, its name, entry of evaluation.json
    ("perplexity", "Perplexity", "perplexity"),
    ("kl_divergence", "Mean KL to the 16-bit base, nats a token", "kl_mean"),
)


def base_of(identity: Mapping[str, Any]) -> tuple[str | None, str]:
    """The base's id on the Hub (None where it has none), and its name: never a path of this machine."""
    base = str(identity["id"]) if identity["kind"] in ("hub", "bundled") else None
    return base, base or Path(str(identity["id"])).name


def shown_figures(figures: Sequence[str]) -> list[tuple[str, str]]:
    """The figures that the card shows, with their captions."""
    found = ((next((one for one in figures if Path(one).match(pattern)), ""), c) for pattern, c in FIGURES)
    return [(path, caption) for path, caption in found if path]


def make_card(
    repo_id: str,
    run: Run,
    plan: ProtectionPlan,
    evaluation: Evaluation,
    licence: Licence,
    languages: Sequence[str] = (),
    figures: Sequence[str] = (),
) -> ModelCard:
    """The card, its YAML built by huggingface_hub.

    Args:
        repo_id: the repository's `owner/name`.
        run: whose layer table, identity and checkpoint's size the card shows.
        figures: paths relative to the repository.
    """
    identity, layers = run_info(run)["model"], read_layers(run)
    base, base_name = base_of(identity)
    lower = sorted(set(plan.formats.values()) - {"16bit"}, key=nominal_bits)
    backend = "bitsandbytes" if set(lower) <= {"nf4"} else "compressed-tensors"
    tags = [backend, *dict.fromkeys(fmt.split("_")[0] for fmt in lower)] if lower else []
    own, text = evaluation.variants["plan"], evaluation.text
    dataset, config, split = DATASETS.get(text["name"], (text["name"], None, None))
    known = licence.id is None or licence.id.lower() in KNOWN
    scored = {"task_type": "text-generation", "dataset_type": dataset, "dataset_name": text["name"]}
    scored |= {"dataset_config": config, "dataset_split": split}
    scored |= {"metric_args": {"convention": text["convention"]}}
    results = [
        EvalResult(**scored, metric_type=kind, metric_name=label, metric_value=round(float(own[key]), 5))
        for kind, label, key in METRICS
    ]
    data = ModelCardData(
        base_model=base,
        base_model_relation="quantized" if base else None,
        license=(licence.id or "unknown") if known else "other",
        license_name=None if known else licence.id,
        license_link=None if known else "LICENSE",
        language=list(languages) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["mixed-precision", "quantized", *tags, plan.score],
        datasets=[dataset] if text["name"] in DATASETS else None,
        model_name=repo_id.rsplit("/", maxsplit=1)[-1],
        eval_results=results,
    )
    planned = layers[layers["quantizable"]]
    held = planned["name"].map(plan.formats)
    used = sorted(set(held), key=nominal_bits, reverse=True)
    config_file = run.model_dir / "config.json"
    types = held.groupby(planned["type"], sort=False)
    look: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    templates = Environment(loader=PackageLoader("spi_utils", "."), **look)
    body = templates.get_template("card.md.jinja").render(
        repo_id=repo_id,
        base=base,
        base_name=base_name,
        identity=identity,
        licence=licence,
        plan=plan,
        evaluation=evaluation,
        headline=headline_of(evaluation),
        stock=stock_sentence(evaluation.stock),
        parameters=int(layers["numel"].sum()),
        file_bytes=sum(path.stat().st_size for path in run.model_dir.glob("[!.]*.safetensors")),
        lower=lower,
        backend=backend,
        remote_code=config_file.is_file() and "auto_map" in read_json(config_file),
        held=held_words(plan.formats.values()),
        score_title=SCORES[plan.score].title,
        rule_title=RULES[plan.rule].title,
        command=command_of(plan, backend, identity),
        used=used,
        types=[(kind, [int((of == fmt).sum()) for fmt in used]) for kind, of in types],
        figures=shown_figures(figures),
        repository=repository_url(),
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def command_of(plan: ProtectionPlan, backend: str, identity: Mapping[str, Any]) -> str:
    """The command that makes such a file: every choice of the plan, whatever the defaults are then."""
    # With a menu of just the formats in use a budget's best plan is the same one.
    menu = sorted({*plan.formats.values(), "16bit"}, key=nominal_bits)
    given = {
        "model": typed_model(identity),
        "revision": identity.get("revision") if identity["kind"] == "hub" else None,
        **{"score": plan.score, "direction": plan.direction, "rule": plan.rule},
        "value": None if plan.rule == "claim" else f"{plan.value:.12g}",
        **{"backend": backend, "rounding": plan.rounding},
        "formats": menu if len(menu) > 1 else None,
        "double_quant": "true" if plan.double_quant else None,
        "group": plan.options.get("group", AUTO_GROUP[backend]) or "none",
        **{name: plan.options.get(name) or None for name in ("force_16bit", "forbid_16bit", "seed")},
    }
    told = {k: f"[{', '.join(v)}]" if isinstance(v, list | tuple) else v for k, v in given.items()}
    words = [f"-p {name} {shlex.quote(str(v))}" for name, v in told.items() if v is not None]
    return f"spi-utils run {' '.join(words)}"
