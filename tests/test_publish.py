"""What may leave this machine: the very file that was proved and measured, and nothing private with it."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants

from spi_utils import notebook as book
from spi_utils import publish as publishing
from spi_utils import quantize, speed, tokens
from spi_utils.__main__ import main
from spi_utils.errors import PublishError, RunError
from spi_utils.models import resolve
from spi_utils.publish import publish
from spi_utils.runs import Run, sha256_file, write_json
from tests.finished_run import KEPT, STOCK, checkpoint_hash, make_finished_run
from tests.tiny import make_tiny

TOKEN = "hf_" + "Q7" * 17
MINE = {"allow_license": "mit"}


@pytest.fixture
def run(finished_run, tmp_path):
    return Run(shutil.copytree(finished_run.path, tmp_path / "run"))


@pytest.fixture(autouse=True)
def nobody(monkeypatch):
    """No token of the machine's user, and no connection, in any test of this file."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(tokens, "_login", lambda: None)
    monkeypatch.setattr(tokens, "_hidden", [])


def edit(path, change):
    held = json.loads(path.read_text())
    change(held)
    write_json(path, held)


def edit_evaluation(run, change):
    """Change evaluation.json, and the record of it: as if the evaluation had found that."""
    edit(run.evaluation_json, change)
    entry = {"bytes": run.evaluation_json.stat().st_size, "sha256": sha256_file(run.evaluation_json)}
    edit(run.info_json, lambda info: info["stages"]["evaluate"]["outputs"].update({"evaluation.json": entry}))


def closed(run):
    return {gate.name: gate.found for gate in publish(run, **MINE).gates if not gate.passed}


# --- the rehearsal ---------------------------------------------------------------------------------------


def test_a_rehearsal_writes_card_record_and_list_the_same_each_time_and_sends_nothing(run):
    done = publish(run, **MINE)
    first = {path.name: path.read_bytes() for path in run.publish.iterdir()}
    assert done.ready and "Rehearsal: nothing was sent." in str(done)
    manifest = json.loads(first["manifest.json"])
    assert manifest["files"] == {name: path.stat().st_size for name, path in done.files.items()}
    assert manifest["total_bytes"] == sum(manifest["files"].values()) and manifest["ready"]
    tables = {"README.md", "plan.json", "layers.csv", "evaluation.json", "environment.json", "config.json"}
    assert tables | {"generate.py", "model.safetensors.index.json", "figures/plan_map.png"} <= set(done.files)
    record = json.loads(first["environment.json"])
    assert set(record["files"]) == set(done.files) - {"README.md", "environment.json"}
    assert set(record["stages"]) == {"analyze", "quantize", "evaluate"}
    assert "python" in record["stages"]["evaluate"]
    assert done.preview().lstrip().startswith("# ") and "license:" not in done.preview()
    publish(run, **MINE)
    assert {path.name: path.read_bytes() for path in run.publish.iterdir()} == first


def test_the_card_holds_the_measured_numbers(run):
    text = publish(run, repo_id="me/small", **MINE).card.read_text()
    variants = json.loads(run.evaluation_json.read_text())["variants"]
    own = variants["plan"]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    table = {cells[0]: cells[1:] for cells in rows}
    assert table["**this model**"][1] == f"{own['perplexity']:.3f}"
    ends = [float(number) for number in re.findall(r"[+-]\d+\.\d+", table["**this model**"][2])]
    assert ends == pytest.approx([own["delta"]["mean"], own["delta"]["low"], own["delta"]["high"]], abs=5e-5)
    assert "0.1213 nats a token on the first 4 windows" in text and "tensors it is 0.1207" in " ".join(
        text.split()
    )
    assert table["layers by type"] == ["16bit", "nf4"] and table[f"`{KEPT}`"] == ["4", "0"]
    embedding, norm, width, hidden = 320 * 128, 128, 128, 256
    block = width * width * 2 + 2 * width * 64 + 3 * width * hidden + 2 * norm  # q, o; k, v; MLP; two norms
    assert table["Parameters"][0].startswith(f"{embedding + 4 * block + norm:,} (")  # the head is tied
    assert "differs by -0.0620 (-0.0850 … -0.0410) nats a token" in " ".join(text.split())
    assert 'from_pretrained("me/small"' in text and "](figures/plan_map.png)" in text
    data = yaml.safe_load(text.split("---")[1])
    assert data["base_model"] == "someone/tiny-llama" and data["base_model_relation"] == "quantized"
    assert data["library_name"] == "transformers" and data["datasets"] == ["Salesforce/wikitext"]
    metrics = {m["type"]: m["value"] for m in data["model-index"][0]["results"][0]["metrics"]}
    assert metrics["perplexity"] == pytest.approx(own["perplexity"], abs=1e-5)
    assert metrics["kl_divergence"] == pytest.approx(own["kl_mean"], abs=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda held: held["variants"]["plan"].pop("vs_random"), "nothing here says that the choice matters"),
        (lambda held: held["variants"]["plan"]["delta"].update(low=None), "(unbounded …"),
        (
            lambda held: held.update(
                stock={**STOCK, "agrees": None, "kl": None, "reason": "9 GB are missing"}
            ),
            "was not scored: 9 GB are missing",
        ),
    ],
)
def test_what_was_not_measured_is_said(run, change, words):
    edit_evaluation(run, change)
    done = publish(run, **MINE)
    assert done.ready and words in done.card.read_text()


def test_a_local_run_publishes_no_path_in_card_record_or_manifest(tmp_path):
    run = make_finished_run(tmp_path, kind="local", model_id="My own größtes--model.")
    edit(run.info_json, lambda info: info.update(location=str(tmp_path / "source")))
    done = publish(run, **MINE)
    assert done.ready and done.repo_id == "your-name/My-own-gr-tes-model-SPI-nf4-16bit-11.6bpw"
    of_evaluation(skipped={"fisher": f"none in {tmp_path / 'source'}"})(run)
    assert "evaluation.json names a folder" in closed(run)["local paths"]
    assert all(str(tmp_path) not in path.read_text() for path in run.publish.iterdir())


LEFT_OVER = (
    *("figures/.plan_map.png", "figures/plan_map.png~", "model/.DS_Store", "model/notes.txt"),
    *("model/.model.safetensors.0a1b2c3d.safetensors", "model/tokenizer.json.tmp", "model/nested/model.bin"),
)


def test_what_a_kill_or_an_editor_left_is_never_listed(run):
    before = publish(run, **MINE)
    for name in LEFT_OVER:
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_text("half a file")
    done = publish(run, **MINE)
    assert done.ready and done.files == before.files


# --- gates -----------------------------------------------------------------------------------------------


def flip(run):
    """Other weights, evaluated as they are: they are not what quantize wrote."""
    path = next(run.model_dir.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    edit_evaluation(run, lambda held: held.update(checkpoint_sha256=checkpoint_hash(run.model_dir)))


def of_plan(**changes):
    return lambda run: edit(run.plan_json, lambda plan: plan.update(changes))


def of_evaluation(**changes):
    return lambda run: edit_evaluation(run, lambda held: held.update(changes))


def of_proof(proof):
    return lambda run: edit(run.info_json, lambda info: info["stages"]["quantize"].update(proof=proof))


def without(*keys):
    def act(info):
        *path, last = keys
        for key in path:
            info = info[key]
        info.pop(last)

    return lambda run: edit(run.info_json, act)


SECRETS = (TOKEN, "ghp_" + "a1" * 18, "sk-" + "b2" * 20)
WROTE = "what {} writes is missing or was changed; run notebook {}"


@pytest.mark.parametrize(
    ("spoil", "gate", "words"),
    [
        (flip, "stages", WROTE.format("quantize", "03_quantize")),
        (lambda run: (run.model_dir / "generate.py").unlink(), "stages", "03_quantize"),
        (lambda run: (run.model_dir / "z.safetensors").write_bytes(b""), "evaluation", "04_evaluate"),
        (without("stages", "quantize", "outputs"), "stages", WROTE.format("quantize", "03_quantize")),
        (without("stages", "evaluate"), "stages", WROTE.format("evaluate", "04_evaluate")),
        (of_plan(reason="Another."), "evaluation", "plan.json changed"),
        (of_evaluation(checkpoint_sha256="0" * 64), "evaluation", "of checkpoint 000000000000"),
        (of_evaluation(hashes={}), "evaluation", "04_evaluate"),
        (of_proof(None), "proof by use", "03_quantize"),
        (of_proof({"finite": True}), "proof by use", "03_quantize"),
        (of_evaluation(stock={}), "stock score", "04_evaluate"),
        (of_evaluation(stock={**STOCK, "agrees": False}), "stock score", "04_evaluate"),
        (of_evaluation(stock={"agrees": None}), "stock score", "04_evaluate"),  # with no reason
        *(
            (of_plan(reason=f"x {secret}"), "secrets", "plan.json holds what looks like")
            for secret in SECRETS
        ),
        (of_plan(reason="'/home/somebody/base'"), "local paths", "plan.json names a folder"),
    ],
)
def test_a_spoiled_run_is_refused_and_the_rehearsal_says_why(run, monkeypatch, spoil, gate, words):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(publishing, "owner_of", lambda *_: "me")
    monkeypatch.setattr(publishing, "send", lambda *_, **__: pytest.fail("something was sent"))
    monkeypatch.setattr(Path, "home", lambda: Path("/home/somebody"))
    spoil(run)
    found = closed(run)
    assert words in found[gate] and not any(secret in str(found) for secret in SECRETS)
    with pytest.raises(PublishError, match="Nothing was sent"):
        publish(run, dry_run=False, **MINE)


def test_what_can_not_be_read_names_the_notebook_to_run_again(run):
    edit_evaluation(run, lambda held: held.update(variants=[]))
    with pytest.raises(RunError, match=r"evaluation\.json: .*04_evaluate again"):
        publish(run)
    run.evaluation_json.unlink()
    with pytest.raises(RunError, match="04_evaluate"):
        publish(run)


def test_an_unknown_licence_closes_the_gate_until_it_is_stated(run):
    found = {gate.name: gate.found for gate in publish(run).gates if not gate.passed}
    assert set(found) == {"licence"} and "allow_license" in found["licence"]
    for stated, written in {
        "mit": {"license": "mit"},
        "foo-1.0": {"license": "other", "license_name": "foo-1.0", "license_link": "LICENSE"},
    }.items():
        done = publish(run, allow_license=stated)
        data = yaml.safe_load(done.card.read_text().split("---")[1])
        assert done.ready and {k: v for k, v in data.items() if k.startswith("license")} == written


@pytest.mark.parametrize("name", ["a b/c d", "a/b/c", "a/b--c", "a/b.git", "a/" + "b" * 97])
def test_a_name_that_the_hub_can_not_have_is_refused_before_anything_else(tmp_path, name):
    with pytest.raises(PublishError, match="expected `name` or `owner/name`") as refused:
        publish(tmp_path / "there is no run here", repo_id=name)
    assert repr(name) in str(refused.value)


def test_the_command_line_rehearses_and_refuses(run, capsys):
    command = ["publish", str(run.path), "--dry-run", "--allow-license", "mit", "--repo-id"]
    assert main([*command, "Some_model.v1"]) == 0
    assert "private repository your-name/Some_model.v1" in capsys.readouterr().out
    assert main(["publish", str(run.path), "--dry-run", "--public"]) == 0
    assert "public repository your-name/tiny-llama-SPI-nf4-16bit-11.6bpw" in capsys.readouterr().out
    assert main(["publish", str(run.path / "nowhere")]) == 1
    assert "01_analyze" in capsys.readouterr().err


# --- the token -------------------------------------------------------------------------------------------

REPORT = """
import json, os, sys
names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
json.dump({name: os.environ.get(name) for name in names}, open(sys.argv[-1], "w"))
"""


def test_the_environment_of_a_stage_holds_a_token_only_where_it_publishes(monkeypatch, tmp_path):
    """Through the very subprocess calls, with a stand-in for papermill that notes what it was given."""
    (tmp_path / "papermill.py").write_text(REPORT.replace("sys.argv[-1]", repr(str(tmp_path / "held"))))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", TOKEN)
    held = {}
    for name in ("03_quantize", "05_publish", "00_run_all"):
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
    folder = make_tiny("llama", tmp_path / "m", num_hidden_layers=1)
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(folder / "config.json", lambda held: held.update(model_type="own", auto_map=names))
    (folder / "own.py").write_text(
        "import json, os\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
        f"open({str(tmp_path / 'seen')!r}, 'w').write(json.dumps(dict(os.environ)))\n"
    )
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    resolve(str(folder), trust_remote_code=True)
    assert TOKEN not in (tmp_path / "seen").read_text()
    assert TOKEN not in repr(tokens.hub_token())
    assert tokens.hub_token().value == TOKEN and tokens.with_token({})["HF_TOKEN"] == TOKEN
