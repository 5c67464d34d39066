import json
import shutil
import struct
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file, save_file

from spi_utils import models
from spi_utils.errors import ModelError, RunError
from spi_utils.workspace import begin_run, continue_run
from tests.tiny import ARCHITECTURES


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_read_one_by_one_equal_transformers_own_load(tiny, arch):
    source = models.resolve(str(tiny(arch)))
    model = models.load_model(source, device="cpu", dtype=torch.float16)
    state = model.state_dict()
    with models.open_weights(source) as weights:
        for name in weights.names:
            assert torch.equal(weights.read(name), state[name]), name
            assert weights.shape(name) == tuple(state[name].shape)
        untold = set(state) - set(weights.names)
    assert untold <= {"lm_head.weight"}
    assert all(state[name].data_ptr() == model.get_input_embeddings().weight.data_ptr() for name in untold)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_layers_add_up_to_the_models_parameters(tiny, arch):
    source = models.resolve(str(tiny(arch)))
    layers = models.list_layers(source)
    model = models.load_model(source, device="cpu", dtype=torch.float16)
    assert sum(layer.numel for layer in layers) == sum(p.numel() for p in model.parameters())
    assert [layer.role for layer in layers].count("other") == 1 and layers[-1].role == "other"
    modules = dict(model.named_modules())
    for layer in layers:
        if layer.role == "linear":
            assert tuple(modules[layer.name].weight.shape) == (layer.rows, layer.cols)
        if layer.role == "conv1d":
            assert tuple(modules[layer.name].weight.shape) == (layer.cols, layer.rows)
        if layer.role in {"embedding", "head", "experts", "other"}:
            assert not layer.quantizable


def test_types_depths_and_roles(tiny):
    def table(arch):
        return {layer.name: layer for layer in models.list_layers(models.resolve(str(tiny(arch))))}

    gpt2, qwen, mixtral, untied = (
        table(a) for a in ("gpt2", "qwen3_5_multimodal", "mixtral", "llama_untied")
    )
    assert gpt2["transformer.h.3.attn.c_proj"].type == "attn.c_proj"
    assert gpt2["transformer.h.3.mlp.c_proj"].depth == 3
    assert qwen["model.layers.1.linear_attn.in_proj_qkv"].type == "in_proj_qkv"
    assert not any("visual" in name or "language_model" in name for name in qwen)
    experts = mixtral["model.layers.0.mlp.experts.gate_up_proj"]
    assert (experts.role, experts.rows, experts.cols, experts.numel) == ("experts", 512, 128, 4 * 512 * 128)
    assert untied["lm_head"].role == "head" and untied["model.embed_tokens"].depth == -1


def test_float32_sources_are_stored_as_bfloat16_and_bfloat16_stays(tmp_path):
    from tests.tiny import make_tiny

    for dtype, stored in (("float32", "bfloat16"), ("bfloat16", "bfloat16")):
        directory = make_tiny("llama", tmp_path / dtype, dtype=dtype)
        source = models.resolve(str(directory))
        assert source.storage_dtype == stored
        name = "model.layers.0.mlp.down_proj.weight"
        raw = load_file(directory / "model.safetensors")[name]
        with models.open_weights(source) as weights:
            assert torch.equal(weights.read(name), raw.to(getattr(torch, stored)))
            assert torch.equal(weights.read_source(name), raw)


def test_the_identity_follows_the_weights(tiny, tmp_path):
    first = models.resolve(str(tiny("llama")))
    copy = shutil.copytree(tiny("llama"), tmp_path / "copy")
    assert models.resolve(str(copy)).sha256 == first.sha256
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    assert models.resolve(str(copy)).sha256 != first.sha256
    assert set(first.identity()) == {"id", "kind", "revision", "sha256", "files_sha256", "storage_dtype"}


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_the_identity_follows_configuration_and_tokenizer(tiny, tmp_path, file):
    copy = shutil.copytree(tiny("llama"), tmp_path / "copy")
    first = models.resolve(str(copy))
    (copy / "notes.md").write_text("of no weight")
    assert models.resolve(str(copy)).identity() == first.identity()
    with (copy / file).open("a") as held:
        held.write("\n")
    changed = models.resolve(str(copy))
    assert changed.sha256 == first.sha256 and changed.files_sha256 != first.files_sha256


def test_a_run_is_refused_once_its_models_configuration_has_changed(tiny, tmp_path):
    copy = shutil.copytree(tiny("llama"), tmp_path / "copy")
    begin_run(str(tmp_path / "run"), str(copy))
    continue_run(str(tmp_path / "run"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    for again in (
        lambda: begin_run(str(tmp_path / "run"), str(copy)),
        lambda: continue_run(str(tmp_path / "run")),
    ):
        with pytest.raises(RunError, match="configuration, tokenizer or code"):
            again()


# --- bad input -------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tiny, tmp_path):
    return shutil.copytree(tiny("llama"), tmp_path / "broken")


def edit_config(directory, **values):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def shard_missing(directory):
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(directory / "model.safetensors", directory / "model-1.safetensors")


def truncate(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_head(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20] + b"\xff" * 8 + path.read_bytes()[28:])


def to_pickle(directory):
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


def drop_tensor(directory):
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors")


def to_float8(directory):
    tensors = load_file(directory / "model.safetensors")
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, directory / "model.safetensors")


@pytest.mark.parametrize(
    "damage, message",
    [
        (shard_missing, r"shard model-2\.safetensors is missing"),
        (truncate, "truncated, or its head is damaged"),
        (damage_head, "truncated, or its head is damaged"),
        (to_pickle, "only pickle weights"),
        (drop_tensor, r"no file holds 'model\.layers\.2\.mlp\.up_proj\.weight'"),
        (to_float8, "already quantized or no number"),
        (lambda d: (d / "config.json").unlink(), "no config.json"),
        (lambda d: (d / "config.json").write_text("{"), "truncated or not JSON"),
        (
            lambda d: edit_config(d, intermediate_size=64),
            r"has shape \(256, 128\), but config.json asks for \(64, 128\)",
        ),
        (lambda d: edit_config(d, model_type="llama9"), "can't read its config.json"),
        (lambda d: edit_config(d, model_type="vit", architectures=["ViTModel"]), "no causal language model"),
        (
            lambda d: edit_config(d, quantization_config={"quant_method": "gptq"}),
            r"already quantized \(gptq\)",
        ),
    ],
)
def test_damage_is_named(broken, damage, message):
    damage(broken)
    with pytest.raises(ModelError, match=message), models.open_weights(models.resolve(str(broken))):
        raise AssertionError("opened")


@pytest.mark.parametrize("name", ["nowhere/to/be", "/no/such/folder", "model.gguf", "justaname"])
def test_an_unknown_name_is_refused_before_any_request(name):
    with pytest.raises(ModelError, match=r"neither a directory|no such GGUF"):
        models.resolve(name)


def test_a_model_without_linear_layers(tiny, monkeypatch):
    monkeypatch.setattr(models, "_matrices", lambda model, tied: iter(()))
    with pytest.raises(ModelError, match="no linear layer"):
        models.list_layers(models.resolve(str(tiny("llama"))))


# --- devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "capability, dtype", [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_compute_dtype_goes_by_capability_not_by_emulation(monkeypatch, capability, dtype):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *a, **k: True)
    assert models.resolve_device("auto") == torch.device("cuda:0")
    assert models.resolve_dtype("auto", torch.device("cuda:0")) is dtype


def test_a_p100_is_passed_over_and_wrong_names_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (6, 0))
    assert models.resolve_device("auto") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert models.resolve_dtype("auto", torch.device("cpu")) is torch.float32
    for call in (
        lambda: models.resolve_device("cuda"),
        lambda: models.resolve_device("tpu9"),
        lambda: models.resolve_dtype("fp4", torch.device("cpu")),
    ):
        with pytest.raises(ModelError):
            call()


# --- the bundled model and GGUF --------------------------------------------------------------------------


@pytest.mark.slow
def test_the_bundled_model_equals_transformers_own_dequantization(bundled):
    from transformers import AutoModelForCausalLM

    file, _ = models._bundled_file()
    reference = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    state = reference.state_dict()
    with models.open_weights(bundled) as weights:
        assert len(weights.names) == 272
        for name in weights.names:
            assert torch.equal(weights.read(name), state[name].to(torch.float16)), name
    layers = models.list_layers(bundled)
    assert sum(layer.quantizable for layer in layers) == 210
    assert sum(layer.numel for layer in layers) == 134_515_008
    assert (bundled.directory / "LICENSE").exists()


def test_a_damaged_gguf_is_named(tmp_path):
    path = tmp_path / "half.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\0" * 40)
    with pytest.raises(ModelError, match="not a GGUF model"):
        models.resolve(str(path), cache_dir=tmp_path)
    assert [p.name for p in tmp_path.rglob(".converting-*")] == []


# --- the Hub, played by a local server -------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Answers each repository name with the status that it carries: owner/status-404, owner/status-429 …"""

    def do_GET(self):
        status = int(self.path.split("status-")[1][:3])
        self.send_response(status)
        if status == 403:
            self.send_header("X-Error-Code", "GatedRepo")
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        if status == 429:
            self.send_header("Retry-After", "0" if self.server.asked else "1")
            self.server.asked += 1
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        """Say nothing."""


FETCH = """
from spi_utils.errors import ModelError
from spi_utils.models import download
import sys
try:
    download(sys.argv[1])
except ModelError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.asked = 0  # how often it limited the client
    Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(
    "repo, message",
    [
        ("a/status-404", "knows no such model"),
        ("a/status-403", "is gated"),
        ("a/status-503", "answered 503"),
        ("a/status-000", "can't be reached"),
    ],
)
def test_hub_errors_say_what_to_do(hub, repo, message, tmp_path):
    found = fetch(repo, "http://127.0.0.1:9" if repo.endswith("000") else hub, tmp_path)
    assert message in found.stdout, found.stderr[-2000:]


@pytest.mark.slow
def test_a_limited_address_waits_as_long_as_the_hub_asks_and_then_says_so(hub, tmp_path):
    found = fetch("a/status-429", hub, tmp_path)
    *waits, error = found.stdout.splitlines()
    assert ["waiting 1 s, then try 2" in waits[0], "waiting 0 s, then try 3" in waits[1]] == [True, True]
    assert "a/status-429: the Hub limits requests from this address (429)" in error
    assert "It asks to wait 0 s more, or give a token" in error and len(waits) == 2, found.stderr[-2000:]


def fetch(repo, endpoint, tmp_path):
    """`download` in a process of its own, from the local server."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path),
        "PATH": "/usr/bin",
    }
    return subprocess.run(
        [sys.executable, "-c", FETCH, repo],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    "files, message",
    [
        (["pytorch_model.bin"], "only pickle"),
        (["m.gguf"], "It holds m.gguf"),
        (["README.md"], "no safetensors"),
    ],
)
def test_repositories_without_safetensors_are_refused(files, message):
    with pytest.raises(ModelError, match=message):
        models.require_safetensors("a/b", files)
