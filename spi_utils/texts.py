"""Texts to score a model on, and how they are cut into windows.

A perplexity without its convention is no number, so the convention lives in one place: a text is tokenized
once without special tokens, `n` disjoint stretches spread evenly over it become the windows, and each window
begins with the token that the model was trained to see first.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import platform
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spi_utils.errors import EvaluationError
from spi_utils.tokens import redacted

if TYPE_CHECKING:
    import torch

# The archive that llama.cpp's perplexity figures use: plain text, so no parquet reader is needed.
WIKITEXT_REPOSITORY = "ggml-org/ci"
WIKITEXT_ARCHIVE = "wikitext-2-raw-v1.zip"
WIKITEXT_MEMBER = "wikitext-2-raw/wiki.test.raw"
HUB_PATIENCE = 5.0  # seconds to wait for a sign of the Hub before the offline text is used

# Long modules of CPython's own library: code, a domain apart from `pydoc`'s prose, present on every machine.
CODE_MODULES = ("argparse", "ast", "dataclasses", "datetime", "difflib", "doctest", "inspect", "statistics")

CHAT = "chat"
CHAT_PROMPTS = Path(__file__).with_name("chat_prompts.json")  # [{"user", "system" if any}], < 120 tokens each


@dataclass(frozen=True)
class Text:
    """A text and where it came from.

    Attributes:
        name: short key, e.g. "wikitext2", "pydoc" or a file's stem.
        source: one line for the reader: what it is, and why this one if another was asked for.
        text: the text itself.
        sha256: of the text's UTF-8 bytes; compare runs by it.
    """

    name: str
    source: str
    text: str
    sha256: str


def load_text(spec: str | Path = "auto") -> Text:
    """Return one text.

    Args:
        spec: "wikitext2" (WikiText-2's raw test split, from the Hub), "pydoc" (the prose of CPython's own
            `help()` topics), "pycode" (modules of CPython's own library), "auto" (wikitext2 if the Hub can
            be reached, else pydoc), or the path of a UTF-8 file.

    Raises:
        EvaluationError: the text can't be fetched, found, read as UTF-8, or is empty.
    """
    if spec == "auto":
        why = _hub_silence()
        try:
            if why is None:
                return _wikitext()
        except EvaluationError as error:
            why = str(error)
        text = load_text("pydoc")
        return replace(text, source=f"{text.source}; WikiText-2 could not be fetched: {why}")
    if spec in _LOADERS:
        return _LOADERS[str(spec)]()
    path = Path(spec)
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise EvaluationError(
            f"{path} is not UTF-8: byte {error.start} (0x{error.object[error.start]:02x}) can't be decoded; "
            f"convert it, e.g. iconv -f LATIN1 -t UTF-8 {path.name}."
        ) from error
    except OSError as error:
        raise EvaluationError(
            f"There is no text '{path}': expected auto, {', '.join(_LOADERS)}, or the path of a UTF-8 file."
        ) from error
    if not content.strip():
        raise EvaluationError(f"{path} is empty: expected text to score.")
    return _text(path.stem, f"the file {path.name}", content)


def load_texts(
    spec: str | Path | Sequence[str | Path] = "auto", *, at_least: int = 1, template: bool = False
) -> list[Text]:
    """Return several texts, each once.

    Args:
        spec: one specification as in `load_text` or "chat" (`chat.converse`), several separated by commas, or
            a sequence of them.
        at_least: with "auto", how many texts of different domains are wanted; what is missing is filled
            from "chat", if it can be, and from the texts that every machine has.
        template: whether the tokenizer has a chat template, which "chat" needs.

    Raises:
        EvaluationError: as in `load_text`, nothing was named, or "chat" without a template.
    """
    specs = spec.split(",") if isinstance(spec, str) else [spec] if isinstance(spec, Path) else list(spec)
    specs = [s.strip() if isinstance(s, str) else s for s in specs if str(s).strip()]
    if not specs:
        raise EvaluationError("No text was named: texts is empty; give 'auto', a name or a file's path.")
    if CHAT in specs and not template:
        raise EvaluationError(
            "The text 'chat' is made of the model's own answers, and this tokenizer has no chat template to "
            "ask with; name another text, e.g. texts='pydoc,pycode'."
        )
    texts = {text.sha256: text for text in (_chat() if s == CHAT else load_text(s) for s in specs)}
    more = (*([_chat] if template else []), _pydoc, _pycode) if "auto" in specs else ()
    for load in more:
        if len(texts) < at_least:
            extra = load()
            texts.setdefault(extra.sha256, extra)
    if more and at_least > 1 and not template:
        names = ", ".join(text.name for text in texts.values())
        print(f"This tokenizer has no chat template, so none of the texts is the model's chat: {names}")
    return list(texts.values())


def start_token(tokenizer: Any, config: Any) -> int | None:
    """Return the id that every window begins with, or None where the model knows no such token.

    Models see some token first in training; without it many are out of their distribution. It is the
    beginning-of-sequence token of the tokenizer or else of the configuration, and where there is none the
    document separator ("<|endoftext|>" if the tokenizer has it, else the end-of-sequence token).

    Args:
        tokenizer: a transformers tokenizer.
        config: the model's configuration, nested text configuration included.
    """
    config = _inner(config)
    separator = tokenizer.get_vocab().get("<|endoftext|>")
    bos, eos = (getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos"))
    candidates = [tokenizer.bos_token_id, bos, separator, eos, tokenizer.eos_token_id]
    candidates = [next(iter(i), None) if isinstance(i, list | tuple) else i for i in candidates]
    # Some configurations carry another model's default id: one outside the vocabulary is no token.
    return next((i for i in candidates if i is not None and 0 <= i < config.vocab_size), None)


def make_windows(
    text: Text | str, tokenizer: Any, n: int, length: int, start: int | None, *, config: Any = None
) -> torch.Tensor:
    """Cut a text into windows.

    Args:
        text: what to cut.
        tokenizer: a transformers tokenizer.
        n: number of windows.
        length: tokens in a window, the start token included.
        start: id of the first column (`start_token`), or None: windows of text alone.
        config: the model's configuration; with it, its longest context and vocabulary are checked.

    Returns:
        LongTensor (n, length): disjoint, in the text's order, spread evenly from its beginning to its end.

    Raises:
        EvaluationError: the text is too short, a window is longer than the model's limit, or the tokenizer
            makes ids that the model has no embedding for.
    """
    import torch

    check_windows(n, length, start, config)
    plain = text.text if isinstance(text, Text) else text
    ids = tokenizer(plain, add_special_tokens=False, verbose=False)["input_ids"]
    size = getattr(_inner(config), "vocab_size", None)
    if size is not None and ids and max(ids) >= size:
        raise EvaluationError(
            f"The tokenizer ({len(tokenizer)} tokens) doesn't match the model: it makes id {max(ids)}, "
            f"and the model's vocabulary ends at {size - 1}; load the tokenizer of this model."
        )
    body = length - (start is not None)
    windows = torch.tensor([ids[i : i + body] for i in _offsets(len(ids), n, body)])  # (n, body)
    return windows if start is None else torch.cat([torch.full((n, 1), start), windows], dim=1)


def window_texts(text: Text | str, tokenizer: Any, n: int, length: int, start: int | None) -> list[str]:
    """Return the raw characters behind each window of `make_windows`, for word and byte counts."""
    raw = text.text if isinstance(text, Text) else text
    encoded = tokenizer(raw, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    spans = encoded["offset_mapping"]
    body = length - (start is not None)
    return [raw[spans[i][0] : spans[i + body - 1][1]] for i in _offsets(len(spans), n, body)]


def _hub_silence() -> str | None:
    """None if WikiText-2 is cached or the Hub answers within a few seconds, else the reason that it doesn't.

    `hf_hub_download` retries for half a minute before it gives up, too long for a default.
    """
    from huggingface_hub import constants, get_session, try_to_load_from_cache

    cached = try_to_load_from_cache(WIKITEXT_REPOSITORY, WIKITEXT_ARCHIVE, repo_type="dataset")
    if not isinstance(cached, str):
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_PATIENCE)
        except Exception as error:  # the HTTP library differs between versions, and so do its errors
            offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub can't be reached"
            return f"{offline} ({type(error).__name__})"
    return None


def _wikitext() -> Text:
    """WikiText-2's raw test split, as Salesforce/wikitext's rows joined by blank lines."""
    from huggingface_hub import hf_hub_download

    try:
        archive = hf_hub_download(WIKITEXT_REPOSITORY, WIKITEXT_ARCHIVE, repo_type="dataset")
        with zipfile.ZipFile(archive) as files:
            raw = files.read(WIKITEXT_MEMBER).decode("utf-8")
    except Exception as error:
        raise EvaluationError(
            f"WikiText-2 can't be read from the Hub dataset {WIKITEXT_REPOSITORY} "
            f"({type(error).__name__}: {redacted(str(error) or 'no message').splitlines()[0]}); "
            "use texts='pydoc' or give a file's path."
        ) from None  # a Hub that echoes the request would put its header into the traceback
    return _text("wikitext2", "WikiText-2 raw, test split", join_rows(raw))


def join_rows(raw: str) -> str:
    r"""Join the lines of a raw WikiText file by blank lines, as evaluations of Salesforce/wikitext do.

    The dataset's rows are the file's lines with their "\n", and "" for a line of blanks; everyone joins them
    with "\n\n".

    >>> join_rows(" \n = A = \n \n text \n")
    '\n\n = A = \n\n\n\n\n text \n'
    """
    return "\n\n".join(line if line.strip() else "" for line in io.StringIO(raw))


def _pydoc() -> Text:
    from pydoc_data.topics import topics

    prose = "\n\n".join(topics[key] for key in sorted(topics))
    return _text("pydoc", f"pydoc_data.topics of CPython {platform.python_version()}", prose)


def _pycode() -> Text:
    files = [importlib.util.find_spec(name).origin for name in CODE_MODULES]  # type: ignore[union-attr]
    code = "\n\n".join(Path(str(file)).read_text(encoding="utf-8") for file in files)
    return _text("pycode", f"library modules of CPython {platform.python_version()}", code)


def _chat() -> Text:
    prompts = CHAT_PROMPTS.read_text(encoding="utf-8")
    source = f"the model's own answers to {len(json.loads(prompts))} prompts of this package"
    return _text(CHAT, source, prompts)


_LOADERS: dict[str, Callable[[], Text]] = {"wikitext2": _wikitext, "pydoc": _pydoc, "pycode": _pycode}
NAMES = ("auto", *_LOADERS)  # of texts that are there before the model is; an evaluation knows "chat" too


def _text(name: str, source: str, text: str) -> Text:
    return Text(name, source, text, hashlib.sha256(text.encode("utf-8")).hexdigest())


def _inner(config: Any) -> Any:
    """The text part of a configuration."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def check_windows(n: int, length: int, start: int | None, config: Any) -> None:
    """Refuse windows that a model can't be run on.

    Raises:
        EvaluationError: none, too short to predict a token, or longer than the model's limit.
    """
    least = 2 if start is None else 3
    if n < 1 or length < least:
        raise EvaluationError(f"{n} windows of {length} tokens can't be scored: expected ≥ 1 of ≥ {least}.")
    limit = getattr(_inner(config), "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise EvaluationError(
            f"Windows of {length} tokens are longer than this model's limit; choose a length ≤ {limit}."
        )


def _offsets(tokens: int, n: int, body: int) -> list[int]:
    """First token of each window: disjoint, from the text's beginning to its end."""
    if tokens < n * body:
        raise EvaluationError(
            f"The text is too short: {tokens} tokens, and {n} windows need {n * body} text tokens; "
            f"ask for at most {tokens // body} windows of this length, or give a longer text."
        )
    stride = (tokens - body) / max(n - 1, 1)  # ≥ body because tokens ≥ n·body, so windows can't overlap
    return [int(i * stride) for i in range(n)]
