"""What a card says is true of the file: formats, rounding, what loads it, languages, and the command."""

import shlex
from dataclasses import replace

import pytest
import yaml

from spi_utils import card, runs
from spi_utils.claims import Evaluation, headline_of
from spi_utils.models import resolve
from spi_utils.notebook import from_command_line
from spi_utils.plan import ProtectionPlan, decide
from spi_utils.presets import resolve as resolve_preset
from spi_utils.runs import open_run, read_layers, run_info
from tests.evaluated_run import layer_table
from tests.finished_run import make_finished_run
from tests.tiny import make_tiny

MIT = card.Licence("mit", "the base's model card")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_finished_run(tmp_path_factory.mktemp("finished"))


def written(run, plan, **more):
    """The card of a finished run as if its plan were this one: its YAML, and its text in one line."""
    options = {"identity": run_info(run)["model"], "licence": MIT, "file_bytes": 1_300_000} | more
    evaluation = Evaluation.read(run.evaluation_json)
    text = str(card.make_card("me/small", plan, evaluation, read_layers(run), **options))
    _, data, body = text.split("---\n", 2)
    return yaml.safe_load(data), " ".join(body.split())


def with_formats(run, choose, **more):
    """The run's plan with other formats: `choose` of a module's last name."""
    plan = ProtectionPlan.read(run.plan_json)
    formats = {name: choose(name.split(".")[-1]) for name in plan.formats}
    kept = tuple(name for name, fmt in formats.items() if fmt == "16bit")
    return replace(plan, formats=formats, protected=kept, **more)


VLLM = "vllm serve me/small"
PLUGIN = "pip install vllm vllm-bnb-plugin"


@pytest.mark.parametrize(
    ("choose", "held", "package", "said", "unsaid"),
    [
        (lambda leaf: "nf4", "NF4", "bitsandbytes", [VLLM, PLUGIN], ["cannot load this file"]),
        (
            lambda leaf: "16bit" if leaf == "down_proj" else "nf4",  # vLLM merges it with nothing
            "NF4 and 16-bit",
            "bitsandbytes",
            [VLLM, PLUGIN],
            ["cannot load this file"],
        ),
        (
            lambda leaf: "16bit" if leaf in ("gate_proj", "up_proj") else "nf4",
            "NF4 and 16-bit",
            "bitsandbytes",
            ["cannot load this file", "gate_proj`, `model.layers.0.mlp.up_proj`"],
            [VLLM, PLUGIN],
        ),
        (
            lambda leaf: {"o_proj": "int8", "gate_proj": "16bit", "up_proj": "16bit"}.get(leaf, "int4_g64"),
            "int4, int8 and 16-bit",
            "compressed-tensors",
            [VLLM, "pip install vllm ", "without a plugin", "memory is not"],
            ["bnb", "cannot load this file"],
        ),
        (
            lambda leaf: "int8" if leaf == "q_proj" else "16bit",
            "int8 and 16-bit",
            "compressed-tensors",
            ["merged ones must share a format", "self_attn.q_proj`"],
            [VLLM],
        ),
        (lambda leaf: "16bit", "16-bit", "accelerate", [VLLM, "pip install vllm "], ["bnb", "Rounding"]),
    ],
)
def test_the_card_is_true_of_every_mix_of_formats(finished, choose, held, package, said, unsaid):
    _, text = written(finished, with_formats(finished, choose))
    assert f"weight matrices in {held}," in text
    assert (
        f"{package}`:" in text.split("after `pip install transformers accelerate")[1][:40] or held == "16-bit"
    )
    assert all(words in text for words in said) and not any(words in text for words in unsaid)


def test_the_card_says_which_layers_guided_rounding_made(finished):
    def mixed(leaf):
        return "int8" if leaf == "o_proj" else "int4_g64"

    _, guided = written(finished, with_formats(finished, mixed, rounding="guided"))
    assert "codes and scales of the int4 layers were chosen" in guided
    assert "The int8 layers have the nearest levels." in guided
    _, nearest = written(finished, with_formats(finished, mixed, rounding="nearest"))
    assert "level of its scale that is nearest" in nearest and "guided" not in nearest.split("How it was")[1]
    _, plain = written(finished, with_formats(finished, lambda leaf: "nf4", rounding="guided"))
    assert "scales of the NF4 layers were chosen" in plain and "nearest levels" not in plain


def test_the_verdict_comes_first_then_the_numbers_then_how_to_load(finished):
    _, text = written(finished, ProtectionPlan.read(finished.plan_json))
    order = ("# small", headline_of(Evaluation.read(finished.evaluation_json)), "**this model**")
    places = [text.index(part) for part in (*order, "## Load it", "## How it was made", "## Limits")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("named", "languages"),
    [("language: en\n", ["en"]), ("language:\n- de\n- fr\n", ["de", "fr"]), ("", None)],
)
def test_languages_are_those_that_the_base_names(finished, tmp_path, named, languages):
    (tmp_path / "README.md").write_text(f"---\nlicense: mit\n{named}---\nbase\n")
    licence, found = card.read_base({"kind": "local", "id": "m"}, tmp_path)
    data, _ = written(finished, ProtectionPlan.read(finished.plan_json), licence=licence, languages=found)
    assert data.get("language") == languages and data["license"] == "mit"


def test_a_model_with_code_of_its_own_is_loaded_with_leave(finished):
    _, text = written(finished, with_formats(finished, lambda leaf: "nf4"), remote_code=True)
    assert text.count("trust_remote_code=True)") == 2 and f"{VLLM} --trust-remote-code" in text


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysed")
    source = resolve(str(make_tiny("llama", folder / "m")))
    run = open_run(folder / "run", source.identity())
    runs.write_text(run.layers_csv, layer_table(source).to_csv(index=False))
    return run


PLANNING = ("double_quant", "group", "force_16bit", "forbid_16bit", "seed")


def decided(run, given):
    """The plan that notebook 02 makes of what a command line gives."""
    asked = dict.fromkeys(("score", "direction", "rule", "value", "backend", "formats")) | given
    chosen = resolve_preset(given.get("preset", "claim"), asked)
    chosen |= {name: given[name] for name in PLANNING if name in given}
    chosen["formats"] = chosen["formats"] or ()
    return decide(run, force=True, **chosen)


@pytest.mark.parametrize(
    ("given", "preset"),
    [
        ({}, "claim"),
        ({"preset": "small"}, "small"),
        ({"preset": "balanced"}, None),  # no format of its menu need be left over
        ({"rule": "top_k", "value": 0.0}, None),
        ({"score": "fisher", "rule": "matrix_bits", "value": 7.25, "group": "fused"}, None),
        ({"score": "fisher", "rule": "bits_per_weight", "value": 9.0, "formats": ["int8", "16bit"]}, None),
        ({"rule": "threshold", "value": 3.1234567891, "direction": "low"}, None),
        ({"rule": "top_k", "value": 9.0, "force_16bit": [r"\.0\.mlp", "o_proj"], "double_quant": True}, None),
        ({"score": "random", "rule": "top_k", "value": 9.0, "seed": 7}, None),
        ({"backend": "compressed-tensors", "rule": "top_k", "value": 9.0, "group": None}, None),
    ],
)
def test_the_command_makes_the_same_plan_again(analysed, given, preset):
    given = {"backend": "compressed-tensors"} | given if "int8" in given.get("formats", []) else given
    plan = replace(decided(analysed, given), rounding="guided")
    backend = next(iter(plan.writers)) if len(plan.writers) == 1 else given.get("backend", "bitsandbytes")
    named, command = card._recipe(plan, backend, {"kind": "local", "id": "somewhere/m"})
    assert preset is None or named == preset
    words = shlex.split(command)
    assert words[:4] == ["python", "-m", "spi_utils", "run"] and words[4::3] == ["-p"] * (len(words[4:]) // 3)
    again = {name: from_command_line(name, text) for name, text in zip(words[5::3], words[6::3], strict=True)}
    assert again.pop("model") == "MODEL"
    assert again.pop("rounding", "guided") == "guided"
    made = decided(analysed, again)
    assert (made.formats, made.double_quant) == (plan.formats, plan.double_quant)
