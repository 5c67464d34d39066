"""All notebooks on the bundled model, executed: what a person gets from `make run`, in small."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from spi_utils.models import resolve
from spi_utils.notebook import STAGES
from spi_utils.plan import ProtectionPlan, make_plan, read_plan
from spi_utils.quantize import check_request
from spi_utils.runs import Run, read_layers, read_spectra, run_info
from tests.browser.test_notebook import PATIENCE, Controls

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "model": "bundled",
    "sensitivity_windows": 4,
    "sensitivity_length": 64,
    "windows": 4,
    "length": 64,
    "random_seeds": 2,
}


def run_all(run_dir, text, **more):
    parameters = {**SMALL, "texts": text, "run_dir": str(run_dir), **more}
    arguments = [part for name, value in parameters.items() for part in ("-p", name, str(value))]
    return subprocess.run(
        [sys.executable, "-m", "spi_utils", "run", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ, "CI": ""},
    )  # fmt: skip


@pytest.fixture(scope="session")
def finished(tmp_path_factory, evaluation_text):
    """A finished run in a folder with a space in its name, and what the command printed."""
    run = Run(tmp_path_factory.mktemp("my runs") / "bundled")
    done = run_all(run.path, evaluation_text)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return run, done.stdout


def test_every_file_of_the_run_directory_is_there(finished):
    run, _ = finished
    for path in (run.layers_csv, run.spectra, run.plan_json, run.evaluation_json, run.explorer, run.report):
        assert path.stat().st_size > 0, path
    assert {p.stem for p in run.notebooks.glob("*.ipynb")} == {"00_run_all", *STAGES}
    assert {"config.json", "generate.py", "plan.json"} <= {p.name for p in run.model_dir.iterdir()}
    assert (run.publish / "README.md").exists() and not run.partial.exists()
    pngs = {p.stem for p in run.figures.glob("*.png")}
    assert {"score_by_depth", "spectra", "histogram", "plan_map"} <= pngs
    assert pngs == {p.stem for p in run.figures.glob("*.svg")}
    assert set(run_info(run)["stages"]) >= {"analyze", "quantize", "evaluate"}


def test_no_executed_notebook_holds_an_error_or_a_blank_figure(finished):
    run, _ = finished
    for path in run.notebooks.glob("*.ipynb"):
        outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])]
        assert outputs and all(o.output_type != "error" for o in outputs)
        if path.stem[:2] in {"00", "02", "04"}:
            assert any("image/png" in o.get("data", {}) for o in outputs), path


def test_the_tables_and_the_plan_agree(finished):
    run, printed = finished
    layers, spectra = read_layers(run), read_spectra(run)
    planned = layers[layers["quantizable"]]
    assert len(planned) == 210 and set(planned["name"]) <= set(spectra)
    plan = ProtectionPlan.read(run.plan_json)
    assert len(plan.protected) == round(0.52 * 210) and plan.rule == "claim"
    top = planned.nlargest(len(plan.protected), "alpha_hill")["name"]
    assert set(top) == set(plan.protected)
    evaluation = json.loads(run.evaluation_json.read_text())
    wanted = {
        "reference",
        "nf4",
        "plan",
        "other_direction",
        "fisher",
        "fisher_int8",
        "fisher_int4",
        "int8",
        "int4",
        "random_0",
        "random_1",
    }
    assert wanted <= set(evaluation["variants"])
    assert evaluation["variants"]["reference"]["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert 0 < evaluation["variants"]["plan"]["kl_mean"] < evaluation["variants"]["nf4"]["kl_mean"]
    assert str(run.report) in printed


LOAD = """
import sys
from transformers import AutoModelForCausalLM
from bitsandbytes.nn import Linear4bit
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(name.startswith("spi_utils") for name in sys.modules)
print(sum(isinstance(m, Linear4bit) for m in model.modules()), type(model.lm_head).__name__)
"""


def test_plain_transformers_loads_the_checkpoint(finished):
    run, _ = finished
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(run.model_dir)], capture_output=True, text=True, check=False, cwd="/"
    )
    assert loaded.stdout.split() == [str(210 - round(0.52 * 210)), "Linear"], loaded.stderr[-2000:]


def test_the_other_backend_runs_through_all_notebooks(tiny, tmp_path, evaluation_text):
    """int4, int8 and 16-bit in one file: planned by Fisher, merged layers together, judged from the file."""
    run = Run(tmp_path / "mixed")
    wishes = {"backend": "compressed-tensors", "score": "fisher", "rule": "matrix_bits", "value": 6.5}
    done = run_all(run.path, evaluation_text, **{**wishes, "model": str(tiny("llama"))})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    plan = ProtectionPlan.read(run.plan_json)
    assert plan.options["group"] == "fused" and {"int4_g64", "int8"} <= set(plan.formats.values())
    held = json.loads((run.model_dir / "config.json").read_text())["quantization_config"]
    assert held["quant_method"] == "compressed-tensors"
    evaluation = json.loads(run.evaluation_json.read_text())
    assert evaluation["checkpoint"]["int4_g64"] == plan.count("int4_g64")
    assert {"int4", "int8", "nf4", "fisher_int4", "random_0"} <= set(evaluation["variants"])
    assert "compressed-tensors" in (run.publish / "README.md").read_text()


def test_a_second_run_recognises_what_is_done(finished, evaluation_text):
    run, _ = finished
    before = {p: p.stat().st_mtime_ns for p in (run.layers_csv, run.plan_json, run.evaluation_json)}
    again = run_all(run.path, evaluation_text)
    assert again.returncode == 0, again.stderr[-2000:]
    assert again.stdout.count("already done") == len(STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_unknown_parameters_are_refused_before_anything_runs(tmp_path):
    refused = run_all(tmp_path / "run", "pydoc", scoer="alpha_hill")
    assert refused.returncode == 2 and "Did you mean 'score'?" in refused.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture
def untouched(finished):
    """The finished run, its plan put back after a test that saves another."""
    run, _ = finished
    before = run.plan_json.read_bytes()
    yield run
    run.plan_json.write_bytes(before)


@pytest.mark.browser
def test_a_plan_saved_by_slider_in_a_browser_is_one_that_the_next_notebook_takes(untouched, voila, visit):
    run, one = untouched, visit()
    one.page.goto(voila(run.notebooks / "02_visualize.ipynb"), timeout=PATIENCE)
    one.page.wait_for_selector(".spi-explorer img", timeout=PATIENCE)
    controls = Controls(one.page)
    assert controls.line().startswith(f"{round(0.52 * 210)} of 210 layers in 16-bit")
    number, picture = controls.number(), controls.picture()
    controls.handle.focus()
    for _ in range(20):
        one.page.keyboard.press("ArrowRight")
    assert controls.changed(controls.number, number) > number
    assert controls.picture() != picture
    line = controls.line()
    controls.box.locator("button", has_text="Save plan").click()
    one.page.wait_for_selector(".spi-explorer [role=status] >> text=Saved to")
    plan = read_plan(run)
    check_request(resolve("bundled"), plan)
    again = make_plan(read_layers(run), rule="threshold", value=plan.value)
    assert (plan.origin, plan.protected) == ("slider", again.protected)
    assert line.startswith(f"{len(plan.protected)} of 210 layers in 16-bit")
    for width in (1280, 800):
        one.page.set_viewport_size({"width": width, "height": 7000})
        one.page.wait_for_timeout(1000)
        one.page.screenshot(path=run.figures / f"screen_notebook_{width}.png")
        assert one.cut_off() == []
    assert one.errors == []
