"""Run directories under fire: two owners, kills, damage, full disks."""

import errno
import json
import os
import subprocess
import sys

import pytest

from spi_utils import runs
from spi_utils.errors import RunError

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
