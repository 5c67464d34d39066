"""One loaded model through every variant, block by block of windows, so that a killed evaluation goes on.

Every block is a small file in `partial/evaluate`, written as soon as it is scored; a block that is there is
never scored again. The stage empties that folder when its inputs change.
"""

from __future__ import annotations

import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spi_utils import runs
from spi_utils.checkpoint import put_saved
from spi_utils.formats import Packed
from spi_utils.judging.controls import Variant
from spi_utils.judging.rivals import Rival, load_rival
from spi_utils.models import ModelSource, load_model, load_tokenizer, open_weights
from spi_utils.progress import progress
from spi_utils.scoring import Head, Reference, Switch, TokenScores, reference_states, token_scores
from spi_utils.texts import Text, make_windows, window_texts
from spi_utils.texts import start_token as find_start

BLOCK = 8  # windows that are scored and saved together


@dataclass(frozen=True)
class Sample:
    """A text cut into windows: `ids` (W, T) with the start token first, and the raw text behind each."""

    text: Text
    ids: torch.Tensor
    pieces: tuple[str, ...]
    start: int | None


@dataclass(frozen=True)
class Unit:
    """What is scored at once: windows `first` … `first + BLOCK − 1` of one sample under one variant."""

    key: str
    sample: int
    first: int

    def file(self, folder: Path) -> Path:
        """Where its scores lie."""
        return folder / f"{self.key.replace('/', '_')}.{self.sample}.{self.first:05d}.npz"


@dataclass
class Session:
    """What scoring needs, and what it notes on the way.

    `variants` are switched from `source`'s weights, `plan` read from `model_dir`, `rivals` loaded one by one;
    scores are kept in `folder`; `codes` are those that guided rounding chose; `seconds` {variant: time spent
    in this process} is filled in.
    """

    source: ModelSource
    variants: Mapping[str, Variant]
    rivals: Sequence[Rival]
    samples: Sequence[Sample]
    model_dir: Path
    folder: Path
    device: torch.device
    dtype: torch.dtype
    double_quant: bool
    seed: int
    codes: Mapping[tuple[str, str], Packed] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def score(self) -> dict[str, list[TokenScores]]:
        """Score what is missing; returns {variant: scores on each sample}."""
        keys = [*self.variants, *(rival.key for rival in self.rivals)]
        units = [unit for key in keys for unit in self._units(key)]
        missing = [unit for unit in units if not _is_whole(unit.file(self.folder))]
        if missing:
            self._score_missing(missing, len(units))
        return {key: self._join(key) for key in keys}

    def _units(self, key: str) -> Iterator[Unit]:
        for index, sample in enumerate(self.samples):
            for first in range(0, len(sample.ids), BLOCK):
                yield Unit(key, index, first)

    def _score_missing(self, missing: Sequence[Unit], total: int) -> None:
        with open_weights(self.source) as weights:
            loaded = self._load(weights)
            began = time.monotonic()
            references = [reference_states(loaded.switch.model, sample.ids) for sample in self.samples]
            self.seconds["reference"] = time.monotonic() - began
            bar = progress(missing, total, "evaluate: blocks of windows", done=total - len(missing))
            for unit in bar:
                began = time.monotonic()
                sample, rows = self.samples[unit.sample], slice(unit.first, unit.first + BLOCK)
                held = references[unit.sample][rows]
                if unit.key == "reference":
                    scores = held.scores()
                else:
                    scores = loaded.score(unit.key, sample.ids[rows], held)
                _save(unit.file(self.folder), scores)
                self.seconds[unit.key] = self.seconds.get(unit.key, 0.0) + time.monotonic() - began

    def visit(self, keys: Sequence[str]) -> Iterator[tuple[str, Any]]:
        """Load the model and yield it as each of these variants in turn: (key, model)."""
        with open_weights(self.source) as weights:
            loaded = self._load(weights)
            for key in keys:
                loaded.put(key)
                yield key, loaded.switch.model

    def _load(self, weights: Any) -> _Loaded:
        model = load_model(self.source, device=self.device, dtype=self.dtype)
        planned = list(self.variants["reference"].formats)
        double = self.double_quant
        switch = Switch(model, weights, planned, double_quant=double, seed=self.seed, codes=self.codes)
        return _Loaded(self, switch, weights, Head(model))

    def _join(self, key: str) -> list[TokenScores]:
        parts: list[list[TokenScores]] = [[] for _ in self.samples]
        for unit in self._units(key):
            parts[unit.sample].append(_load(unit.file(self.folder)))
        return [TokenScores.join(part) for part in parts]

    @property
    def found_json(self) -> Path:
        """Where it is noted what the saved checkpoint was found to hold."""
        return self.folder / "checkpoint.json"

    def checkpoint(self) -> dict[str, Any]:
        """What the saved checkpoint was found to hold: matrices of each format, tensors checked."""
        return runs.read_json(self.found_json, what="note on the checkpoint", stage="04_evaluate")


class _Loaded:
    """The model in memory and which variant it holds now."""

    def __init__(self, session: Session, switch: Switch, weights: Any, head: Head) -> None:
        self.session, self.switch, self.weights, self.head = session, switch, weights, head
        self.held = "reference"
        self.rival: Any = None

    def score(self, key: str, windows: torch.Tensor, reference: Reference) -> TokenScores:
        """Scores of one block; puts the variant in place first if another one is there."""
        self.put(key)
        if self.rival is not None:
            return self.rival.score(windows, reference, self.head)
        return token_scores(self.switch.model, windows, reference, label=key)

    def put(self, key: str) -> None:
        """Make the model that variant, or load that rival, if it isn't there already."""
        if key == self.held:
            return
        session = self.session
        if self.held == "plan":
            self.switch.renew()  # the file's 16-bit layers may be a cast of the source's
        self.rival = None  # one rival in memory at a time
        if key in session.variants:
            formats = session.variants[key].formats
            self.switch.to(formats)
            if key == "plan":
                found = put_saved(self.switch.model, self.weights, formats, session.model_dir)
                runs.write_json(session.found_json, found)
        else:
            chosen = next(rival for rival in session.rivals if rival.key == key)
            self.rival = load_rival(chosen, session.source, session.samples, session.device, session.dtype)
        self.held = key


def make_samples(
    source: ModelSource,
    texts: Sequence[Text],
    *,
    windows: int,
    length: int,
    start_token: str | int | None = "auto",
) -> list[Sample]:
    """Cut every text into windows with the source's tokenizer.

    Raises EvaluationError as `texts.make_windows` and `texts.start_token` do.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    tokenizer = load_tokenizer(source)
    start = find_start(tokenizer, config, start_token)
    return [
        Sample(
            text,
            make_windows(text, tokenizer, windows, length, start, config=config),
            tuple(window_texts(text, tokenizer, windows, length, start)),
            start,
        )
        for text in texts
    ]


def _save(path: Path, scores: TokenScores) -> None:
    with runs.atomic_path(path) as temporary, temporary.open("wb") as file:
        columns: dict[str, Any] = dict(vars(scores))
        np.savez(file, **columns)


def _load(path: Path) -> TokenScores:
    with np.load(path, allow_pickle=False) as held:
        return TokenScores(**{name: held[name] for name in held.files})


def _is_whole(path: Path) -> bool:
    """Whether a finished block is there and can be read; a damaged one is said and scored again."""
    if not path.exists():
        return False
    try:
        return len(_load(path).nll) > 0
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        print(f"evaluate: {path.name} is damaged ({error}) and scored again.", flush=True)
        return False
