import base64
import json
import re
import shutil
from dataclasses import replace

import pytest
import yaml

from spi_utils import card, tokens
from spi_utils import publish as publishing
from spi_utils.__main__ import main
from spi_utils.errors import PublishError, RunError
from spi_utils.publish import Published, Rehearsal, publish, quantized_modules
from spi_utils.runs import Run, write_json
from tests.finished_run import KEPT, make_finished_run

TOKEN = "hf_" + "Q7" * 17


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return make_finished_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture
def run(original, tmp_path):
    return Run(shutil.copytree(original.path, tmp_path / "run"))


@pytest.fixture(autouse=True)
def nobody(monkeypatch, tmp_path):
    """No token of the machine's user, and no connection, in any test of this file."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(tokens, "_login", lambda: None)
    monkeypatch.setattr(card, "_hub_card", lambda model, revision: {})


def edit(path, **changes):
    write_json(path, {**json.loads(path.read_text()), **changes})


def closed(rehearsal):
    return {gate.name: gate.found for gate in rehearsal.gates if not gate.passed}


# --- the rehearsal ---------------------------------------------------------------------------------------


def test_a_rehearsal_writes_the_card_and_the_list_and_sends_nothing(run):
    done = publish(run, allow_license="mit")
    assert isinstance(done, Rehearsal) and not isinstance(done, Published)
    assert done.ready and closed(done) == {}
    manifest = json.loads((run.publish / "manifest.json").read_text())
    assert manifest["files"]["model.safetensors"] == (run.model_dir / "model.safetensors").stat().st_size
    assert manifest["total_bytes"] == sum(manifest["files"].values())
    assert {
        "README.md",
        "plan.json",
        "layers.csv",
        "evaluation.json",
        "environment.json",
        "generate.py",
    } <= set(manifest["files"])
    assert {"config.json", "tokenizer.json", "figures/plan_map.png"} <= set(manifest["files"])
    assert "Rehearsal: nothing was sent." in str(done)


def test_two_rehearsals_give_the_same_bytes(run):
    publish(run, allow_license="mit")
    first = {path.name: path.read_bytes() for path in run.publish.iterdir()}
    publish(run, allow_license="mit", force=True)
    assert {path.name: path.read_bytes() for path in run.publish.iterdir()} == first


def test_a_rehearsal_is_recognised_until_something_changes(run):
    first = publish(run, allow_license="mit")
    stamp = first.card.stat().st_mtime_ns
    again = publish(run, allow_license="mit")
    assert again == first and again.card.stat().st_mtime_ns == stamp
    assert publish(run, allow_license="mit", force=True).card.stat().st_mtime_ns > stamp
    (run.figures / "plan_map.png").write_bytes(b"another picture")
    changed = publish(run, allow_license="mit")
    assert changed.total_bytes == first.total_bytes - 67 + 15
    assert publish(run, allow_license="cc0-1.0").licence.id == "cc0-1.0"


def test_what_is_smaller_and_better_is_named(run):
    text = publish(run, allow_license="mit").card.read_text()
    assert "nearer to the base: chosen by Fisher information, equal bytes; 8-bit everywhere." in text
    evaluation = json.loads(run.evaluation_json.read_text())
    evaluation["variants"]["int8"]["bytes"] = evaluation["variants"]["fisher"]["bytes"] = 4_000_000
    edit(run.evaluation_json, variants=evaluation["variants"])
    assert "nearer to the base" not in publish(run, allow_license="mit").card.read_text()


def test_the_yaml_says_what_the_hub_asks_for(run):
    (run.model_dir / "README.md").write_text("---\nlanguage: en\nlicense: gemma\n---\nbase\n")
    text = publish(run, repo_id="me/small", allow_license="mit").card.read_text()
    data = yaml.safe_load(text.split("---")[1])
    assert data["language"] == ["en"]
    assert data["base_model"] == "someone/tiny-llama"
    assert data["base_model_relation"] == "quantized"
    assert (data["library_name"], data["pipeline_tag"], data["license"]) == (
        "transformers",
        "text-generation",
        "mit",
    )
    assert data["datasets"] == ["Salesforce/wikitext"]
    metrics = {m["type"]: m["value"] for m in data["model-index"][0]["results"][0]["metrics"]}
    measured = json.loads(run.evaluation_json.read_text())["variants"]["plan"]
    assert metrics["perplexity"] == pytest.approx(measured["perplexity"], abs=1e-5)
    assert metrics["kl_divergence"] == pytest.approx(measured["kl_mean"], abs=1e-5)


def test_the_card_holds_the_measured_numbers(run):
    text = publish(run, repo_id="me/small", allow_license="mit").card.read_text()
    variants = json.loads(run.evaluation_json.read_text())["variants"]
    own = variants["plan"]
    row = next(line for line in text.splitlines() if line.startswith("| **this model**"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[2] == f"{own['perplexity']:.3f}"
    ends = [float(number) for number in re.findall(r"[+-]\d+\.\d+", cells[3])]
    assert ends == pytest.approx([own["delta"]["mean"], own["delta"]["low"], own["delta"]["high"]], abs=5e-5)
    mean = sum(variants[f"random_{seed}"]["kl_mean"] for seed in range(5)) / 5
    chance = next(line for line in text.splitlines() if line.startswith("| random layers"))
    assert f"| {mean:.4f} |" in chance
    said = " ".join(text.split())
    assert "-0.0620 (-0.0850 … -0.0410) nats a token: **the choice of layers matters.**" in said
    assert "| layers by type | 16bit | nf4 |" in text
    assert f"| `{KEPT}` | 4 | 0 |" in text and "| `q_proj` | 0 | 4 |" in text
    assert (
        'from_pretrained("me/small"' in text
        and "![Which layers stay in 16-bit.](figures/plan_map.png)" in text
    )


def test_the_preview_holds_its_pictures(run):
    preview = publish(run, allow_license="mit").preview()
    assert preview.lstrip().startswith("# ") and "license:" not in preview
    data = re.search(r"!\[Which layers stay in 16-bit\.\]\(data:image/png;base64,([^)]+)\)", preview)
    assert base64.b64decode(data[1]) == (run.figures / "plan_map.png").read_bytes()


def test_the_parameter_count_is_the_architectures(run):
    embedding, norm, width, hidden = 320 * 128, 128, 128, 256
    block = width * width * 2 + 2 * width * 64 + 3 * width * hidden + 2 * norm  # q, o; k, v; MLP; two norms
    text = publish(run, allow_license="mit").card.read_text()
    assert f"| Parameters | {embedding + 4 * block + norm:,} (" in text  # the head is tied to the embedding


def test_a_card_without_random_controls_claims_nothing(run):
    evaluation = json.loads(run.evaluation_json.read_text())
    kept = {key: value for key, value in evaluation["variants"].items() if not key.startswith("random")}
    del kept["plan"]["vs_random"]
    edit(run.evaluation_json, variants=kept)
    text = publish(run, allow_license="mit").card.read_text()
    assert "nothing here says that the choice matters" in text and "random layers" not in text


def test_an_interval_without_an_end_is_said(run):
    evaluation = json.loads(run.evaluation_json.read_text())
    evaluation["variants"]["plan"]["delta"]["low"] = None
    edit(run.evaluation_json, variants=evaluation["variants"])
    assert "(unbounded …" in publish(run, allow_license="mit").card.read_text()


def test_a_local_model_names_no_folder_of_this_machine(tmp_path):
    run = make_finished_run(tmp_path, kind="local", model_id=str(tmp_path / "source"))
    done = publish(run, allow_license="mit")
    assert str(tmp_path) not in done.card.read_text() and "base_model" not in done.card.read_text()
    assert done.repo_id == "your-name/source-SPI-nf4-16bit-11.6bpw"


def test_the_environment_record_holds_the_hashes_of_every_other_file(run):
    done = publish(run, allow_license="mit")
    record = json.loads((run.publish / "environment.json").read_text())
    assert set(record["files"]) == set(done.files) - {"README.md", "environment.json"}
    assert set(record["stages"]) == {"analyze", "quantize", "evaluate"}
    assert "python" in record["stages"]["evaluate"]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (-0.02, 0.03, "these windows cannot tell the choice from chance."),
        (0.01, 0.03, "the choice is worse than chance."),
    ],
)
def test_the_verdict_is_the_intervals(run, low, high, words):
    evaluation = json.loads(run.evaluation_json.read_text())
    evaluation["variants"]["plan"]["vs_random"]["kl"] |= {"mean": (low + high) / 2, "low": low, "high": high}
    edit(run.evaluation_json, variants=evaluation["variants"])
    assert words in publish(run, allow_license="mit").card.read_text()


# --- gates -----------------------------------------------------------------------------------------------


def test_the_quantized_modules_are_read_from_the_file(run):
    held = quantized_modules(run.model_dir)
    assert len(held) == 24 and not any(name.endswith(KEPT) for name in held)


def test_a_truncated_checkpoint_closes_the_gate(run):
    path = run.model_dir / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PublishError, match=r"BLOCKED plan: .*model\.safetensors: truncated"):
        publish(run, allow_license="mit", dry_run=False, repo_id="a/b")


def change_checkpoint(run):
    path = run.model_dir / "model.safetensors"
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body)


def drop_stage(run):
    info = json.loads(run.info_json.read_text())
    del info["stages"]["evaluate"]
    write_json(run.info_json, info)


def shrink_plan(run):
    edit(run.plan_json, bytes={"total": 500_000})


def swap_plan(run):
    plan = json.loads(run.plan_json.read_text())
    formats = {**plan["formats"], "model.layers.0.self_attn.q_proj": "16bit"}
    edit(run.plan_json, formats=formats, protected=[name for name in formats if formats[name] == "16bit"])


def touch_plan(run):
    edit(run.plan_json, reason="Another reason.")


def leave_token(run):
    (run.model_dir / "generate.py").write_text(f"token = '{TOKEN}'\n")


def drop_script(run):
    (run.model_dir / "generate.py").unlink()


@pytest.mark.parametrize(
    ("spoil", "gate", "words"),
    [
        (change_checkpoint, "evaluation", "04_evaluate"),
        (drop_stage, "stages", "evaluate has not finished; run notebook 04_evaluate"),
        (shrink_plan, "size", "planned (+23.99%); allowed is ±64,000 bytes"),
        (swap_plan, "plan", "the first layers.0.self_attn.q_proj"),
        (touch_plan, "evaluation", "plan.json changed after it"),
        (leave_token, "secrets", "generate.py holds what looks like an access token"),
        (drop_script, "checkpoint", "model/ lacks generate.py; run notebook 03_quantize"),
    ],
)
def test_a_spoiled_run_is_refused_and_the_rehearsal_says_why(run, monkeypatch, spoil, gate, words):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(publishing, "owner_of", lambda *_: "me")
    monkeypatch.setattr(publishing, "send", lambda *_, **__: pytest.fail("something was sent"))
    spoil(run)
    found = closed(publish(run, allow_license="mit"))
    assert words in found[gate]
    with pytest.raises(PublishError, match="Nothing was sent") as refused:
        publish(run, dry_run=False, allow_license="mit")
    assert words in str(refused.value)


def test_a_missing_evaluation_names_its_notebook(run):
    run.evaluation_json.unlink()
    with pytest.raises(RunError, match="04_evaluate"):
        publish(run)


# --- licence ---------------------------------------------------------------------------------------------


def test_an_unknown_licence_closes_the_gate(run):
    found = closed(publish(run))
    assert set(found) == {"licence"} and "allow_license" in found["licence"]


def test_a_stated_licence_opens_it_and_the_card_says_who_stated_it(run):
    text = publish(run, allow_license="cc-by-4.0").card.read_text()
    assert "license: cc-by-4.0" in text and "The publisher stated this" in text


@pytest.mark.parametrize("name", ["cc-by-nd-4.0", "cc-by-nc-nd-4.0"])
def test_a_licence_without_derivatives_is_refused_until_overridden(run, name):
    (run.model_dir / "README.md").write_text(f"---\nlicense: {name}\n---\nbase\n")
    assert "forbids passing on changed weights" in closed(publish(run))["licence"]
    stated = publish(run, allow_license=name)
    assert stated.ready and f"the base says {name}" in stated.card.read_text()


def test_the_bases_own_files_tell_the_licence(run):
    (run.model_dir / "LICENSE").write_text("\n   Apache License\n   Version 2.0, January 2004\n")
    done = publish(run)
    assert done.ready and done.licence.id == "apache-2.0" and not done.licence.stated
    (run.model_dir / "README.md").write_text("---\nlicense: mit\n---\nbase\n")
    assert publish(run).licence.id == "mit"  # the card comes before the file's words
    assert done.files["README.md"] == run.publish / "README.md"  # the base's card isn't ours


def test_a_named_licence_beside_other_counts_with_its_conditions(run):
    (run.model_dir / "README.md").write_text("---\nlicense: other\nlicense_name: llama3.2\n---\nbase\n")
    done = publish(run)
    assert done.ready and "Built with Llama" in done.card.read_text()
    (run.model_dir / "README.md").write_text("---\nlicense: other\n---\nbase\n")
    assert not publish(run).ready


# --- without a token -------------------------------------------------------------------------------------


def test_without_a_token_the_run_stays_local_with_the_command_to_publish_it(run):
    done = publish(run, dry_run=False, private=False, allow_license="mit")
    assert not isinstance(done, Published) and done.note.startswith("Saved locally, not published")
    name = "tiny-llama-SPI-nf4-16bit-11.6bpw"
    command = f'python -m spi_utils publish "{run.path}" --repo-id {name} --public --allow-license mit'
    assert command in done.note


def test_the_command_line_rehearses_and_refuses(run, capsys):
    assert main(["publish", str(run.path), "--dry-run", "--allow-license", "mit"]) == 0
    assert "private repository your-name/tiny-llama-SPI-nf4-16bit-11.6bpw" in capsys.readouterr().out
    assert main(["publish", str(run.path)]) == 1
    assert "BLOCKED licence" in capsys.readouterr().err
    assert main(["publish", str(run.path / "nowhere")]) == 1
    assert "01_analyze" in capsys.readouterr().err


def test_a_token_is_never_shown():
    token = tokens.Token(TOKEN, "the environment")
    assert (
        TOKEN not in repr(token) and TOKEN not in str(token) and TOKEN not in repr(replace(token, source="x"))
    )
