"""The Hub token: looked for in four places, never a parameter, never printed or stored.

Who gets it: a process that downloads, before a model's own code runs in it, and 05_publish. The stages that
compute, and the fresh processes that check and time a checkpoint, are started without it, and a process that
is about to run a model's own code takes it out of its environment first. That keeps it from being handed
over; programs of one user can't be kept from reading each other's files (a login, Kaggle's secrets) at all.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from spi_utils.errors import PlatformError
from spi_utils.platforms import platform_name
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

    def __str__(self) -> str:
        return f"a token from {self.source}"


_hidden: list[Token] = []  # what `hide_token` took out of the environment


def hub_token() -> Token | None:
    """The Hub token, looked for in the environment, Kaggle's secrets, Colab's secrets and the Hub's login.

    Returns:
        None where there is none: publishing then stays local.

    Raises:
        PlatformError: what was found can't be a token. A request with it would fail, its error showing it.
    """
    finders = (_from_environment, _from_hidden, _from_kaggle, _from_colab, _from_login)
    token = next((token for token in (find() for find in finders) if token is not None), None)
    if token is not None and not SHAPE.fullmatch(token.value):
        raise PlatformError(
            f"what stands in {token.source} is no Hub token: it holds a character that none has, such as a "
            "line break, a blank or a quote. Copy the token alone from "
            "https://huggingface.co/settings/tokens and set it again."
        )
    return token


def redacted(text: str, token: Token | None = None) -> str:
    """`text` without the token, and without whatever else looks like one."""
    return LIKE_A_TOKEN.sub("***", text if token is None else text.replace(token.value, "***"))


def without_token(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that may run a model's own code: everything but the Hub token."""
    return {name: value for name, value in environment.items() if name not in NAMES}


def with_token(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment for a process that downloads or publishes: with this session's Hub token, if any.

    Raises:
        PlatformError: as `hub_token`.
    """
    token = hub_token()
    return {**without_token(environment), **({} if token is None else {TOKEN_NAME: token.value})}


def hide_token() -> None:
    """Take the token out of this process' environment: a model's own code is about to run in it."""
    token = _from_environment()
    if token is not None:
        _hidden[:] = [token]
    for name in NAMES:
        os.environ.pop(name, None)


def _token(value: str | None, source: str) -> Token | None:
    cleaned = (value or "").strip()
    return Token(cleaned, source) if cleaned else None


def _from_environment() -> Token | None:
    return _token(os.environ.get(TOKEN_NAME), f"the environment variable {TOKEN_NAME}")


def _from_hidden() -> Token | None:
    return _hidden[0] if _hidden else None


def _from_kaggle() -> Token | None:
    """Kaggle's secrets; a fork has none attached, which their client answers by raising."""
    if platform_name() != "kaggle":
        return None
    try:
        client = importlib.import_module("kaggle_secrets").UserSecretsClient()
        return _token(client.get_secret(TOKEN_NAME), "Kaggle's secrets")
    except Exception as error:
        print(f"Kaggle has no secret {TOKEN_NAME} attached to this notebook ({type(error).__name__}).")
        return None


def _from_colab() -> Token | None:
    """Colab's secrets; a secret that is missing, or not shared with this notebook, is an exception there.

    Only the notebook that the browser shows can ask: in a stage run by 00_run_all the question would hang.
    """
    if platform_name() != "colab" or not interactive():
        return None
    try:
        userdata = importlib.import_module("google.colab.userdata")
        return _token(userdata.get(TOKEN_NAME), "Colab's secrets")
    except Exception as error:
        print(f"Colab shares no secret {TOKEN_NAME} with this notebook ({type(error).__name__}).")
        return None


def _from_login() -> Token | None:
    """The Hub's own login; on Colab huggingface_hub would ask for the secret again, see above."""
    if platform_name() == "colab" and not interactive():
        return None
    try:
        from huggingface_hub import get_token
    except ImportError:
        return None
    return _token(get_token(), "the Hub's login on this machine")


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
