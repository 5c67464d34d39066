"""What is handed over, shown or compared is what was measured: faults that once passed unseen."""

import traceback

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from torch import nn

from spi_utils.card import read_base
from spi_utils.errors import EvaluationError, PublishError
from spi_utils.evaluate import evaluate
from spi_utils.models import load_model, open_weights, resolve
from spi_utils.publish import _patiently, publish
from spi_utils.runs import open_run, stage, write_text
from spi_utils.scoring import Switch, as_head_takes
from spi_utils.tokens import Token
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


def test_a_hub_that_echoes_the_request_puts_no_token_into_the_traceback(tmp_path):
    """The error shown must not be chained to the one that holds the header."""
    token = "hf_" + "a" * 34
    httpx = pytest.importorskip("httpx2")
    request = httpx.Request("POST", "https://hub/api", headers={"Authorization": f"Bearer {token}"})
    response = httpx.Response(400, request=request, text=f"bad header: Bearer {token}")

    def fail():
        raise HfHubHTTPError(f"400: bad header: Bearer {token}", response=response)

    with pytest.raises(PublishError) as caught:
        _patiently(fail, token=Token(token, "a test"), repo_id="someone/model", local=tmp_path)
    shown = "".join(traceback.format_exception(caught.value))
    assert token not in shown and "someone/model" in shown


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


MIT = (
    "MIT License\n\nCopyright (c) 2026 A. Person\n\nPermission is hereby granted, free of charge, to any "
    "person obtaining a copy of this software"
)
APACHE = "Apache License\nVersion 2.0, January 2004\nhttp://www.apache.org/licenses/\n\nTERMS AND CONDITIONS"


@pytest.mark.parametrize(
    ("text", "usable"),
    [
        (APACHE, True),
        ("This is NOT the Apache License, Version 2.0. NON-COMMERCIAL use alone.", False),
        (APACHE + " Additional terms: non-commercial use only.", False),
        ("Our own terms. " * 40 + "Parts are under the Apache License, Version 2.0.", False),
        (MIT, True),
    ],
)
def test_a_licence_file_is_known_by_its_title_and_nothing_may_restrict_it(text, usable, tmp_path):
    (tmp_path / "LICENSE").write_text(text)
    assert read_base({"kind": "local", "id": "m"}, tmp_path)[0].usable is usable


@pytest.mark.parametrize(
    ("yaml", "usable"),
    [
        ("license: apache-2.0", True),
        ("license: foo-bar-evil-1.0", False),
        ("license: other\nlicense_name: my-own-terms", False),
        ("license:\n- apache-2.0\n- cc-by-nd-4.0", False),
        ("license:\n- apache-2.0\n- mit", True),
    ],
)
def test_only_licences_that_are_known_let_a_card_pass(yaml, usable, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{yaml}\n---\nbase\n")
    assert read_base({"kind": "local", "id": "m"}, tmp_path)[0].usable is usable


def test_a_folder_of_the_models_name_lends_it_no_licence(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert read_base({"kind": "local", "id": "m"}, tmp_path / "model")[0].id is None
