"""A guided checkpoint: the file holds the codes that were chosen; stock libraries read them as planned."""

import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from spi_utils.analyze import analyze
from spi_utils.checkpoint import BACKENDS, saved_weights
from spi_utils.errors import CheckpointError
from spi_utils.formats import dequantize
from spi_utils.plan import decide, read_plan
from spi_utils.quantize import quantize
from spi_utils.rounding import Codes
from spi_utils.runs import run_info
from spi_utils.workspace import begin_run
from tests.tiny import make_tiny

SMALL = {"device": "cpu", "windows": 6, "length": 24, "text": "pydoc", "formats": ("nf4", "int4_g64", "int8")}
FAMILIES = ["llama", "gemma3", "qwen3_5", "gpt2", "phi3"]


def analysed(arch, folder, **options):
    run, source = begin_run(
        str(folder / "run"), str(make_tiny(arch, folder / "model", initializer_range=0.1))
    )
    analyze(run, source, **SMALL | options)
    return run, source


def values_in_stock(run):
    model = AutoModelForCausalLM.from_pretrained(run.model_dir)
    return dict(model.dequantize().named_parameters())


@pytest.mark.parametrize("arch", FAMILIES)
def test_stock_bitsandbytes_reads_the_codes_that_were_chosen(arch, tmp_path):
    run, source = analysed(arch, tmp_path)
    plan = decide(run)
    assert plan.rounding == "guided" == read_plan(run).rounding
    quantize(run, source, plan, device="cpu")
    codes, held = Codes(run.rounded), values_in_stock(run)
    planned = [name for name, fmt in plan.formats.items() if fmt == "nf4"]
    assert planned
    for name in planned:
        meant = dequantize(codes[name, "nf4"], codes[name, "nf4"].dtype)
        found = held[f"{name}.weight"]
        assert torch.equal(found if found.shape == meant.shape else found.T, meant), name
    proof = run_info(run)["stages"]["quantize"]
    assert proof["proof"]["finite"] and proof["fresh_process"]["max_logit_difference"] < 0.05


def test_compressed_tensors_reads_the_codes_that_were_chosen(tmp_path):
    run, source = analysed("llama", tmp_path)
    plan = decide(run, backend="compressed-tensors")
    quantize(run, source, plan, device="cpu", backend="compressed-tensors")
    codes = Codes(run.rounded)
    saved = saved_weights(run.model_dir)
    for name, fmt in plan.formats.items():
        if fmt == "int4_g64":
            assert torch.equal(saved.read(name), dequantize(codes[name, fmt]))


def test_in_another_dtype_and_with_double_quantization_the_codes_stay(tmp_path):
    run, source = analysed("llama", tmp_path)
    plan = replace(decide(run), double_quant=True)
    other = "float16" if source.storage_dtype == "bfloat16" else "bfloat16"
    quantize(run, source, decide(run, double_quant=True, force=True), device="cpu", storage_dtype=other)
    codes = Codes(run.rounded)
    saved = saved_weights(run.model_dir)
    for name, fmt in plan.formats.items():
        if fmt == "nf4":
            assert torch.equal(saved.packed(name).codes, codes[name, fmt].codes)
            near = saved.read(name) - dequantize(codes[name, fmt])
            assert near.norm() < 0.02 * dequantize(codes[name, fmt]).norm()


def test_without_codes_notebook_03_makes_them_and_says_so(tmp_path, capsys):
    run, source = analysed("llama", tmp_path)
    plan = decide(run)
    quantize(run, source, plan, device="cpu")
    first = (run.model_dir / "model.safetensors").read_bytes()
    shutil.rmtree(run.rounded)
    capsys.readouterr()
    quantize(run, source, plan, device="cpu", force=True)
    assert "no guided codes in nf4" in capsys.readouterr().out
    assert len((run.model_dir / "model.safetensors").read_bytes()) == len(first)
    assert {name for name, _ in Codes(run.rounded)} >= {n for n, f in plan.formats.items() if f == "nf4"}


def test_nearest_leaves_no_codes_and_writes_the_librarys_own(tmp_path):
    run, source = analysed("llama", tmp_path, rounding="nearest")
    plan = decide(run)
    assert plan.rounding == "nearest" and not run.rounded.exists()
    quantize(run, source, plan, device="cpu")
    assert run_info(run)["stages"]["quantize"]["proof"]["finite"]


@pytest.mark.parametrize("rounding", ["guided", "nearest"])
def test_a_file_with_other_codes_than_were_chosen_is_refused(rounding, tmp_path, monkeypatch):
    run, source = analysed("llama", tmp_path, rounding=rounding)
    plan = decide(run)
    own = BACKENDS["bitsandbytes"]

    def flipped(packed):
        parts = own.parts(packed)
        parts["weight"] = parts["weight"] ^ 1
        return parts

    monkeypatch.setitem(BACKENDS, "bitsandbytes", replace(own, parts=flipped))
    with pytest.raises(CheckpointError, match="bitsandbytes reads nf4 as other values than were meant"):
        quantize(run, source, plan, device="cpu")
