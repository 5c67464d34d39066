"""What is handed over, shown or compared is what was measured: faults that once passed unseen."""

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


def test_a_token_in_a_safetensors_header_is_found(tmp_path):
    run, path = make_finished_run(tmp_path), tmp_path / "run" / "model" / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": "pt", "note": "hf_" + "b" * 34})
    gates = {gate.name: gate for gate in publish(run).gates}
    assert "model.safetensors" in gates["secrets"].found and not gates["secrets"].passed


def test_a_checkpoint_with_zeroed_codes_is_refused_by_the_evaluation(tmp_path):
    source = resolve(str(make_tiny("llama", tmp_path / "m")))
    run = open_run(tmp_path / "run", source.identity())
    plan = plan_for(source)
    write_text(run.layers_csv, "name\n")
    with stage(run, "quantize", {}, ["model"]):
        write_checkpoint(source.directory, run.model_dir, skip=plan.protected)
    path = run.model_dir / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4096:-4032] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(
        EvaluationError, match=r"model\.safetensors is not the file that notebook 03_quantize"
    ):
        evaluate(run, source, device="cpu")
