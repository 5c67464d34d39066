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
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from benchmarks.quantize import synthetic
from spi_utils import fresh_check
from spi_utils import quantize as q
from spi_utils.checkpoint import read_part, read_saved, saved_files
from spi_utils.errors import CheckpointError, ModelError, PlanError
from spi_utils.models import list_layers, open_weights, resolve
from spi_utils.plan import make_plan
from spi_utils.runs import open_run, run_info
from tests.tiny import make_tiny

ARCHS = ["llama", "llama_untied", "qwen3_5", "qwen3_5_multimodal", "gemma3", "phi3", "gpt2", "mixtral"]
UP, NORM = "model.layers.1.mlp.up_proj", "model.norm.weight"


@pytest.fixture(scope="module", autouse=True)
def here(tmp_path_factory):
    """The fresh process' check, run in this one and on less text: a process costs seconds. The real `ask`."""
    folder, real, text = tmp_path_factory.mktemp("ask"), q.ask, q.load_text("pydoc").text[:20_000]

    def ask(request):
        (folder / "request.json").write_text(json.dumps(request))
        fresh_check.main(str(folder / "request.json"), str(folder / "answer.json"))
        return json.loads((folder / "answer.json").read_text()) | {"spi_utils": False}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q, "ask", ask)
        patch.setattr(q, "load_text", lambda name: text)
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
    return q.quantize(run, source, plan, device="cpu", **options), run_info(run)["stages"]["quantize"]


@pytest.fixture(scope="module")
def llama(tiny, tmp_path_factory):
    """A checkpoint that many tests look at and none changes: half of the layers in NF4."""
    return quantized(tiny("llama"), tmp_path_factory.mktemp("llama"))[0]


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
    with open_weights(source) as weights:
        saved = {name: value for name, _, value in read_saved(folder, weights.model)}
        for name in weights.names:
            own, module = weights.read(name), name.removesuffix(".weight")
            if module not in planned:
                assert torch.equal(state[name], own) and torch.equal(saved[name], own), name
                continue
            conv1d = isinstance(weights.model.get_submodule(module), Conv1D)
            options = {"blocksize": 64, "quant_type": "nf4", "compress_statistics": plan.double_quant}
            codes, held = bnb.functional.quantize_4bit((own.T if conv1d else own).contiguous(), **options)
            weight, values = model.get_submodule(module).weight, bnb.functional.dequantize_4bit(codes, held)
            ours, theirs = (one.as_dict(packed=True) for one in (weight.quant_state, held))
            assert torch.equal(weight.data, codes) and all(
                torch.equal(ours[key], theirs[key]) for key in theirs
            )
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
def test_a_real_fresh_process_never_sees_this_package_and_the_folders_script_runs(tiny, tmp_path, here):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q, "ask", here)
        folder, found = quantized(tiny("llama"), tmp_path)
    fresh = found["fresh_process"]
    assert fresh["spi_utils"] is False and fresh["max_logit_difference"] <= 0.01 * fresh["logit_spread"] > 0
    code = """
        import runpy, sys
        import psutil, torch, transformers  # psutil itself needs the module, but not on Windows
        sys.modules["resource"] = None  # as where Python has no such module
        sys.argv = ["generate.py", "Why", "is", "the", "sky", "blue?"]
        runpy.run_path("generate.py", run_name="__main__")
        print("spi_utils" in sys.modules)
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    *_, said, imported = done.stdout.decode(errors="replace").rstrip().splitlines()
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s, peak memory [\d.]+ GB on (cpu|cuda:0)", said), said
    assert imported == "False" and len((folder / "generate.py").read_text().splitlines()) <= 50


def test_code_that_comes_with_the_model_travels_along_when_trusted(tmp_path):
    directory = make_tiny("llama", tmp_path / "m")
    code = "from transformers import LlamaConfig, LlamaForCausalLM\nclass Own(LlamaConfig):\n"
    code += "    model_type = 'own'\nclass Model(LlamaForCausalLM):\n    config_class = Own\n"
    (directory / "own.py").write_text(code)
    path = directory / "config.json"
    auto = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "own", "auto_map": auto}))
    with pytest.raises(ModelError, match="trust_remote_code"):
        resolve(str(directory))
    source = resolve(str(directory), trust_remote_code=True)
    folder = q.quantize(open_run(tmp_path / "run", source.identity()), source, plan_for(source), device="cpu")
    assert (folder / "own.py").read_text() == code
    assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)).__name__ == "Model"


def test_what_could_not_be_checked_is_said(tiny, tmp_path, monkeypatch):
    directory = make_tiny("llama", tmp_path / "m", intermediate_size=200)  # 200 is no multiple of 64
    found = quantized(directory, tmp_path / "odd", keep=0)[1]
    (note,) = found["fresh_process"]["notes"]
    assert "AVX512-BF16" in note and "mlp" in note and found["proof"] is None
    monkeypatch.setattr(q, "fits_in_memory", lambda *_: False)
    found = quantized(tiny("llama"), tmp_path)[1]
    fresh = found["fresh_process"]
    assert (
        fresh["loaded"] is False and "max_logit_difference" not in fresh and "too large" in fresh["notes"][0]
    )
    assert "NOT proven by use" in q.proof_by_use(found)


# --- shards, resume, replacement -------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_resumes_at_the_missing_shard_and_shards_hold_the_same(
    tiny, tmp_path, monkeypatch, llama
):
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
    assert not (tmp_path / "run" / "model").exists()
    written, write = [], q.write_shard
    monkeypatch.setattr(q, "write_shard", lambda path, *rest: written.append(path.name) or write(path, *rest))
    folder, _ = quantized(tiny("llama"), tmp_path, max_shard_size="200KB")
    shards = {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}
    assert written == list(shards)[2:] and not (tmp_path / "run" / "partial").exists()
    whole = load_file(llama / "model.safetensors")
    merged = {name: tensor for tensors in shards.values() for name, tensor in tensors.items()}
    assert merged.keys() == whole.keys() and all(torch.equal(merged[name], whole[name]) for name in whole)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file in shards for name in shards[file]}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())


def test_what_is_finished_is_recognised_and_another_plan_replaces_it(tiny, tmp_path, monkeypatch):
    def killed(*_, **__):
        raise KeyboardInterrupt

    run, source, plan = prepare(tiny("llama"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(q.shutil, "rmtree", killed)  # the first thing after the checks
        with pytest.raises(KeyboardInterrupt):
            q.quantize(run, source, plan, device="cpu")
    with monkeypatch.context() as patch:
        patch.setattr(q, "make_checkpoint", lambda *_: pytest.fail("made again"))
        for _ in range(2):
            folder = q.quantize(run, source, plan, device="cpu")
    first = (folder / "model.safetensors").read_bytes()
    for keep in (0.5, 0.0, 1.0):
        q.quantize(run, source, plan_for(source, keep=keep), device="cpu", force=True)
        assert ((folder / "model.safetensors").read_bytes() == first) == (keep == 0.5)
        assert ("quantization_config" in json.loads((folder / "config.json").read_text())) == (keep < 1)
        assert not (run.path / ".model-old").exists()


@pytest.mark.slow
def test_a_checkpoint_needs_a_shard_its_largest_tensor_and_little_more():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(synthetic, 1.2, vocabulary=32_000, shard="100MB").result()
    assert found["source_gb"] > 1.1 and found["peak_rss_above_gb"] < 0.7 + found["largest_tensor_gb"]
    assert found["saved_gb"] == pytest.approx(found["planned_gb"], rel=0.005)


# --- casts -----------------------------------------------------------------------------------------------


def test_what_float16_cannot_hold_keeps_the_checkpoint_in_bfloat16_or_is_refused(tmp_path, capsys):
    def change(tensors):
        weight = tensors[f"{UP}.weight"]
        weight[0, 0], weight[0, 1], weight[3, :5] = 1e5, -7e4, 1e-12

    source = edit(make_tiny("llama", tmp_path / "bf16", dtype="bfloat16"), change)
    folder, found = quantized(source, tmp_path, storage_dtype="float16")
    (lost,) = (cast for cast in found["casts"] if cast["name"] == f"{UP}.weight")
    assert (lost["overflow"], lost["underflow"], lost["largest"]) == (2, 5, 99840)
    config = json.loads((folder / "config.json").read_text())
    assert found["saved_as"] == config["dtype"] == "bfloat16"
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert "written again in bfloat16" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=rf"{UP}.weight: 2 values"):
        quantized(source, tmp_path / "refused", storage_dtype="float16", overflow="error")
    assert not (tmp_path / "refused" / "run" / "model").exists()


def test_a_cast_to_float16_that_holds_everything(tmp_path):
    directory = make_tiny("llama", tmp_path / "bf16", dtype="bfloat16")
    folder, found = quantized(directory, tmp_path, keep=1.0, storage_dtype="float16")
    saved, own = (load_file(place / "model.safetensors") for place in (folder, directory))
    assert found["saved_as"] == "float16" and all(torch.equal(saved[n], own[n].half()) for n in own)
    lost = {name: int(((t.half() == 0) & (t != 0)).sum()) for name, t in own.items()}
    assert {c["name"]: c["underflow"] for c in found["casts"]} == {n: c for n, c in lost.items() if c}


@pytest.mark.parametrize("odd", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", ["protected", "norm"])
@pytest.mark.parametrize("quantizes", [True, False])
def test_stock_loaders_cannot_run_one_tensor_in_another_dtype(tiny, llama, tmp_path, odd, target, quantizes):
    """Why one tensor that float16 can't hold moves the whole checkpoint to bfloat16: nothing less works.

    With NF4 layers in it a checkpoint's dtypes are kept, and the float16 product meets another dtype; without
    any, the value is cast to float16 as it is loaded, and becomes infinite.
    """
    kept = json.loads((llama / "plan.json").read_text())["protected"]
    name = f"{kept[0]}.weight" if target == "protected" else "model.layers.1.input_layernorm.weight"
    folder = shutil.copytree(llama if quantizes else tiny("llama"), tmp_path / "m")
    edit(folder, lambda tensors: tensors.update({name: tensors[name].to(odd).fill_(1e5)}))
    model = AutoModelForCausalLM.from_pretrained(folder)
    weight = model.get_parameter(name)
    assert weight.dtype == (odd if quantizes else torch.float16) and bool(weight.isinf().all()) != quantizes
    if quantizes:
        with pytest.raises(RuntimeError, match="same dtype"):
            model(torch.arange(8)[None])


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
    ("changes", "options", "match"),
    [
        ({"formats": {UP: "int8"}}, {}, f"int8.*{UP}"),
        ({"formats": {"model.layers.9.mlp.up_proj": "nf4"}}, {}, r"model\.layers\.9"),
        ({"formats": {"model.embed_tokens": "nf4"}}, {}, "embed_tokens"),
        ({"model": {"id": "someone/else", "sha256": "0" * 64}}, {}, "someone/else"),
        ({}, {"overflow": "ignore"}, "ignore.*keep_bf16"),
        ({}, {"storage_dtype": "float8"}, "float8"),
        ({}, {"compute_dtype": "int4"}, "int4"),
        ({}, {"backend": "gguf"}, "gguf.*bitsandbytes"),
    ],
)
def test_wrong_parameters_and_plans_that_do_not_fit_are_refused(refused, changes, options, match):
    changes = {name: {**getattr(refused.plan, name), **change} for name, change in changes.items()}
    plan = dataclasses.replace(refused.plan, **changes)
    refused((PlanError, CheckpointError), match, plan=plan, **options)
    assert not refused.run.partial.exists()


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


def test_foreign_files_in_the_target_are_left_alone_and_its_own_output_is_no_source(refused, llama):
    folder = refused.run.model_dir
    folder.mkdir()
    (folder / "thesis.txt").write_text("irreplaceable")
    refused(CheckpointError, "did not write")
    (folder / "plan.json").write_text(json.dumps({"model": {"id": "a/b", "sha256": "1" * 64}}))
    refused(CheckpointError, "a/b")
    assert (folder / "thesis.txt").read_text() == "irreplaceable"
    with pytest.raises(ModelError, match="already quantized"):
        resolve(str(llama))


# --- the checks themselves must be able to fail ----------------------------------------------------------


def transposed_absmax(tensors):
    """What a CPU with AVX512-BF16 makes of a matrix in its first forward, were it saved after that."""
    name = next(name for name in tensors if name.endswith("up_proj.weight.absmax"))
    tensors[name] = tensors[name].view(256, 128 // 64).T.reshape(-1).contiguous()


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (lambda tensors: None, 0),
        (transposed_absmax, 1),
        (lambda tensors: tensors["model.embed_tokens.weight"].view(torch.int16)[-1, -1].bitwise_xor_(1), 1),
        (lambda tensors: tensors.update({NORM: tensors[NORM].view(torch.int16)}), 1),
        (lambda tensors: tensors.pop(NORM), 1),
        (lambda tensors: tensors.update(more=torch.zeros(2)), 1),
    ],
)
def test_tensors_that_are_other_too_few_or_too_many_are_found(llama, tmp_path, change, wrong):
    files = saved_files(llama)
    written = {name: q.tensor_hash(read_part(path, name, shape)) for name, (path, _, shape) in files.items()}
    folder = edit(shutil.copytree(llama, tmp_path / "copied"), change)
    if wrong:
        with pytest.raises(CheckpointError, match=r"1 of \d+ tensors on the disk differ"):
            q.check_bits(folder, written)
    else:
        q.check_bits(folder, written)


def test_a_truncated_file_is_not_promoted(tiny, tmp_path, monkeypatch):
    real = q.prove

    def cut(folder, *rest):
        os.truncate(folder / "model.safetensors", 100_000)
        return real(folder, *rest)

    monkeypatch.setattr(q, "prove", cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*03_quantize again"):
        quantized(tiny("llama"), tmp_path)
    assert not (tmp_path / "run" / "model").exists()


def test_a_size_modules_or_logits_that_differ_are_found(refused):
    plan = refused.plan
    small = dataclasses.replace(plan, bytes={**plan.bytes, "total": plan.bytes["total"] // 2})
    refused(CheckpointError, r"predicted.*\+\d+", plan=small)
    said = {"problem": None, "text": "a", "tokens": 1}
    answer = {
        "transformers": "5",
        "finite": True,
        "logit_spread": 2.0,
        "first_nonfinite": None,
        "spi_utils": False,
    }
    assert q.check_use(answer | {"max_logit_difference": 0.019, "generation": dict(said)}, "float16")[
        "finite"
    ]
    for difference in (0.021, float("nan")):
        with pytest.raises(CheckpointError, match="logits differ"):
            q.check_use(answer | {"max_logit_difference": difference, "generation": said}, "float16")
    with pytest.raises(q.NotFinite, match="not numbers"):
        q.check_use(answer | {"finite": False, "generation": said}, "float16")
    good, planned = {"a": "nf4", "b": [8, None, True], "c": "float16"}, {"a": "nf4", "b": "int8"}
    q.check_modules(answer | {"modules": good}, planned)
    for wrong in ({"c": "nf4"}, {"a": "float16"}, {"b": [4, 64, True]}, {"c": "uint8"}):
        with pytest.raises(CheckpointError, match=rf"1 modules are not in their.*: {next(iter(wrong))} "):
            q.check_modules(answer | {"modules": good | wrong}, planned)
    with pytest.raises(CheckpointError, match="imported spi_utils"):
        q.check_modules(answer | {"modules": good, "spi_utils": True}, planned)
