"""Publishing against a Hub on this machine: in this process, and where it matters in one of its own."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

from spi_utils import publish
from spi_utils.__main__ import main
from spi_utils.publish import LONGEST_WAIT
from spi_utils.runs import Run
from tests.finished_run import make_finished_run
from tests.hub_server import Fault, Repository, git_oid, running_hub, sha256

ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "Q7" * 17
REPO = "me/tiny-llama-SPI-nf4-16bit-11.6bpw"
# Small "large" files, so that a tiny checkpoint is sent shard by shard.
PUBLISH = """
import sys
from spi_utils import publish
publish.SENT_ALONE = 1000
from spi_utils.__main__ import main
sys.exit(main(['publish', *sys.argv[1:]]))
"""
LOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
kinds = {name: type(module).__name__ for name, module in model.named_modules()}
print(kinds["model.layers.0.self_attn.q_proj"], kinds["model.layers.0.mlp.down_proj"])
ids = tokenizer("hello", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] - ids.shape[1])
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_finished_run(tmp_path_factory.mktemp("finished"), shard="200KB")


@pytest.fixture
def run(original, tmp_path):
    return Run(shutil.copytree(original.path, tmp_path / "run"))


@pytest.fixture
def hub():
    with running_hub(TOKEN) as running:
        yield running


@pytest.fixture(autouse=True)
def waits(monkeypatch):
    """Waiting takes no time here; what was waited is noted, in seconds."""
    noted: list[float] = []
    monkeypatch.setattr(time, "sleep", noted.append)
    return noted


@pytest.fixture
def published(hub, run, monkeypatch, capfd, caplog):
    """`spi-utils publish` in this process, against the hub: exit code and everything it said."""
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(run.path.parent / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(publish, "SENT_ALONE", 1000)

    def call(*more):
        code = main(["publish", str(run.path), "--allow-license", "mit", *more])
        said = "".join(capfd.readouterr()) + caplog.text
        assert os.environ["HF_TOKEN"] not in said
        return code, " ".join(said.split())

    return call


def environment(hub, home, **more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT)])),
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HOME": str(home),
        "HF_TOKEN": TOKEN,
        "OMP_NUM_THREADS": "1",
        **more,
    }


def publishing(hub, run, *more, **variables):
    return subprocess.Popen(
        [sys.executable, "-c", PUBLISH, str(run.path), "--allow-license", "mit", *more],
        env=environment(hub, run.path.parent / "home", **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def published_alone(hub, run, *more, **variables):
    """The same in a process of its own, as a user calls it."""
    process = publishing(hub, run, *more, **variables)
    said, _ = process.communicate(timeout=120)
    assert TOKEN not in said
    return process.returncode, " ".join(said.split())


def shards(run):
    return {path.name: path.read_bytes() for path in run.model_dir.glob("*.safetensors")}


def assert_no_token_anywhere(hub, run):
    for request in hub.requests:
        headers = {name: value for name, value in request.headers.items() if name != "authorization"}
        assert TOKEN.encode() not in request.body
        assert TOKEN not in json.dumps([request.path, headers])
    for path in run.path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


# --- what arrives ----------------------------------------------------------------------------------------


def test_what_arrives_is_bit_equal_private_and_in_one_commit(hub, run):
    code, said = published_alone(hub, run)
    assert code == 0, said
    held = hub.repositories[REPO]
    assert held.private and len(held.commits) == 2  # the empty repository, and ours
    manifest = json.loads((run.publish / "manifest.json").read_text())
    assert set(held.files) == set(manifest["files"]) | {".gitattributes"}
    local = {**shards(run), "README.md": (run.publish / "README.md").read_bytes()}
    local |= {name: (run.path / name).read_bytes() for name in ("plan.json", "layers.csv", "evaluation.json")}
    assert {name: held.files[name] for name in local} == local
    assert set(hub.objects) >= {sha256(data) for data in shards(run).values()}
    assert f"Published at {hub.address}/{REPO}" in said
    assert f'from_pretrained("{REPO}"'.encode() in held.files["README.md"]
    record = json.loads(held.files["environment.json"])
    assert all(sha256(held.files[name]) == entry["sha256"] for name, entry in record["files"].items())
    assert_no_token_anywhere(hub, run)


def test_the_card_is_validated_before_anything_is_sent(hub, run, published):
    published()
    order = [f"{request.method} {request.path}" for request in hub.requests]
    assert order.index("POST /api/validate-yaml") < order.index("POST /api/repos/create")
    hub.requests.clear()
    hub.faults = [Fault("validate-yaml", 400, message="license: unknown")]
    code, said = published()
    assert code == 1 and "refuses the card's YAML" in said and "license: unknown" in said
    assert not hub.sent("POST", "commit|create") and not hub.sent("PUT", "")


def test_a_second_run_uploads_nothing(hub, run, published):
    published()
    hub.requests.clear()
    code, said = published()
    assert code == 0 and "Nothing new to send" in said
    assert not hub.sent("PUT", "") and not hub.sent("POST", "/commit/")
    assert len(hub.repositories[REPO].commits) == 2


def test_only_what_changed_is_sent_again(hub, run, published):
    published()
    before = dict(hub.repositories[REPO].files)
    (run.figures / "plan_map.png").write_bytes(b"another picture")
    hub.requests.clear()
    assert published()[0] == 0
    assert len(hub.sent("PUT", "")) == 1
    after = hub.repositories[REPO].files
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed == {"figures/plan_map.png", "environment.json"}


def test_files_that_are_gone_here_are_removed_there(hub, run, published):
    published()
    hub.repositories[REPO].files["notes.md"] = b"added by hand on the Hub"
    (run.figures / "plan_map.png").unlink()
    assert published()[0] == 0
    held = hub.repositories[REPO].files
    assert "figures/plan_map.png" not in held and "notes.md" in held


def test_a_file_in_parts_arrives_whole(hub, run, published):
    hub.part_size = 50_000
    code, said = published()
    assert code == 0, said
    held = hub.repositories[REPO].files
    assert {name: held[name] for name in shards(run)} == shards(run)
    assert len(hub.sent("PUT", "/lfs/")) > 2 * len(shards(run))


@pytest.mark.slow
def test_the_published_model_loads_and_generates(hub, run, tmp_path):
    assert published_alone(hub, run)[0] == 0
    done = subprocess.run(
        [sys.executable, "-c", LOAD, REPO],
        env=environment(hub, tmp_path / "stranger"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Linear4bit", "Linear", "4"]


# --- interruptions and trouble ---------------------------------------------------------------------------


def test_a_kill_in_mid_upload_resumes(hub, run):
    data = shards(run)
    assert len(data) >= 3
    hub.stall_at = sha256(data[sorted(data)[1]])
    process = publishing(hub, run)
    assert hub.stalled.wait(60)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    hub.stall_at = None
    hub.released.set()
    first = sha256(data[sorted(data)[0]])
    assert first in hub.objects and len(hub.repositories[REPO].commits) == 1  # nothing half published
    hub.requests.clear()
    assert published_alone(hub, run)[0] == 0
    assert not hub.sent("PUT", first)
    held = hub.repositories[REPO].files
    assert {name: held[name] for name in data} == data
    assert shards(run) == data


@pytest.mark.parametrize(
    "where", ["whoami", "repos/create", "preupload", "objects/batch", "/commit/", "PUT /lfs/"]
)
def test_a_busy_hub_is_waited_for(hub, run, published, where):
    hub.faults = [Fault(where, 429, headers={"Retry-After": "1"}), Fault(where, 503)]
    code, said = published()
    assert code == 0, said
    assert len(hub.repositories[REPO].commits) == 2


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"RateLimit": '"api";r=0;t=47'}, 47),
        ({"Retry-After": "31"}, 31),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "9999999"}, LONGEST_WAIT),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After": "soon", "RateLimit": '"api";r=0;t=3'}, 3),
        ({}, 1),
    ],
)
def test_the_servers_own_delay_is_kept(hub, run, published, waits, headers, seconds):
    hub.faults = [Fault("whoami", 429, headers=headers)]
    code, said = published()
    assert code == 0 and waits == [seconds]
    assert f"the Hub is busy (HTTP 429); waiting {seconds:.0f} s" in said


def test_a_broken_connection_is_tried_again(hub, run, published):
    hub.faults = [Fault("/commit/", -1)]
    code, said = published()
    assert code == 0, said


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("whoami", 401, 9), "does not accept the token from the environment variable HF_TOKEN (401)"),
        (Fault("/commit/", 403, 9), "may not write to me (403)"),
        (Fault("repos/create", 403, 9, message="write role needed"), "may not write to me (403)"),
        (Fault("whoami", 429, 99, {"Retry-After": "0"}), "too many requests (429)"),
        (Fault("whoami", 503, 99), "trouble of its own"),
        (Fault("/commit/", 409, 9), "changed while this ran (409)"),
        (
            Fault("objects/batch", 403, 9, message="Private repository storage limit reached"),
            "the storage of me is full",
        ),
    ],
    ids=lambda value: value.match + str(value.status) if isinstance(value, Fault) else "",
)
def test_what_fails_for_good_is_explained_and_the_files_stay(hub, run, published, fault, words):
    before = shards(run)
    hub.faults = [fault]
    code, said = published()
    assert code == 1 and words in said, said
    assert f"The local files are untouched in {run.path}" in said and "Traceback" not in said
    assert shards(run) == before
    assert len(hub.repositories[REPO].commits) == 1 if REPO in hub.repositories else True


class XetAuthenticationError(PermissionError):
    """As hf_xet names it; the package can't make one without its server."""


@pytest.mark.parametrize(
    ("failure", "code", "words", "tries"),
    [
        (RuntimeError("Data processing error: CAS service error : Reqwest Error"), 0, "waiting 1 s", 2),
        (XetAuthenticationError("token refused"), 1, "does not accept the token", 1),
    ],
)
def test_the_large_files_own_transport_is_waited_for_and_explained(
    hub, run, published, monkeypatch, failure, code, words, tries
):
    calls = []
    real = HfApi.preupload_lfs_files

    def breaking(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise failure
        return real(*arguments, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", breaking)
    monkeypatch.setattr(publish, "SENT_ALONE", max(map(len, shards(run).values())))
    done, said = published()
    sent_alone = len(calls) - (done == 0)  # the commit asks once more
    assert done == code and words in said and sent_alone == tries
    assert "hf_" not in said


def test_no_connection_is_said(hub, run, published, monkeypatch, waits):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, said = published()
    assert code == 1 and "no connection to the Hub" in said and "switch Internet on" in said
    assert waits == [1, 2, 4, 8]


def test_offline_mode_is_said_without_waiting(hub, run, published, monkeypatch, waits):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, said = published()
    assert code == 1 and "HF_HUB_OFFLINE is set" in said and waits == []


def test_a_wrong_token_is_named_by_its_place_only(hub, run, published, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "X9" * 17)
    code, said = published()
    assert code == 1 and "environment variable HF_TOKEN (401)" in said


# --- a name that is taken --------------------------------------------------------------------------------


def taken(hub, files, private=True):
    hub.repositories[REPO] = Repository(private, {".gitattributes": b"", **files}, ["1" * 40])


@pytest.mark.parametrize("record", [{}, {"environment.json": b"[1]"}, {"environment.json": b"{"}])
def test_a_repository_of_another_origin_is_left_alone(hub, run, published, record):
    taken(hub, {"README.md": b"a diary", **record})
    code, said = published()
    assert (
        code == 1
        and "exists and holds files of another origin (README.md" in said
        and "overwrite=True" in said
    )
    assert hub.repositories[REPO].files["README.md"] == b"a diary"


def test_a_publication_of_another_base_is_left_alone_until_asked(hub, run, published):
    taken(hub, {"environment.json": b'{"base_model": "other/base"}', "model-9.safetensors": b"old"})
    code, said = published()
    assert code == 1 and "a model made from other/base" in said and not hub.sent("PUT", "")
    code, said = published("--overwrite")
    assert code == 0, said
    assert "model-9.safetensors" not in hub.repositories[REPO].files
    assert shards(run).items() <= hub.repositories[REPO].files.items()


def test_a_public_repository_takes_no_private_publication(hub, run, published):
    taken(hub, {}, private=False)
    code, said = published()
    assert code == 1 and "is public, and a private repository was asked for" in said
    assert published("--public")[0] == 0


def test_an_owner_that_does_not_exist_is_said(hub, run, published):
    hub.faults = [Fault("repos/create", 404, 9)]
    code, said = published("--repo-id", "nobody/thing")
    assert code == 1 and "no user or organisation nobody" in said


# --- the server itself -----------------------------------------------------------------------------------


def test_the_server_knows_gits_own_object_id(tmp_path):
    (tmp_path / "file").write_bytes(b"some text\n")
    said = subprocess.run(
        ["git", "hash-object", str(tmp_path / "file")], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == git_oid(b"some text\n")


def test_without_a_token_nothing_reaches_the_hub(hub, run):
    code, said = published_alone(hub, run, HF_TOKEN="")
    assert code == 0 and "Saved locally, not published" in said and not hub.repositories
    assert re.search(r"python -m spi_utils publish \"\S+\" --repo-id tiny-llama-SPI-nf4-16bit-11.6bpw", said)
