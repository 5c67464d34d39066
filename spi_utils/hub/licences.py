"""Whether a model's licence lets its quantized weights be passed on.

A quantized checkpoint is a derivative of its base, so the base's licence decides. It is read, never guessed:
from the base's own card or licence file. Where it can't be read the answer is "unknown", and a person has to
state it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spi_utils.errors import ModelError
from spi_utils.hub.hub_calls import transport_errors

BUNDLED_LICENCE = "apache-2.0"  # SmolLM2's card on the Hub

# Licence ids of the Hub that forbid passing on a changed work.
FORBIDDING = re.compile(r"(^|-)nd(-|$)|no-?deriv|^unlicensed$|^proprietary$|all-rights-reserved")

# Ids of the Hub that allow it, under conditions that the publisher has to meet.
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
        return next((text for start, text in CONDITIONS.items() if start in name), None)

    def as_dict(self) -> dict[str, Any]:
        """For the manifest and the environment record."""
        return {**asdict(self), "condition": self.condition}


def find_licence(
    identity: Mapping[str, Any],
    model_dir: Path,
    allow: str | None = None,
    *,
    location: str | None = None,
    ask: bool = True,
) -> Licence:
    """The base's licence.

    Args:
        identity: `run.json["model"]`.
        model_dir: the checkpoint's folder, which the base's licence file may have travelled to.
        allow: a licence id that the publisher states; it overrides what is found, and is recorded as stated.
        location: `run.json["location"]`: where a local base lies; read only if it still holds that base.
        ask: ask the Hub where nothing on this machine tells.
    """
    found = _first_found(identity, model_dir, location, ask)
    if allow is None:
        return found
    said = f"the base says {found.id}" if found.id else "none was found in the base"
    return Licence(allow, f"stated by the publisher ({said})", stated=True)


def _first_found(identity: Mapping[str, Any], model_dir: Path, location: str | None, ask: bool) -> Licence:
    if identity["kind"] == "bundled":
        return Licence(BUNDLED_LICENCE, f"the card of {identity['id']}")
    beside = Path(location) if identity["kind"] == "local" and location else None
    for folder in filter(None, (model_dir, beside)):
        licence = _from_card(folder) or _from_text(folder)
        if licence is not None and (folder == model_dir or _holds(folder, identity["sha256"])):
            return licence
    if identity["kind"] != "hub":
        return Licence(None, "no licence file and no model card with a licence beside the weights")
    model, revision = identity["id"], identity.get("revision")
    cached = _from_cache(model, revision)
    if cached is not None:
        return cached
    if ask:
        return _from_hub(model, revision)
    return Licence(None, f"a rehearsal asks nobody, and the card of {model} is not in this machine's cache")


def _holds(folder: Path, sha256: str) -> bool:
    """Whether a folder's weights still are those that were analysed: another model lends no licence."""
    from spi_utils.models import weights_hash

    try:
        return folder.is_absolute() and weights_hash(folder) == sha256
    except ModelError:  # its weights are gone, or no longer whole: not that base
        return False


def _from_cache(model_id: str, revision: str | None) -> Licence | None:
    """The licence in the base's card, if the card came to this machine with the base."""
    from huggingface_hub import try_to_load_from_cache

    card = try_to_load_from_cache(model_id, "README.md", revision=revision)
    return _from_card(Path(card).parent, f"the card of {model_id}") if isinstance(card, str) else None


def _from_card(folder: Path, where: str = "the base's model card") -> Licence | None:
    """The licence in the YAML of a README.md."""
    from huggingface_hub import ModelCard

    path = folder / "README.md"
    if not path.is_file():
        return None
    card = ModelCard.load(path, ignore_metadata_errors=True)
    return _licence_of_data(card.data.to_dict(), where)


def _from_text(folder: Path) -> Licence | None:
    """The licence that its file gives away; of several files each must be one that is known."""
    found = [(path, _of_words(path)) for path in sorted(folder.glob("LICEN[CS]E*"))]
    if not found or not all(name for _, name in found):
        return None
    path, name = found[0]
    return Licence(name, f"the base's file {path.name}")


def _of_words(path: Path) -> str | None:
    """The id of a licence file that begins with a licence's title and adds no restriction to it."""
    words = " ".join(path.read_text(encoding="utf-8", errors="replace").lower().split())
    if RESTRICTING.search(words):
        return None
    places = {name: words.find(start) for name, start in TEXTS.items()}
    titled = (name for name, place in places.items() if 0 <= place < TITLE_WITHIN)
    return next((name for name in titled if " not " not in f" {words[: places[name]]}"), None)


def _from_hub(model_id: str, revision: str | None) -> Licence:
    """The licence in the base's card on the Hub, or unknown with the reason."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    unanswered: tuple[type[Exception], ...] = (HfHubHTTPError, *transport_errors())
    try:
        info = HfApi().model_info(model_id, revision=revision)
    except unanswered as error:
        return Licence(
            None, f"the Hub could not be asked for the card of {model_id} ({type(error).__name__})"
        )
    data = info.card_data.to_dict() if info.card_data is not None else {}
    return _licence_of_data(data, f"the card of {model_id}") or Licence(
        None, f"the card of {model_id} has none"
    )


def _licence_of_data(data: Mapping[str, Any], where: str) -> Licence | None:
    value = data.get("license")
    named = [str(one) for one in (value if isinstance(value, list) else [value]) if one]
    if named == ["other"]:  # the name beside it says more
        named = [str(data.get("license_name") or "other")]
    found = [Licence(one, where) for one in named]
    # All of several must allow it: the first that doesn't speaks for them.
    return next((one for one in found if not one.usable), found[0]) if found else None
