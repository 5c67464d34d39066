import shutil

import pytest

from spi_utils.errors import RunError
from spi_utils.runs import run_info
from spi_utils.workspace import begin_run, continue_run, find_run


def test_a_run_is_begun_found_and_continued(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run, source = begin_run("auto", str(tiny("llama")))
    assert str(run.path) == "runs/llama" and run_info(run)["model"]["id"] == "llama"
    assert find_run("auto", str(tiny("llama"))) == run
    again, same = continue_run("runs/llama")
    assert again == run and same == source


def test_another_model_is_refused(tiny, tmp_path):
    run_dir = str(tmp_path / "run")
    begin_run(run_dir, str(tiny("llama")))
    for call in (begin_run, continue_run, find_run):
        with pytest.raises(RunError, match="holds a run of llama"):
            call(run_dir, str(tiny("phi3")))
    with pytest.raises(RunError, match="01_analyze first"):
        find_run(str(tmp_path / "none"))


def test_changed_weights_are_noticed(tiny, tmp_path):
    copy = shutil.copytree(tiny("llama"), tmp_path / "copy")
    begin_run(str(tmp_path / "run"), str(copy))
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(RunError, match="whose weights have changed since"):
        continue_run(str(tmp_path / "run"))
