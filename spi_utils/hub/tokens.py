"""The Hub token: looked for in four places, never a parameter, never printed or stored."""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass, field

from spi_utils.platforms import platform_name
from spi_utils.progress import interactive

TOKEN_NAME = "HF_TOKEN"


@dataclass(frozen=True)
class Token:
    """A Hub token and where it was found. The value is left out of every repr and print."""

    value: str = field(repr=False)
    source: str

    def __str__(self) -> str:
        return f"a token from {self.source}"


def hub_token() -> Token | None:
    """The Hub token, looked for in the environment, Kaggle's secrets, Colab's secrets and the Hub's login.

    Returns:
        None where there is none: publishing then stays local.
    """
    finders = (_from_environment, _from_kaggle, _from_colab, _from_login)
    return next((token for token in (find() for find in finders) if token is not None), None)


def _token(value: str | None, source: str) -> Token | None:
    cleaned = (value or "").strip()
    return Token(cleaned, source) if cleaned else None


def _from_environment() -> Token | None:
    return _token(os.environ.get(TOKEN_NAME), f"the environment variable {TOKEN_NAME}")


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
    """Let the stages, which run in processes of their own, find this session's token; say where it was found.

    It goes into this process' environment, which its children inherit, and nowhere else.
    """
    token = hub_token()
    if token is None:
        return f"Hub token: no {TOKEN_NAME} found; publishing will stay local, downloads are anonymous"
    if not os.environ.get(TOKEN_NAME, "").strip():  # a blank one is none
        os.environ[TOKEN_NAME] = token.value
    return f"Hub token: found in {token.source}"
