"""The notebooks' parameters, a row each: by this table every door refuses a wrong value before any work.

The first cell of a notebook, the command line and a batch's grid ask it alike. No torch here: the command
line must answer at once, so names that stand in modules with torch are repeated, and a test compares them.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from spi_utils.errors import ParameterError, PlanError
from spi_utils.formats import FORMATS
from spi_utils.plan import DIRECTIONS, GROUPS, RULES, SCORES, TIERS, check_value
from spi_utils.presets import DEFAULT, PRESETS, resolve
from spi_utils.texts import NAMES

LAB = "06_compactness_lab"  # has names of its own, and other meanings of `layers`, `windows` and `seed`
SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
NOTHING = ("null", "None", "none", "~")
HUB_NAME = re.compile(r"\w([\w.-]*\w)?(/\w([\w.-]*\w)?)?", re.ASCII)
LONGEST_NAME = 96  # characters of `owner/name`, the Hub's limit
NOT_IN_A_NAME = ("--", "..", ".git", ".ipynb")
SHARD = re.compile(r"\s*\d+(\.\d+)?\s*[KMGT]B\s*", re.IGNORECASE)
PACKAGES = {"bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed_tensors"}  # backend: module
LARGEST_SEED = 2**32 - 1  # numpy's older generators take no more
KIND_WORDS = {"text": "a text", "whole": "a whole number", "number": "a number", "switch": "True or False"}


@dataclass(frozen=True)
class Parameter:
    """One row: what a parameter may be.

    `kind` of one value: "text", "whole", "number" or "switch". `many`: "one" value, a "list", or "either".
    `low` and `high` bound a number, `above` is a bound that it may not reach. A text must be one of
    `choices`, if there are some, or else pass `wrong`, which returns what is wrong with it, or nothing.
    `beside` may stand instead: 0 or None where that means the default. A list has `least` entries or more.
    `words` describe one value, where the rest doesn't say it.
    """

    kind: str
    many: str = "one"
    low: float | None = None
    high: float | None = None
    above: float | None = None
    choices: Iterable[str] = ()
    wrong: Callable[[Any], str] | None = None
    beside: tuple[Any, ...] = ()
    least: int = 0
    words: str = ""


# --- what a text, or a number, must be beside its kind ----------------------------------------------------


def _not_a_pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        return f"as one it has an error: {error}"
    return ""


def _no_file(text: str) -> str:
    return "" if os.path.isfile(text) else f"there is no file {text!r}"


def _no_texts(text: str) -> str:
    parts = [part.strip() for part in text.split(",")]
    return next((_no_file(part) for part in parts if part not in NAMES and _no_file(part)), "")


def _no_checkpoint(text: str) -> str:
    if os.path.isdir(os.path.expanduser(text)) or HUB_NAME.fullmatch(text):
        return ""
    return f"there is no folder {text!r}"


def repository_problem(text: str) -> str:
    """What is wrong with a name for a repository on the Hub; "" where nothing is."""
    bad = next((part for part in NOT_IN_A_NAME[:2] if part in text), "")
    bad = bad or next((end for end in NOT_IN_A_NAME[2:] if text.endswith(end)), "")
    if bad:
        return f"the Hub allows no {bad!r} there"
    if len(text) > LONGEST_NAME:
        return f"it has {len(text)} characters, the Hub allows {LONGEST_NAME}"
    if HUB_NAME.fullmatch(text):
        return ""
    return "the Hub allows letters without accents, digits, '-', '_' and '.', none of '-' and '.' at an end"


def _no_run_dir(text: str) -> str:
    """Whether a run can be kept there: what exists of the path must be a folder that can be written."""
    if text == "auto":
        return ""
    path = Path(os.path.abspath(text))
    there = next((p for p in (path, *path.parents) if os.path.lexists(p)), path)
    if not os.path.isdir(there):
        return f"{there} is a file"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"{there} can't be written"


def _no_size(text: str) -> str:
    return "" if SHARD.fullmatch(text) and float(re.split("[KMGTkmgt]", text)[0]) > 0 else "it is none"


def _no_device(text: str) -> str:
    return "" if re.fullmatch(r"cuda(:\d+)?", text) else "there is no such device"


def _empty(text: str) -> str:
    return "" if text.strip() else "it is empty"


def _odd_width(width: int) -> str:
    return f"{width} isn't" if width % 8 else ""


# --- the table --------------------------------------------------------------------------------------------

SWITCH = Parameter("switch")
COUNT = Parameter("whole", low=0)
POSITIVE = Parameter("whole", low=1)
TEXT = Parameter("text")
PATTERN = Parameter("text", wrong=_not_a_pattern, words="a regular expression")
LENGTH = Parameter("whole", low=2, beside=(0,))
FORMAT_LIST = Parameter("text", "list", choices=FORMATS)
TEXT_NAME = "or the path of a text file"

TABLE: dict[str, Parameter] = {
    "model": Parameter("text", wrong=_empty, words="a Hub id, a folder, a .gguf file, 'bundled' or 'auto'"),
    "run_dir": Parameter("text", wrong=_no_run_dir, words="'auto', or a folder that can be written"),
    "device": Parameter(
        "text", choices=("auto", "cpu", "cuda", "cuda:0"), wrong=_no_device, words="or another 'cuda:N'"
    ),
    "dtype": Parameter("text", choices=("auto", "float32", "float16", "bfloat16")),
    "seed": Parameter("whole", low=0, high=LARGEST_SEED),
    "force": SWITCH,
    "preset": Parameter("text", choices=PRESETS),
    # 00
    "over_budget": Parameter("text", choices=("warn", "stop")),
    # 01
    "revision": TEXT,
    "trust_remote_code": SWITCH,
    "layers": PATTERN,
    "min_tail": COUNT,
    "include_embeddings": SWITCH,
    "workers": COUNT,
    "cost_formats": FORMAT_LIST,
    "sensitivity": Parameter(
        "text", choices=("self", "random", "measured", "none", *NAMES), wrong=_no_file, words=TEXT_NAME
    ),
    "rounding": Parameter("text", choices=("guided", "nearest"), beside=(None,)),
    "sensitivity_windows": COUNT,
    "sensitivity_length": LENGTH,
    "refine_at": Parameter(
        "number",
        "list",
        wrong=lambda bits: "" if 4 < bits < 16 else f"{bits} is outside",
        words="a number of matrix bits between 4 and 16",
    ),
    # 02
    "score": Parameter("text", choices=SCORES, beside=(None,)),
    "direction": Parameter("text", choices=DIRECTIONS, beside=(None,)),
    "rule": Parameter("text", choices=RULES, beside=(None,)),
    "value": Parameter("number", beside=(None,)),
    "backend": Parameter("text", choices=TIERS, beside=(None,)),
    "formats": replace(FORMAT_LIST, beside=(None,)),
    "double_quant": SWITCH,
    "group": Parameter("text", choices=("auto", *filter(None, GROUPS)), beside=(None,)),
    "force_16bit": replace(PATTERN, many="either"),
    "forbid_16bit": replace(PATTERN, many="either"),
    # 03
    "max_shard_size": Parameter("text", wrong=_no_size, words="a size such as '2GB' or '500MB'"),
    "storage_dtype": Parameter("text", choices=("auto", "float16", "bfloat16")),
    "overflow": Parameter("text", choices=("keep_bf16", "error")),
    # 04
    "profile": Parameter("text", choices=("quick", "full")),
    "texts": Parameter("text", "either", choices=NAMES, wrong=_no_texts, least=1, words=TEXT_NAME),
    "windows": COUNT,
    "length": LENGTH,
    "random_seeds": COUNT,
    "rivals": Parameter("text", "list", wrong=_no_checkpoint, words="a folder or a Hub id"),
    "lm_eval_tasks": Parameter("text", "list", wrong=_empty, words="a task's name"),
    # 05
    "repo_id": Parameter("text", wrong=repository_problem, beside=("",), words="'name' or 'owner/name'"),
    "dry_run": SWITCH,
    "private": SWITCH,
    "allow_license": TEXT,
}
LAB_TABLE: dict[str, Parameter] = {
    "run_dir": TABLE["run_dir"],
    "seeds": POSITIVE,
    "coefficient": Parameter("number", above=0),
    "levels": Parameter("number", "list", above=0, least=1),
    "width": Parameter("whole", low=8, wrong=_odd_width, words="a multiple of 8"),
    "depth": POSITIVE,
    "windows": POSITIVE,
    "layers": POSITIVE,
    "seed": TABLE["seed"],
}


def table_of(notebook: str) -> dict[str, Parameter]:
    """The rows of a notebook's parameters, and of others that it may not have."""
    return LAB_TABLE if notebook == LAB else TABLE


# --- checking ---------------------------------------------------------------------------------------------


def check_values(values: Mapping[str, Any], notebook: str) -> None:
    """Refuse the first value that a notebook's parameter can't have; names that have no row are left alone.

    Raises:
        ParameterError: names the parameter, its value, what is expected, and the nearest that would do.
    """
    table = table_of(notebook)
    for name, value in values.items():
        if name in table and (problem := problem_of(name, value, table[name])):
            raise ParameterError(problem)
    if table is not TABLE:
        return
    chosen = resolve(values.get("preset", DEFAULT), values)
    if chosen.keys() >= {"rule", "value"} and chosen["rule"] is not None:
        _check_rule(chosen["rule"], chosen["value"])
    backend = chosen.get("backend")
    if backend in PACKAGES and find_spec(PACKAGES[backend]) is None:
        raise ParameterError(
            f"backend={backend!r} needs its package, which isn't installed here: run "
            f"`pip install {backend}` and start the session again; it needs no CUDA."
        )


def problem_of(name: str, value: Any, row: Parameter) -> str:
    """What is wrong with a parameter's value, in a sentence or two; nothing if it may be that."""
    fault = _fault(value, row)
    if fault is None:
        return ""
    wanted, reason = _expected(row), f" ({fault})" if fault else ""
    return f"{name}={value!r}: expected {wanted}{reason}.{_hint(name, value, row)}"


def _check_rule(rule: str, value: Any) -> None:
    """The rule's number: there, and in its range."""
    try:
        number = check_value(rule, value)
    except PlanError as error:
        raise ParameterError(str(error)) from None
    if rule == "top_k" and (number < 0 or number % 1):
        raise ParameterError(f"value={value!r}: expected a whole number of layers from 0 for rule='top_k'.")
    if rule == "max_kl" and number < 0:
        raise ParameterError(f"value={value!r}: expected 0 or more nats a token for rule='max_kl'.")
    if RULES[rule].unit and number <= 0:
        raise ParameterError(f"value={value!r}: expected more than 0 {RULES[rule].unit} for rule={rule!r}.")


def _fault(value: Any, row: Parameter) -> str | None:
    """None for a value that may stand; else why not, or "" where the expectation says it all."""
    if any(value is one or (type(value) is type(one) and value == one) for one in row.beside):
        return None
    if isinstance(value, list | tuple) and row.many != "one":
        if len(value) < row.least:
            return "it is empty"
        faults = ((one, _fault_of_one(one, row)) for one in value)
        return next((fault or f"{one!r} is none" for one, fault in faults if fault is not None), None)
    return "" if row.many == "list" else _fault_of_one(value, row)


def _fault_of_one(value: Any, row: Parameter) -> str | None:
    if not _is_kind(value, row.kind):
        return ""
    if row.kind in ("whole", "number") and not _in_range(value, row):
        return ""
    if row.choices and value in row.choices:
        return None
    if row.wrong is None:
        return "" if row.choices else None
    return row.wrong(value) or None


def _is_kind(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "switch":
        return isinstance(value, bool)
    return isinstance(value, int if kind == "whole" else int | float) and not isinstance(value, bool)


def _in_range(value: float, row: Parameter) -> bool:
    low = -math.inf if row.low is None else row.low
    high = math.inf if row.high is None else row.high
    return low <= value <= high and (row.above is None or value > row.above)


def _expected(row: Parameter) -> str:
    one = row.words or KIND_WORDS[row.kind]
    if row.choices:
        named = ", ".join(map(repr, row.choices))
        one = f"one of {named}" + (f" {row.words}" if row.words else "")
    if row.above is not None:
        one += f" above {row.above:g}"
    if row.low is not None:
        one += f" from {row.low:g}" + (f" to {row.high:.0f}" if row.high is not None else "")
    if row.many == "one":
        beside = "".join(f", or {value!r}" for value in row.beside)
        return one + beside
    return f"a list, each of it {one}" if row.many == "list" else f"{one}, or a list of such"


def _hint(name: str, value: Any, row: Parameter) -> str:
    """The nearest value that would do, to be written so."""
    for other in _repairs(value, row):
        if _fault(other, row) is None:
            return f" Write {name}={other!r}."
    for one in value if isinstance(value, list | tuple) else [value]:
        near = difflib.get_close_matches(str(one), list(row.choices), n=1, cutoff=0.5)
        if near and one not in row.choices:
            return f" Did you mean {near[0]!r}?"
    return ""


def _repairs(value: Any, row: Parameter) -> list[Any]:
    """The same value of the right kind: a number out of its quotes, a text in them, one value as a list."""
    if isinstance(value, list | tuple):
        return [value[0]] if len(value) == 1 and row.many == "one" else []
    if value is None or value == "":
        return []
    typed = _typed(value, row) if isinstance(value, str) else str(value)
    return [typed, [value], [typed]] if row.many != "one" else [typed]


# --- texts from outside -----------------------------------------------------------------------------------


def coerce(name: str, value: Any, notebook: str = "00_run_all") -> Any:
    """A value that came as text, of the parameter's own kind: "1e-2" is a number only where one belongs.

    YAML would read `no` as False and `1.0` as a number also where a branch's name is meant. What can't be
    read so stays as it is, for `check_values` to refuse; so do values that are no texts.
    """
    row = table_of(notebook).get(name)
    if row is None:
        return value
    if isinstance(value, list):
        return [_typed(one, row) for one in value]
    return _typed(value, row)


def from_command_line(name: str, text: str, notebook: str = "00_run_all") -> Any:
    """What `-p NAME TEXT` means: a list in brackets, a text perhaps in quotes, all else by the table."""
    row = table_of(notebook).get(name)
    lists = row is not None and not (row.kind == "text" and row.many == "one")
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if quoted or (lists and text.startswith("[") and text.endswith("]")):
        try:
            return coerce(name, yaml.load(text, Untyped), notebook)
        except yaml.YAMLError:
            return coerce(name, text, notebook)
    return coerce(name, text, notebook)


class Untyped(yaml.SafeLoader):
    """YAML whose plain scalars stay the texts that they are, null apart: the table knows their kinds."""


Untyped.yaml_implicit_resolvers = {
    first: kept
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    if (kept := [(tag, rule) for tag, rule in known if tag.endswith((":null", ":merge"))])
}


def _typed(value: Any, row: Parameter) -> Any:
    if not isinstance(value, str):
        return value
    if None in row.beside and value in NOTHING:
        return None
    if row.kind == "switch":
        return SWITCHES.get(value.lower(), value)
    if row.kind == "text":
        return value
    for read in (int, float):
        try:
            return read(value.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            continue
    return value
