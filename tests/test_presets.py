"""Presets: what a word stands for, and what is given beside it."""

import pytest

from spi_utils import sensitivity
from spi_utils.errors import ParameterError
from spi_utils.notebook import ALL, check_settings, parameters_of
from spi_utils.plan import make_plan
from spi_utils.presets import DEFAULT, OWN_WINDOWS, PRESETS, for_all_stages, resolve, told
from tests.synthetic import layer_table

GIVEN = dict.fromkeys(PRESETS[DEFAULT])  # every parameter that a preset sets, none given


def test_the_default_is_the_claim_as_stated():
    assert parameters_of(ALL)["preset"] == DEFAULT == "claim"
    chosen = resolve("claim", GIVEN)
    assert (chosen["score"], chosen["direction"], chosen["rule"], chosen["value"]) == (
        *("alpha_hill", "high", "claim"),
        None,
    )


def test_what_a_preset_sets_stands_as_none_in_every_notebook_that_has_it():
    for name in ("00_run_all", "01_analyze", "02_visualize", "03_quantize"):
        held = parameters_of(name)
        assert "preset" in held
        assert all(held[one] is None for one in GIVEN if one in held)


def test_what_is_given_wins_and_half_a_pair_brings_its_own_other_half():
    assert resolve("small", GIVEN | {"value": 5.0})["value"] == 5.0
    assert resolve("small", GIVEN | {"rule": "top_k", "value": 3})["value"] == 3
    assert resolve("small", GIVEN | {"rule": "claim"})["value"] is None
    assert resolve("small", {"rounding": None}) == {"rounding": "guided"}
    assert resolve("balanced", {"backend": None}) == {"backend": "compressed-tensors"}
    assert "value=4.6" in told("small", GIVEN) and "score='fisher'" in told("small", GIVEN)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes_the_door(preset):
    check_settings({"preset": preset}, ALL)


def test_a_rule_without_its_number_is_refused_beside_a_preset_as_without():
    with pytest.raises(ParameterError, match="top_k"):
        check_settings({"preset": "small", "rule": "top_k"}, ALL)


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "claim"])
def test_a_preset_costs_about_the_bits_that_it_promises(preset):
    layers = layer_table()
    chosen = resolve(preset, GIVEN)
    formats = {"bitsandbytes": ("nf4", "16bit"), "compressed-tensors": ("int4_g64", "int8", "16bit")}
    plan = make_plan(
        layers,
        score=chosen["score"],
        rule=chosen["rule"],
        value=chosen["value"],
        formats=formats[chosen["backend"]],
    )
    assert chosen["value"] - 0.5 < plan.matrix_bits <= chosen["value"]


def test_the_full_profile_rounds_on_more_own_text():
    assert for_all_stages({"profile": "full"})["sensitivity_windows"] == OWN_WINDOWS["full"] == 128
    assert for_all_stages({"profile": "full", "sensitivity_windows": 8})["sensitivity_windows"] == 8
    quick = {"profile": "quick", "sensitivity_windows": 0}
    assert for_all_stages(quick) == quick  # the stage's own default
    assert OWN_WINDOWS["quick"] == sensitivity.WINDOWS
