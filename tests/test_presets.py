"""Presets: what a word stands for, and what is given beside it."""

import pytest

from spi_utils import sensitivity
from spi_utils.errors import ParameterError
from spi_utils.notebook import ALL, check_settings, parameters_of
from spi_utils.plan import TIERS, make_plan
from spi_utils.presets import (
    DEFAULT,
    OWN_WINDOWS,
    PRESETS,
    for_all_stages,
    formats_to_cost,
    resolve,
    told,
)
from tests.synthetic import layer_table

GIVEN = dict.fromkeys(PRESETS[DEFAULT])  # every parameter that a preset sets, none given


def test_the_default_is_the_claim_as_stated_and_what_presets_set_stands_as_none():
    assert parameters_of(ALL)["preset"] == DEFAULT == "claim"
    stated = {"score": "alpha_hill", "direction": "high", "rule": "claim", "value": None}
    assert resolve("claim", GIVEN).items() >= stated.items()
    for name in ("00_run_all", "01_analyze", "02_visualize", "03_quantize"):
        held = parameters_of(name)
        assert "preset" in held and all(held[one] is None for one in GIVEN if one in held)


def test_what_is_given_wins_and_half_a_pair_brings_its_own_other_half():
    assert resolve("small", GIVEN | {"value": 5.0})["value"] == 5.0
    assert resolve("small", GIVEN | {"rule": "top_k", "value": 3})["value"] == 3
    assert resolve("small", GIVEN | {"rule": "claim"})["value"] is None
    assert resolve("small", {"rounding": None}) == {"rounding": "guided"}
    assert resolve("balanced", {"backend": None}) == {"backend": "compressed-tensors"}
    assert resolve("small", {"double_quant": None}) == {"double_quant": True}
    assert not resolve("small", GIVEN | {"backend": "compressed-tensors"})["double_quant"]
    for other in ({"backend": "bitsandbytes"}, {"rule": "top_k"}, {"score": "alpha_hill"}):
        assert resolve("balanced", GIVEN | other)["formats"] == []
    assert "value=4.6" in told("small", GIVEN) and "double_quant=True" in told("small", GIVEN)
    assert "double_quant" not in told("claim", GIVEN)
    with pytest.raises(ParameterError, match="top_k"):
        check_settings({"preset": "small", "rule": "top_k"}, ALL)  # without its number


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_passes_the_door_and_costs_about_the_bits_that_it_promises(preset):
    check_settings({"preset": preset}, ALL)
    chosen = resolve(preset, GIVEN)
    asked = {name: chosen[name] for name in ("score", "rule", "value", "double_quant")}
    adds_up = preset != "claim"
    layers = layer_table()
    for kind in ("fisher", "predicted"):
        layers[f"{kind}_int4_g32"] = 0.8 * layers[f"{kind}_int4_g64"]
    plan = make_plan(layers, **asked, formats=chosen["formats"] or TIERS[chosen["backend"]][adds_up])
    assert not adds_up or chosen["value"] - 0.5 < plan.matrix_bits <= chosen["value"]


def test_the_full_profile_rounds_on_more_own_text():
    assert for_all_stages({"profile": "full"})["sensitivity_windows"] == OWN_WINDOWS["full"] == 128
    assert for_all_stages({"profile": "full", "sensitivity_windows": 8})["sensitivity_windows"] == 8
    assert OWN_WINDOWS["quick"] == sensitivity.WINDOWS  # the stage's own default


def test_only_formats_that_the_plan_may_use_are_costed():
    pair, mix = ["nf4", "int8"], ["nf4", "int8", "int4_g64"]
    assert formats_to_cost({}) == formats_to_cost({"backend": "bitsandbytes"}) == pair
    assert formats_to_cost({"preset": "small", "cost_formats": None}) == [*pair, "nf4_dq"]
    assert formats_to_cost({"preset": "small", "double_quant": False}) == pair
    assert formats_to_cost({"preset": "near-lossless"}) == formats_to_cost({"profile": "full"}) == mix
    assert formats_to_cost({"preset": "balanced"}) == [*pair, "int4_g32"]
    assert formats_to_cost({"preset": "balanced", "score": "alpha_hill"}) == mix
    assert formats_to_cost({"preset": "balanced", "profile": "full"}) == [*mix, "int4_g32"]
    assert formats_to_cost({"preset": "claim", "backend": "compressed-tensors"}) == mix
    assert formats_to_cost({"formats": ["int4_g32", "16bit"]}) == [*pair, "int4_g32"]
    assert formats_to_cost({"profile": "full", "cost_formats": ["int8"]}) == ["int8"]
    assert for_all_stages({"double_quant": True})["cost_formats"] == [*pair, "nf4_dq"]
