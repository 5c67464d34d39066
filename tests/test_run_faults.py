"""Run directories under fire: two owners, kills, damage, full disks."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from spi_utils import runs, sensitivity
from spi_utils.analyze import analyze
from spi_utils.errors import RunError
from spi_utils.models import resolve

IDENTITY = {"id": "a/b", "kind": "local", "revision": None, "sha256": "0" * 64, "storage_dtype": "float16"}

OWNER = """
import sys, time
from spi_utils import runs
with runs.stage(runs.Run(runs.Path(sys.argv[1])), "analyze", {}, ["out.txt"]):
    print("inside", flush=True)
    time.sleep(60)
"""
WRITER = """
import sys
from spi_utils import runs
run = runs.Run(runs.Path(sys.argv[1]))
for index in range(40):
    runs.update_info(run, lambda info: info.setdefault("notes", {}).update({f"{sys.argv[2]}-{index}": 1}))
"""


@pytest.fixture
def run(tmp_path):
    return runs.open_run(tmp_path / "run", IDENTITY)


def make(run, text="x", *, inner=None, name="analyze"):
    """A stage that writes out.txt; whether it was finished already."""
    with runs.stage(run, name, {}, ["out.txt"]) as stage:
        if not stage.finished:
            if inner:
                inner()
            runs.write_text(run.path / "out.txt", text)
    return stage.finished


def python(code, *arguments):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE)


def test_a_run_directory_has_one_owner_and_a_killed_one_leaves_no_lock(run):
    owner = python(OWNER, run.path)
    try:
        assert owner.stdout.readline() == b"inside\n"
        with pytest.raises(RunError, match=rf"process {owner.pid} on .+ since \d{{4}}-.+ in stage analyze"):
            make(run)
    finally:
        owner.kill()
        owner.wait()
    assert make(run) is False and make(run) is True


def test_stages_of_one_process_nest(run):
    make(run, inner=lambda: make(run, name="spectra"))
    assert set(runs.run_info(run)["stages"]) == {"analyze", "spectra"}


def test_without_locks_the_work_goes_on_and_says_so(run, monkeypatch, capsys):
    import fcntl

    def refuse(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert make(run) is False and "can't be locked" in capsys.readouterr().out


def test_two_processes_lose_no_entry_of_the_record(run):
    writers = [python(WRITER, run.path, name) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert len(runs.run_info(run)["notes"]) == 80


def test_a_flip_in_a_large_output_is_noticed(run):
    size = 65_000_000

    def body():
        with runs.stage(run, "quantize", {}, ["big"]) as stage:
            if not stage.finished:
                with (run.path / "big").open("wb") as file:
                    file.truncate(size)
        return stage.finished

    assert [body(), body()] == [False, True]
    with (run.path / "big").open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xff" * 64)
    assert body() is False


def test_left_overs_of_a_kill_are_no_outputs_and_are_removed(run):
    figures = run.path / "figures"
    figures.mkdir()
    left = figures / ".quality.svg.ab12_x9z.svg"
    with runs.stage(run, "visualize", {}, ["figures"]):
        runs.write_text(figures / "quality.svg", "<svg/>")
        left.write_text("half")
    assert set(runs.run_info(run)["stages"]["visualize"]["outputs"]) == {"figures/quality.svg"}
    (figures / ".keep").write_text("a user's")
    elsewhere, live = run.path / ".plan.json.abcdefgh.json", run.path / ".card.md.12345678.md"
    elsewhere.write_text("half")
    live.write_text("half")
    os.utime(elsewhere, (0, 0))
    with runs.stage(run, "visualize", {}, ["figures"], force=True):
        assert not left.exists() and not elsewhere.exists() and live.exists() and (figures / ".keep").exists()


def damage_stages(value):
    return lambda info: info.update(stages=value)


@pytest.mark.parametrize(
    "change",
    [
        damage_stages(None),
        damage_stages([]),
        damage_stages({"analyze": None}),
        damage_stages({"analyze": {"fingerprint": "1", "outputs": []}}),
        damage_stages({"analyze": {"fingerprint": "1", "outputs": {"a": {}}}}),
        lambda info: info.pop("model"),
        lambda info: info["model"].pop("sha256"),
        lambda info: info["model"].pop("id"),
        lambda info: info.pop("stages"),
        lambda info: info.update(schema=None),
    ],
)
def test_a_damaged_record_is_named_and_the_advice_heals_it(run, change):
    make(run)
    info = json.loads(run.info_json.read_text())
    change(info)
    run.info_json.write_text(json.dumps(info))
    with pytest.raises(RunError, match=r"run\.json.*01_analyze"):
        runs.existing_run(run.path)
    again = runs.open_run(run.path, IDENTITY)  # what notebook 01 does
    assert make(again) is False and make(again) is True


def test_a_record_of_a_newer_version_is_left_alone(run):
    runs.write_json(run.info_json, {"schema": runs.SCHEMA + 1})
    with pytest.raises(RunError, match="newer spi_utils"):
        runs.open_run(run.path, IDENTITY)
    assert json.loads(run.info_json.read_text()) == {"schema": runs.SCHEMA + 1}


@pytest.mark.parametrize(
    "entry", [{}, {"fingerprint": "1"}, {"outputs": {}}, {"fingerprint": "1", "outputs": {}}]
)
def test_a_stage_without_its_keys_is_done_again(run, entry):
    make(run)
    runs.update_info(run, lambda info: info.update(stages={"analyze": entry}))
    assert make(run) is False and make(run) is True


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path, run):
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "below"):
        with pytest.raises(RunError, match="file"):
            runs.open_run(path, IDENTITY)
        with pytest.raises(RunError):
            runs.existing_run(path)
    run.partial.write_text("")
    assert make(run) is False
    run.figures.write_text("")
    with pytest.raises(RunError, match="move that one away"):
        runs.write_text(run.figures / "x.svg", "")
    run.figures.rename(tmp_path / "away")
    runs.write_text(run.figures / "x.svg", "")


@pytest.mark.parametrize(
    "code, advice",
    [(errno.ENOSPC, "Free some space"), (errno.EROFS, "Allow this user"), (errno.EIO, "Mend that")],
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_names_its_own_cause(run, monkeypatch, code, advice, call):
    make(run, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, lambda *_: (_ for _ in ()).throw(OSError(code, os.strerror(code))))
        with pytest.raises(RunError, match=advice) as caught:
            runs.write_text(run.path / "out.txt", "new")
    assert os.strerror(code) in str(caught.value) and (code == errno.ENOSPC) == (
        "space" in str(caught.value).split(". ")[1]
    )
    assert make(run) is True and (run.path / "out.txt").read_text() == "old"


def test_a_full_disk_within_a_stage_is_said(run):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match="Free some space"):
        make(run, inner=full)
    assert make(run) is False


def test_the_umask_is_the_users(tmp_path):
    before = os.umask(0o077)
    try:
        runs.write_text(tmp_path / "private", "")
    finally:
        os.umask(before)
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o600


def test_inputs_whose_text_varies_are_refused():
    with pytest.raises(TypeError, match="not JSON serializable"):
        runs.fingerprint({"x": object()})


# --- what an analysis leaves -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def analysed(tmp_path_factory, model):
    return analysis(tmp_path_factory.mktemp("analysed") / "run", model)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tests.tiny import make_tiny

    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama", num_hidden_layers=1)


def analysis(path, model, **changes):
    source = resolve(str(model))
    run = runs.open_run(path, source.identity())
    settings = {"device": "cpu", "sensitivity": "random", "windows": 2, "length": 16, "workers": 1}
    analyze(run, source, text="pydoc", formats=("nf4",), **{**settings, **changes})
    return run


def edit_table(change):
    def damage(run):
        lines = run.layers_csv.read_text().splitlines(keepends=True)
        run.layers_csv.write_text("".join(change(lines)))

    return damage


def another_word(lines):
    return [*lines[:2], lines[2].replace(",128,", ",wide,", 1), *lines[3:]]


def another_number(lines):
    return [*lines[:2], lines[2].replace(",128,", ",129,", 1), *lines[3:]]


@pytest.mark.parametrize(
    "damage",
    [
        edit_table(another_word),
        edit_table(another_number),
        edit_table(lambda lines: lines[:-2] + lines[-1:]),
        edit_table(lambda lines: [*lines[:-1], lines[-1][:20]]),
        edit_table(lambda lines: []),
        lambda run: run.spectra.write_bytes(run.spectra.read_bytes()[:-8]),
        lambda run: run.spectra.write_bytes(run.spectra.read_bytes()[:-8] + b"12345678"),
    ],
)
def test_a_changed_analysis_is_refused_and_made_again_without_force(analysed, model, tmp_path, damage):
    expected = analysed.layers_csv.read_bytes(), analysed.spectra.read_bytes()
    shutil.copytree(analysed.path, tmp_path / "run")
    run = runs.Run(tmp_path / "run")
    damage(run)
    with pytest.raises(RunError, match="Run notebook 01_analyze again"):
        runs.read_layers(run)
        runs.read_spectra(run)
    analysis(run.path, model)
    assert (run.layers_csv.read_bytes(), run.spectra.read_bytes()) == expected


def cut(path):
    path.write_bytes(path.read_bytes()[:40])


def empty(path):
    path.write_bytes(b"")


def reshape(path):
    if path.suffix == ".npy":
        np.save(path, np.zeros((2, 8), np.int64))
    elif path.suffix == ".npz":
        np.savez(path, nf4=np.zeros((1, 1, 1), np.float32))
    elif path.suffix == ".json":
        path.write_text('{"kl": {"int8": 1.0}}')
    else:
        save_file({"a": np.zeros(3)}, path, metadata={"rows": '{"a": ["ok", {}, {}]}'})


@pytest.mark.parametrize("damage", [cut, empty, reshape])
def test_damaged_pieces_of_unfinished_work_are_made_again(
    analysed, model, tmp_path, monkeypatch, capsys, damage
):
    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(runs, "_enter", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            analysis(path, model)
    pieces = sorted((path / "partial" / "spectra").glob("0*.safetensors"))
    damage(pieces[1])
    with monkeypatch.context() as patch:
        enter = runs._enter
        kill = pytest.raises(KeyboardInterrupt)
        patch.setattr(
            runs,
            "_enter",
            lambda run, current, *rest: (
                enter(run, current, *rest)
                if current.name == "spectra"
                else (_ for _ in ()).throw(KeyboardInterrupt)
            ),
        )
        with kill:
            analysis(path, model)
    for piece in (path / "partial" / "analyze" / "sensitivity").iterdir():
        if piece.suffix in (".npy", ".npz", ".json"):
            damage(piece)
    run = analysis(path, model)
    assert "damaged" in capsys.readouterr().out
    assert run.layers_csv.read_bytes() == analysed.layers_csv.read_bytes()
    assert run.spectra.read_bytes() == analysed.spectra.read_bytes()


def test_columns_of_an_older_formula_are_made_again(analysed, model, tmp_path, monkeypatch):
    shutil.copytree(analysed.path, tmp_path / "run")
    before = runs.run_info(analysed)["stages"]
    monkeypatch.setattr(sensitivity, "ENGINE", sensitivity.ENGINE + 1)
    after = runs.run_info(analysis(tmp_path / "run", model))["stages"]
    assert after["analyze"]["fingerprint"] != before["analyze"]["fingerprint"]
    assert after["spectra"] == before["spectra"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_during_an_analysis_loses_nothing(analysed, model, tmp_path, monkeypatch, call):
    real, left = getattr(os, call), iter(range(6))

    def until_full(*given, **named):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, until_full)
        with pytest.raises(RunError, match="Free some space"):
            analysis(tmp_path / "run", model)
    run = analysis(tmp_path / "run", model)
    assert runs.run_info(run)["stages"]["spectra"]["resumed_layers"] > 0
    assert run.layers_csv.read_bytes() == analysed.layers_csv.read_bytes()


@pytest.mark.parametrize("lost", ["figures/plan_map.png", "explorer.html"])
def test_a_lost_figure_or_page_is_missed_by_the_stage(tmp_path, lost):
    from spi_utils.explorer import write_explorer
    from spi_utils.figures import draw_all
    from spi_utils.plan import decide
    from tests.synthetic import make_run

    run = make_run(tmp_path / "run", count=14)
    plan = decide(run, score="alpha_hill", rule="top_k", value=3)
    draw_all(run, plan)
    write_explorer(run)
    made = runs.run_info(run)["stages"]["visualize"]
    assert runs.is_intact(run, made)
    (run.path / lost).unlink()
    assert not runs.is_intact(run, made)
