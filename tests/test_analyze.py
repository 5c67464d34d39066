"""The layer table: complete, resumable, the same on every backend."""

import errno
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from safetensors.torch import load_file, save_file

from spi_utils import formats as number_formats
from spi_utils import runs, sensitivity
from spi_utils.analyze import analyze
from spi_utils.errors import AnalysisError, PlanError, RunError
from spi_utils.models import list_layers, open_weights, resolve
from spi_utils.runs import LAYER_KEYS, open_run, read_layers, read_spectra, run_info
from spi_utils.spectra import COLUMNS, analyze_matrix
from tests.tiny import make_tiny

ROOT = Path(__file__).parents[1]


def run_analysis(directory, model, **parameters) -> tuple:
    source = resolve(str(model))
    run = open_run(directory, source.identity())
    return run, analyze(run, source, device="cpu", **{"sensitivity": "none", "workers": 1, **parameters})


@pytest.fixture(scope="module")
def analysed(tiny, tmp_path_factory):
    return run_analysis(tmp_path_factory.mktemp("runs") / "llama", tiny("llama"))


def test_rows_columns_and_bytes(analysed, tiny):
    run, table = analysed
    tensors = load_file(tiny("llama") / "model.safetensors")
    assert table["numel"].sum() == sum(tensor.numel() for tensor in tensors.values())
    assert list(table["name"]) == [layer.name for layer in list_layers(resolve(str(tiny("llama"))))]
    assert (table["status"] == "listed").sum() == 2  # the embedding (tied to the head), and the rest
    sizes = ["bytes_16bit", "bytes_nf4", "bytes_nf4_dq", "bytes_int8", "bytes_int4_g64"]
    bytes_and_errors = [*sizes, "error_nf4", "error_int8", "error_int4_g64"]
    assert list(table) == [*LAYER_KEYS, *COLUMNS, "alphaq", "swan", *bytes_and_errors]
    planned, rest = table[table["quantizable"]], table[~table["quantizable"]]
    rows, cols = map(int, planned.iloc[0][["rows", "cols"]])
    assert planned.iloc[0]["bytes_nf4"] == number_formats.layer_bytes("nf4", rows, cols)
    assert (table["bytes_16bit"] == 2 * table["numel"]).all()
    assert (rest["bytes_nf4"] == rest["bytes_16bit"]).all()
    assert planned[["swan", "alpha_hill", "error_nf4"]].notna().all().all()
    assert (planned["alphaq"].notna() == (planned[["rows", "cols"]].min(axis=1) >= 128)).all()
    pd.testing.assert_frame_equal(read_layers(run), table)


def test_rows_hold_each_weights_own_numbers(analysed, tiny):
    run, table = analysed
    tensors = load_file(tiny("llama") / "model.safetensors")
    spectra = read_spectra(run)
    rows = table.set_index("name")
    assert set(spectra) == set(table["name"][table["status"] != "listed"])
    for name in list(spectra)[::5]:
        weight = tensors[f"{name}.weight"]
        expected = scipy.linalg.svdvals(weight.double().numpy())
        np.testing.assert_allclose(spectra[name], expected, rtol=1e-9, atol=1e-9 * expected[0])
        assert rows.loc[name, "stable_rank"] == pytest.approx((expected**2).sum() / expected[0] ** 2)
        assert rows.loc[name, "error_nf4"] == number_formats.relative_error(weight, "nf4")
        assert rows.loc[name, "status"] == analyze_matrix(weight).status


def test_a_second_run_reads_and_force_repeats(analysed, tiny, monkeypatch):
    run, table = analysed
    before = run.layers_csv.stat().st_mtime_ns
    again = run_analysis(run.path, tiny("llama"))[1]
    pd.testing.assert_frame_equal(again, table)
    assert run.layers_csv.stat().st_mtime_ns == before
    assert not run.partial.exists()
    stages = run_info(run)["stages"]
    assert stages["analyze"]["layers"] == len(table) and stages["spectra"]["seconds"] >= 0


def test_conv1d_is_shown_as_a_linear_layer(tiny, tmp_path):
    """GPT-2 keeps (in, out): rows are outputs here, and quantization blocks run along inputs."""
    _, table = run_analysis(tmp_path / "gpt2", tiny("gpt2"))
    row = table[table["name"].str.endswith("h.0.attn.c_attn")].iloc[0]
    weight = load_file(tiny("gpt2") / "model.safetensors")[f"{row['name']}.weight"]
    assert tuple(weight.shape) == (row["cols"], row["rows"]) == (128, 384)
    assert row["error_nf4"] == number_formats.relative_error(weight.T.contiguous(), "nf4")


def test_stacked_experts_become_a_row_each(tiny, tmp_path):
    run, table = run_analysis(tmp_path / "moe", tiny("mixtral"))
    source = resolve(str(tiny("mixtral")))
    experts = table[table["role"] == "experts"]
    stacks = [layer for layer in list_layers(source) if layer.role == "experts"]
    assert len(experts) == 4 * len(stacks) and not experts["quantizable"].any()
    assert table["numel"].sum() == sum(layer.numel for layer in list_layers(source))
    with open_weights(source) as weights:
        stack = weights.read(stacks[0].name)
    third = scipy.linalg.svdvals(stack[3].double().numpy())
    np.testing.assert_allclose(read_spectra(run)[f"{stacks[0].name}[3]"], third, rtol=1e-8)
    assert experts["numel"].iloc[0] == stack[0].numel()
    assert experts["alpha_hill"].notna().all() and experts["error_nf4"].isna().all()


def test_layers_is_a_regular_expression_and_embeddings_are_on_request(tiny, tmp_path):
    _, table = run_analysis(tmp_path / "a", tiny("llama"), layers=r"\.0\.mlp|embed", include_embeddings=True)
    done = table[table["status"] != "listed"]
    assert list(done["type"]) == ["embed_tokens", "gate_proj", "up_proj", "down_proj"]
    assert len(table) == len(list_layers(resolve(str(tiny("llama")))))


# --- the same everywhere ---------------------------------------------------------------------------------


def test_workers_change_no_bit(analysed, tiny, tmp_path):
    run, _ = analysed
    other, _ = run_analysis(tmp_path / "run", tiny("llama"), workers=2)
    assert other.layers_csv.read_bytes() == run.layers_csv.read_bytes()
    assert other.spectra.read_bytes() == run.spectra.read_bytes()


@pytest.mark.slow
def test_a_killed_run_continues_where_it_stood(analysed, tiny, tmp_path):
    run, _ = analysed
    script = f"""
        import time
        from spi_utils import analyze
        from spi_utils.models import resolve
        from spi_utils.runs import open_run
        work = analyze.analyze_weight
        def slow(*job):
            time.sleep(0.3)
            return work(*job)
        analyze.analyze_weight = slow
        source = resolve({str(tiny("llama"))!r})
        run = open_run({str(tmp_path / "killed")!r}, source.identity())
        analyze.analyze(run, source, device="cpu", sensitivity="none", workers=1)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT)
    pieces = tmp_path / "killed" / "partial" / "spectra"
    deadline = time.monotonic() + 60
    while len(list(pieces.glob("[0-9]*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in pieces.glob("[0-9]*.safetensors")}
    assert 3 <= len(finished) < 28
    resumed, _ = run_analysis(tmp_path / "killed", tiny("llama"))
    assert run_info(resumed)["stages"]["spectra"]["resumed_layers"] == len(finished)
    assert resumed.layers_csv.read_bytes() == run.layers_csv.read_bytes()
    assert resumed.spectra.read_bytes() == run.spectra.read_bytes()


def test_another_seed_starts_over(analysed, tiny, tmp_path):
    run, table = analysed
    shutil.copytree(run.path, tmp_path / "run")
    _, other = run_analysis(tmp_path / "run", tiny("llama"), seed=1)
    assert (other["alpha_excess"].dropna() != table["alpha_excess"].dropna()).all()
    pd.testing.assert_series_equal(other["alpha_hill"], table["alpha_hill"])


# --- bad input -------------------------------------------------------------------------------------------


@pytest.fixture()
def broken(tiny, tmp_path):
    """A copy of the tiny model whose tensors a test may spoil."""

    def make(**changes):
        directory = tmp_path / "model"
        shutil.copytree(tiny("llama"), directory)
        file = directory / "model.safetensors"
        tensors = load_file(file)
        for name, change in changes.items():
            key = f"model.layers.1.{name.replace('__', '.')}.weight"
            tensors[key] = change(tensors[key].clone())
        save_file(tensors, file, metadata={"format": "pt"})
        return directory

    return make


def spoiled(weight: torch.Tensor) -> torch.Tensor:
    weight[3, 5] = float("nan")
    return weight


def test_bad_weights_fail_alone_and_are_named(broken, tmp_path, capsys):
    model = broken(mlp__up_proj=spoiled, mlp__down_proj=torch.zeros_like, self_attn__q_proj=torch.ones_like)
    run, table = run_analysis(tmp_path / "run", model, sensitivity="self")
    assert "model.layers.1.mlp.up_proj holds NaN or Inf" in capsys.readouterr().out
    failed = table[table["status"] == "failed"]
    assert sorted(failed["type"]) == ["down_proj", "q_proj", "up_proj"]
    assert failed["alpha_hill"].isna().all() and failed["bytes_nf4"].notna().all()
    rows = table.set_index("name")
    assert np.isnan(rows.loc["model.layers.1.mlp.up_proj", "error_nf4"])
    assert rows.loc["model.layers.1.self_attn.q_proj", "stable_rank"] == pytest.approx(1)
    assert "model.layers.1.mlp.up_proj" not in read_spectra(run)
    others = table[table["quantizable"] & (table["status"] != "failed")]
    assert len(others) == 25 and others["alpha_hill"].notna().all()


@pytest.mark.parametrize(
    ("parameters", "error", "said"),
    [
        ({"layers": "nothing_like_it"}, AnalysisError, "nothing_like_it"),
        ({"layers": "("}, AnalysisError, "regular expression"),
        ({"formats": ("nf3",)}, PlanError, "nf4"),
    ],
)
def test_bad_settings(parameters, error, said, tiny, tmp_path):
    with pytest.raises(error, match=said):
        run_analysis(tmp_path / "run", tiny("llama"), **parameters)


# --- memory ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_memory_is_that_of_one_layer_whatever_their_number(tmp_path):
    """Peak resident memory over the process before, at most 3 × the largest layer's float64 working set."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "head_dim": 128}
    model = make_tiny("llama", tmp_path / "model", num_hidden_layers=3, **sizes)
    script = f"""
        from spi_utils.analyze import analyze
        from spi_utils.models import resolve, list_layers
        from spi_utils.runs import open_run, peak_rss_bytes
        source = resolve({str(model)!r})
        run = open_run({str(tmp_path / "run")!r}, source.identity())
        settings = dict(device="cpu", sensitivity="none", workers=1)
        analyze(run, source, layers="layers.0.self_attn.k_proj", **settings)  # what imports and caches take
        before = peak_rss_bytes()
        analyze(run, source, layers="mlp", **settings)
        print(peak_rss_bytes() - before)
    """
    # glibc gives freed arrays back at once, so that what is held is measured, not what malloc keeps for later
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    working_set = 8 * (4096 * 1024 + 1024 * 1024)  # the weight and its Gram matrix
    assert int(result.stdout.split()[-1]) <= 3 * working_set


# --- what an analysis leaves -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama", num_hidden_layers=1)


def costed(path, model):
    settings = {"sensitivity": "random", "windows": 2, "length": 16, "text": "pydoc", "formats": ("nf4",)}
    return run_analysis(path, model, **settings)[0]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, small):
    return costed(tmp_path_factory.mktemp("whole") / "run", small)


def edit_table(old, new):
    return lambda run: run.layers_csv.write_text(run.layers_csv.read_text().replace(old, new, 1))


def spoil(end):
    return lambda run: run.spectra.write_bytes(run.spectra.read_bytes()[:-8] + end)


@pytest.mark.parametrize(
    "damage",
    [edit_table(",128,", ",wide,"), edit_table(",128,", ",129,"), spoil(b""), spoil(b"12345678")],
)
def test_a_changed_analysis_is_refused_and_made_again_without_force(whole, small, tmp_path, damage):
    run = runs.Run(shutil.copytree(whole.path, tmp_path / "run"))
    damage(run)
    with pytest.raises(RunError, match="Run notebook 01_analyze again"):
        read_layers(run)
        read_spectra(run)
    costed(run.path, small)
    assert run.layers_csv.read_bytes() == whole.layers_csv.read_bytes()
    assert run.spectra.read_bytes() == whole.spectra.read_bytes()


def test_columns_of_an_older_formula_are_made_again(whole, small, tmp_path, monkeypatch):
    shutil.copytree(whole.path, tmp_path / "run")
    monkeypatch.setattr(sensitivity, "ENGINE", sensitivity.ENGINE + 1)
    before, after = (run_info(run)["stages"] for run in (whole, costed(tmp_path / "run", small)))
    assert after["analyze"]["fingerprint"] != before["analyze"]["fingerprint"]
    assert after["spectra"] == before["spectra"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fills_during_an_analysis_loses_nothing(whole, small, tmp_path, monkeypatch, call):
    real, left = getattr(os, call), iter(range(6))

    def until_full(*given, **named):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*given, **named)

    with monkeypatch.context() as patch, pytest.raises(RunError, match="Free some space"):
        patch.setattr(os, call, until_full)
        costed(tmp_path / "run", small)
    run = costed(tmp_path / "run", small)
    assert run_info(run)["stages"]["spectra"]["resumed_layers"] > 0
    assert run.layers_csv.read_bytes() == whole.layers_csv.read_bytes()


def test_damaged_pieces_of_unfinished_work_are_made_again(whole, small, tmp_path, monkeypatch, capsys):
    path, describe = tmp_path / "run", runs.describe_files

    def killed_before(output):
        def kill(run, outputs):
            if output in outputs:
                raise KeyboardInterrupt
            return describe(run, outputs)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(runs, "describe_files", kill)
            costed(path, small)

    killed_before("spectra.safetensors")
    piece = sorted((path / "partial" / "spectra").glob("0*.safetensors"))[1]
    piece.write_bytes(piece.read_bytes()[:40])
    killed_before("layers.csv")
    for piece in (path / "partial" / "analyze" / "sensitivity").iterdir():
        if piece.suffix:
            piece.write_bytes(piece.read_bytes()[:40])
    run = costed(path, small)
    assert "damaged" in capsys.readouterr().out
    assert run.layers_csv.read_bytes() == whole.layers_csv.read_bytes()
    assert run.spectra.read_bytes() == whole.spectra.read_bytes()
