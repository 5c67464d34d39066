"""Checkpoints of others, judged by the same protocol: anything that transformers loads.

GPTQ, AWQ, HQQ, compressed-tensors, an earlier run's `model/`: a rival is scored on the same token ids and
against the same reference. Its head may be its own (quantized, even), so its logits come from its head, and
the reference's from the reference's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from spi_utils.errors import EvaluationError
from spi_utils.scoring import Head, Reference, TokenScores, token_scores
from spi_utils.tokens import hub_token

if TYPE_CHECKING:
    from spi_utils.models import ModelSource

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt")


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
    for spec in specs:
        rival = _find(str(spec))
        same = sum(key.split("#")[0] == rival.key for key in found)  # every run's folder is called "model"
        key = rival.key if not same else f"{rival.key}#{same + 1}"
        found[key] = replace(rival, key=key)
    return list(found.values())


def _find(spec: str) -> Rival:
    import json

    directory = Path(spec).expanduser()
    if not directory.is_dir():
        directory = _download(spec)
    config = directory / "config.json"
    files = sorted(directory.glob("*.safetensors"))
    if not config.exists() or not files:
        raise EvaluationError(
            f"the rival {spec!r} has no config.json or no safetensors file; expected a folder or a Hub id of "
            "a checkpoint that transformers loads."
        )
    packed = json.loads(config.read_text(encoding="utf-8")).get("quantization_config") or {}
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", spec.rstrip("/").split("/")[-1])
    size = sum(file.stat().st_size for file in files)
    return Rival(f"rival:{name}", spec, directory, size, packed.get("quant_method", "16bit"))


def _download(spec: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        token = hub_token()
        value = None if token is None else token.value
        return Path(snapshot_download(spec, allow_patterns=list(WEIGHTS), token=value))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise EvaluationError(
            f"the rival {spec!r} is no folder here and can't be fetched from the Hub "
            f"({type(error).__name__}). Check the path or the id; log in if the repository is gated."
        ) from None  # a Hub that echoes the request would put its header into the traceback


class LoadedRival:
    """A rival in memory."""

    def __init__(self, rival: Rival, model: Any) -> None:
        self.rival, self.model = rival, model

    def score(self, windows: torch.Tensor, reference: Reference, head: Head) -> TokenScores:
        """Scores of windows (W, T) against the reference, whose logits come from `head`."""
        pair = _TwoHeads(self.model, head)
        return token_scores(self.model, windows, reference, label=self.rival.key, head=pair)


class _TwoHeads(Head):
    """The rival's logits from the rival's head, the reference's from the reference's."""

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


def load_rival(
    rival: Rival, source: ModelSource, samples: Sequence[Any], device: torch.device, dtype: torch.dtype
) -> LoadedRival:
    """Load a rival and check that it reads the same tokens.

    Raises EvaluationError if it doesn't load or run, or has another vocabulary or tokenizer than the source.
    """
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            rival.directory, dtype=dtype, device_map={"": str(device)}, use_safetensors=True
        )
    except (OSError, ValueError, ImportError, RuntimeError, KeyError) as error:
        raise EvaluationError(
            f"the rival {rival.spec!r} ({rival.method}) can't be loaded: {error}. Install what its format "
            "needs, or leave it out."
        ) from error
    size = model.config.get_text_config().vocab_size
    if size != config_vocabulary(source):
        raise EvaluationError(
            f"the rival {rival.spec!r} has a vocabulary of {size}, {source.id} one of "
            f"{config_vocabulary(source)}: it is not a version of this model."
        )
    _check_tokenizer(rival, samples[0])
    model.requires_grad_(False).eval()
    _unpack(rival, model, samples[0].ids[:1, :2].to(device))
    return LoadedRival(rival, model)


def _unpack(rival: Rival, model: Any, ids: torch.Tensor) -> None:
    """Call the whole model once: compressed-tensors unpacks then, and scoring calls only what is below it."""
    try:
        with torch.no_grad():
            model(ids)
    except (RuntimeError, NotImplementedError, ImportError) as error:
        raise EvaluationError(
            f"the rival {rival.spec!r} ({rival.method}) loads but doesn't run on {ids.device}: {error}. "
            "Evaluate on a device that its kernels know, or leave it out."
        ) from error


def config_vocabulary(source: ModelSource) -> int:
    """Size of the source's vocabulary, by its configuration."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.directory, trust_remote_code=source.trust_remote_code)
    return config.get_text_config().vocab_size


def _check_tokenizer(rival: Rival, sample: Any) -> None:
    """A rival that brings a tokenizer must cut the text into the same tokens."""
    from transformers import AutoTokenizer

    if not any(rival.directory.glob("tokenizer*")):
        return
    tokenizer = AutoTokenizer.from_pretrained(rival.directory)
    piece = sample.pieces[0]
    body = sample.ids[0, int(sample.start is not None) :].tolist()
    ours: Mapping[str, Any] = tokenizer(piece, add_special_tokens=False, verbose=False)
    # A window may begin inside a word, which tokenizes differently alone: compare from the second space on.
    if ours["input_ids"][-len(body) // 2 :] != body[-len(body) // 2 :]:
        raise EvaluationError(
            f"the rival {rival.spec!r} tokenizes the text differently: its losses can't be paired with ours."
        )
