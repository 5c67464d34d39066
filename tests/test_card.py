"""What a card says is true of the file: formats, rounding, what loads it, the licence, and the command."""

import json
import shlex
import shutil
from dataclasses import replace

import pytest
import yaml

from spi_utils import card, runs
from spi_utils.claims import Evaluation, headline_of
from spi_utils.models import resolve, weights_hash
from spi_utils.notebook import from_command_line
from spi_utils.plan import ProtectionPlan, decide
from spi_utils.presets import resolve as resolve_preset
from spi_utils.runs import Run, open_run
from tests.evaluated_run import layer_table
from tests.tiny import make_tiny

MIT = card.Licence("mit", "the base's model card")


@pytest.fixture
def finished(finished_run):
    return finished_run


def written(run, choose=None, licence=MIT, languages=(), **more):
    """The card's YAML and its text in one line, as if the plan held `choose` of each module's last name."""
    plan, evaluation = ProtectionPlan.read(run.plan_json), Evaluation.read(run.evaluation_json)
    if choose is not None:
        formats = {name: choose(name.split(".")[-1]) for name in plan.formats}
        kept = tuple(name for name, fmt in formats.items() if fmt == "16bit")
        plan = replace(plan, formats=formats, protected=kept, **more)
    text = str(card.make_card("me/small", run, plan, evaluation, licence, languages))
    _, data, body = text.split("---\n", 2)
    return yaml.safe_load(data), " ".join(body.split())


PLUGIN = "vllm-bnb-plugin"


@pytest.mark.parametrize(
    ("choose", "rounding", "held", "said", "unsaid"),
    [
        (lambda leaf: "nf4", "guided", "NF4", [PLUGIN, "accelerate bitsandbytes`", "4-bit layers were"], []),
        (lambda leaf: "16bit" if leaf == "up_proj" else "nf4", "nearest", "NF4 and 16-bit",
         [PLUGIN, "scale that is nearest"], ["GPTQ"]),
        (lambda leaf: {"o_proj": "int8", "up_proj": "16bit"}.get(leaf, "int4_g64"), "guided",
         "int4, int8 and 16-bit", ["memory is not", "accelerate compressed-tensors`", "GPTQ"], ["bnb"]),
        (lambda leaf: "int8", "guided", "int8", ["scale that is nearest"], ["GPTQ", "bnb"]),
        (lambda leaf: "16bit", "guided", "16-bit", ["transformers accelerate`"], ["bnb", "Rounding"]),
    ],
)  # fmt: skip
def test_the_card_is_true_of_every_mix_of_formats(finished, choose, rounding, held, said, unsaid):
    _, text = written(finished, choose, rounding=rounding)
    assert f"weight matrices in {held}," in text
    assert all(words in text for words in said) and not any(words in text for words in unsaid)


def test_the_verdict_comes_first_then_the_numbers_then_how_to_load(finished, tmp_path):
    run = Run(shutil.copytree(finished.path, tmp_path / "run"))
    runs.write_json(run.model_dir / "config.json", {"auto_map": {}})  # code of its own: loaded with leave
    _, text = written(run)
    assert text.count("trust_remote_code=True)") == 2
    order = ("# small", headline_of(Evaluation.read(finished.evaluation_json)), "**this model**")
    places = [text.index(part) for part in (*order, "## Load it", "## How it was made", "## Limits")]
    assert places == sorted(places)


# --- the licence -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("told", "usable", "licence", "languages", "condition"),
    [
        ("license: mit\nlanguage: en", True, "mit", ["en"], ""),
        ("license: apache-2.0\nlanguage:\n- de\n- fr", True, "apache-2.0", ["de", "fr"], ""),
        ("license: llama3.2", True, "llama3.2", None, "Built with Llama"),
        ("license: other\nlicense_name: llama3.2", True, "llama3.2", None, "Built with Llama"),
        ("license: foo-bar-evil-1.0", False, "other", None, ""),
        ("license: cc-by-nc-nd-4.0", False, "other", None, "Non-commercial"),
        ("license:\n- apache-2.0\n- cc-by-nd-4.0", False, "other", None, ""),
        ("license:\n- apache-2.0\n- mit", True, "apache-2.0", None, ""),
        ("language: en", False, "unknown", ["en"], ""),
    ],
)
def test_a_local_bases_card_tells_licence_and_languages_while_the_weights_are_that_base(
    finished, tmp_path, told, usable, licence, languages, condition
):
    folder = make_tiny("llama", tmp_path / "m", num_hidden_layers=1)
    (folder / "README.md").write_text(f"---\n{told}\n---\nbase\n")
    identity = {"kind": "local", "id": "m", "sha256": weights_hash(folder)}
    found, spoken = card.read_base(identity, str(folder))
    assert found.usable is usable
    data, text = written(finished, licence=found, languages=spoken)
    assert data["license"] == licence and data.get("language") == languages and condition in text
    assert card.read_base({**identity, "sha256": "0" * 64}, str(folder))[0].id is None
    (folder / "model.safetensors").unlink()
    assert card.read_base(identity, str(folder))[0].id is None
    stated, _ = card.read_base(identity, None, "cc-by-nd-4.0")
    assert (
        stated.usable
        and stated.forbids
        and "The publisher stated this" in written(finished, licence=stated)[1]
    )


# --- the command -----------------------------------------------------------------------------------------


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
    "given",
    [
        {},
        {"preset": "small"},
        {"score": "fisher", "rule": "matrix_bits", "value": 7.25, "group": "fused"},
        {"score": "fisher", "rule": "bits_per_weight", "value": 9.0, "formats": ["int8", "16bit"]},
        {"rule": "threshold", "value": 3.1234567891, "direction": "low"},
        {"rule": "top_k", "value": 9.0, "force_16bit": [r"\.0\.mlp", "o_proj"], "double_quant": True},
        {"backend": "compressed-tensors", "rule": "top_k", "value": 9.0, "group": None},
    ],
    ids=json.dumps,
)
def test_the_command_makes_the_same_plan_again(analysed, given):
    given = {"backend": "compressed-tensors"} | given if "int8" in given.get("formats", []) else given
    plan = decided(analysed, given)
    backend = next(iter(plan.writers)) if len(plan.writers) == 1 else given.get("backend", "bitsandbytes")
    words = shlex.split(card.command_of(plan, backend, {"kind": "local", "id": "somewhere/m"}))
    assert words[:2] == ["spi-utils", "run"] and words[2::3] == ["-p"] * (len(words[2:]) // 3)
    again = {name: from_command_line(name, text) for name, text in zip(words[3::3], words[4::3], strict=True)}
    assert again.pop("model") == "MODEL" and again.pop("rounding") == plan.rounding
    made = decided(analysed, again)
    assert (made.formats, made.double_quant) == (plan.formats, plan.double_quant)
