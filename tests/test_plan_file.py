"""plan.json damaged in every entry: one error that names it, and advice that works when it is followed."""

import json

import pytest

from spi_utils.errors import PlanError
from spi_utils.plan import ProtectionPlan, decide, read_plan
from spi_utils.runs import read_layers
from tests.synthetic import make_run

REQUIRED = [
    *("model", "score", "direction", "rule", "value", "formats", "protected", "double_quant", "bytes"),
    *("bits_per_weight", "matrix_bits", "predicted_kl", "layers_fingerprint", "schema"),
]
WRONG = {
    "model": [None, [], "gpt2"],
    "score": [None, 5, ["alpha_hill"]],
    "direction": [None, 1, "up", ["high"], {}],
    "rule": [None, 7, ["top_k"]],
    "value": ["7", [7], True, float("nan")],
    "formats": [None, [], "nf4", {"model.layers.0.mlp.up_proj": 4}, {"model.layers.0.mlp.up_proj": ["nf4"]}],
    "protected": [None, "all", {}, [1], [["a"]]],
    "double_quant": [None, 0, "no"],
    "bytes": [None, 5, {}, {"total": "5"}, {"total": None}, {"total": 5, "data": []}],
    "bits_per_weight": [None, "4.5", True, float("nan")],
    "matrix_bits": [None, "4.5", [], float("nan")],
    "predicted_kl": ["0.1", [], True],
    "layers_fingerprint": [None, 5, []],
    "schema": [None, "1", 2, [1]],
    "origin": [None, 5],
    "reason": [None, []],
    "rounding": [None, "near", 4],
    "options": [
        None,
        [],
        {"group": "merged"},
        {"group": []},
        {"force_16bit": 5},
        {"forbid_16bit": [5]},
        {"seed": "0"},
    ],
}
CASES = [
    *((f"without {name}", name, lambda held, name=name: held.pop(name)) for name in REQUIRED),
    *(
        (f"{name}={value!r}", name, lambda held, name=name, value=value: held.update({name: value}))
        for name, values in WRONG.items()
        for value in values
    ),
    ("unknown", "formatz", lambda held: held.update(formatz={})),
    ("nf5", "nf5", lambda held: held["formats"].update(dict.fromkeys(list(held["formats"])[:1], "nf5"))),
    ("protected", "must be the same", lambda held: held["protected"].pop()),
    ("other table", r"another layers\.csv", lambda held: held.update(layers_fingerprint="0" * 64)),
    ("other model", "not for", lambda held: held.update(model={"id": "other", "sha256": "f" * 64})),
]


def test_every_entry_is_tried():
    optional = {"origin", "reason", "options", "rounding"}
    assert {*REQUIRED, *optional} == set(ProtectionPlan.__dataclass_fields__) == set(WRONG)


@pytest.mark.parametrize(("said", "spoil"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_damaged_plan_is_refused_by_name_and_made_again_as_advised(said, spoil, tmp_path):
    run = make_run(tmp_path / "run", 14)
    decide(run, score="alpha_hill", rule="top_k", value=3, force=True)
    held = json.loads(run.plan_json.read_text())
    spoil(held)
    run.plan_json.write_text(json.dumps(held))
    with pytest.raises(PlanError, match=said) as refused:
        read_plan(run)
    assert str(run.plan_json) in str(refused.value)
    assert "02_visualize again with force=True" in str(refused.value)
    again = decide(run, score="alpha_hill", rule="top_k", value=3, force=True)
    assert read_plan(run) == again


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "5", "\x00", '{"schema": 1}'])
def test_a_cut_plan_is_refused_and_made_again_as_advised(content, tmp_path):
    run = make_run(tmp_path / "run", 14)
    run.plan_json.write_text(content)
    for read in (read_plan, decide):
        with pytest.raises(PlanError, match="02_visualize again with force=True"):
            read(run)
    again = decide(run, force=True)
    assert read_plan(run) == again


def test_a_plan_from_a_table_that_changed_is_refused(tmp_path):
    run = make_run(tmp_path / "run", 14)
    plan = decide(run, force=True)
    layers = read_layers(run)
    layers.loc[layers["alpha_hill"].idxmax(), "alpha_hill"] += 1e-6
    layers.to_csv(run.layers_csv, index=False)
    with pytest.raises(PlanError, match=r"another layers\.csv than the run holds"):
        read_plan(run)
    assert decide(run, force=True).layers_fingerprint != plan.layers_fingerprint
