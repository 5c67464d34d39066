"""What is handed over, shown or compared is what was measured: faults that once passed unseen."""

import json
import traceback

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from torch import nn

from spi_utils.errors import PublishError
from spi_utils.explorer.page import _json
from spi_utils.hub.gates import check_gates
from spi_utils.hub.hub_calls import Caller
from spi_utils.hub.licences import Licence
from spi_utils.hub.tokens import Token
from spi_utils.judging.generalization import evaluated_beside
from spi_utils.models import load_model, open_weights, resolve
from spi_utils.runs import run_info, write_json
from spi_utils.scoring import as_head_takes
from spi_utils.variants import Switch
from tests.finished_run import make_finished_run
from tests.tiny import make_tiny


def test_a_control_after_the_plan_starts_from_the_sources_weights_not_the_files_cast(tmp_path):
    """A float16 source whose file is bfloat16: most 16-bit weights differ between the two."""
    source = resolve(str(make_tiny("llama", tmp_path / "m", dtype="float16")))
    model = load_model(source, device="cpu", dtype=torch.float32)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name.removesuffix(".weight") for name in own if "proj" in name]
    with open_weights(source) as weights:
        switch = Switch(model, weights, names)
        switch.to({names[0]: "nf4"})
        with torch.no_grad():
            for name in names[1:]:  # as the saved checkpoint is put in: past the switch
                module = model.get_submodule(name)
                module.weight.copy_(module.weight.bfloat16())
        assert (model.state_dict()[f"{names[1]}.weight"] != own[f"{names[1]}.weight"]).float().mean() > 0.5
        switch.renew()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert set(switch.state.values()) == {"16bit"}


def test_hidden_states_for_a_packed_head_keep_their_numbers():
    class Model:
        head = nn.Linear(4, 8)

        def get_output_embeddings(self):
            return self.head

    hidden = torch.tensor([[0.5, -1.5, 2.25, 300.0]])
    assert as_head_takes(Model(), hidden.half()).dtype == torch.float32
    Model.head.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    assert torch.equal(as_head_takes(Model(), hidden), hidden)


@pytest.mark.parametrize("name", ["<!--<script>", "</script><b>", "a < b"])
def test_no_name_leaves_the_pages_script_element(name):
    text = _json({"model": name})
    assert "<" not in text
    assert json.loads(text) == {"model": name}


def test_a_damaged_run_beside_this_one_is_named_and_left_out(tmp_path, capsys):
    run = make_finished_run(tmp_path)
    for name, content in (("cut", '{"schema": 1, '), ("empty", "{}"), ("list", "[]")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(content)
        (tmp_path / name / "evaluation.json").write_text(content)
    found = evaluated_beside(run)
    assert not {path.name for path in found} & {"cut", "empty", "list"}
    said = capsys.readouterr().out
    assert all(f"{name} is left out" in said for name in ("cut", "empty", "list"))


@pytest.mark.parametrize("proof", [None, {"finite": False}, {"finite": True}])
def test_a_checkpoint_that_nobody_has_used_is_not_published(proof, tmp_path):
    run = make_finished_run(tmp_path)
    licence = Licence("apache-2.0", "its LICENSE file")
    held = {gate.name: gate.passed for gate in check_gates(run, {}, licence)}
    assert held["proof by use"]
    info = run_info(run)
    info["stages"]["quantize"]["proof"] = proof
    write_json(run.info_json, info)
    gate = next(gate for gate in check_gates(run, {}, licence) if gate.name == "proof by use")
    assert not gate.passed and "03_quantize" in gate.found


def test_a_hub_that_echoes_the_request_puts_no_token_into_the_traceback(tmp_path):
    """The error shown must not be chained to the one that holds the header."""
    token = "hf_" + "a" * 34
    httpx = pytest.importorskip("httpx2")
    request = httpx.Request("POST", "https://hub/api", headers={"Authorization": f"Bearer {token}"})
    response = httpx.Response(400, request=request, text=f"bad header: Bearer {token}")

    def fail():
        raise HfHubHTTPError(f"400: bad header: Bearer {token}", response=response)

    with pytest.raises(PublishError) as caught:
        Caller(Token(token, "a test"), "someone/model", tmp_path)(fail)
    shown = "".join(traceback.format_exception(caught.value))
    assert token not in shown and "someone/model" in shown
