"""Publishing against a Hub on this machine: in this process, and where it is killed in one of its own."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback

import pytest
from huggingface_hub import HfApi, constants
from transformers import AutoModelForCausalLM

from spi_utils import notebook as book
from spi_utils import publish, tokens
from spi_utils.__main__ import main
from spi_utils.card import read_base
from spi_utils.errors import ModelError, PlatformError
from spi_utils.models import resolve
from spi_utils.runs import Run
from tests.hub_server import Fault, Repository, running_hub, sha256
from tests.tiny import make_tiny

TOKEN = "hf_" + "Q7" * 17
ECHO = f"400 Bad Request: header Authorization: Bearer {TOKEN}"
REPO = "me/tiny-llama-SPI-nf4-16bit-11.6bpw"


@pytest.fixture
def run(finished_run, tmp_path):
    return Run(shutil.copytree(finished_run.path, tmp_path / "run"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    monkeypatch.setattr(tokens, "_login", lambda: None)
    monkeypatch.setattr(tokens, "_hidden", [])
    with running_hub(TOKEN, monkeypatch, str(tmp_path / "home")) as running:
        yield running


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Waiting takes no time here; what was waited is noted, in seconds."""
    noted = []
    monkeypatch.setattr(time, "sleep", noted.append)
    return noted


@pytest.fixture
def published(hub, run, monkeypatch, capfd, caplog):
    """`spi-utils publish` in this process, against the hub: exit code and everything it said."""

    def call(*more):
        code = main(["publish", str(run.path), "--allow-license", "mit", *more])
        said = "".join(capfd.readouterr()) + caplog.text
        assert TOKEN not in said and "Traceback" not in said
        return code, " ".join(said.split())

    return call


def shards(run):
    return {path.name: path.read_bytes() for path in run.model_dir.glob("*.safetensors")}


# --- what arrives ----------------------------------------------------------------------------------------


def test_what_arrives_is_bit_equal_private_in_one_commit_and_loads(hub, run, published):
    code, said = published()
    assert code == 0 and f"Published at {hub.address}/{REPO}" in said
    held = hub.repositories[REPO]
    assert held.private and len(held.commits) == 2  # the empty repository, and ours
    manifest = json.loads((run.publish / "manifest.json").read_text())
    assert set(held.files) == set(manifest["files"]) | {".gitattributes"}
    local = {**shards(run), "README.md": (run.publish / "README.md").read_bytes()}
    local |= {name: (run.path / name).read_bytes() for name in ("plan.json", "layers.csv", "evaluation.json")}
    assert {name: held.files[name] for name in local} == local
    record = json.loads(held.files["environment.json"])
    assert all(sha256(held.files[name]) == entry["sha256"] for name, entry in record["files"].items())
    for request in hub.requests:
        headers = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert TOKEN.encode() not in request.body and TOKEN not in json.dumps([request.path, headers])
    assert not any(TOKEN.encode() in path.read_bytes() for path in run.path.rglob("*") if path.is_file())
    kinds = {
        name: type(one).__name__ for name, one in AutoModelForCausalLM.from_pretrained(REPO).named_modules()
    }
    assert kinds["model.layers.0.self_attn.q_proj"] == "Linear4bit"
    assert kinds["model.layers.0.mlp.down_proj"] == "Linear"


def test_a_second_call_sends_what_changed_removes_what_is_gone_and_leaves_what_others_put_there(
    hub, run, published
):
    published()
    hub.requests.clear()
    code, said = published()
    assert code == 0 and "Nothing new to send" in said
    assert not hub.sent("PUT", "") and not hub.sent("POST", "/commit/")
    before = dict(hub.repositories[REPO].files)
    (run.figures / "plan_map.png").write_bytes(b"another picture")
    assert published()[0] == 0 and len(hub.sent("PUT", "")) == 1
    held = hub.repositories[REPO]
    changed = {name for name, data in held.files.items() if data != before.get(name)}
    assert changed == {"figures/plan_map.png", "environment.json"}
    held.files["notes.md"] = b"added by hand on the Hub"
    (run.figures / "plan_map.png").unlink()
    assert published()[0] == 0
    assert "figures/plan_map.png" not in held.files and "notes.md" in held.files


def test_a_kill_in_mid_upload_resumes(hub, run, published):
    data = shards(run)
    first, second = (sha256(data[name]) for name in sorted(data)[:2])
    hub.stall_at = second
    command = [sys.executable, "-m", "spi_utils", "publish", str(run.path), "--allow-license", "mit"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert hub.stalled.wait(60)
    for _ in range(100):  # files are sent side by side
        if first not in hub.objects:
            threading.Event().wait(0.1)
    process.send_signal(signal.SIGKILL)
    assert TOKEN not in process.communicate(timeout=30)[0]
    hub.stall_at = None
    hub.released.set()
    assert first in hub.objects and len(hub.repositories[REPO].commits) == 1  # nothing half published
    hub.requests.clear()
    assert published()[0] == 0
    held = hub.repositories[REPO].files
    assert not hub.sent("PUT", first) and {name: held[name] for name in data} == data == shards(run)


# --- trouble ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["whoami", "objects/batch", "/commit/"])
def test_a_busy_hub_is_waited_for(hub, run, published, where):
    hub.faults = [Fault(where, 429, headers={"Retry-After": "1"}), Fault(where, 503), Fault("/commit/", -1)]
    code, said = published()
    assert code == 0, said
    assert len(hub.repositories[REPO].commits) == 2


NO_ACCESS = "the token from the environment variable HF_TOKEN can't write to "


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("validate-yaml", 400, message="license: unknown"), "license: unknown"),
        (Fault("/commit/", 403, 9), NO_ACCESS),
        (Fault("objects/batch", 403, 9, message="storage limit reached"), "storage limit reached"),
        (Fault("whoami", 429, 99), "the Hub is busy or in trouble"),
        (Fault("/commit/", 409, 9), "changed while this ran"),
    ],
    ids=lambda value: value.match + str(value.status) if isinstance(value, Fault) else "",
)
def test_what_fails_for_good_is_explained_and_the_files_stay(hub, run, published, fault, words):
    before = shards(run)
    hub.faults = [fault]
    code, said = published()
    assert code == 1 and words in said, said
    assert f"The local files are untouched in {run.path}" in said and shards(run) == before
    assert not any(len(held.commits) > 1 for held in hub.repositories.values())


@pytest.mark.parametrize(
    ("failure", "code", "words"),
    [
        (RuntimeError("Data processing error: CAS service error : Reqwest Error"), 0, "waiting 1 s"),
        (type("XetAuthenticationError", (PermissionError,), {})("token refused"), 1, NO_ACCESS),
    ],
)
def test_the_large_files_own_transport_is_waited_for_and_explained(
    hub, published, monkeypatch, failure, code, words
):
    real, failures = HfApi.create_commit, [failure]

    def breaking(*arguments, **options):
        if failures:
            raise failures.pop()
        return real(*arguments, **options)

    monkeypatch.setattr(HfApi, "create_commit", breaking)
    done, said = published()
    assert done == code and words in said


@pytest.mark.parametrize(("name", "value"), [("ENDPOINT", "http://127.0.0.1:9"), ("HF_HUB_OFFLINE", True)])
def test_no_connection_is_said_after_some_tries(hub, published, monkeypatch, waits, name, value):
    monkeypatch.setattr(constants, name, value)
    code, said = published()
    assert code == 1 and "no connection to the Hub" in said and waits == list(publish.WAITS)


# --- a name that is taken --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "files of another origin (README.md"),
        ({"environment.json": b'{"base_model": "other/base"}'}, "a model made from other/base"),
    ],
)
def test_a_repository_of_another_origin_is_left_alone_until_asked(hub, run, published, files, words):
    held = hub.repositories[REPO] = Repository(
        True, {"README.md": b"a diary", "model-9.safetensors": b"", **files}
    )
    code, said = published()
    assert code == 1 and words in said and "overwrite=True" in said and not hub.sent("PUT", "")
    assert held.files["README.md"] == b"a diary"
    assert published("--overwrite")[0] == 0
    assert "model-9.safetensors" not in held.files and shards(run).items() <= held.files.items()


def test_a_public_repository_takes_no_private_publication(hub, published):
    hub.repositories[REPO] = Repository(private=False)
    code, said = published()
    assert code == 1 and "is public, and a private repository was asked for" in said
    assert published("--public")[0] == 0


@pytest.mark.parametrize("when", ["/preupload/", "/commit/"])
def test_a_change_of_somebody_else_in_between_is_kept_and_said(hub, published, when):
    def act(request):
        held = hub.repositories.get(REPO)
        if when in request.path and "theirs.md" not in held.files:
            held.files["theirs.md"] = b"their change"
            held.commits.append("7" * 40)

    hub.on_request = act
    code, said = published()
    assert code == 1 and "changed while this ran" in said
    held = hub.repositories[REPO]
    assert held.files["theirs.md"] == b"their change" and held.commits[-1] == "7" * 40


def test_a_commit_whose_answer_was_lost_is_recognised_as_our_own(hub, published):
    hub.faults = [Fault("/commit/", -2)]
    assert published()[0] == 0 and len(hub.repositories[REPO].commits) == 2


# --- the token -------------------------------------------------------------------------------------------


def test_without_a_token_nothing_reaches_the_hub_and_the_command_for_later_is_said(
    hub, published, run, monkeypatch
):
    monkeypatch.delenv("HF_TOKEN")
    code, said = published("--public")
    assert code == 0 and "Saved locally, not published" in said and not hub.repositories
    assert f'spi-utils publish "{run.path}"' in said


@pytest.mark.parametrize("where", ["validate-yaml", "whoami", "/commit/"])
def test_a_hub_that_echoes_the_header_shows_no_token(hub, run, capfd, caplog, where):
    hub.faults = [Fault(where, 400, 99, message=ECHO)]
    with pytest.raises(publish.PublishError) as caught:
        publish.publish(run, allow_license="mit", dry_run=False)
    shown = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr()) + caplog.text
    assert TOKEN not in shown and "400 Bad Request: header Authorization: Bearer ***" in shown
    assert caught.value.__context__ is None


def test_a_hub_that_echoes_the_header_to_a_download_shows_no_token(hub):
    hub.faults = [Fault("GET /api/models/", 400, 99, message=ECHO)]
    with pytest.raises(ModelError, match="the Hub answered 400") as caught:
        resolve("someone/model")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert hub.requests[-1].headers["authorization"] == f"Bearer {TOKEN}"


@pytest.mark.slow
def test_the_executed_notebook_of_a_refused_publication_holds_no_token(hub, run):
    hub.faults = [Fault("/commit/", 400, 99, message=ECHO)]
    output = run.notebooks / "05_publish.ipynb"
    with pytest.raises(book.NotebookError, match=r"Bearer \*\*\*"):
        book.execute(
            "05_publish", output, {"run_dir": str(run.path), "dry_run": False, "allow_license": "mit"}
        )
    assert hub.sent("POST", "/commit/") and TOKEN not in output.read_text()


@pytest.mark.parametrize("value", ["hf_abc\r\nX-Evil: 1", '"hf_abcdefgh"'])
def test_what_can_be_no_token_is_refused_without_being_shown(hub, run, monkeypatch, capsys, value):
    monkeypatch.setenv("HF_TOKEN", value)
    for act in (
        lambda: publish.publish(run, allow_license="mit", dry_run=False),
        lambda: resolve("someone/model"),
        tokens.share_token,
    ):
        with pytest.raises(PlatformError, match="environment variable HF_TOKEN is no Hub token") as caught:
            act()
        shown = "".join(traceback.format_exception(caught.value)) + "".join(capsys.readouterr())
        assert "hf_ab" not in shown
    assert hub.requests == []


def test_a_stage_without_a_token_finds_what_was_fetched_with_it(hub, tmp_path, monkeypatch):
    files = {path.name: path.read_bytes() for path in make_tiny("llama", tmp_path / "m").iterdir()}
    files["README.md"] = b"---\nlicense: mit\n---\nA card.\n"
    hub.repositories["someone/private"] = Repository(True, files)
    needed = book._fetched(
        Run(tmp_path / "empty"), "01_analyze", {"model": "someone/private", "revision": ""}
    )
    assert needed == {"model": "someone/private", "revision": "1" * 40}
    monkeypatch.delenv("HF_TOKEN")
    hub.requests.clear()
    found = resolve("someone/private", needed["revision"])
    assert found.revision == "1" * 40 and {path.name for path in found.directory.iterdir()} >= set(files)
    assert read_base(found.identity(), ask=False)[0].id == "mit" and hub.requests == []


def test_a_rehearsal_asks_nobody_and_a_publication_asks_the_hub_for_the_licence(hub, run):
    done = publish.publish(run)
    assert {gate.name for gate in done.gates if not gate.passed} == {"licence"} and hub.requests == []
    with pytest.raises(publish.PublishError, match="BLOCKED licence: the base's licence is unknown"):
        publish.publish(run, dry_run=False)
    assert hub.sent("HEAD", "/someone/tiny-llama/resolve/a+/README.md") and not hub.repositories
    card = {"README.md": b"---\nlicense: mit\nlanguage: en\n---\nbase\n"}
    hub.repositories["someone/tiny-llama"] = Repository(False, card, ["a" * 40])
    assert publish.publish(run, dry_run=False).ready
    assert publish.publish(run).ready  # it is in this machine's cache now
