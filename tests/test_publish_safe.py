"""What may leave this machine: the very file that was proved and measured, and nothing private with it."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

from spi_utils import publish as publishing
from spi_utils.errors import PublishError
from spi_utils.hub import licences, tokens
from spi_utils.publish import publish
from spi_utils.runs import Run, write_json
from tests.finished_run import STOCK, checkpoint_hash, make_finished_run

TOKEN = "hf_" + "Q7" * 17


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
    monkeypatch.setattr(tokens, "_from_login", lambda: None)
    monkeypatch.setattr(licences, "_from_hub", lambda model, revision: licences.Licence(None, "not asked"))


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
    [{"checkpoint_sha256": "0" * 64}, {"hashes": {"checkpoint": "0" * 64}}, {"hashes": {}}, {"hashes": None}],
)
def test_an_evaluation_that_names_another_checkpoint_or_no_plan_is_refused(run, changes):
    if changes.get("hashes"):
        changes["hashes"]["plan"] = hashlib.sha256(run.plan_json.read_bytes()).hexdigest()
    evaluate_again(run, **changes)
    assert "04_evaluate" in closed(publish(run, allow_license="mit"))["evaluation"]


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
        None,
        {},
        {**STOCK, "agrees": False},
        {**STOCK, "agrees": None},
        {**STOCK, "agrees": "yes"},
        {**STOCK, "kl": 0.2},
        {**STOCK, "kl": None},
        {"agrees": True},
    ],
    ids=[
        "absent",
        "empty",
        "no",
        "unknown, no reason",
        "a word",
        "contradicted",
        "no number",
        "no tolerance",
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
def test_a_known_licence_with_a_restriction_is_not_that_licence(run, text, name, restriction):
    (run.model_dir / "LICENSE").write_text(text)
    assert publish(run).licence.id == name
    (run.model_dir / "LICENSE").write_text(f"{text}\n{restriction}\n")
    assert set(closed(publish(run))) == {"licence"}
    (run.model_dir / "LICENSE").write_text(text)
    (run.model_dir / "LICENSE-WEIGHTS").write_text(restriction)
    assert set(closed(publish(run))) == {"licence"}


def test_a_local_models_card_is_read_beside_the_model_while_it_is_that_model(tmp_path, monkeypatch):
    from spi_utils.source.sources import weights_hash

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
