"""The hybrid checkpoint, judged by stock libraries, by its own bytes, and by use."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import bitsandbytes as bnb
import pandas as pd
import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    Gemma3ForConditionalGeneration,
)
from transformers.pytorch_utils import Conv1D

from benchmarks.quantize import synthetic
from spi_utils import fresh_check
from spi_utils import quantize as q
from spi_utils.analyze import analyze
from spi_utils.checkpoint import BACKENDS, put_saved, read_saved, saved_files
from spi_utils.errors import CheckpointError, ModelError, PlanError
from spi_utils.formats import FORMATS, dequantize, fits
from spi_utils.formats import quantize as round_to_nearest
from spi_utils.models import list_layers, load_model, open_weights, read_tensor, resolve
from spi_utils.plan import decide, make_plan, price, read_plan
from spi_utils.rounding import Codes
from spi_utils.runs import Run, open_run, run_info
from spi_utils.workspace import begin_run
from tests.tiny import CONFIGS, make_tiny

ARCHS = ["llama", "qwen3_5_multimodal", "gemma3", "phi3", "gpt2", "mixtral"]
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
    assert (config["bnb_4bit_quant_type"], config["bnb_4bit_compute_dtype"]) == ("nf4", "float16")
    assert {*plan.protected, "lm_head"} <= set(config["llm_int8_skip_modules"])
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
        patch.setattr(q, "write_shard", lambda *_: pytest.fail("written again"))
        for _ in range(2):
            folder = q.quantize(run, source, plan, device="cpu")
    first = (folder / "model.safetensors").read_bytes()
    for keep in (0.5, 0.0, 1.0):
        q.quantize(run, source, plan_for(source, keep=keep), device="cpu", force=True)
        assert ((folder / "model.safetensors").read_bytes() == first) == (keep == 0.5)
        assert ("quantization_config" in json.loads((folder / "config.json").read_text())) == (keep < 1)
        assert not run.partial.exists()


@pytest.mark.slow
def test_a_checkpoint_needs_a_shard_its_largest_tensor_and_little_more():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(synthetic, 1.2, vocabulary=32_000, shard="100MB").result()
    assert found["source_gb"] > 1.1 and found["peak_rss_above_gb"] < 0.7 + 2 * found["largest_tensor_gb"]
    assert found["saved_gb"] == pytest.approx(found["planned_gb"], rel=0.005)


# --- casts -----------------------------------------------------------------------------------------------


def test_what_float16_cannot_hold_keeps_the_checkpoint_in_bfloat16_or_is_refused(tmp_path, capsys):
    def change(tensors):
        weight = tensors[f"{UP}.weight"]
        weight[0, 0], weight[0, 1] = 1e5, -7e4

    source = edit(make_tiny("llama", tmp_path / "bf16", dtype="bfloat16"), change)
    folder, found = quantized(source, tmp_path, storage_dtype="float16")
    config = json.loads((folder / "config.json").read_text())
    assert found["saved_as"] == config["dtype"] == "bfloat16"
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    assert "written again in bfloat16" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=rf"{UP}.weight: 2 values"):
        quantized(source, tmp_path / "refused", storage_dtype="float16", overflow="error")
    assert not (tmp_path / "refused" / "run" / "model").exists()


# --- refusals --------------------------------------------------------------------------------------------


@pytest.fixture
def assert_refused(tiny, tmp_path):
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
        ({}, {"backend": "gguf"}, "gguf.*bitsandbytes"),
    ],
)
def test_wrong_parameters_and_plans_that_do_not_fit_are_refused(assert_refused, changes, options, match):
    changes = {name: {**getattr(assert_refused.plan, name), **change} for name, change in changes.items()}
    plan = dataclasses.replace(assert_refused.plan, **changes)
    assert_refused((PlanError, CheckpointError), match, plan=plan, **options)
    assert not assert_refused.run.partial.exists()


def test_a_broken_package_a_full_disk_and_no_device_are_refused_with_nothing_written(
    assert_refused, monkeypatch, tmp_path
):
    broken = tmp_path / "broken" / "bitsandbytes"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise RuntimeError('CUDA Setup failed')")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(broken.parent)
        patch.delitem(sys.modules, "bitsandbytes")
        assert_refused(CheckpointError, r"CUDA Setup failed.*pip install bitsandbytes")
    with monkeypatch.context() as patch:
        patch.setattr(q.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
        assert_refused(CheckpointError, "of disk are needed, 0.00 GB are free")
    if not torch.cuda.is_available():
        assert_refused(ModelError, "no CUDA", device="cuda:0")
    assert not assert_refused.run.model_dir.exists()


def test_foreign_files_in_the_target_are_left_alone_and_its_own_output_is_no_source(assert_refused, llama):
    folder = assert_refused.run.model_dir
    folder.mkdir()
    (folder / "thesis.txt").write_text("irreplaceable")
    assert_refused(CheckpointError, "did not write")
    (folder / "plan.json").write_text(json.dumps({"model": {"id": "a/b", "sha256": "1" * 64}}))
    assert_refused(CheckpointError, "a/b")
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
        (lambda tensors: tensors.pop(NORM), 1),
        (lambda tensors: tensors.update(more=torch.zeros(2)), 1),
    ],
)
def test_tensors_that_are_other_too_few_or_too_many_are_found(llama, tmp_path, change, wrong):
    files = saved_files(llama)
    written = {name: q.tensor_hash(read_tensor(path, name)) for name, (path, *_) in files.items()}
    folder = edit(shutil.copytree(llama, tmp_path / "copied"), change)
    if wrong:
        with pytest.raises(CheckpointError, match=r"1 of \d+ tensors on the disk differ"):
            q.check_bits(folder, written)
    else:
        q.check_bits(folder, written)


def test_a_size_modules_or_logits_that_differ_are_found(assert_refused):
    plan = assert_refused.plan
    small = dataclasses.replace(plan, bytes={**plan.bytes, "total": plan.bytes["total"] // 2})
    assert_refused(CheckpointError, r"predicted.*\+\d+", plan=small)
    answer = {"transformers": "5", "logit_spread": 2.0, "first_nonfinite": None, "spi_utils": False}
    answer |= {"finite": True, "max_logit_difference": 0.019, "generation": {"text": "a", "tokens": 1}}
    assert q.check_use(answer, "float16")["finite"]
    for difference in (0.021, float("nan")):
        with pytest.raises(CheckpointError, match="logits differ"):
            q.check_use(answer | {"max_logit_difference": difference}, "float16")
    with pytest.raises(q.NotFinite, match="not numbers"):
        q.check_use(answer | {"finite": False}, "float16")
    good, planned = {"a": "nf4", "b": [8, None, True], "c": "float16"}, {"a": "nf4", "b": "int8"}
    q.check_modules(answer | {"modules": good}, planned)
    for wrong in ({"c": "nf4"}, {"a": "float16"}, {"b": [4, 64, True]}, {"c": "uint8"}):
        with pytest.raises(CheckpointError, match=rf"1 modules are not in their.*: {next(iter(wrong))} "):
            q.check_modules(answer | {"modules": good | wrong}, planned)
    with pytest.raises(CheckpointError, match="imported spi_utils"):
        q.check_modules(answer | {"modules": good, "spi_utils": True}, planned)


# --- compressed-tensors ----------------------------------------------------------------------------------

MIX = ("int4_g64", "int8", "16bit", "int4_g32", "int4_g128_absmax")
CT = {"backend": "compressed-tensors", "device": "cpu"}


def mixed_plan(source, mix=MIX):
    """Formats in turn, where they fit; merged layers may differ: transformers doesn't mind."""
    layers = table(source)
    planned = layers[layers["quantizable"]]
    turns = zip(planned["name"], planned["cols"], cycle(mix), strict=False)
    formats = {name: fmt if fits(fmt, cols) else "int8" for name, cols, fmt in turns}
    plan = make_plan(layers, score="random", rule="top_k", value=0, model=source.identity())
    kept = tuple(name for name, fmt in formats.items() if fmt == "16bit")
    return dataclasses.replace(plan, formats=formats, protected=kept, bytes=price(layers, formats))


def prepare_mixed(directory, tmp_path, mix=MIX):
    source = resolve(str(directory))
    return open_run(tmp_path / "run", source.identity()), source, mixed_plan(source, mix)


def gemma3_multimodal(directory):
    """A tiny random Gemma 3 with its vision tower, as its own class saves it: model.language_model.… in
    memory, language_model.model.… in the file."""
    kinds = ["sliding_attention", "full_attention"]
    text = {**CONFIGS["gemma3"], "num_hidden_layers": 2, "layer_types": kinds}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    make_tiny("gemma3", directory)  # its tokenizer
    (directory / "model.safetensors").unlink()
    Gemma3ForConditionalGeneration(config).half().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("arch", ["llama_untied", "qwen3_5_multimodal", "phi3", "gemma3_multimodal"])
def test_stock_transformers_load_exactly_the_mixed_plan(tiny, tmp_path, arch):
    multimodal = arch == "gemma3_multimodal"
    run, source, plan = prepare_mixed(
        gemma3_multimodal(tmp_path / "g") if multimodal else tiny(arch), tmp_path
    )
    folder = q.quantize(run, source, plan, **CT)
    if multimodal:
        names = load_file(folder / "model.safetensors")
        assert any(name.startswith("language_model.model.") for name in names)
    model = AutoModelForCausalLM.from_pretrained(folder)
    packed = {name for name, module in model.named_modules() if hasattr(module, "weight_packed")}
    assert packed == {name for name, fmt in plan.formats.items() if fmt != "16bit"}
    model(torch.tensor([[1, 2, 3]]))  # the first forward unpacks
    with open_weights(source) as weights:
        for name, fmt in plan.formats.items():
            module = model.get_submodule(name)
            expected = dequantize(round_to_nearest(weights.read(f"{name}.weight"), fmt), torch.float16)
            assert type(module) is nn.Linear and module.weight.dtype == torch.float16
            assert torch.equal(module.weight, expected), (name, fmt)
        rest = [name for name in weights.names if name.removesuffix(".weight") not in plan.formats]
        state = model.state_dict()
        assert rest and all(torch.equal(state[name], weights.read(name)) for name in rest)
        own = load_model(source, device="cpu", dtype=torch.float32)
        found = put_saved(own, weights, plan.formats, folder)
    assert found == {fmt: plan.count(fmt) for fmt in set(plan.formats.values())}
    for name in plan.formats:  # what is scored is what stock transformers compute with
        assert torch.equal(own.get_submodule(name).weight, model.get_submodule(name).weight.float())
    q.check_size(folder, plan.bytes["total"])

    held = json.loads((folder / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate({k: v for k, v in held.items() if k != "version"})
    assert CompressedTensorsConfig(**held).is_quantization_compressed and parsed.format == "pack-quantized"
    targets = [target for group in parsed.config_groups.values() for target in group.targets]
    assert sorted(targets) == sorted(packed) and not any(
        g.input_activations for g in parsed.config_groups.values()
    )
    assert all(group.weights.num_bits == FORMATS[name].bits for name, group in parsed.config_groups.items())
    # vLLM looks for a target of every linear layer that isn't ignored, the output head included.
    linear = {name for name, module in own.named_modules() if isinstance(module, nn.Linear)}
    assert {*targets, *parsed.ignore} == linear and not set(targets) & set(parsed.ignore)


@pytest.mark.parametrize(
    ("arch", "mix", "backend", "match"),
    [
        ("llama", MIX, "bitsandbytes", "bitsandbytes checkpoint can't hold .*backend='compressed-tensors'"),
        ("llama", ("nf4", "int8"), CT["backend"], "can't hold nf4, which .* layers"),
        ("gpt2", MIX, CT["backend"], "no Conv1D"),
        ("mixtral", MIX, CT["backend"], "stack of experts.* Use backend='bitsandbytes'"),
    ],
)
def test_what_the_backend_cannot_hold_is_refused_before_writing(tiny, tmp_path, arch, mix, backend, match):
    run, source, plan = prepare_mixed(tiny(arch), tmp_path, mix)
    with pytest.raises(PlanError, match=match):
        q.quantize(run, source, plan, backend=backend, device="cpu")
    assert not run.model_dir.exists() and not run.partial.exists()


def test_groups_that_do_not_divide_are_refused(tmp_path):
    directory = make_tiny("llama", tmp_path / "m", intermediate_size=200)
    run, source, plan = prepare_mixed(directory, tmp_path, ("int8",))
    name = next(name for name in plan.formats if name.endswith("down_proj"))
    narrow = dataclasses.replace(plan, formats=plan.formats | {name: "int4_g64"})
    with pytest.raises(PlanError, match=f"{name} can't be int4_g64.*200 columns"):
        q.quantize(run, source, narrow, **CT)


# --- guided rounding -------------------------------------------------------------------------------------

SMALL = {"device": "cpu", "windows": 6, "length": 24, "text": "pydoc", "formats": ("nf4", "int4_g64", "int8")}


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """Runs after notebook 01 by architecture; each is made once, tests get copies."""

    @cache
    def make(arch):
        place = tmp_path_factory.mktemp(arch)
        size = {"n_layer" if arch == "gpt2" else "num_hidden_layers": 2}
        model = make_tiny(arch, place / "model", initializer_range=0.1, **size)
        run, source = begin_run(str(place / "run"), str(model))
        analyze(run, source, **SMALL)
        return run, source

    return lambda folder, arch="llama": (
        Run(shutil.copytree(make(arch)[0].path, folder / "run")),
        make(arch)[1],
    )


@pytest.mark.parametrize(
    ("arch", "dtype", "stored"),
    [
        ("llama", "float16", "nf4"),
        pytest.param("llama", "bfloat16", "nf4_dq", marks=pytest.mark.slow),
        pytest.param("gpt2", "float16", "nf4", marks=pytest.mark.slow),
    ],
)
def test_the_codes_that_were_chosen_are_in_the_file_in_any_dtype(analysed, tmp_path, arch, dtype, stored):
    run, source = analysed(tmp_path, arch)
    plan = decide(run, double_quant=stored == "nf4_dq", force=True)
    assert plan.rounding == "guided" == read_plan(run).rounding
    q.quantize(run, source, plan, device="cpu", storage_dtype=dtype)
    codes, loaded = Codes(run.rounded), AutoModelForCausalLM.from_pretrained(run.model_dir)
    source_model = AutoModelForCausalLM.from_pretrained(source.directory)
    tensors = load_file(run.model_dir / "model.safetensors")
    stock, seen = dict(loaded.dequantize().named_parameters()), 0
    for name, fmt, value in read_saved(run.model_dir, source_model):
        if fmt == "nf4":
            meant = codes[name.removesuffix(".weight"), stored]
            values = dequantize(meant, value.dtype)
            assert value.dtype == getattr(torch, dtype)
            assert torch.equal(value.T if arch == "gpt2" else value, values)  # Conv1D is (in, out)
            assert dtype == "bfloat16" or torch.equal(stock[name], values), name
            assert arch == "gpt2" or torch.equal(tensors[name], meant.codes)  # GPT-2's files lack a prefix
            seen += 1
    assert seen == plan.count("nf4") > 0


def test_values_that_the_backends_package_reads_otherwise_are_refused(assert_refused, monkeypatch):
    parts_of, *others = BACKENDS["bitsandbytes"]

    def flipped(packed):
        parts = parts_of(packed)
        return parts | {"weight": parts["weight"] ^ 1}

    monkeypatch.setitem(BACKENDS, "bitsandbytes", (flipped, *others))
    assert_refused(CheckpointError, "bitsandbytes reads nf4 as other values than were meant")


@pytest.mark.slow
def test_compressed_tensors_reads_the_codes_that_were_chosen_or_made_now(analysed, tmp_path, capsys):
    run, source = analysed(tmp_path)
    plan = decide(run, backend="compressed-tensors")
    shutil.rmtree(run.rounded)
    q.quantize(run, source, plan, device="cpu", backend="compressed-tensors")
    assert "no guided codes in int4_g64" in capsys.readouterr().out
    codes, model = Codes(run.rounded), AutoModelForCausalLM.from_pretrained(source.directory)
    read = {name: value for name, fmt, value in read_saved(run.model_dir, model) if fmt == "int4_g64"}
    assert read
    for name, value in read.items():
        assert torch.equal(value, dequantize(codes[name.removesuffix(".weight"), "int4_g64"], value.dtype))


# --- proof by use ----------------------------------------------------------------------------------------

START = 257  # <s> of the tiny tokenizer


def hot_behind_start(folder, *, factor=6e4, gate=16):
    """A Llama in bfloat16 whose activations leave float16's range where the start token stands, and nowhere
    else: its embedding alone has the component that one neuron of an MLP multiplies."""

    def change(tensors):
        embedding, mlp = tensors["model.embed_tokens.weight"], "model.layers.0.mlp"
        embedding[:, 0] = embedding[START] = 0
        embedding[START, 0] = 1
        for kind in ("gate_proj", "up_proj"):
            tensors[f"{mlp}.{kind}.weight"][0] = 0
            tensors[f"{mlp}.{kind}.weight"][0, 0] = gate
        tensors["model.layers.0.self_attn.o_proj.weight"].zero_()
        tensors[f"{mlp}.down_proj.weight"][:, 0] = 0
        tensors[f"{mlp}.down_proj.weight"][5, 0] = factor
        tensors["lm_head.weight"][256:260] = 0  # so that an untrained model doesn't end its answer at once

    return edit(make_tiny("llama_untied", folder, dtype="bfloat16"), change)


@pytest.mark.parametrize("backend", ["bitsandbytes", "compressed-tensors"])
def test_activations_that_overflow_behind_the_start_token_end_as_bfloat16(backend, tmp_path, capsys):
    source = resolve(str(hot_behind_start(tmp_path / "hot")))
    half = AutoModelForCausalLM.from_pretrained(source.directory, dtype=torch.float16)
    assert half(torch.linspace(0, 319, 24).long()[None]).logits.isfinite().all()  # without the start token
    plan = plan_for(source, keep=1.0)
    if backend == "compressed-tensors":
        plan = mixed_plan(source, ("int4_g64", "int8", "16bit"))
    run, refused = (open_run(tmp_path / name, source.identity()) for name in ("run", "refused"))
    options = {"device": "cpu", "storage_dtype": "float16", "backend": backend}
    q.quantize(run, source, plan, **options)
    assert "activations overflow float16" in capsys.readouterr().out
    proof = run_info(run)["stages"]["quantize"]["proof"]
    assert (proof["dtype"], proof["finite"]) == ("bfloat16", True)
    assert (proof["windows"], proof["length"], proof["start_token"]) == (4, 256, START)
    loaded = AutoModelForCausalLM.from_pretrained(run.model_dir)
    assert loaded(torch.tensor([[START, 72, 105]])).logits.isfinite().all()
    assert "proven by use: transformers" in q.proof_of(run)
    with pytest.raises(CheckpointError, match=r"not numbers.*float16.*model\.layers\.0\.mlp.*bfloat16"):
        q.quantize(refused, source, plan, overflow="error", **options)
    assert not refused.model_dir.exists()


def nan(tensors):
    tensors["model.norm.weight"].view(-1)[3] = float("nan")


def mute(folder):
    path = make_tiny("llama", folder) / "generation_config.json"
    config = json.loads(path.read_text()) | {"suppress_tokens": [i for i in range(320) if i != 258]}
    path.write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda folder: hot_behind_start(folder, factor=3e38, gate=1e18), r"bfloat16.*model\.layers\.0\.mlp"),
        (lambda folder: edit(make_tiny("llama", folder), nan), r"model\.norm\.weight holds .* NaN.*source"),
        (mute, "answer to a prompt is empty"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused(make, match, tmp_path):
    source = resolve(str(make(tmp_path / "m")))
    run = open_run(tmp_path / "run", source.identity())
    with pytest.raises(CheckpointError, match=match):
        q.quantize(run, source, plan_for(source, keep=1.0), device="cpu")
    assert not run.model_dir.exists()


def test_a_float32_source_saved_in_bfloat16_is_recognised_as_its_own(tmp_path):
    """float32 -> float16 -> bfloat16 rounds twice; the file holds what one cast gives."""
    directory = make_tiny("llama", tmp_path / "f32", dtype="float32")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "float16"}))
    source = resolve(str(directory))
    run, plan = open_run(tmp_path / "run", source.identity()), plan_for(source)
    q.quantize(run, source, plan, device="cpu", storage_dtype="bfloat16")
    original = load_file(directory / "model.safetensors")
    assert any((t.half().bfloat16() != t.bfloat16()).any() for t in original.values())  # or nothing is tested
    with open_weights(source) as weights:
        model = load_model(source, device="cpu", dtype=torch.float32)
        found = put_saved(model, weights, plan.formats, run.model_dir)
    name = plan.protected[0]
    assert torch.equal(model.get_submodule(name).weight, original[f"{name}.weight"].bfloat16().float())
    assert found["16bit"] == len(plan.protected)
