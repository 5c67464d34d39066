"""Models: read as transformers reads them, damage named, the Hub's moods answered."""

import hashlib
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
from spi_utils.errors import ModelError
from tests.tiny import ARCHITECTURES, make_tiny


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_weights_and_layers_are_those_of_transformers_own_load(tiny, arch):
    source = models.resolve(str(tiny(arch)))
    model = models.load_model(source, device="cpu", dtype=torch.float16)
    state, modules = model.state_dict(), dict(model.named_modules())
    with models.open_weights(source) as weights:
        for name, shape in weights.shapes.items():
            assert torch.equal(weights.read(name), state[name]) and shape == tuple(state[name].shape), name
        assert set(state) - set(weights.shapes) <= {"lm_head.weight"}  # tied
    layers = models.list_layers(source)
    assert sum(layer.numel for layer in layers) == sum(p.numel() for p in model.parameters())
    assert [layer.role for layer in layers].count("other") == 1 and layers[-1].role == "other"
    for layer in layers:
        sizes = {"linear": (layer.rows, layer.cols), "conv1d": (layer.cols, layer.rows)}.get(layer.role)
        assert layer.quantizable == (sizes is not None)
        assert sizes is None or tuple(modules[layer.name].weight.shape) == sizes


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


def test_what_stock_loaders_leave_alone_is_not_planned(copy):
    config(model_type="qwen2_moe")(copy)
    layers = {layer.name: layer for layer in models.list_layers(models.resolve(str(copy)))}
    gate = layers["model.layers.0.mlp.shared_expert_gate"]  # a single row: no spectrum, nothing to save
    assert (gate.role, gate.rows, gate.quantizable) == ("linear", 1, False)
    assert layers["model.layers.0.mlp.shared_expert.up_proj"].quantizable
    text("config.json", '{"model_type": "mamba"}')(copy)
    kinds = {(layer.type, layer.quantizable) for layer in models.list_layers(models.resolve(str(copy)))}
    assert {("x_proj", True), ("dt_proj", False)} <= kinds  # whose weight is read without a call
    text("config.json", '{"model_type": "falcon"}')(copy)
    with pytest.raises(ModelError, match="this model's are FalconLinear"):
        models.list_layers(models.resolve(str(copy)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_float32_sources_are_stored_as_bfloat16_and_bfloat16_stays(tmp_path, dtype):
    source = models.resolve(str(make_tiny("llama", tmp_path / dtype, dtype=dtype)))
    assert source.storage_dtype == "bfloat16"
    name = "model.layers.0.mlp.down_proj.weight"
    raw = load_file(source.directory / "model.safetensors")[name]
    with models.open_weights(source) as weights:
        assert torch.equal(weights.read(name), raw.bfloat16()) and torch.equal(weights.read_source(name), raw)


# --- identity ------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tiny, tmp_path):
    return shutil.copytree(tiny("llama"), tmp_path / "copy")


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors"]
)
def test_the_identity_follows_weights_configuration_and_tokenizer(copy, file):
    first = models.resolve(str(copy)).identity()
    assert set(first) == {"id", "kind", "revision", "sha256", "files_sha256", "storage_dtype"}
    (copy / "notes.md").write_text("of no weight")
    assert models.resolve(str(copy)).identity() == first
    if file.endswith("safetensors"):
        flip(copy / file, -1, 0)
    else:
        with (copy / file).open("a") as held:
            held.write("\n")
    changed = models.resolve(str(copy)).identity()
    differing = "sha256" if file.endswith("safetensors") else "files_sha256"
    assert {name for name in first if first[name] != changed[name]} == {differing}


def test_a_file_that_is_called_like_a_hash_is_hashed_all_the_same(copy):
    """Only the Hub's cache names a file by its content; a folder of one's own may call it anything."""
    (copy / "model.safetensors").rename(copy / ("a" * 64))
    (copy / "model.safetensors").symlink_to("a" * 64)
    held = hashlib.sha256((copy / ("a" * 64)).read_bytes()).hexdigest()
    expected = hashlib.sha256(f"model.safetensors {held}\n".encode()).hexdigest()
    assert models.resolve(str(copy)).sha256 == expected


# --- bad input -------------------------------------------------------------------------------------------


def flip(path, place, bit):
    data = bytearray(path.read_bytes())
    data[place] ^= 1 << bit
    path.write_bytes(data)


def config(**values):
    def change(directory):
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def text(file, content):
    return lambda directory: (directory / file).write_text(content)


def mapped(value):
    return text(models.INDEX, json.dumps({"weight_map": value}))


def bytes_of(change):
    def damage(directory):
        path = directory / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return damage


def tensors(change):
    def damage(directory):
        save_file(change(load_file(directory / "model.safetensors")), directory / "model.safetensors")

    return damage


def to_pickle(directory):
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


UP = "model.layers.2.mlp.up_proj.weight"
UNREADABLE = "make a causal language model from its config.json"


@pytest.mark.parametrize(
    "damage, message",
    [
        (mapped({"a": "model.safetensors", "b": "m-2.safetensors"}), r"no m-2\.safetensors, which its index"),
        (mapped([]), "which its index names"),
        (mapped({"a": 5}), "which its index names"),
        (mapped({"a": "../elsewhere.safetensors"}), r"no \.\./elsewhere\.safetensors"),
        (text(models.INDEX, "[]"), "expected a JSON object"),
        (bytes_of(lambda raw: raw[:-100]), "truncated, or its head is damaged"),
        (bytes_of(lambda raw: raw[:20] + b"\xff" * 8 + raw[28:]), "truncated, or its head is damaged"),
        (to_pickle, "no safetensors file here.*Pickle weights"),
        (tensors(lambda held: {k: v for k, v in held.items() if k != UP}), f"no file holds '{UP}'"),
        (tensors(lambda held: {k: v.to(torch.float8_e4m3fn) for k, v in held.items()}), "already quantized"),
        (lambda d: (d / "config.json").unlink(), r"config\.json: there is no"),
        (text("config.json", "{"), "truncated or damaged"),
        (config(intermediate_size=64), r"shape \(256, 128\), but config.json asks for \(64, 128\)"),
        (config(vocab_size="many"), UNREADABLE),
        (config(model_type="llama9"), UNREADABLE),
        (config(model_type="vit", architectures=["ViTModel"]), UNREADABLE),
        (config(model_type="electra"), "no next-token model"),
        (config(model_type="bart"), "no next-token model"),
        (config(quantization_config={"quant_method": "gptq"}), r"already quantized \(gptq\)"),
    ],
)
def test_damage_is_named(copy, damage, message):
    damage(copy)
    with pytest.raises(ModelError, match=message), models.open_weights(models.resolve(str(copy))):
        raise AssertionError("opened")


def test_a_flip_in_a_header_is_a_clear_error_wherever_it_is(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"layer.weight": torch.ones(4, 6, dtype=torch.float16), "b": torch.ones(3)}, path)
    length, seen = struct.unpack("<Q", path.read_bytes()[:8])[0], 0
    for place in range(8 + length):
        flip(path, place, place % 7)
        try:
            for name in models.read_header(path):
                models.read_tensor(path, name)
        except ModelError as error:
            assert str(path) in str(error)
            seen += 1
        flip(path, place, place % 7)
    assert seen > length / 3  # most flips are seen; one in a name is another name


@pytest.mark.parametrize("name", ["nowhere/to/be", "/no/such/folder", "model.gguf", "justaname"])
def test_an_unknown_name_is_refused_before_any_request(name):
    with pytest.raises(ModelError, match=r"neither a directory|no such GGUF"):
        models.resolve(name)


# --- devices ---------------------------------------------------------------------------------------------


def test_wrong_devices_and_types_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
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

    file = models._bundled_file()
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


def test_a_damaged_gguf_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "CACHE", tmp_path)
    path = tmp_path / "half.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + b"\0" * 40)
    with pytest.raises(ModelError, match="not a GGUF model"):
        models.resolve(str(path))
    assert [p.name for p in tmp_path.rglob(".converting-*")] == []


# --- the Hub, played by a local server -------------------------------------------------------------------


class Hub(BaseHTTPRequestHandler):
    """Answers each repository name with the status that it carries: owner/status-404; 000 hangs up."""

    def do_GET(self):
        status = int(self.path.split("status-")[1][:3])
        if status == 0:
            return
        self.send_response(status)
        if status in (403, 404):
            self.send_header("X-Error-Code", {403: "GatedRepo", 404: "RepoNotFound"}[status])
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args):
        """Say nothing."""


FETCH = """
import sys
from spi_utils.errors import ModelError
from spi_utils.models import download
for repo in sys.argv[1:]:
    try:
        download(repo)
    except ModelError as error:
        print(error)
"""
SAID = {
    "a/status-404": "knows no such model",
    "a/status-403": "is gated",
    "a/status-503": "answered 503",
    "a/status-429": "answered 429",
    "a/status-000": "can't be reached",
}


@pytest.mark.slow
def test_hub_errors_say_what_to_do(tmp_path):
    """In a process of its own, from a local server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    environment = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": str(tmp_path), "PATH": "/usr/bin"}
    command = [sys.executable, "-c", FETCH, *SAID]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    server.shutdown()
    lines = found.stdout.splitlines()
    assert len(lines) == len(SAID), found.stdout + found.stderr[-2000:]
    assert all(word in line for word, line in zip(SAID.values(), lines, strict=True)), lines
