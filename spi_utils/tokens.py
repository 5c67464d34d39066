"""Where a Hub token comes from, and who gets it: never a parameter, never printed or stored.

Who gets it: a process that downloads, before a model's own code runs in it, and 05_publish. The stages that
compute, and the fresh processes that check and time a checkpoint, are started without it, and a process that
is about to run a model's own code takes it out of its environment first. That keeps it from being handed
over; programs of one user can't be kept from reading each other's files (a login, Kaggle's secrets) at all.

Imports the standard library alone, so that the first cell of a notebook can use it.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from spi_utils.errors import PlatformError
from spi_utils.progress import interactive

TOKEN_NAME = "HF_TOKEN"
NAMES = (TOKEN_NAME, "HUGGING_FACE_HUB_TOKEN")  # what huggingface_hub reads
SHAPE = re.compile(r"[A-Za-z0-9_.-]+")
LIKE_A_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}")


@dataclass(frozen=True)
class Token:
    """A Hub token and where it was found. The value is left out of every repr and print."""

    value: str = field(repr=False)
    source: str


_hidden: list[str] = []  # what `hide_token` took out of the environment


def platform_name() -> str:
    """`kaggle`, `colab` or `local`."""
    if os.environ.get("KAGGLE_KERNEL_RUN_TYPE"):
        return "kaggle"
    return "colab" if os.environ.get("COLAB_RELEASE_TAG") or "google.colab" in sys.modules else "local"


def hub_token() -> Token | None:
    """The Hub token, looked for in the environment, Kaggle's secrets, Colab's secrets and the Hub's login.

    Returns:
        None where there is none: publishing then stays local.

    Raises:
        PlatformError: what was found can't be a token. A request with it would fail, its error showing it.
    """
    for value, source in _places():
        if value and value.strip():
            if SHAPE.fullmatch(value.strip()):
                return Token(value.strip(), source)
            raise PlatformError(
                f"what stands in {source} is no Hub token: it holds a character that none has, such as a "
                "line break or a quote. Copy it from https://huggingface.co/settings/tokens and set it again."
            )
    return None


def _places() -> Iterator[tuple[str | None, str]]:
    """(what is there, what the place is called), each asked only if the ones before hold nothing."""
    for value in (os.environ.get(TOKEN_NAME), *_hidden):
        yield value, f"the environment variable {TOKEN_NAME}"
    where = platform_name()
    # Only the notebook that the browser shows can ask Colab: in a stage run by 00_run_all the question would
    # hang, and huggingface_hub's own login asks there too.
    if where == "colab" and not interactive():
        return
    try:
        if where == "kaggle":
            secrets = importlib.import_module("kaggle_secrets").UserSecretsClient()
            yield secrets.get_secret(TOKEN_NAME), "Kaggle's secrets"
        elif where == "colab":
            yield importlib.import_module("google.colab.userdata").get(TOKEN_NAME), "Colab's secrets"
    except Exception as error:  # one that is missing or not shared with this notebook, in both services
        print(f"{where.capitalize()} shares no secret {TOKEN_NAME} here ({type(error).__name__}).")
    yield _login(), "the Hub's login on this machine"


def _login() -> str | None:
    from huggingface_hub import get_token

    return get_token()


def redacted(text: str, token: Token | None = None) -> str:
    """`text` without the token, and without whatever else looks like one."""
    return LIKE_A_TOKEN.sub("***", text if token is None else text.replace(token.value, "***"))


def share_token() -> str:
    """Let this process' downloads find the session's token, and say where it was found.

    It goes into this process' environment and nowhere else; of its children 05_publish alone inherits it.
    """
    token = hub_token()
    if token is None:
        return f"Hub token: no {TOKEN_NAME} found; publishing will stay local, downloads are anonymous"
    if not os.environ.get(TOKEN_NAME, "").strip():  # a blank one is none
        os.environ[TOKEN_NAME] = token.value
    return f"Hub token: found in {token.source}"


def without_token(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that may run a model's own code: everything but the Hub token."""
    return {name: value for name, value in environment.items() if name not in NAMES}


def with_token(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that downloads or publishes: with this session's Hub token, if any.

    Raises:
        PlatformError: as `hub_token`.
    """
    token = hub_token()
    return without_token(environment) | ({} if token is None else {TOKEN_NAME: token.value})


def hide_token() -> None:
    """Take the token out of this process' environment: a model's own code is about to run in it."""
    if value := os.environ.get(TOKEN_NAME, "").strip():
        _hidden[:] = [value]
    for name in NAMES:
        os.environ.pop(name, None)
