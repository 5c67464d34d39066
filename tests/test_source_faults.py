"""Models and files that are damaged or foreign: refused with the file's name and what to do, or healed."""

import hashlib
import json
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from spi_utils import notebook as book
from spi_utils import texts
from spi_utils.checkpoint import read_part, saved_files
from spi_utils.errors import CheckpointError, ModelError, ParameterError
from spi_utils.models import cache_key, convert_gguf, list_layers, resolve
from spi_utils.quantize import quantize
from spi_utils.runs import open_run
from tests.test_quantize import plan_for
from tests.tiny import make_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("faults") / "m")


def changed(model, folder, file, change):
    directory = shutil.copytree(model, folder / "copy")
    path = directory / file
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    return directory


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda config: [config], "config.json: expected a JSON object"),
        (lambda config: "llama", "config.json: expected a JSON object"),
        (lambda config: config | {"vocab_size": "many"}, "config.json"),
        (lambda config: config | {"hidden_size": None}, "config.json"),
        (lambda config: config | {"quantization_config": "gptq"}, r"already quantized \(gptq\)"),
        (
            lambda config: config | {"quantization_config": {"quant_method": "awq"}},
            r"already quantized \(awq\)",
        ),
        (lambda config: config | {"model_type": "no-such-family"}, "config.json"),
    ],
)
def test_a_configuration_that_is_none_is_refused(model, change, words, tmp_path):
    with pytest.raises(ModelError, match=words):
        list_layers(resolve(str(changed(model, tmp_path, "config.json", change))))


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ([], "not an index"),
        ({"weight_map": []}, "not an index"),
        ({"weight_map": {"a": 5}}, "not an index"),
        ({"weight_map": {"a": "../elsewhere.safetensors"}}, "no file of this folder"),
        ({"weight_map": {"a": "/etc/passwd"}}, "no file of this folder"),
        ({"weight_map": {"a": "gone.safetensors"}}, "gone.safetensors is missing"),
        ({}, "not an index"),
    ],
)
def test_an_index_that_is_none_is_refused(model, index, words, tmp_path):
    directory = shutil.copytree(model, tmp_path / "copy")
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=words):
        resolve(str(directory))


def test_a_file_that_is_called_like_a_hash_is_hashed_all_the_same(model, tmp_path):
    """Only the Hub's cache names a file by its content; a folder of one's own may call it anything."""
    directory, name = shutil.copytree(model, tmp_path / "copy"), "a" * 64
    (directory / "model.safetensors").rename(directory / name)
    (directory / "model.safetensors").symlink_to(name)
    held = hashlib.sha256((directory / name).read_bytes()).hexdigest()
    expected = hashlib.sha256(f"model.safetensors {held}\n".encode()).hexdigest()
    assert resolve(str(directory)).sha256 == expected


def test_a_flip_in_a_header_is_a_clear_error_wherever_it_is(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"layer.weight": torch.ones(4, 6, dtype=torch.float16), "b": torch.ones(3)}, path)
    whole = path.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    seen = 0
    for place in range(8 + length):
        for bit in (0, 3, 6):
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                for name, (file, _, shape) in saved_files(tmp_path).items():
                    read_part(file, name, shape)
            except CheckpointError as error:
                assert str(path) in str(error)
                seen += 1
    assert seen > length  # most flips are seen; one in a name is another name


def test_a_cut_plan_in_the_checkpoints_folder_is_healed(model, tmp_path):
    source = resolve(str(model))
    run, plan = open_run(tmp_path / "run", source.identity()), plan_for(source)
    quantize(run, source, plan, device="cpu")
    path = run.model_dir / "plan.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    quantize(run, source, plan, device="cpu", force=True)
    assert path.read_bytes() == whole
    assert load_file(run.model_dir / "model.safetensors")


def test_a_backends_missing_package_is_said_before_anything_runs(monkeypatch):
    chosen = {"backend": "compressed-tensors"}
    book.check_values(chosen, "00_run_all")
    monkeypatch.setitem(book.PACKAGES, "compressed-tensors", "no_such_package_here")
    for notebook in ("00_run_all", "02_visualize", "03_quantize"):
        with pytest.raises(ParameterError, match="pip install compressed-tensors"):
            book.check_values(chosen, notebook)


def test_a_conversion_of_another_version_is_made_anew_and_a_readers_folder_stays(monkeypatch, tmp_path):
    first = cache_key("a" * 64)
    monkeypatch.setattr("spi_utils.models.version", lambda name: "99")
    assert cache_key("a" * 64) != first and cache_key("a" * 64).startswith("a" * 16)
    target = tmp_path / "converted"

    def convert(path, work):
        (work / "config.json").write_text("ours")
        target.mkdir()  # another process ends first
        (target / "config.json").write_text("theirs")

    monkeypatch.setattr("spi_utils.models._convert_into", convert)
    assert convert_gguf(tmp_path / "m.gguf", target) == target
    assert (target / "config.json").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["converted"]


def test_wikitext_of_another_hash_is_said(monkeypatch, tmp_path, capsys):
    import zipfile

    archive = tmp_path / "w.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(texts.WIKITEXT_MEMBER, " \n = A = \n")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(archive))
    text = texts._wikitext()
    assert text.sha256[:12] in capsys.readouterr().out
