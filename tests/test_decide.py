import dataclasses

import pytest

from spi_utils.errors import PlanError
from spi_utils.plan import ProtectionPlan, decide, make_plan, read_plan
from spi_utils.runs import layers_fingerprint, read_layers, run_info
from tests.synthetic import make_run


@pytest.fixture
def run(tmp_path):
    made = make_run(tmp_path / "run", 70)
    made.plan_json.unlink(missing_ok=True)
    return made


def by_hand(run, count=5, **wishes):
    """A plan as the explorer saves it: the first `count` layers."""
    plan = make_plan(
        read_layers(run),
        rule="top_k",
        value=count,
        model=run_info(run)["model"],
        layers_fingerprint=layers_fingerprint(run),
        **wishes,
    )
    dataclasses.replace(plan, origin="slider").write(run.plan_json)


def test_the_parameters_decide_and_are_written(run):
    plan = decide(run, score="alpha_hill", rule="top_k", value=7)
    layers = read_layers(run)
    planned = layers[layers["quantizable"]]
    assert set(plan.protected) == set(planned.nlargest(7, "alpha_hill")["name"])
    assert read_plan(run) == plan and plan.origin == "parameters"


def test_a_plan_saved_by_hand_stays_until_forced(run, capsys):
    by_hand(run)
    assert len(decide(run).protected) == 5
    assert "Kept the plan saved from the explorer (5 layers)" in capsys.readouterr().out
    assert len(decide(run, rule="top_k", value=5).protected) == 5
    assert len(decide(run, rule="top_k", value=9, force=True).protected) == 9
    assert len(decide(run, rule="top_k", value=3).protected) == 3


@pytest.mark.parametrize(
    "asked",
    [
        {"score": "fisher"},
        {"direction": "low"},
        {"rule": "matrix_bits", "value": 6},
        {"rule": "top_k", "value": 9},
        {"double_quant": True},
        {"force_16bit": ["up_proj"]},
        {"forbid_16bit": "up_proj"},
    ],
)
def test_a_plan_saved_by_hand_does_not_answer_for_another_choice(run, asked):
    by_hand(run)
    saved = run.plan_json.read_bytes()
    with pytest.raises(PlanError, match="02_visualize with force=True") as refused:
        decide(run, **asked)
    assert all(f"{name}={value!r}" in str(refused.value) for name, value in asked.items())
    assert run.plan_json.read_bytes() == saved
    assert decide(run, **asked, force=True).origin == "parameters"
    by_hand(run, 12, **{name: value for name, value in asked.items() if "16bit" in name})
    defaults = {"score": "alpha_hill", "direction": "high", "rule": "claim", "value": None, "seed": 0}
    wishes = {"force_16bit": [], "forbid_16bit": [], "double_quant": False, "group": None, "formats": ()}
    assert decide(run, **defaults, **wishes).origin == "slider"  # as the notebook calls it
    assert decide(run, **{name: value for name, value in asked.items() if "16bit" in name}).origin == "slider"


def test_a_plan_for_another_layer_table_is_made_anew(run):
    by_hand(run)
    layers = read_layers(run)
    layers["alpha_hill"] += 1
    layers.to_csv(run.layers_csv, index=False)
    with pytest.raises(PlanError, match=r"another layers\.csv"):
        read_plan(run)
    assert decide(run, rule="top_k", value=9).origin == "parameters"


def test_a_plan_for_another_model_is_refused(run):
    by_hand(run)
    plan = ProtectionPlan.read(run.plan_json)
    dataclasses.replace(plan, model={"id": "other", "sha256": "f" * 64}).write(run.plan_json)
    with pytest.raises(PlanError, match="this plan is for other"):
        decide(run)
