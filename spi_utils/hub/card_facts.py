"""What a model card is made from: the contents of a run's files, gathered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spi_utils.hub.licences import Licence

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Facts:
    """All that a card is made from.

    `identity`, `plan` and `evaluation` are the contents of run.json["model"], plan.json and evaluation.json;
    `file_bytes` the safetensors files' size; `figures` paths relative to the repository.
    """

    repo_id: str
    identity: Mapping[str, Any]
    plan: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    layers: pd.DataFrame
    licence: Licence
    file_bytes: int
    figures: tuple[str, ...]
    repository: str | None

    @property
    def base(self) -> str | None:
        """The base's id on the Hub; None for weights that have none."""
        return str(self.identity["id"]) if self.identity["kind"] in ("hub", "bundled") else None

    @property
    def base_name(self) -> str:
        """The base as a reader should see it: never a path of the machine that made it."""
        return self.base or Path(str(self.identity["id"])).name

    @property
    def backend(self) -> str:
        """The package that loads the quantized layers."""
        lower = set(self.plan["formats"].values()) - {"16bit"}
        return "bitsandbytes" if lower <= {"nf4"} else "compressed-tensors"

    @property
    def parameters(self) -> int:
        """True number of parameters (the Hub counts packed 4-bit weights as half or less)."""
        return int(self.layers["numel"].sum())


def source_name(text: Mapping[str, Any]) -> str:
    """What the evaluation's text is called."""
    return str(text.get("name") or text["source"])
