"""One table of parameters for the notebooks' first cells, the command line and a batch's grid."""

import subprocess
import sys

import pytest
import yaml

from spi_utils import notebook as book
from spi_utils.__main__ import main
from spi_utils.batch import arguments_of, expand, read_grid
from spi_utils.errors import ParameterError
from spi_utils.notebook import (
    ALL,
    LAB,
    LAB_TABLE,
    STAGES,
    TABLE,
    check_given,
    check_values,
    coerce,
    from_command_line,
    parameters_of,
    problem_of,
)

TEXTS_ONLY = (
    "model",
    "run_dir",
    "device",
    "dtype",
    "revision",
    "layers",
    "sensitivity",
    "score",
    "direction",
)
TEXTS_ONLY += ("rule", "backend", "max_shard_size", "storage_dtype", "overflow", "profile", "repo_id")
TEXTS_ONLY += ("allow_license", "over_budget", "preset")
SET_BY_A_PRESET = ("score", "direction", "rule", "backend", "formats")  # None is "not given" there
SWITCHES = ("force", "trust_remote_code", "include_embeddings", "double_quant", "dry_run", "private")
COUNTS = ("seed", "min_tail", "workers", "sensitivity_windows", "sensitivity_length", "windows", "length")
COUNTS += ("random_seeds",)
LISTS = ("cost_formats", "refine_at", "formats", "rivals", "lm_eval_tasks")

# Parameter, a wrong value as a notebook may hold it, and a piece of what must be said beside name and value.
WRONG = [
    *((name, 5, "") for name in TEXTS_ONLY),
    *((name, None, "") for name in (*TEXTS_ONLY, *SWITCHES, *COUNTS, *LISTS) if name not in SET_BY_A_PRESET),
    ("preset", "smal", "Did you mean 'small'?"),
    *((name, "maybe", "True or False") for name in SWITCHES),
    *((name, 1, "True or False") for name in SWITCHES),
    *((name, wrong, "a whole number") for name in COUNTS for wrong in ("abc", 2.5, -1, True, [8])),
    *((name, "nf4", "a list") for name in LISTS),
    ("windows", "8", "Write windows=8."),
    ("windows", [8], "Write windows=8."),
    ("length", 1, "from 2, or 0"),
    ("seed", 2**32, "to 4294967295"),
    ("refine_at", 5.65, "Write refine_at=[5.65]."),
    ("refine_at", [3], "between 4 and 16"),
    ("refine_at", ["x"], "between 4 and 16"),
    ("cost_formats", "nf4", "Write cost_formats=['nf4']."),
    ("cost_formats", ["nf5"], "Did you mean 'nf4'?"),
    ("formats", ["int4_g46"], "Did you mean 'int4_g64'?"),
    ("score", "alpha_hil", "Did you mean 'alpha_hill'?"),
    ("direction", "hihg", "Did you mean 'high'?"),
    ("rule", "budget", "Did you mean 'budget_gb'?"),
    ("backend", "bitsandbyte", "Did you mean 'bitsandbytes'?"),
    ("backend", "gguf", "'compressed-tensors'"),
    ("group", "fusd", "Did you mean 'fused'?"),
    ("group", False, "or None"),
    ("value", "x", "a number, or None"),
    ("value", float("nan"), "a number, or None"),
    ("value", True, "a number, or None"),
    ("device", "gpu", "'cuda:0'"),
    ("device", "cuda:x", "'cuda:0'"),
    ("dtype", "float61", "Did you mean 'float16'?"),
    ("dtype", "int8", "'bfloat16'"),
    ("storage_dtype", "float32", "'float16'"),
    ("overflow", "keep", "Did you mean 'keep_bf16'?"),
    ("max_shard_size", "2", "'500MB'"),
    ("max_shard_size", "0GB", "'500MB'"),
    ("profile", "quik", "Did you mean 'quick'?"),
    ("texts", "pidoc", "Did you mean 'pydoc'?"),
    ("texts", "no-such-file.txt", "there is no file 'no-such-file.txt'"),
    ("texts", "pydoc,no-such-file.txt", "there is no file 'no-such-file.txt'"),
    ("texts", ["pydoc", 3], "3"),
    ("texts", [], "it is empty"),
    ("rounding", "guidde", "Did you mean 'guided'?"),
    ("rounding", 4, "nearest"),
    ("sensitivity", "slef", "Did you mean 'self'?"),
    ("layers", "(", "unterminated subpattern"),
    ("force_16bit", "[", "unterminated character set"),
    ("forbid_16bit", ["a", "*"], "nothing to repeat"),
    ("rivals", ["no/such/folder"], "there is no folder 'no/such/folder'"),
    ("rivals", "a/b", "Write rivals=['a/b']."),
    ("lm_eval_tasks", [""], "it is empty"),
    ("repo_id", "a b/c d", "'owner/name'"),
    ("repo_id", "a/b/c", "'owner/name'"),
    ("repo_id", "a/b--c", "no '--'"),
    ("repo_id", "a/" + "b" * 95, "97 characters"),
    ("revision", 1.0, "Write revision='1.0'."),
    ("model", "", "it is empty"),
    ("run_dir", __file__, "is a file"),
    ("run_dir", f"{__file__}/below/it", "test_parameters.py is a file"),
    ("over_budget", "go", "'warn', 'stop'"),
]
WRONG_FOR_THE_LAB = [
    ("seeds", 0, "from 1"),
    ("coefficient", 0, "above 0"),
    ("levels", 2.0, "Write levels=[2.0]."),
    ("levels", [], "it is empty"),
    ("width", 97, "a multiple of 8"),
    ("depth", "3", "Write depth=3."),
    ("layers", "", "from 1"),
]
# A rule and its number belong together.
WRONG_RULES = [
    ("claim", 3, "use rule='top_k'"),
    ("top_k", None, "needs a value"),
    ("top_k", 2.5, "a whole number of layers"),
    ("top_k", -1, "a whole number of layers"),
    ("matrix_bits", None, "needs a value"),
    ("matrix_bits", float("inf"), "finite"),
    ("budget_gb", 0, "more than 0 GB"),
    ("bits_per_weight", -4, "more than 0"),
    ("max_kl", -0.1, "0 or more"),
]
RIGHT = [
    ("seed", 0),
    ("windows", 0),
    ("length", 0),
    ("length", 2),
    ("refine_at", []),
    ("refine_at", [5, 5.65]),
    ("cost_formats", ["16bit", "nf4"]),
    ("group", None),
    ("group", "fused"),
    ("device", "cuda:1"),
    ("texts", "pydoc, pycode"),
    ("texts", __file__),
    ("texts", ["wikitext2", __file__]),
    ("sensitivity", "none"),
    ("force_16bit", r"layers\.0\."),
    ("force_16bit", ["lm_head"]),
    ("rivals", ["owner/name", "."]),
    ("repo_id", ""),
    ("repo_id", "name"),
    ("repo_id", "owner/my-model_1.5"),
    ("max_shard_size", "1.5gb"),
    ("run_dir", "runs/new/one"),
]


def everything(notebook=ALL, **changes):
    return {**parameters_of(notebook), **changes}


# --- the table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notebook", [ALL, *STAGES, LAB])
def test_every_parameter_has_a_row_and_its_default_may_stand(notebook):
    table = LAB_TABLE if notebook == LAB else TABLE
    assert set(parameters_of(notebook)) <= set(table)
    check_values(parameters_of(notebook), notebook)


def test_the_table_has_no_row_too_many():
    assert set(TABLE) == set(parameters_of(ALL)) and set(LAB_TABLE) == set(parameters_of(LAB))


def test_names_that_are_repeated_here_are_those_of_their_modules():
    from spi_utils.evaluate import PROFILES
    from spi_utils.models import resolve_device, resolve_dtype
    from spi_utils.quantize import OVERFLOW
    from spi_utils.sensitivity import OWN
    from spi_utils.texts import NAMES

    assert set(TABLE["profile"].choices) == set(PROFILES)
    assert set(TABLE["overflow"].choices) == set(OVERFLOW)
    assert set(TABLE["sensitivity"].choices) == {*OWN, "measured", "none", *NAMES}
    for dtype in TABLE["dtype"].choices:
        resolve_dtype(dtype, resolve_device("cpu"))


def test_torch_is_not_imported_for_a_refusal():
    code = (
        "import sys; from spi_utils.__main__ import main\n"
        "code = main(['run', '-p', 'windows', 'abc'])\n"
        "print(code, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False", "False"]


# --- wrong values by every door ---------------------------------------------------------------------------


def test_there_are_enough_wrong_values():
    assert len(WRONG) + len(WRONG_FOR_THE_LAB) + len(WRONG_RULES) >= 72
    assert {name for name, _, _ in WRONG} | {"rule", "value"} == set(TABLE)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(("name", "value", "said"), WRONG, ids=lambda x: str(x)[:30])
def test_a_wrong_value_is_refused_by_the_first_cell(monkeypatch, name, value, said, alone):
    monkeypatch.setattr(book, "interactive", lambda: not alone)
    notebooks = [notebook for notebook in (ALL, *STAGES) if name in parameters_of(notebook)]
    for notebook in notebooks:
        with pytest.raises(ParameterError) as refused:
            check_given(everything(notebook, **{name: value}), notebook)
        assert str(refused.value).startswith(f"{name}={value!r}: expected ") and said in str(refused.value)


@pytest.mark.parametrize(("name", "value", "said"), WRONG_FOR_THE_LAB, ids=str)
def test_a_wrong_value_is_refused_by_the_labs_first_cell(name, value, said):
    with pytest.raises(ParameterError) as refused:
        check_given(everything(LAB, **{name: value}), LAB)
    assert str(refused.value).startswith(f"{name}={value!r}: expected ") and said in str(refused.value)


@pytest.mark.parametrize(("rule", "value", "said"), WRONG_RULES, ids=str)
def test_a_rule_and_a_number_that_do_not_go_together_are_refused(rule, value, said):
    for notebook in (ALL, "02_visualize"):
        with pytest.raises(ParameterError) as refused:
            check_given(everything(notebook, rule=rule, value=value), notebook)
        assert said in str(refused.value)


def typed_in(value):
    """A wrong value as a person types it behind -p."""
    return value if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


# A text takes any digits; a null is a text there, too.
TYPED = [(n, v, s) for n, v, s in WRONG if not (TABLE[n].kind == "text" and isinstance(v, int | float))]
TYPED = [
    (n, v, s) for n, v, s in TYPED if v is not None and (n, v) not in (("windows", "8"), ("group", False))
]


@pytest.mark.parametrize(("name", "value", "said"), TYPED, ids=lambda x: str(x)[:30])
def test_a_wrong_value_is_refused_by_the_command_line(monkeypatch, capsys, name, value, said):
    monkeypatch.setattr("spi_utils.__main__.execute", lambda *_, **__: pytest.fail("it was started"))
    given = ["-p", name, typed_in(value)]
    assert main(["run", "-p", "run_dir", "runs/x", *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"ParameterError: {name}=") and error.count("\n") == 1
    assert said.split("=")[0] in error


@pytest.mark.parametrize(("name", "value", "said"), TYPED, ids=lambda x: str(x)[:30])
def test_a_wrong_value_is_refused_by_a_grid(tmp_path, name, value, said):
    if name in ("run_dir", "force", "repo_id", "dry_run", "over_budget", "model"):
        pytest.skip("a grid has none, or names it by itself")
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"models": ["a/b"], "parameters": {name: value}}))
    with pytest.raises(ParameterError, match=r"grid\.yaml: ") as refused:
        read_grid(file)
    assert f"{name}=" in str(refused.value)


@pytest.mark.parametrize(("name", "value"), RIGHT, ids=str)
def test_what_is_right_may_stand(name, value):
    assert problem_of(name, value, TABLE[name]) == ""
    check_given(everything(**{name: value}), ALL)


# --- texts from outside -----------------------------------------------------------------------------------

READ = [
    ("value", "1e-2", 0.01),
    ("value", "5.65", 5.65),
    ("value", "12", 12),
    ("value", "null", None),
    ("value", ".inf", float("inf")),
    ("revision", "1.0", "1.0"),
    ("revision", "no", "no"),
    ("revision", "'1e3'", "1e3"),
    ("revision", "null", "null"),
    ("model", "5", "5"),
    ("model", "2026-01-01", "2026-01-01"),
    ("layers", "[abc]", "[abc]"),
    ("layers", "''", ""),
    ("force_16bit", "[a-z]+_proj", "[a-z]+_proj"),
    ("force_16bit", "[lm_head, '7']", ["lm_head", "7"]),
    ("force_16bit", "[no]", ["no"]),
    ("group", "null", None),
    ("double_quant", "no", False),
    ("double_quant", "True", True),
    ("seed", "010", 10),
    ("refine_at", "[5.65, 6e0]", [5.65, 6.0]),
    ("cost_formats", "[nf4, int8]", ["nf4", "int8"]),
    ("texts", "pydoc, pycode", "pydoc, pycode"),
    ("windows", "[1", "[1"),
]


@pytest.mark.parametrize(("name", "text", "value"), READ, ids=str)
def test_a_text_is_read_by_the_parameters_own_kind(name, text, value):
    found = from_command_line(name, text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(("name", "text", "value"), READ, ids=str)
def test_a_grid_reads_the_same(tmp_path, name, text, value):
    if name == "model" or text.startswith(("[", "''")) or not isinstance(value, str | int | float | None):
        pytest.skip("written otherwise in YAML")
    if (name, text) == ("revision", "null"):
        pytest.skip("YAML's null is no text")
    if value == float("inf"):
        pytest.skip("no rule takes it")
    assert coerce(name, text) == value or text[0] == "'"
    file = tmp_path / "grid.yaml"
    rule = "rule: threshold, " if name == "value" and value is not None else ""
    file.write_text(
        f"models: [a/b]\nparameters: {{{rule}{name}: {text if ', ' not in text else repr(text)}}}\n"
    )
    (job,), _ = read_grid(file)
    assert job.parameters[name] == value and type(job.parameters[name]) is type(value)


def test_a_batch_hands_on_what_its_grid_holds():
    """The grid's values go through a command line: they must come out as they went in."""
    given = {"revision": "1.0", "layers": "", "force_16bit": ["no", "1e-2"], "value": 0.01, "group": None}
    given |= {"double_quant": False, "refine_at": [5.65], "texts": "pydoc, pycode", "model": "5", "seed": 3}
    told = arguments_of(STAGES, given)
    pairs = {told[i + 1]: told[i + 2] for i, part in enumerate(told) if part == "-p"}
    assert {name: from_command_line(name, text) for name, text in pairs.items()} == given


def test_a_stage_is_told_only_its_own():
    told = arguments_of(["04_evaluate"], {"model": "a/b", "score": "fisher", "windows": 3})
    assert told[3:] == ("--only", "04_evaluate", "-p", "model", "a/b", "-p", "windows", "3")


def test_typed_values_may_stand_in_a_grid_made_in_python():
    (job,), _ = expand({"models": ["a/b"], "seeds": [3], "parameters": {"double_quant": True}})
    assert job.parameters == {"model": "a/b", "seed": 3, "double_quant": True}
    with pytest.raises(ParameterError, match=r"the grid: revision=1\.0: .*Write revision='1\.0'"):
        expand({"models": ["a/b"], "parameters": {"revision": 1.0}})
