import json
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from spi_utils import runs
from spi_utils.errors import RunError

IDENTITY = {"id": "a/b", "kind": "local", "revision": None, "sha256": "0" * 64, "storage_dtype": "float16"}


def one_stage(run, value, force=False, calls=None):
    with runs.stage(run, "analyze", {"value": value}, ["out.txt"], force=force) as stage:
        if not stage.finished:
            if calls is not None:
                calls.append(value)
            runs.write_text(run.path / "out.txt", str(value))
            stage.record(seen=value)
    return stage


def test_a_finished_stage_is_recognised_and_an_input_or_output_change_is_noticed(tmp_path):
    run, calls = runs.open_run(tmp_path / "run", IDENTITY), []
    one_stage(run, 1, calls=calls)
    one_stage(run, 1, calls=calls)
    assert calls == [1]
    one_stage(run, 2, calls=calls)
    (run.path / "out.txt").write_text("3")
    one_stage(run, 2, calls=calls)
    one_stage(run, 2, force=True, calls=calls)
    assert calls == [1, 2, 2, 2]
    entry = runs.run_info(run)["stages"]["analyze"]
    assert entry["seen"] == 2 and entry["outputs"]["out.txt"]["bytes"] == 1 and entry["seconds"] >= 0


def test_a_stage_that_fails_or_writes_nothing_is_not_finished(tmp_path):
    run = runs.open_run(tmp_path / "run", IDENTITY)
    with pytest.raises(ZeroDivisionError), runs.stage(run, "analyze", {}, ["out.txt"]):
        1 / 0  # noqa: B018
    with (
        pytest.raises(RunError, match=r"without writing out\.txt"),
        runs.stage(run, "analyze", {}, ["out.txt"]),
    ):
        run.partial.mkdir(exist_ok=True)
    assert runs.run_info(run)["stages"] == {}


def test_partial_work_is_kept_for_the_same_inputs_only(tmp_path):
    run = runs.open_run(tmp_path / "run", IDENTITY)
    for inputs, expected in (({"a": 1}, False), ({"a": 1}, True), ({"a": 2}, False)):
        with pytest.raises(KeyboardInterrupt), runs.stage(run, "analyze", inputs, ["x"]):
            piece = run.partial / "analyze" / "piece"
            assert piece.exists() is expected
            runs.write_text(piece, "done")
            raise KeyboardInterrupt


def test_another_model_and_foreign_folders_are_refused(tmp_path):
    runs.open_run(tmp_path / "run", IDENTITY)
    with pytest.raises(RunError, match="holds a run of a/b"):
        runs.open_run(tmp_path / "run", {**IDENTITY, "id": "c/d", "sha256": "1" * 64})
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"")
    with pytest.raises(RunError, match=r"cat\.jpg"):
        runs.open_run(tmp_path / "photos", IDENTITY)
    with pytest.raises(RunError, match="Run notebook 01_analyze first"):
        runs.existing_run(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "text, message", [("{", "truncated"), ("[]", "JSON object"), ('{"schema": 9}', "schema 9")]
)
def test_damaged_json_names_the_file_and_the_notebook(tmp_path, text, message):
    path = tmp_path / "plan.json"
    path.write_text(text)
    with pytest.raises(RunError, match=message) as caught:
        runs.read_json(path, 1, "plan", "02_visualize")
    assert "plan.json" in str(caught.value) and "02_visualize" in str(caught.value)


def test_a_truncated_layer_table_is_refused(tmp_path):
    run = runs.open_run(tmp_path / "run", IDENTITY)
    with pytest.raises(RunError, match="no layer table"):
        runs.read_layers(run)
    run.layers_csv.write_text('name,type\n"a')
    with pytest.raises(RunError, match="01_analyze"):
        runs.read_layers(run)
    run.layers_csv.write_text("name,type\na,b\n")
    with pytest.raises(RunError, match="no column depth"):
        runs.read_layers(run)


def test_the_layer_table_comes_back_bit_for_bit(tmp_path):
    run = runs.open_run(tmp_path / "run", IDENTITY)
    table = pd.DataFrame({key: [1, 2] for key in runs.LAYER_KEYS} | {"x": [0.1 + 0.2, 1e-300]})
    table["quantizable"] = [True, False]
    table.to_csv(run.layers_csv, index=False)
    back = runs.read_layers(run)
    assert back["x"].tolist() == [0.1 + 0.2, 1e-300] and back["quantizable"].tolist() == [True, False]


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    runs.write_text(path, "old")
    with pytest.raises(ValueError, match=r"NaN|Out of range"):
        runs.write_json(path, {"x": float("nan")})
    with pytest.raises(RunError, match="could not write"), runs.atomic_path(path):
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


KILLED = """
import sys, time
from spi_utils import runs
with runs.atomic_path(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


def test_a_killed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({"schema": 1}))
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"writing\n"
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert runs.read_json(path, 1) == {"schema": 1}


def test_slugs_are_folder_names():
    assert runs.slug("Qwen/Qwen3.5-4B") == "qwen3.5-4b"
    assert runs.slug("/some where/My Model/") == "my-model"
    assert (
        str(runs.run_path("auto", "m")) == os.path.join("runs", "m") and str(runs.run_path("x", "m")) == "x"
    )


def test_peak_memory_is_this_process_own():
    code = "from spi_utils.runs import peak_rss_bytes; print(peak_rss_bytes())"
    held = bytearray(400_000_000)
    small = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(held) == 400_000_000 and runs.peak_rss_bytes() > 400_000_000
    assert 10_000_000 < int(small.stdout) < 300_000_000
