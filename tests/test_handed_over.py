"""What is handed over, shown or compared is what was measured: faults that once passed unseen."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spi_utils.errors import EvaluationError
from spi_utils.evaluate import evaluate
from spi_utils.models import load_model, open_weights, resolve
from spi_utils.publish import publish
from spi_utils.runs import open_run, stage, write_text
from spi_utils.scoring import Switch, as_head_takes
from tests.evaluated_run import write_checkpoint
from tests.finished_run import make_finished_run
from tests.test_quantize import plan_for


def test_a_control_after_the_plan_starts_from_the_sources_weights_not_the_files_cast(tiny):
    """A float16 source whose file is bfloat16: most 16-bit weights differ between the two."""
    source = resolve(str(tiny("llama")))
    model = load_model(source, device="cpu", dtype=torch.float32)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name.removesuffix(".weight") for name in own if "proj" in name]
    with open_weights(source) as weights:
        switch = Switch(model, weights, names)
        switch.to({names[0]: "nf4"})
        for weight in (model.get_submodule(name).weight for name in names[1:]):
            weight.data.copy_(weight.bfloat16())  # as the saved checkpoint is put in: past the switch
        assert (model.state_dict()[f"{names[1]}.weight"] != own[f"{names[1]}.weight"]).float().mean() > 0.5
        switch.renew()
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())
    assert set(switch.state.values()) == {"16bit"}


def test_hidden_states_for_a_packed_head_keep_their_numbers():
    hidden, head = torch.tensor([[0.5, -1.5, 2.25, 300.0]]), nn.Linear(4, 8)
    model = SimpleNamespace(get_output_embeddings=lambda: head)
    assert as_head_takes(model, hidden.half()).dtype == torch.float32
    head.weight = nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    assert torch.equal(as_head_takes(model, hidden), hidden)


def test_a_token_in_a_safetensors_header_is_found(tmp_path):
    run, path = make_finished_run(tmp_path), tmp_path / "run" / "model" / "model.safetensors"
    save_file(load_file(path), path, metadata={"format": "pt", "note": "hf_" + "b" * 34})
    gates = {gate.name: gate for gate in publish(run).gates}
    assert "model.safetensors" in gates["secrets"].found and not gates["secrets"].passed


def test_a_checkpoint_with_zeroed_codes_is_refused_by_the_evaluation(tiny, tmp_path):
    source = resolve(str(tiny("llama")))
    run = open_run(tmp_path / "run", source.identity())
    write_text(run.layers_csv, "name\n")
    with stage(run, "quantize", {}, ["model"]):
        write_checkpoint(source.directory, run.model_dir, skip=plan_for(source).protected)
    path = run.model_dir / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-4096] + bytes(64) + content[-4032:])
    with pytest.raises(EvaluationError, match=r"model\.safetensors is not the file.*03_quantize"):
        evaluate(run, source, device="cpu")
