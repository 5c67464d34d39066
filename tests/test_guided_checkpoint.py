"""A guided checkpoint: the file holds the codes that were chosen; stock libraries read them as planned."""

import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from spi_utils.analyze import analyze
from spi_utils.checkpoint import BACKENDS, read_saved
from spi_utils.errors import CheckpointError
from spi_utils.formats import dequantize
from spi_utils.plan import decide, read_plan
from spi_utils.quantize import quantize
from spi_utils.rounding import Codes
from spi_utils.runs import Run, run_info
from spi_utils.workspace import begin_run
from tests.test_quantize import here  # noqa: F401
from tests.tiny import make_tiny

SMALL = {"device": "cpu", "windows": 6, "length": 24, "text": "pydoc", "formats": ("nf4", "int4_g64", "int8")}


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """Runs after notebook 01 by architecture; each is made once, tests get copies."""

    @cache
    def make(arch):
        place = tmp_path_factory.mktemp(arch)
        model = make_tiny(arch, place / "model", initializer_range=0.1)
        run, source = begin_run(str(place / "run"), str(model))
        analyze(run, source, **SMALL)
        return run, source

    return lambda arch, folder: (Run(shutil.copytree(make(arch)[0].path, folder / "run")), make(arch)[1])


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_stock_bitsandbytes_reads_the_codes_that_were_chosen(arch, analysed, tmp_path, monkeypatch):
    run, source = analysed(arch, tmp_path)
    plan = decide(run)
    assert plan.rounding == "guided" == read_plan(run).rounding
    quantize(run, source, plan, device="cpu")
    codes = Codes(run.rounded)
    held = dict(AutoModelForCausalLM.from_pretrained(run.model_dir).dequantize().named_parameters())
    planned = [name for name, fmt in plan.formats.items() if fmt == "nf4"]
    assert planned
    for name in planned:
        meant, found = dequantize(codes[name, "nf4"], codes[name, "nf4"].dtype), held[f"{name}.weight"]
        assert torch.equal(found, meant), name
    assert run_info(run)["stages"]["quantize"]["fresh_process"]["max_logit_difference"] < 0.05
    parts_of, *others = BACKENDS["bitsandbytes"]

    def flipped(packed):
        parts = parts_of(packed)
        return parts | {"weight": parts["weight"] ^ 1}

    monkeypatch.setitem(BACKENDS, "bitsandbytes", (flipped, *others))
    with pytest.raises(CheckpointError, match="bitsandbytes reads nf4 as other values than were meant"):
        quantize(run, source, plan, device="cpu", force=True)


def test_compressed_tensors_reads_the_codes_that_were_chosen_or_made_now(analysed, tmp_path, capsys):
    run, source = analysed("llama", tmp_path)
    plan = decide(run, backend="compressed-tensors")
    shutil.rmtree(run.rounded)
    quantize(run, source, plan, device="cpu", backend="compressed-tensors")
    assert "no guided codes in int4_g64" in capsys.readouterr().out
    codes, model = Codes(run.rounded), AutoModelForCausalLM.from_pretrained(source.directory)
    read = {name: value for name, fmt, value in read_saved(run.model_dir, model) if fmt == "int4_g64"}
    assert read
    for name, value in read.items():
        assert torch.equal(value, dequantize(codes[name.removesuffix(".weight"), "int4_g64"], value.dtype))


def test_in_another_dtype_and_with_double_quantization_the_codes_stay(analysed, tmp_path):
    run, source = analysed("llama", tmp_path)
    plan = decide(run, double_quant=True, force=True)
    quantize(run, source, plan, device="cpu", storage_dtype="bfloat16")
    codes, model = Codes(run.rounded), AutoModelForCausalLM.from_pretrained(source.directory)
    tensors = load_file(run.model_dir / "model.safetensors")
    for name, fmt, value in read_saved(run.model_dir, model):
        if fmt == "nf4":
            meant = codes[name.removesuffix(".weight"), "nf4"]
            assert torch.equal(tensors[name], meant.codes)
            assert (value.float() - dequantize(meant)).norm() < 0.02 * dequantize(meant).norm()
