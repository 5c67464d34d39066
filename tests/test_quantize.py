"""The hybrid checkpoint, judged by stock transformers, by bitsandbytes, and by its own bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pandas as pd
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from benchmarks.quantize import synthetic
from spi_utils import fresh_check
from spi_utils import quantize as q
from spi_utils.checkpoint import read_part, read_saved, saved_files
from spi_utils.errors import CheckpointError, ModelError, PlanError, RunError
from spi_utils.models import list_layers, open_weights, resolve
from spi_utils.plan import make_plan
from spi_utils.runs import open_run, run_info
from tests.tiny import make_tiny

ARCHS = ["llama", "llama_untied", "qwen3_5", "qwen3_5_multimodal", "gemma3", "phi3", "gpt2", "mixtral"]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """The fresh process' check, run in this one: a process costs seconds. Gives back the real `ask`."""
    folder, real = tmp_path_factory.mktemp("ask"), q.ask

    def ask(request):
        (folder / "request.json").write_text(json.dumps(request))
        fresh_check.main(str(folder / "request.json"), str(folder / "answer.json"))
        return json.loads((folder / "answer.json").read_text()) | {"spi_utils": False}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q, "ask", ask)
        yield real


def table(source):
    return pd.DataFrame([dataclasses.asdict(layer) for layer in list_layers(source)]).assign(status="ok")


def plan_for(source, *, keep=0.5, **options):
    layers = table(source)
    count = round(keep * int(layers["quantizable"].sum()))
    return make_plan(layers, score="random", rule="top_k", value=count, model=source.identity(), **options)


def prepare(directory, tmp_path, **options):
    source = resolve(str(directory))
    return open_run(tmp_path / "run", source.identity()), source, plan_for(source, **options)


def quantized(directory, tmp_path, *, keep=0.5, **options):
    run, source, plan = prepare(directory, tmp_path, keep=keep)
    return q.quantize(run, source, plan, device="cpu", **options), run


@pytest.fixture(scope="module")
def llama(tiny, tmp_path_factory):
    """A checkpoint that many tests look at and none changes: half of the layers in NF4."""
    return quantized(tiny("llama"), tmp_path_factory.mktemp("llama"))


@pytest.fixture
def copied(llama, tmp_path):
    return Path(shutil.copytree(llama[0], tmp_path / "copied"))


def record(run):
    return run_info(run)["stages"]["quantize"]


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("arch", ARCHS)
def test_stock_transformers_find_exactly_the_plan_and_the_sources_bits(tiny, tmp_path, arch):
    run, source, plan = prepare(tiny(arch), tmp_path, double_quant=arch in ("phi3", "gpt2"))
    folder = q.quantize(run, source, plan, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(folder)
    state, planned = model.state_dict(), {name for name, fmt in plan.formats.items() if fmt == "nf4"}
    assert planned == {name for name, m in model.named_modules() if isinstance(m, bnb.nn.Linear4bit)} != set()
    kinds = {type(m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in planned}
    assert kinds == {nn.Linear}
    saved = {name: value for name, _, value in read_saved(folder, model)}
    with open_weights(source) as weights:
        for name in weights.names:
            own, module = weights.read(name), name.removesuffix(".weight")
            if module not in planned:
                assert torch.equal(state[name], own) and torch.equal(saved[name], own), name
                continue
            conv1d = isinstance(weights.model.get_submodule(module), Conv1D)
            options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": plan.double_quant}
            codes, held = bnb.functional.quantize_4bit((own.T if conv1d else own).contiguous(), **options)
            weight = model.get_submodule(module).weight
            assert torch.equal(weight.data, codes)
            ours, theirs = (one.as_dict(packed=True) for one in (weight.quant_state, held))
            assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
            values = bnb.functional.dequantize_4bit(codes, held)
            assert torch.equal(saved[name], values.T if conv1d else values)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert abs(size - plan.bytes["total"]) <= max(0.005 * plan.bytes["total"], 64_000)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    wanted = {"quant_type": "nf4", "compute_dtype": "float16", "quant_storage": "uint8"}
    assert {key: config[f"bnb_4bit_{key}"] for key in wanted} == wanted and config["load_in_4bit"] is True
    skipped = set(config["llm_int8_skip_modules"])
    assert {*plan.protected, "lm_head"} <= skipped and not skipped & planned
    names = {path.name for path in folder.iterdir()}
    assert {"plan.json", "generate.py", "tokenizer.json", "tokenizer_config.json"} <= names
    if arch == "mixtral":  # as published: an expert a tensor
        name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
        ours, theirs = (load_file(place / "model.safetensors")[name] for place in (folder, source.directory))
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_a_real_fresh_process_never_sees_this_package(tiny, tmp_path, here, monkeypatch):
    monkeypatch.setattr(q, "ask", here)
    found = record(quantized(tiny("qwen3_5"), tmp_path)[1])["fresh_process"]
    assert found["spi_utils"] is False and found["loaded"] is True
    assert found["max_logit_difference"] <= 0.01 * found["logit_spread"] > 0


@pytest.mark.slow
def test_the_folders_own_script_answers_on_windows_too(llama):
    code = """
        import runpy, sys
        import psutil, torch, transformers  # psutil itself needs the module, but not on Windows
        sys.modules["resource"] = None  # as where Python has no such module
        sys.argv = ["generate.py", "Why", "is", "the", "sky", "blue?"]
        runpy.run_path("generate.py", run_name="__main__")
        print("spi_utils" in sys.modules)
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=llama[0], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    *_, said, imported = done.stdout.decode(errors="replace").rstrip().splitlines()
    found = re.fullmatch(r"(\d+) tokens, ([\d.]+) tokens/s, peak memory ([\d.]+) GB on (cpu|cuda:0)", said)
    assert found and 1 <= int(found[1]) <= 200 and float(found[2]) > 0 and imported == "False"
    assert len((llama[0] / "generate.py").read_text().splitlines()) <= 50


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_the_model_travels_along_when_trusted(tmp_path):
    directory = make_tiny("llama", tmp_path / "m")
    (directory / "modeling_own.py").write_text(OWN_CODE)
    config = json.loads((directory / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": classes}
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="trust_remote_code"):
        resolve(str(directory))
    source = resolve(str(directory), trust_remote_code=True)
    run = open_run(tmp_path / "run", source.identity())
    folder = q.quantize(run, source, plan_for(source), device="cpu")
    assert (folder / "modeling_own.py").read_text() == OWN_CODE
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())


def test_what_could_not_be_checked_is_said(tiny, tmp_path, monkeypatch):
    directory = make_tiny("llama", tmp_path / "m", intermediate_size=200)  # 200 is no multiple of 64
    found = record(quantized(directory, tmp_path / "odd", keep=0)[1])
    (note,) = found["fresh_process"]["notes"]
    assert "AVX512-BF16" in note and "mlp" in note and found["proof"] is None
    monkeypatch.setattr(q, "fits_in_memory", lambda *_: False)
    run = quantized(tiny("llama"), tmp_path)[1]
    found = record(run)["fresh_process"]
    assert (
        found["loaded"] is False and "max_logit_difference" not in found and "too large" in found["notes"][0]
    )
    assert "NOT proven by use" in q.proof_of(run)


# --- shards, resume, replacement -------------------------------------------------------------------------


def test_shards_have_an_index_and_the_same_tensors(tiny, tmp_path, llama):
    folder, _ = quantized(tiny("llama"), tmp_path, max_shard_size="300KB")
    whole = load_file(llama[0] / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    assert len(shards) > 2 and shards.keys() == set(index["weight_map"].values())
    assert index["weight_map"] == {name: file for file in sorted(shards) for name in shards[file]}
    merged = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    assert merged.keys() == whole.keys() and all(torch.equal(merged[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


@pytest.mark.slow
def test_a_killed_run_resumes_at_the_missing_shard(tiny, tmp_path, monkeypatch):
    code = f"""
        import os, signal, sys
        sys.path[:0] = [{str(Path(__file__).parent.parent)!r}]
        from pathlib import Path
        from tests.test_quantize import prepare, q
        write = q.runs.write_tensors
        def kill_at_the_third(path, *rest, **more):
            if "00003-of" in path.name:
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, *rest, **more)
        q.runs.write_tensors = kill_at_the_third
        run, source, plan = prepare({str(tiny("llama"))!r}, Path({str(tmp_path)!r}))
        q.quantize(run, source, plan, device="cpu", max_shard_size="200KB")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    written, write = [], q.write_shard
    monkeypatch.setattr(q, "write_shard", lambda path, *rest: written.append(path.name) or write(path, *rest))
    assert not (tmp_path / "run" / "model").exists()
    folder, run = quantized(tiny("llama"), tmp_path, max_shard_size="200KB")
    assert sorted(written) == sorted(path.name for path in folder.glob("*.safetensors"))[2:]
    assert not [path for path in folder.iterdir() if path.name.startswith(".")] and not run.partial.exists()


def test_killed_after_the_checks_only_the_rename_is_left(tiny, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(q.shutil, "rmtree", killed)  # the first thing after the checks
        with pytest.raises(KeyboardInterrupt):
            quantized(tiny("llama"), tmp_path)
    monkeypatch.setattr(q, "make_checkpoint", lambda *_: pytest.fail("made again"))
    folder, run = quantized(tiny("llama"), tmp_path)
    assert (folder / "model.safetensors").exists() and record(run)["bits"]["nf4"]


def test_the_same_is_recognised_and_another_plan_replaces_it(tiny, tmp_path, monkeypatch):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    first = (q.quantize(run, source, plan, device="cpu") / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(q, "make_checkpoint", lambda *_: pytest.fail("made again"))
        q.quantize(run, source, plan, device="cpu")
    assert (
        q.quantize(run, source, plan, device="cpu", force=True) / "model.safetensors"
    ).read_bytes() == first
    for keep in (0.0, 1.0):
        folder = q.quantize(run, source, plan_for(source, keep=keep), device="cpu")
        assert (folder / "model.safetensors").read_bytes() != first and not (run.path / ".model-old").exists()
        assert ("quantization_config" in json.loads((folder / "config.json").read_text())) == (keep == 0)


@pytest.mark.slow
def test_a_checkpoint_needs_a_shard_its_largest_tensor_and_little_more():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(synthetic, 1.6, vocabulary=32_000, shard="100MB").result()
    assert found["source_gb"] > 1.5 and found["peak_rss_above_gb"] < 0.7 + found["largest_tensor_gb"]
    assert found["saved_gb"] == pytest.approx(found["planned_gb"], rel=0.005)


# --- casts -----------------------------------------------------------------------------------------------


@pytest.fixture
def wide(tmp_path):
    """A bfloat16 model with values that float16 can't hold."""

    def change(tensors):
        weight = tensors[f"{UP}.weight"]
        weight[0, 0], weight[0, 1], weight[3, :5] = 1e5, -7e4, 1e-12

    return edit(make_tiny("llama", tmp_path / "bf16", dtype="bfloat16"), change)


def test_bfloat16_stays_bfloat16_by_default(wide, tmp_path):
    folder, run = quantized(wide, tmp_path, keep=1.0)
    ours, original = (load_file(place / "model.safetensors")[f"{UP}.weight"] for place in (folder, wide))
    assert torch.equal(ours, original) and record(run)["casts"] == []


def test_what_float16_cannot_hold_keeps_the_checkpoint_in_bfloat16_or_is_refused(wide, tmp_path, capsys):
    folder, run = quantized(wide, tmp_path, storage_dtype="float16")
    casts = {cast["name"]: cast for cast in record(run)["casts"]}
    lost = {"overflow": 2, "underflow": 5, "largest": 99840.0}
    assert casts[f"{UP}.weight"] == {"name": f"{UP}.weight", **lost}
    config = json.loads((folder / "config.json").read_text())
    assert record(run)["saved_as"] == config["dtype"] == "bfloat16"
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert "written again in bfloat16" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=rf"{UP}.weight: 2 values"):
        quantized(wide, tmp_path / "refused", storage_dtype="float16", overflow="error")
    assert not (tmp_path / "refused" / "run" / "model").exists()


def test_a_cast_to_float16_that_holds_everything(tmp_path):
    directory = make_tiny("llama", tmp_path / "bf16", dtype="bfloat16")
    folder, run = quantized(directory, tmp_path, keep=1.0, storage_dtype="float16")
    saved, own = (load_file(place / "model.safetensors") for place in (folder, directory))
    assert record(run)["saved_as"] == "float16" and all(torch.equal(saved[n], own[n].half()) for n in own)
    lost = {name: int(((t.half() == 0) & (t != 0)).sum()) for name, t in own.items()}
    assert {c["name"]: c["underflow"] for c in record(run)["casts"]} == {n: c for n, c in lost.items() if c}


@pytest.mark.parametrize("odd", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", ["protected", "norm"])
@pytest.mark.parametrize("quantizes", [True, False])
def test_stock_loaders_cannot_run_one_tensor_in_another_dtype(tiny, llama, tmp_path, odd, target, quantizes):
    """Why one tensor that float16 can't hold moves the whole checkpoint to bfloat16: nothing less works.

    With NF4 layers in it a checkpoint's dtypes are kept, and the float16 product meets another dtype; without
    any, the value is cast to float16 as it is loaded, and becomes infinite.
    """
    kept = json.loads((llama[0] / "plan.json").read_text())["protected"]
    name = f"{kept[0]}.weight" if target == "protected" else "model.layers.1.input_layernorm.weight"
    folder = Path(shutil.copytree(llama[0] if quantizes else tiny("llama"), tmp_path / "m"))

    def change(tensors):
        tensors[name] = tensors[name].to(odd)
        tensors[name].view(-1)[0] = 1e5

    model = AutoModelForCausalLM.from_pretrained(edit(folder, change))
    weight = model.get_parameter(name)
    if quantizes:
        assert weight.dtype == odd
        with pytest.raises(RuntimeError, match="same dtype"):
            model(torch.arange(8)[None])
    else:
        assert weight.dtype == torch.float16 and weight.view(-1)[0].isinf()


# --- refusals --------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tiny, tmp_path):
    run, source, plan = prepare(tiny("llama"), tmp_path)

    def refuse(error, match, *, plan=plan, **options):
        with pytest.raises(error, match=match):
            q.quantize(run, source, plan, **{"device": "cpu", **options})
        assert not (run.model_dir / "model.safetensors").exists()

    refuse.run, refuse.plan = run, plan
    return refuse


@pytest.mark.parametrize(
    ("formats", "model", "match"),
    [
        ({UP: "int8"}, {}, f"int8.*{UP}"),
        ({"model.layers.9.mlp.up_proj": "nf4"}, {}, r"model\.layers\.9"),
        ({"model.embed_tokens": "nf4"}, {}, "embed_tokens"),
        ({}, {"id": "someone/else", "sha256": "0" * 64}, "someone/else"),
    ],
)
def test_plans_that_do_not_fit_the_model_are_refused(refused, formats, model, match):
    plan = refused.plan
    changes = {"formats": {**plan.formats, **formats}, "model": {**plan.model, **model}}
    refused(PlanError, match, plan=dataclasses.replace(plan, **changes))
    assert not refused.run.partial.exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"overflow": "ignore"}, "ignore.*keep_bf16"),
        ({"storage_dtype": "float8"}, "float8"),
        ({"compute_dtype": "int4"}, "int4"),
        ({"backend": "gguf"}, "gguf.*bitsandbytes"),
    ],
)
def test_wrong_parameters(refused, options, match):
    refused(CheckpointError, match, **options)


def test_no_package_disk_memory_or_device(refused, monkeypatch, tmp_path):
    broken = tmp_path / "broken" / "bitsandbytes"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('CUDA Setup failed')")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(broken.parent)
        patch.delitem(sys.modules, "bitsandbytes")
        refused(CheckpointError, r"CUDA Setup failed.*pip install bitsandbytes")
    with monkeypatch.context() as patch:
        patch.setattr(q.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
        refused(CheckpointError, "of disk are needed, 0.00 GB are free")
    with monkeypatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000_000))
        refused(CheckpointError, "of memory are needed, 0.10 GB are free")
    if not torch.cuda.is_available():
        refused(ModelError, "no CUDA", device="cuda:0")

    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    refused(RunError, r"model\.safetensors: No space left on device.*Free some space")


def test_foreign_files_in_the_target_are_left_alone_and_its_own_output_is_no_source(refused, llama):
    folder = refused.run.model_dir
    folder.mkdir()
    (folder / "thesis.txt").write_text("irreplaceable")
    refused(CheckpointError, "did not write")
    (folder / "plan.json").write_text(json.dumps({"model": {"id": "a/b", "sha256": "1" * 64}}))
    refused(CheckpointError, "a/b")
    assert (folder / "thesis.txt").read_text() == "irreplaceable"
    with pytest.raises(ModelError, match="already quantized"):
        resolve(str(llama[0]))


# --- the checks themselves must be able to fail ----------------------------------------------------------


def flip(name):
    return lambda tensors: tensors[name].view(torch.uint8).view(-1)[-1:].bitwise_xor_(1)


def transposed_absmax(tensors):
    """What a CPU with AVX512-BF16 makes of a matrix in its first forward, were it saved after that."""
    name = next(name for name in tensors if name.endswith("up_proj.weight.absmax"))
    tensors[name] = tensors[name].view(256, 128 // 64).T.reshape(-1).contiguous()


@pytest.mark.parametrize(
    "change",
    [
        None,
        flip("model.embed_tokens.weight"),
        flip("model.norm.weight"),
        transposed_absmax,
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].view(torch.int16)}),
        lambda tensors: tensors.pop("model.norm.weight"),
        lambda tensors: tensors.update(more=torch.zeros(2)),
    ],
)
def test_tensors_that_are_other_too_few_or_too_many_are_found(llama, copied, change):
    files = saved_files(llama[0])
    written = {name: q.tensor_hash(read_part(path, name, shape)) for name, (path, _, shape) in files.items()}
    edit(copied, change or (lambda tensors: None))
    if change is None:
        return q.check_bits(copied, written)
    with pytest.raises(CheckpointError, match=r"1 of .* tensors on the disk differ"):
        q.check_bits(copied, written)


def wrong_skip_list(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"].remove("lm_head")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("arch", "change", "match"),
    [
        ("llama", lambda folder: edit(folder, flip("model.norm.weight")), r"model\.norm\.weight"),
        ("llama", lambda folder: os.truncate(folder / "model.safetensors", 100_000), r"model\.safetensors"),
        ("llama_untied", wrong_skip_list, "lm_head"),
    ],
)
def test_what_is_not_what_was_planned_is_not_promoted(tiny, tmp_path, monkeypatch, arch, change, match):
    real = q.prove
    monkeypatch.setattr(q, "prove", lambda folder, *rest: change(folder) or real(folder, *rest))
    with pytest.raises((CheckpointError, RuntimeError), match=match):
        quantized(tiny(arch), tmp_path)
    assert not (tmp_path / "run" / "model").exists()


def test_a_size_or_logits_that_differ_are_found(refused):
    plan = refused.plan
    small = dataclasses.replace(plan, bytes={**plan.bytes, "total": plan.bytes["total"] // 2})
    refused(CheckpointError, r"predicted.*\+\d+", plan=small)
    answer = {"transformers": "5", "finite": True, "logit_spread": 2.0, "first_nonfinite": None}

    def judge(**found):
        said = {"problem": None, "text": "a", "tokens": 1}
        return q.check_use(answer | {"generation": said} | found, "float16")

    assert judge(max_logit_difference=0.019)["finite"]
    for difference in (0.021, float("nan")):
        with pytest.raises(CheckpointError, match="logits differ"):
            judge(max_logit_difference=difference)
    with pytest.raises(q.NotFinite, match="not numbers"):
        judge(max_logit_difference=0.0, finite=False)
