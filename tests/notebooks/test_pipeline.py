"""All five notebooks, executed once: the rehearsal of `make gpu-check` leaves what `make run` leaves."""

import contextlib
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import nbformat
import pytest

from spi_utils.__main__ import main
from spi_utils.notebook import STAGES
from spi_utils.plan import ProtectionPlan
from spi_utils.runs import Run, read_layers, read_spectra, run_info
from tests.test_gpu_check import check

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every step of the check on a tiny Qwen3.5, in a folder with a space in its name; what it printed."""
    out, said = tmp_path_factory.mktemp("my runs"), io.StringIO()
    (out / "tests.json").write_text('{"said": "passed"}')  # of tests/test_cuda.py, which runs beside this
    with contextlib.redirect_stdout(said):
        assert check.main(["--tiny", "--out", str(out)]) == 0, said.getvalue()
    run, printed = Run(out / "run"), (out / "notebooks.log").read_text(encoding="utf-8")
    layers = read_layers(run)
    planned = layers[layers["quantizable"]]
    return SimpleNamespace(out=out, run=run, printed=printed, planned=planned)


def test_every_step_of_the_check_ran_and_is_skipped_the_second_time(finished, capsys):
    page = (finished.out / "gpu.md").read_text(encoding="utf-8")
    assert "| hybrid |" in page and "Zero dequantization overhead" in page and "passed" in page
    held = json.loads((finished.out / "notebooks.json").read_text())
    assert held["proof"] and held["stock"]["agrees"] and 0 < held["peak_ram_gb"] < 12.7
    rates = json.loads((finished.out / "speed.json").read_text())
    assert set(rates) == {"16-bit", "NF4", "hybrid"} and all(one["decode"][0] > 0 for one in rates.values())
    assert check.main(["--tiny", "--out", str(finished.out)]) == 0
    assert capsys.readouterr().out.count("done already") == len(check.STEPS)


def test_every_file_of_the_run_directory_is_there(finished):
    run = finished.run
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
    for path in finished.run.notebooks.glob("*.ipynb"):
        outputs = [o for c in nbformat.read(path, as_version=4).cells for o in c.get("outputs", [])]
        assert outputs and all(o.output_type != "error" for o in outputs)
        if path.stem[:2] in {"00", "02", "04"}:
            assert any("image/png" in o.get("data", {}) for o in outputs), path


def test_the_tables_and_the_plan_agree_and_the_summary_is_printed(finished, capsys):
    run, planned = finished.run, finished.planned
    assert set(planned["name"]) <= set(read_spectra(run))
    plan = ProtectionPlan.read(run.plan_json)
    assert len(plan.protected) == round(0.52 * len(planned)) and plan.rule == "claim"
    assert set(planned.nlargest(len(plan.protected), "alpha_hill")["name"]) == set(plan.protected)
    variants = json.loads(run.evaluation_json.read_text())["variants"]
    wanted = {"reference", "nf4", "plan", "other_direction", "fisher", "int8", "random_0"}
    assert wanted <= set(variants)
    assert variants["reference"]["kl_mean"] == pytest.approx(0, abs=1e-6)
    assert variants["plan"]["kl_mean"] > 0 and 0 < variants["int8"]["kl_mean"] < variants["nf4"]["kl_mean"]
    assert str(run.report) in finished.printed
    assert main(["summary", str(run.path)]) == 0
    assert (said := capsys.readouterr().out) in finished.printed and "The checkpoint is " in said


LOAD = """
import sys
from transformers import AutoModelForCausalLM
from bitsandbytes.nn import Linear4bit
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert not any(name.startswith("spi_utils") for name in sys.modules)
print(sum(isinstance(m, Linear4bit) for m in model.modules()), type(model.lm_head).__name__)
"""


def test_plain_transformers_loads_the_checkpoint(finished):
    command = [sys.executable, "-c", LOAD, str(finished.run.model_dir)]
    loaded = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    planned = len(finished.planned)
    assert loaded.stdout.split() == [str(planned - round(0.52 * planned)), "Linear"], loaded.stderr[-2000:]


def test_a_second_run_recognises_what_is_done(finished, capsys):
    run, parameters = finished.run, run_info(finished.run)
    before = {p: p.stat().st_mtime_ns for p in (run.layers_csv, run.plan_json, run.evaluation_json)}
    given = {"model": finished.out / "model", "run_dir": run.path, "texts": "pydoc", **check.SMALL}
    typed = [part for name, value in given.items() for part in ("-p", name, str(value))]
    assert main(["run", *typed]) == 0
    assert capsys.readouterr().out.count("already done") == len(STAGES)
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert run_info(run)["stages"] == parameters["stages"]
