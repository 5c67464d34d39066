"""What may leave this machine: the very file that was proved and measured, and nothing private with it."""

import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import sys
import traceback
import types
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from spi_utils import card, quantize, speed, tokens
from spi_utils import notebook as book
from spi_utils import publish as publishing
from spi_utils.errors import CheckpointError, ModelError, PlatformError, PublishError, RunError
from spi_utils.formats import size_tolerance
from spi_utils.models import resolve
from spi_utils.publish import publish
from spi_utils.runs import Run, write_json
from tests.finished_run import STOCK, checkpoint_hash, make_finished_run
from tests.hub_server import Fault, Repository, running_hub
from tests.tiny import make_tiny

TOKEN = "hf_" + "Q7" * 17
ASK_THE_HUB = card._hub_card


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(original, tmp_path):
    return Run(shutil.copytree(original.path, tmp_path / "run"))


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    """No token of the machine's user, and no connection, in any test of this file."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(tokens, "_login", lambda: None)
    monkeypatch.setattr(tokens, "_hidden", [])
    monkeypatch.setattr(card, "_hub_card", lambda model, revision: {})


def closed(rehearsal):
    return {gate.name: gate.found for gate in rehearsal.gates if not gate.passed}


def evaluate_again(run, **changes):
    """Let evaluation.json, and the record of it, speak of what lies in model/ now; then make the changes."""
    held = json.loads(run.evaluation_json.read_text())
    held["checkpoint_sha256"] = checkpoint_hash(run.model_dir)
    write_json(run.evaluation_json, {**held, **changes})
    info = json.loads(run.info_json.read_text())
    data = run.evaluation_json.read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    info["stages"]["evaluate"]["outputs"]["evaluation.json"] = entry
    write_json(run.info_json, info)


# --- the weights are the recorded ones -------------------------------------------------------------------


def zero_codes(run):
    path = run.model_dir / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-4096:-4032] = bytes(64)
    path.write_bytes(data)


def add_a_shard(run):
    shutil.copyfile(run.model_dir / "model.safetensors", run.model_dir / "model-2.safetensors")


def add_a_pickle(run):
    (run.model_dir / "nested").mkdir()
    (run.model_dir / "nested" / "pytorch_model.bin").write_bytes(b"weights of another kind")


def lose_the_record(run):
    info = json.loads(run.info_json.read_text())
    del info["stages"]["quantize"]["outputs"]
    write_json(run.info_json, info)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (zero_codes, "model/model.safetensors is not what quantize wrote"),
        (add_a_shard, "model/model-2.safetensors was not written by quantize"),
        (add_a_pickle, "model/nested/pytorch_model.bin was not written by quantize"),
        (lose_the_record, "model/model.safetensors was not written by quantize"),
    ],
)
def test_weights_that_quantize_did_not_record_are_refused_even_if_they_were_evaluated(
    run, monkeypatch, spoil, words
):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(publishing, "owner_of", lambda *_: "me")
    monkeypatch.setattr(publishing, "send", lambda *_, **__: pytest.fail("something was sent"))
    spoil(run)
    evaluate_again(run)
    found = closed(publish(run, allow_license="mit"))
    assert words in found["stages"]
    with pytest.raises(PublishError, match="BLOCKED stages"):
        publish(run, allow_license="mit", dry_run=False)


def test_a_rehearsal_is_not_recognised_after_damage_that_left_the_files_time_alone(run):
    path = run.model_dir / "model.safetensors"
    times = path.stat()
    assert publish(run, allow_license="mit").ready
    zero_codes(run)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "stages" in closed(publish(run, allow_license="mit"))


@pytest.mark.parametrize(
    "changes",
    [{"checkpoint_sha256": "0" * 64}, {"hashes": {"checkpoint": "0" * 64}}, {"hashes": {}}],
)
def test_an_evaluation_that_names_another_checkpoint_or_no_plan_is_refused(run, changes):
    if changes.get("hashes"):
        changes["hashes"]["plan"] = hashlib.sha256(run.plan_json.read_bytes()).hexdigest()
    evaluate_again(run, **changes)
    assert "04_evaluate" in closed(publish(run, allow_license="mit"))["evaluation"]


@pytest.mark.parametrize("changes", [{"hashes": None}, {"stock": None}, {"variants": []}])
def test_a_damaged_evaluation_is_refused_with_the_notebook_to_run_again(run, changes):
    evaluate_again(run, **changes)
    with pytest.raises(RunError, match=r"evaluation\.json: .*04_evaluate again"):
        publish(run, allow_license="mit")


# --- both proofs -----------------------------------------------------------------------------------------


def test_the_card_names_the_number_as_loaded_and_the_one_from_the_file(run):
    done = publish(run, allow_license="mit")
    text = done.card.read_text()
    row = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if "|" in line
    }
    assert row["this model, **stock as loaded**: float16 on cpu, transformers 5"] == "0.1213"
    assert row["this model, **float32 from the file's tensors**"] == "0.1207"
    assert row["the 16-bit base, stock as loaded in float16"] == "0.0004"
    assert "The table is computed in float32 from the file's tensors." in text
    assert done.ready and "0.1213 as loaded, 0.1207 in float32 from the file" in str(done)


@pytest.mark.parametrize(
    "stock",
    [
        {},
        {**STOCK, "agrees": False},
        {**STOCK, "agrees": None},  # with no reason
        {**STOCK, "agrees": "yes"},
        {**STOCK, "kl": 0.2},
        {**STOCK, "kl": None},
        {"agrees": True},
    ],
)
def test_a_run_that_was_not_scored_as_loaded_is_refused(run, stock):
    evaluate_again(run, stock=stock)
    done = publish(run, allow_license="mit")
    assert set(closed(done)) == {"stock score"} and "04_evaluate" in closed(done)["stock score"]
    assert done.card.is_file()


def test_a_score_that_could_not_be_had_is_a_warning_with_its_reason(run):
    evaluate_again(run, stock={**STOCK, "agrees": None, "kl": None, "reason": "the model needs 9 GB here"})
    done = publish(run, allow_license="mit")
    assert done.ready and "WARNING stock score: not scored as loaded: the model needs 9 GB here" in str(done)
    text = done.card.read_text()
    assert "it was not scored** (the model needs 9 GB here)" in text and "stock as loaded**" not in text
    assert publish(run, allow_license="mit") == done


@pytest.mark.parametrize("proof", [None, {}, {"finite": True}])
def test_a_run_that_was_not_proved_by_use_is_refused(run, proof):
    info = json.loads(run.info_json.read_text())
    info["stages"]["quantize"]["proof"] = proof
    write_json(run.info_json, info)
    assert "03_quantize" in closed(publish(run, allow_license="mit"))["proof by use"]


# --- the licence -----------------------------------------------------------------------------------------

MIT = "MIT License\n\nCopyright (c) 2026 A\n\nPermission is hereby granted, free of charge, to any person "
MIT += "obtaining a copy of this software, to deal in the Software without restriction.\n"
APACHE = (Path(__file__).parent.parent / "LICENSE").read_text()
RESTRICTIONS = (
    "You may use this for NON-\nCOMMERCIAL purposes.",
    "Non commercial.",
    "Commercial use needs a licence of ours.",
    "The weights may not be used commercially.",
    "For academic purposes.",
    '"Commons Clause" License Condition v1.0',
    "Our Acceptable Use Policy applies.",
    "More than 700 million monthly active users need another licence.",
    "Military use is prohibited.",
    "You may not use the model to make others.",
)


@pytest.mark.parametrize("restriction", RESTRICTIONS)
@pytest.mark.parametrize(("text", "name"), [(MIT, "mit"), (APACHE, "apache-2.0")])
def test_a_known_licence_with_a_restriction_is_not_that_licence(tmp_path, text, name, restriction):
    def found():
        return card.read_base({"kind": "local", "id": "m"}, tmp_path)[0].id

    (tmp_path / "LICENSE").write_text(text)
    assert found() == name
    (tmp_path / "LICENSE").write_text(f"{text}\n{restriction}\n")
    assert found() is None
    (tmp_path / "LICENSE").write_text(text)
    (tmp_path / "LICENSE-WEIGHTS").write_text(restriction)
    assert found() is None


def test_a_local_models_card_is_read_beside_the_model_while_it_is_that_model(tmp_path, monkeypatch):
    from spi_utils.models import weights_hash

    run = make_finished_run(tmp_path, kind="local", model_id="source")
    info = json.loads(run.info_json.read_text())
    info["model"]["sha256"] = weights_hash(tmp_path / "source")
    write_json(run.info_json, {**info, "location": str(tmp_path / "source")})
    other = tmp_path / "elsewhere" / "source"
    other.mkdir(parents=True)
    (other / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    monkeypatch.chdir(other.parent)
    assert publish(run).licence.id is None
    (tmp_path / "source" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert publish(run).licence.id == "mit"
    (tmp_path / "source" / "model.safetensors").write_bytes(b"another model's")
    assert publish(run).licence.id is None


@pytest.mark.parametrize(
    ("stated", "written"),
    [
        ("mit", {"license": "mit"}),
        ("foo-1.0", {"license": "other", "license_name": "foo-1.0", "license_link": "LICENSE"}),
    ],
)
def test_the_cards_licence_is_the_hubs_id_or_other_with_a_name(run, stated, written):
    text = publish(run, allow_license=stated).card.read_text()
    data = yaml.safe_load(text.split("---")[1])
    assert {key: value for key, value in data.items() if key.startswith("license")} == written


# --- the token -------------------------------------------------------------------------------------------

REPORT = """
import json, os, sys
names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
json.dump({name: os.environ.get(name) for name in names}, open(sys.argv[-1], "w"))
"""
ECHO = f"400 Bad Request: header Authorization: Bearer {TOKEN}"
BROKEN = ("hf_abc\r\nX-Evil: 1", "hf_ab\0cd", "hf_ab cd", '"hf_abcdefgh"', "hf_ab\u00e9")


@pytest.fixture
def hub(monkeypatch, run):
    with running_hub(TOKEN) as running:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, running.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", running.address)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(run.path.parent / "cache"))
        monkeypatch.setenv("HF_ENDPOINT", running.address)  # of the processes that tests start
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        monkeypatch.setenv("HF_HOME", str(run.path.parent / "home"))
        yield running


def test_the_environment_of_a_stage_holds_a_token_only_where_it_publishes(monkeypatch, tmp_path):
    """Through the very subprocess calls, with a stand-in for papermill that notes what it was given."""
    (tmp_path / "papermill.py").write_text(REPORT.replace("sys.argv[-1]", repr(str(tmp_path / "held"))))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    held = {}
    for name in (*book.STAGES, book.ALL):
        book.execute(name, tmp_path / "out.ipynb", {})
        held[name] = json.loads((tmp_path / "held").read_text())
    own = {name for name, found in held.items() if found["HF_TOKEN"] is not None}
    assert own == {"05_publish", "00_run_all"} and held["05_publish"]["HF_TOKEN"] == TOKEN
    assert all(found["HUGGING_FACE_HUB_TOKEN"] is None for found in held.values())


@pytest.mark.parametrize("process", ["fresh check", "speed"])
def test_a_process_that_loads_the_model_afresh_holds_no_token(monkeypatch, tmp_path, process):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    given = {}

    def note(command, **options):
        given.update(options["env"])
        raise RuntimeError("far enough")

    monkeypatch.setattr("subprocess.run", note)
    with pytest.raises(RuntimeError, match="far enough"):
        if process == "speed":
            speed.measure_in_subprocess(tmp_path, device="cpu", dtype="float32")
        else:
            quantize.ask({"model": "m"})
    assert given["PATH"] == os.environ["PATH"] and TOKEN not in given.values()


def test_a_models_own_code_finds_no_token_in_its_process_and_publishing_still_does(tmp_path, monkeypatch):
    folder = make_tiny("llama", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    write_json(folder / "config.json", {**config, "model_type": "own", "auto_map": names})
    (folder / "own.py").write_text(
        "import json, os\nfrom transformers import LlamaConfig\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        f"open({str(tmp_path / 'seen')!r}, 'w').write(json.dumps(dict(os.environ)))\n"
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    resolve(str(folder), trust_remote_code=True)
    assert TOKEN not in (tmp_path / "seen").read_text()
    assert tokens.hub_token().value == TOKEN and tokens.with_token({})["HF_TOKEN"] == TOKEN


@pytest.mark.parametrize("value", [one for one in BROKEN if "\0" not in one])
def test_what_can_be_no_token_is_refused_without_being_shown(run, hub, monkeypatch, capsys, value):
    monkeypatch.setenv("HF_TOKEN", value)
    for act in (
        lambda: publish(run, allow_license="mit", dry_run=False),
        lambda: resolve("someone/model"),
        tokens.share_token,
    ):
        with pytest.raises(PlatformError, match="environment variable HF_TOKEN is no Hub token") as caught:
            act()
        shown = "".join(traceback.format_exception(caught.value)) + "".join(capsys.readouterr())
        assert value not in shown and "hf_ab" not in shown
    assert hub.requests == []


@pytest.mark.parametrize("value", BROKEN)
def test_a_secret_that_can_be_no_token_is_refused_too(monkeypatch, value):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    client = types.SimpleNamespace(get_secret=lambda name: value)
    secrets = types.SimpleNamespace(UserSecretsClient=lambda: client)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", secrets)
    with pytest.raises(PlatformError, match="Kaggle's secrets is no Hub token") as caught:
        tokens.hub_token()
    assert value not in str(caught.value)


@pytest.mark.parametrize("where", ["validate-yaml", "whoami", "repos/create", "/commit/", "preupload"])
def test_a_hub_that_echoes_the_header_shows_no_token(run, hub, monkeypatch, capfd, caplog, where):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults = [Fault(where, 400, 99, message=ECHO)]
    with pytest.raises(PublishError) as caught:
        publish(run, allow_license="mit", dry_run=False)
    shown = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr()) + caplog.text
    assert TOKEN not in shown and "400 Bad Request: header Authorization: Bearer ***" in shown


def test_a_hub_that_echoes_the_header_to_a_download_shows_no_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults = [Fault("GET /api/models/", 400, 99, message=ECHO)]
    with pytest.raises(ModelError, match="the Hub answered 400") as caught:
        resolve("someone/model")
    assert TOKEN not in "".join(traceback.format_exception(caught.value))
    assert hub.requests[-1].headers["authorization"] == f"Bearer {TOKEN}"


def test_the_executed_notebook_of_a_refused_publication_holds_no_token(run, hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults = [Fault("/commit/", 400, 99, message=ECHO)]
    output = run.notebooks / "05_publish.ipynb"
    given = {"run_dir": str(run.path), "dry_run": False, "allow_license": "mit"}
    with pytest.raises(book.NotebookError, match=r"Bearer \*\*\*"):
        book.execute("05_publish", output, given)
    assert hub.sent("POST", "/commit/") and TOKEN not in output.read_text()


def test_a_stage_without_a_token_finds_what_was_fetched_with_it(hub, tmp_path, monkeypatch):
    folder = make_tiny("llama", tmp_path / "m")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    files["README.md"] = b"---\nlicense: mit\n---\nA card.\n"
    hub.repositories["someone/private"] = Repository(True, files, ["1" * 40])
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    empty = Run(tmp_path / "empty")
    needed = book._fetched(empty, "01_analyze", {"model": "someone/private", "revision": ""})
    assert needed == {"model": "someone/private", "revision": "1" * 40}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelError, match="no token was given"):
        resolve("someone/private")
    hub.requests.clear()
    found = resolve("someone/private", needed["revision"])
    assert found.revision == "1" * 40 and {path.name for path in found.directory.iterdir()} >= set(files)
    licence, _ = card.read_base(found.identity(), tmp_path / "empty", ask=False)
    assert licence.id == "mit" and hub.requests == []


# --- which files -----------------------------------------------------------------------------------------

LEFT_OVER = (
    "figures/.quality_by_bytes.svg.0a1b2c3d.svg",
    "figures/.plan_map.png",
    "figures/plan_map.png~",
    "model/.model.safetensors.0a1b2c3d.safetensors",
    "model/.ipynb_checkpoints/generate-checkpoint.py",
    "model/.cache/huggingface/download/config.json.metadata",
    "model/model.safetensors.incomplete",
    "model/tokenizer.json.tmp",
    "model/tokenizer.json~",
    "model/.DS_Store",
)


def test_what_a_kill_or_an_editor_left_is_never_listed_and_old_temporary_files_are_removed(run):
    before = publish(run, allow_license="mit")
    for name in LEFT_OVER:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("half a file")
    old = run.path / LEFT_OVER[0]
    os.utime(old, (0, 0))
    done = publish(run, allow_license="mit", force=True)
    assert done.ready and done.files == before.files
    manifest = json.loads((run.publish / "manifest.json").read_text())
    record = json.loads((run.publish / "environment.json").read_text())
    listed = " ".join([*manifest["files"], *record["files"]])
    assert not any(Path(name).name in listed for name in LEFT_OVER) and not old.exists()


NAMES = ("LICENSE", "NOTICE", "USE_POLICY.md", "tokenizer.model", "a.yaml", "a.yml", "a.toml", "vocab.bpe")


SECRETS = (TOKEN, "ghp_" + "a1" * 18, "sk-" + "b2" * 20)


@pytest.mark.parametrize(
    ("name", "secret"), [*zip(NAMES, SECRETS * 3, strict=False), ("deep/down/a.txt", TOKEN)]
)
def test_a_secret_in_any_file_that_would_be_sent_closes_the_gate(run, name, secret):
    (run.model_dir / name).parent.mkdir(parents=True, exist_ok=True)
    (run.model_dir / name).write_bytes(b"\xff\x00 words " + secret.encode() + b" words")
    found = closed(publish(run, allow_license="mit"))
    assert f"{name} holds what looks like an access token" in found["secrets"]
    assert secret not in str(found)


def test_the_secrets_gate_says_what_it_read_of_the_weights(run):
    assert "(of the weights, in their headers)" in str(publish(run, allow_license="mit"))


# --- what else happens at the Hub ------------------------------------------------------------------------

REPO = "me/tiny-llama-SPI-nf4-16bit-11.6bpw"


def change_repository(hub, when):
    """Let somebody else commit to the repository at the first request that matches."""

    def act(request):
        if when in f"{request.method} {request.path}" and "theirs.md" not in hub.repositories[REPO].files:
            hub.repositories[REPO].files["theirs.md"] = b"their change"
            hub.repositories[REPO].commits.append("7" * 40)

    hub.on_request = act


@pytest.mark.parametrize("when", ["/preupload/", "/lfs/", "/commit/"])
def test_a_change_of_somebody_else_in_between_is_kept_and_said(run, hub, monkeypatch, when):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    change_repository(hub, when)
    with pytest.raises(PublishError, match=r"changed while this ran \(412\): somebody else committed to it"):
        publish(run, allow_license="mit", dry_run=False)
    held = hub.repositories[REPO]
    assert held.files["theirs.md"] == b"their change" and held.commits[-1] == "7" * 40
    assert "model.safetensors" not in held.files
    hub.on_request = None
    (run.figures / "plan_map.png").write_bytes(b"a new picture")
    with pytest.raises(PublishError, match="holds files of another origin"):  # theirs, and nothing of ours
        publish(run, allow_license="mit", dry_run=False)
    publish(run, allow_license="mit", dry_run=False, overwrite=True)
    assert held.files["figures/plan_map.png"] == b"a new picture" and len(held.commits) == 3


def test_a_commit_whose_answer_was_lost_is_recognised_as_our_own(run, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.faults = [Fault("/commit/", -2)]
    done = publish(run, allow_license="mit", dry_run=False)
    assert len(hub.repositories[REPO].commits) == 2 and "model.safetensors" in done.uploaded


def test_a_rehearsal_makes_no_network_call(run, hub, monkeypatch):
    monkeypatch.setattr(card, "_hub_card", ASK_THE_HUB)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was made"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("a name was looked up"))
    found = closed(publish(run))
    assert set(found) == {"licence"} and "a rehearsal asks nobody" in found["licence"]
    assert publish(run, allow_license="mit", force=True).ready
    assert hub.requests == []


def test_only_a_publication_asks_the_hub_for_the_licence(run, hub, monkeypatch):
    monkeypatch.setattr(card, "_hub_card", ASK_THE_HUB)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(PublishError, match="BLOCKED licence: the base's licence is unknown"):
        publish(run, dry_run=False)
    assert [request.path.split("/revision")[0] for request in hub.requests[:1]] == [
        "/api/models/someone/tiny-llama"
    ]
    assert not hub.repositories


# --- the size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off", [0, 60_000, -60_000, 64_000, 64_001, -64_001, 200_000])
def test_a_size_is_right_for_publishing_where_it_was_right_for_quantizing(run, off):
    size = (run.model_dir / "model.safetensors").stat().st_size
    plan = json.loads(run.plan_json.read_text())
    write_json(run.plan_json, {**plan, "bytes": {"total": size + off}})
    gate = "size" not in closed(publish(run, allow_license="mit"))
    try:
        quantize.check_size(run.model_dir, size + off)
    except CheckpointError:
        assert not gate and abs(off) > 64_000
    else:
        assert gate and abs(off) <= 64_000


@pytest.mark.parametrize(("planned", "allowed"), [(1_000, 64_000), (12_800_000, 64_000), (10**9, 5 * 10**6)])
def test_the_sizes_tolerance_is_half_a_percent_and_a_header_at_least(planned, allowed):
    assert size_tolerance(planned) == allowed


# --- no path of this machine -----------------------------------------------------------------------------

PLACES = (
    "/home/somebody/models/base",
    "/Users/somebody/base",
    "/root/runs/x",
    "/tmp/tmpabc/text.txt",
    "/content/drive/MyDrive/run",
    "/kaggle/working/runs",
    "C:\\Users\\Somebody\\base",
    "C:/Users/Somebody/base",
)


WRITTEN_HERE = ("evaluation.json", "config.json", "generate.py")


@pytest.mark.parametrize(("name", "place"), zip(itertools.cycle(WRITTEN_HERE), PLACES, strict=False))
def test_a_path_of_a_machine_in_what_was_written_here_closes_the_gate(run, place, name):
    if name == "evaluation.json":
        evaluate_again(run, settings={"seed": 0, "rivals": [place]})
    elif name == "config.json":
        held = json.loads((run.model_dir / name).read_text())
        write_json(run.model_dir / name, {**held, "_name_or_path": place})
    else:
        path = run.path / name if "/" in name else run.model_dir / name
        path.write_text(f"words '{place}' words")
    assert name in closed(publish(run, allow_license="mit"))["local paths"]


@pytest.mark.parametrize("name", ["tokenizer.json", "LICENSE", "own.py", "deep/a.txt"])
def test_the_runs_own_folder_is_found_in_any_file(run, name):
    path = run.model_dir / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"one line\nand {run.path.resolve()}\n")
    assert f"line 2 of {name} names a folder" in closed(publish(run, allow_license="mit"))["local paths"]


def test_a_vocabulary_and_web_addresses_are_no_paths(run):
    held = json.loads((run.model_dir / "tokenizer.json").read_text())
    write_json(
        run.model_dir / "tokenizer.json", {**held, "words": ["/home/", "/tmp/x", "/usr/bin", "/root/a"]}
    )
    (run.model_dir / "LICENSE-NOTES").write_text("https://example.org/home/somebody and and/or")
    (run.figures / "plan_map.svg").write_text(
        '<svg xmlns="http://www.w3.org/tmp/svg"><path d="M 0/1"/></svg>'
    )
    done = publish(run, allow_license="mit")
    assert "local paths" not in closed(done) and "ok      local paths: none found" in str(done)


def test_a_local_run_publishes_no_path_in_card_record_or_manifest(tmp_path):
    run = make_finished_run(tmp_path, kind="local", model_id="source")
    info = json.loads(run.info_json.read_text())
    write_json(run.info_json, {**info, "location": str(tmp_path / "source")})
    assert publish(run, allow_license="mit").ready
    assert all(str(tmp_path) not in path.read_text() for path in run.publish.iterdir())
    weights = run.model_dir / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])  # the reader's error names the file
    (run.model_dir / "LICENSE").write_text(f"{run.path}")
    assert {"plan", "local paths"} <= set(closed(publish(run, allow_license="mit")))
    assert all(str(tmp_path) not in path.read_text() for path in run.publish.iterdir())


# --- the repository's name -------------------------------------------------------------------------------

IMPOSSIBLE = (
    *("a b/c d", "", " ", "a/b/c", "/b", "a/", "a/b\n", "a/..", "a/b--c", "a/b..c", "-a/b", "a/b-", ".a/b"),
    *("a/b.git", "a/b-.git", "a/ü", "https://huggingface.co/a/b", "a/b.ipynb", "a/" + "b" * 96, 5, ["a/b"]),
)


@pytest.mark.parametrize("name", IMPOSSIBLE)
@pytest.mark.parametrize("dry_run", [True, False])
def test_a_name_that_the_hub_can_not_have_is_refused_before_anything_else(tmp_path, hub, name, dry_run):
    with pytest.raises(PublishError, match="expected `name` or `owner/name`") as refused:
        publish(tmp_path / "there is no run here", repo_id=name, dry_run=dry_run)
    assert repr(name) in str(refused.value) and hub.requests == []
    advised = re.search(r"e\.g\. '([^']+)'", str(refused.value))[1]
    with pytest.raises(RunError, match="01_analyze"):  # the advice is taken: now the run is missed
        publish(tmp_path / "there is no run here", repo_id=advised)


@pytest.mark.parametrize("name", ["a", "a/b", "Me-2/Some_model.v1-SPI-nf4", "a/" + "b" * 94, "_a/b_"])
def test_a_name_that_the_hub_can_have_is_taken(run, name):
    assert publish(run, repo_id=name, allow_license="mit").repo_id.endswith(name)


def test_the_name_made_of_a_folders_name_is_one_that_the_hub_can_have(tmp_path):
    run = make_finished_run(tmp_path, kind="local", model_id="My own größtes--model.")
    assert publish(run, allow_license="mit").repo_id == "your-name/My-own-gr-tes-model-SPI-nf4-16bit-11.6bpw"
