"""Calls to the Hub that may fail: waiting where that helps, and plain words where it doesn't."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

from spi_utils.errors import PublishError
from spi_utils.tokens import Token, redacted

Result = TypeVar("Result")

ATTEMPTS = 5
LONGEST_WAIT = 600  # seconds; the Hub's rate windows are 300
FIX_TOKEN = "https://huggingface.co/settings/tokens (type “write”)"
QUOTA = re.compile(r"storage|quota|payment|billing|limit reached|exceed", re.IGNORECASE)
CHANGED = (
    "the repository changed while this ran ({status}): somebody else committed to it. That change stands, "
    "and nothing was committed. See at the repository's page what it was before publishing again."
)
# What an HTTP status means for a publisher.
STATUS = {
    400: "the Hub refused the request ({said}).",
    401: "the Hub does not accept the token from {token} (401): it is mistyped, expired or revoked. Make one "
    "at {tokens}.",
    403: "the token from {token} may not write to {owner} (403). Use a token with write access to it, made "
    "at {tokens}, or another `repo_id`. The Hub said: {said}.",
    404: "there is no user or organisation {owner}, or the token from {token} can't see it (404).",
    409: CHANGED.format(status=409),
    412: CHANGED.format(status=412),
    429: "too many requests (429), still after waiting as long as the Hub asked.",
    500: "the Hub has trouble of its own ({said}), still after several tries; see "
    "https://status.huggingface.co.",
    507: "the storage of {owner} is full. Free some at https://huggingface.co/settings/billing, or publish "
    "to another owner. The Hub said: {said}.",
}


def transport_errors() -> tuple[type[Exception], ...]:
    """What a connection to the Hub that fails or breaks is raised as.

    huggingface_hub 1.x speaks through httpx, 2.x through httpx2; its own error derives from theirs.
    """
    from huggingface_hub.errors import HfHubHTTPError

    parents = [base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError"]
    return (*parents, ConnectionError)


@dataclass(frozen=True)
class Caller:
    """Calls the Hub: waits and repeats where that helps, and explains the failure where it doesn't."""

    token: Token
    repo_id: str
    local: Path

    def __call__(self, function: Callable[[], Result]) -> Result:
        """`function()`, repeated after 408, 429, 5xx and broken connections.

        Raises:
            PublishError: it failed for good.
        """
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return _transferred(function)
            except Exception as error:
                delay = _delay(error, attempt)
                if delay is None or attempt == ATTEMPTS:
                    self._explain(error)
                    raise
                print(f"the Hub is busy ({_label(error)}); waiting {delay:.0f} s, then try {attempt + 1}")
                time.sleep(delay)
        raise AssertionError("unreachable")

    def _explain(self, error: Exception) -> None:
        """Raise a PublishError that says what to do; an error that isn't the Hub's passes through.

        Unless it shows the token: that one is told in its own words, without it.
        """
        advice = _advice(error, self.repo_id, self.token)
        texts = [str(link) for link in _chain(error)]
        if advice is None and any(text != redacted(text, self.token) for text in texts):
            advice = f"{type(error).__name__}: {redacted(texts[0], self.token)}."
        if advice is not None:
            raise PublishError(
                f"publishing to {self.repo_id} failed: {advice} The local files are untouched in "
                f"{self.local}; the same call goes on where this one ended."
            ) from None  # a Hub that echoes the request would put its header, and the token, into a traceback


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _response(error: Exception) -> Any:
    """The HTTP response behind an error, through the wrappers of upload threads; None if there was none."""
    from huggingface_hub.errors import HfHubHTTPError

    found = (link.response for link in _chain(error) if isinstance(link, HfHubHTTPError))
    return next(found, None)


def _unreachable(error: Exception) -> bool:
    """True for a connection that failed or broke."""
    return any(isinstance(link, transport_errors()) for link in _chain(error))


def _label(error: Exception) -> str:
    """Why a call is repeated, in a word."""
    response = _response(error)
    if response is not None:
        return f"HTTP {response.status_code}"
    return "no connection" if _unreachable(error) else "an answer that is no JSON"


def _delay(error: Exception, attempt: int) -> float | None:
    """Seconds to wait before the next try, the server's own where it names one; None: trying is no use."""
    response = _response(error)
    own = 2.0 ** (attempt - 1)
    if response is None:
        broken = _unreachable(error) or isinstance(error, json.JSONDecodeError)
        return own if broken and not _offline(error) else None
    if response.status_code not in (408, 429, 500, 502, 503, 504):
        return None
    asked = server_delay(response.headers)
    return min(own if asked is None else asked, LONGEST_WAIT)


def server_delay(headers: Mapping[str, str]) -> float | None:
    """Seconds from `Retry-After` (a number or a date) or the `RateLimit` header's `t=`; None from neither."""
    after = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d+(\.\d*)?", after):
        return float(after)
    with contextlib.suppress(ValueError):  # no date either
        return max(0.0, parsedate_to_datetime(after).timestamp() - time.time())
    limit = re.search(r"\bt\s*=\s*(\d+)", headers.get("ratelimit", ""))
    return float(limit.group(1)) if limit else None


def _transferred(send: Callable[[], Result]) -> Result:
    """`send()`, its transport's failures raised as ConnectionError.

    xet, which carries large files, raises plain RuntimeError and OSError where HTTP raises its own.
    """
    try:
        return send()
    except (RuntimeError, OSError) as error:
        own = isinstance(error, (FileNotFoundError, PermissionError))  # a file of ours, or xet's refusal
        if own or _response(error) is not None or _unreachable(error):
            raise
        raise ConnectionError(f"sending a large file broke off: {error}") from error


def _offline(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return any(isinstance(link, OfflineModeIsEnabled) for link in _chain(error))


def _advice(error: Exception, repo_id: str, token: Token) -> str | None:
    """What went wrong and what to do, in plain words; None for an error that isn't the Hub's."""
    said = " ".join(redacted(str(error), token).split())
    if _offline(error):
        return "HF_HUB_OFFLINE is set, so nothing may be sent. Unset it and restart the session."
    status = _status(error, said)
    if status is not None:
        owner, _, _ = repo_id.partition("/")
        return STATUS[status].format(token=token.source, owner=owner, tokens=FIX_TOKEN, said=said)
    if _unreachable(error):
        return f"no connection to the Hub ({said}). On Kaggle, switch Internet on in the right-hand panel."
    return None


def _status(error: Exception, said: str) -> int | None:
    """The row of STATUS that an error belongs to; None where the Hub gave no answer."""
    if any(type(link).__name__ == "XetAuthenticationError" for link in _chain(error)):
        return 401
    response = _response(error)
    if response is None:  # huggingface_hub raises ValueError for a card or an LFS object that is refused
        return (507 if QUOTA.search(said) else 400) if isinstance(error, ValueError) else None
    if response.status_code in (402, 403, 413) and QUOTA.search(said):
        return 507
    if response.status_code in STATUS:
        return int(response.status_code)
    return 500 if response.status_code >= 500 else 400
