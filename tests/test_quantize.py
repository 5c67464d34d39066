"""The hybrid checkpoint, judged by stock transformers, by bitsandbytes, and by its own bytes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from benchmarks.quantize import synthetic
from spi_utils import fresh_check
from spi_utils import quantize as q
from spi_utils.checkpoint import saved_files, saved_weights
from spi_utils.errors import CheckpointError, ModelError, PlanError, RunError
from spi_utils.models import list_layers, open_weights, resolve
from spi_utils.plan import make_plan
from spi_utils.runs import open_run, run_info
from tests.tiny import make_tiny

ARCHS = ["llama", "llama_untied", "qwen3_5", "qwen3_5_multimodal", "gemma3", "phi3", "gpt2", "mixtral"]


@pytest.fixture
def here(monkeypatch):
    """The fresh process' check, run in this one: a process costs seconds; two tests start a real one."""

    def ask(request):
        folder = Path(os.environ["PYTEST_ASK"])
        (folder / "request.json").write_text(json.dumps(request))
        fresh_check.main(str(folder / "request.json"), str(folder / "answer.json"))
        return json.loads((folder / "answer.json").read_text()) | {"spi_utils": False}

    monkeypatch.setattr(q, "ask", ask)


@pytest.fixture(autouse=True)
def ask_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_ASK", str(tmp_path))


def table(source):
    rows = [dataclasses.asdict(layer) for layer in list_layers(source)]
    return pd.DataFrame(rows).assign(status="ok")


def plan_for(source, *, keep=0.5, **options):
    layers = table(source)
    count = round(keep * int(layers["quantizable"].sum()))
    return make_plan(layers, score="random", rule="top_k", value=count, model=source.identity(), **options)


def prepare(directory, tmp_path, **options):
    source = resolve(str(directory))
    run = open_run(tmp_path / "run", source.identity())
    return run, source, plan_for(source, **options)


def source_matrix(source, module):
    """(out, in) weight of a module, in the source's storage dtype."""
    with open_weights(source) as weights:
        value = weights.read(f"{module}.weight")
        transposed = isinstance(weights.model.get_submodule(module), Conv1D)
    return value.T.contiguous() if transposed else value


@pytest.mark.parametrize("arch", ARCHS)
def test_stock_transformers_find_exactly_the_plan(tiny, tmp_path, arch, here):
    run, source, plan = prepare(tiny(arch), tmp_path, double_quant=arch in ("phi3", "gpt2"))
    folder = q.quantize(run, source, plan, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert found == {name for name, fmt in plan.formats.items() if fmt == "nf4"}
    assert found, "a plan that quantizes nothing tests nothing"
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | Conv1D) and name not in found:
            assert type(module) in (nn.Linear, Conv1D)
            assert module.weight.dtype == torch.float16
    for name in found:
        module = model.get_submodule(name)
        codes, state = bnb.functional.quantize_4bit(
            source_matrix(source, name), blocksize=64, quant_type="nf4", compress_statistics=plan.double_quant
        )
        assert torch.equal(module.weight.data, codes)
        ours, theirs = (s.as_dict(packed=True) for s in (module.weight.quant_state, state))
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("arch", ARCHS)
def test_everything_else_is_the_source_bit_for_bit(tiny, tmp_path, arch, here):
    run, source, plan = prepare(tiny(arch), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(q.quantize(run, source, plan, device="cpu")).state_dict()
    compared = 0
    with open_weights(source) as weights:
        for name in weights.names:
            if plan.formats.get(name.removesuffix(".weight")) != "nf4":
                assert torch.equal(model[name], weights.read(name)), name
                compared += 1
    assert compared > len(plan.protected)


@pytest.mark.parametrize("arch", ARCHS)
def test_size_and_configuration(tiny, tmp_path, arch, here):
    run, source, plan = prepare(tiny(arch), tmp_path)
    folder = q.quantize(run, source, plan, device="cpu")
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert abs(size - plan.bytes["total"]) <= max(0.005 * plan.bytes["total"], 64_000)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_quant_type"] == "nf4"
    assert config["bnb_4bit_compute_dtype"] == "float16"
    assert config["bnb_4bit_quant_storage"] == "uint8"
    assert config["load_in_4bit"] is True
    skipped = config["llm_int8_skip_modules"]
    assert set(plan.protected) <= set(skipped)
    assert ("lm_head" in skipped) and not set(skipped) & {n for n, f in plan.formats.items() if f == "nf4"}
    names = {path.name for path in folder.iterdir()}
    assert {"plan.json", "generate.py", "tokenizer.json", "tokenizer_config.json"} <= names
    assert not any(name.startswith(".") for name in names)


def test_experts_are_saved_one_by_one_as_published(tiny, tmp_path, here):
    run, source, plan = prepare(tiny("mixtral"), tmp_path)
    folder = q.quantize(run, source, plan, device="cpu")
    with (
        safe_open(folder / "model.safetensors", framework="pt") as file,
        safe_open(source.directory / "model.safetensors", framework="pt") as original,
    ):
        name = "model.layers.0.block_sparse_moe.experts.3.w1.weight"
        assert torch.equal(file.get_tensor(name), original.get_tensor(name))


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_saved_weights_give_back_what_was_saved(tiny, tmp_path, arch, double_quant, here):
    run, source, plan = prepare(tiny(arch), tmp_path, double_quant=double_quant)
    folder = q.quantize(run, source, plan, device="cpu")
    seen = {}
    with open_weights(source) as weights:
        for module, fmt, value in saved_weights(folder):
            seen[module] = fmt
            own = weights.read(f"{module}.weight")
            assert value.shape == own.shape  # a Conv1D comes back in its own orientation
            if fmt == "16bit":
                assert torch.equal(value, own)
            else:
                matrix = source_matrix(source, module)
                codes, state = bnb.functional.quantize_4bit(
                    matrix, blocksize=64, quant_type="nf4", compress_statistics=double_quant
                )
                state.dtype = torch.float32
                expected = bnb.functional.dequantize_4bit(codes, state)
                turned = torch.equal(matrix, own.T) and arch == "gpt2"
                assert torch.equal(value, expected.T if turned else expected)
    assert [m for m in seen if seen[m] == "nf4"] == [m for m in plan.formats if plan.formats[m] == "nf4"]


def test_a_real_fresh_process_never_sees_this_package(tiny, tmp_path):
    run, source, plan = prepare(tiny("qwen3_5"), tmp_path)
    q.quantize(run, source, plan, device="cpu")
    found = run_info(run)["stages"]["quantize"]["fresh_process"]
    assert found["spi_utils"] is False
    assert found["loaded"] is True
    assert found["max_logit_difference"] <= 0.01 * found["logit_spread"]
    assert found["logit_spread"] > 0


RUN = """
    import runpy, sys
    sys.argv = ["generate.py", "Why", "is", "the", "sky", "blue?"]
    if {windows}:
        import psutil, torch, transformers  # psutil itself needs the module, but not on Windows
        sys.modules["resource"] = None  # as where Python has no such module
    runpy.run_path("generate.py", run_name="__main__")
    print("spi_utils" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize("windows", [False, True])
def test_the_folders_own_script_answers(tmp_path, here, windows):
    directory = make_tiny("llama_untied", tmp_path / "m")
    tensors = load_file(directory / "model.safetensors")
    letters = AutoTokenizer.from_pretrained(directory)("abcdefghijklmnopqrstuvwxyz")["input_ids"]
    silent = sorted(set(range(len(tensors["lm_head.weight"]))) - set(letters))
    tensors["lm_head.weight"][silent] = 0  # so it says letters only, and something is to be seen
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    run, source, plan = prepare(directory, tmp_path)
    folder = q.quantize(run, source, plan, device="cpu")
    code = textwrap.dedent(RUN.format(windows=windows))
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    *text, said, imported = done.stdout.decode(errors="replace").rstrip().splitlines()
    assert re.search("[a-z]{20}", "".join(text)), "no answer was printed"
    found = re.fullmatch(r"(\d+) tokens, ([\d.]+) tokens/s, peak memory ([\d.]+) GB on (cpu|cuda:0)", said)
    assert found, said
    assert 1 <= int(found[1]) <= 200
    assert float(found[2]) > 0
    assert found[4] != "cpu" or 0.1 < float(found[3]) < 10
    assert imported == "False"


def test_the_folders_script_is_short():
    assert len((Path(__file__).parents[1] / "examples" / "generate.py").read_text().splitlines()) <= 50


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_the_model_travels_along_when_trusted(tmp_path, here):
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
    assert json.loads((folder / "config.json").read_text())["auto_map"] == classes
    saved = saved_weights(folder, trust_remote_code=True)
    assert type(saved.weights.model).__name__ == "OwnForCausalLM"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    found = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert found == {name for name, fmt in plan_for(source).formats.items() if fmt == "nf4"}


def test_too_large_for_memory_is_checked_without_weights_and_said(tiny, tmp_path, here, monkeypatch):
    monkeypatch.setattr(q, "fits_in_memory", lambda *_: False)
    run, source, plan = prepare(tiny("llama"), tmp_path)
    q.quantize(run, source, plan, device="cpu")
    found = run_info(run)["stages"]["quantize"]["fresh_process"]
    assert found["loaded"] is False
    assert "max_logit_difference" not in found
    assert "too large" in found["notes"][0]


def test_layers_that_some_cpus_cannot_run_are_said(tmp_path, here):
    directory = make_tiny("llama", tmp_path / "m", intermediate_size=200)  # 200 is no multiple of 64
    run, source, plan = prepare(directory, tmp_path, keep=0)
    q.quantize(run, source, plan, device="cpu")
    notes = run_info(run)["stages"]["quantize"]["fresh_process"]["notes"]
    assert "AVX512-BF16" in notes[0] and "mlp" in notes[0]


def test_names_that_older_transformers_confuse_are_found(tmp_path):
    config = {"quantization_config": {"llm_int8_skip_modules": ["model.layers.1.mlp.gate", "up_proj"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    names = ["model.layers.1.mlp.gate_proj", "model.layers.11.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    assert q.shadowed_modules(tmp_path, names) == [names[0], names[2]]


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_everything_and_nothing(tiny, tmp_path, keep, here):
    run, source, plan = prepare(tiny("llama"), tmp_path, keep=keep)
    folder = q.quantize(run, source, plan, device="cpu")
    config = json.loads((folder / "config.json").read_text())
    assert ("quantization_config" in config) == (keep == 0.0)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert any(isinstance(m, bnb.nn.Linear4bit) for m in model.modules()) == (keep == 0.0)


# --- shards, resume, replacement -------------------------------------------------------------------------


def test_shards_have_an_index_and_the_same_tensors(tiny, tmp_path, here):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    whole = load_file(q.quantize(run, source, plan, device="cpu") / "model.safetensors")
    folder = q.quantize(run, source, plan, device="cpu", max_shard_size="300KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert {path.name for path in shards} == set(index["weight_map"].values())
    merged = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert merged.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    for path in shards:
        assert all(index["weight_map"][name] == path.name for name in load_file(path))


KILLED = """
    import os, signal, sys
    sys.path[:0] = [{root!r}]
    from tests.test_quantize import prepare
    from spi_utils import quantize as q
    from pathlib import Path
    write = q.write_tensors
    def kill_at_the_third(path, *rest, **more):
        if "00003-of" in path.name:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, *rest, **more)
    q.write_tensors = kill_at_the_third
    run, source, plan = prepare({model!r}, Path({out!r}))
    q.quantize(run, source, plan, device="cpu", max_shard_size="200KB")
"""


@pytest.mark.slow
def test_a_killed_run_resumes_at_the_missing_shard(tiny, tmp_path, here, monkeypatch):
    root = str(Path(__file__).parent.parent)
    code = textwrap.dedent(KILLED.format(root=root, model=str(tiny("llama")), out=str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run, source, plan = prepare(tiny("llama"), tmp_path)
    assert not run.model_dir.exists()
    written = []
    write = q.write_shard
    monkeypatch.setattr(q, "write_shard", lambda path, *rest: written.append(path.name) or write(path, *rest))
    folder = q.quantize(run, source, plan, device="cpu", max_shard_size="200KB")
    assert len(written) == len(list(folder.glob("*.safetensors"))) - 2
    assert not any("00001-of" in name or "00002-of" in name for name in written)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert not run.partial.exists()


def test_killed_after_the_checks_only_the_rename_is_left(tiny, tmp_path, here, monkeypatch):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    monkeypatch.setattr(q, "_promote", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        q.quantize(run, source, plan, device="cpu")
    monkeypatch.undo()
    monkeypatch.setattr(q, "make_checkpoint", lambda *_: pytest.fail("made again"))
    assert (q.quantize(run, source, plan, device="cpu") / "model.safetensors").exists()
    assert run_info(run)["stages"]["quantize"]["bits"]["nf4"] == plan.count("nf4")


def test_the_same_is_recognised_and_another_plan_replaces_it(tiny, tmp_path, here, monkeypatch):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    folder = q.quantize(run, source, plan, device="cpu")
    first = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    with monkeypatch.context() as patch:
        patch.setattr(q, "make_checkpoint", lambda *_: pytest.fail("made again"))
        q.quantize(run, source, plan, device="cpu")
    q.quantize(run, source, plan, device="cpu", force=True)
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == first
    q.quantize(run, source, plan_for(source, keep=0.2), device="cpu")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() != first
    assert not (run.path / ".model-old").exists()


@pytest.mark.slow
def test_a_checkpoint_of_4_gb_needs_its_largest_tensor_and_little_more():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(synthetic, 4.4).result()
    assert found["source_gb"] >= 4
    assert found["peak_rss_above_gb"] <= 1.5 + found["largest_tensor_gb"]
    assert found["saved_gb"] == pytest.approx(found["planned_gb"], rel=0.005)


# --- casts -----------------------------------------------------------------------------------------------


@pytest.fixture
def bf16_source(tmp_path):
    directory = make_tiny("llama", tmp_path / "bf16", dtype="bfloat16")
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][0, 0] = 1e5
    tensors[name][0, 1] = -7e4
    tensors[name][3, :5] = 1e-12
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return resolve(str(directory)), name


def test_bfloat16_stays_bfloat16_by_default(bf16_source, tmp_path, here):
    source, name = bf16_source
    run = open_run(tmp_path / "run", source.identity())
    folder = q.quantize(run, source, plan_for(source, keep=1.0), device="cpu")
    original = load_file(source.directory / "model.safetensors")[name]
    assert torch.equal(load_file(folder / "model.safetensors")[name], original)
    assert recorded_casts(run) == {}


def recorded_casts(run):
    return {cast["name"]: cast for cast in run_info(run)["stages"]["quantize"]["casts"]}


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_what_float16_cannot_hold_keeps_the_checkpoint_in_bfloat16(bf16_source, tmp_path, here, keep):
    source, name = bf16_source
    run = open_run(tmp_path / "run", source.identity())
    folder = q.quantize(run, source, plan_for(source, keep=keep), device="cpu", storage_dtype="float16")
    assert recorded_casts(run)[name] == {"name": name, "overflow": 2, "underflow": 5, "largest": 99840.0}
    assert run_info(run)["stages"]["quantize"]["saved_as"] == "bfloat16"
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    if keep < 1:
        assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(folder)
    floating = [p for p in model.parameters() if p.is_floating_point()]
    assert all(p.dtype == torch.bfloat16 and p.isfinite().all() for p in floating)


def test_a_cast_to_float16_that_holds_everything(tmp_path, here):
    directory = make_tiny("llama", tmp_path / "bf16", dtype="bfloat16")
    source = resolve(str(directory))
    run = open_run(tmp_path / "run", source.identity())
    folder = q.quantize(run, source, plan_for(source), device="cpu", storage_dtype="float16")
    original = load_file(directory / "model.safetensors")
    saved = load_file(folder / "model.safetensors")
    assert run_info(run)["stages"]["quantize"]["saved_as"] == "float16"
    for module in plan_for(source).protected:
        assert torch.equal(saved[f"{module}.weight"], original[f"{module}.weight"].half())
    lost = {name: int(((t.half() == 0) & (t != 0)).sum()) for name, t in original.items()}
    assert {n: c["underflow"] for n, c in recorded_casts(run).items()} == {n: c for n, c in lost.items() if c}


@pytest.fixture
def hot_source(tmp_path):
    """A bfloat16 model whose weights float16 can hold, and whose activations it can't."""
    directory = make_tiny("llama", tmp_path / "hot", dtype="bfloat16", initializer_range=0.1)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 6e4
    assert all(t.abs().max() < 60_000 for t in tensors.values())
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return resolve(str(directory))


@pytest.mark.slow
def test_activations_that_float16_cannot_hold_bring_bfloat16(hot_source, tmp_path, here, capsys):
    run = open_run(tmp_path / "run", hot_source.identity())
    plan = plan_for(hot_source, keep=1.0)
    folder = q.quantize(run, hot_source, plan, device="cpu", storage_dtype="float16")
    assert "activations overflow in stock transformers; written again in bfloat16" in capsys.readouterr().out
    assert run_info(run)["stages"]["quantize"]["saved_as"] == "bfloat16"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    logits = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(5)[None]).logits
    assert logits.isfinite().all()
    refused = open_run(tmp_path / "refused", hot_source.identity())
    with pytest.raises(CheckpointError, match=r"not numbers.*storage_dtype='bfloat16'"):
        q.quantize(refused, hot_source, plan, device="cpu", storage_dtype="float16", overflow="error")
    assert not refused.model_dir.exists()


def test_a_cast_that_would_overflow_can_be_refused(bf16_source, tmp_path, here):
    source, name = bf16_source
    run = open_run(tmp_path / "run", source.identity())
    with pytest.raises(CheckpointError, match=rf"{name}: 2 values"):
        q.quantize(run, source, plan_for(source), device="cpu", storage_dtype="float16", overflow="error")
    assert not run.model_dir.exists()


@pytest.mark.parametrize("odd", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("target", ["model.layers.1.mlp.up_proj", "model.layers.1.input_layernorm"])
@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_stock_loaders_cannot_run_one_tensor_in_another_dtype(tmp_path, here, odd, target, keep):
    """Why one tensor that float16 can't hold moves the whole checkpoint to bfloat16: nothing less works.

    With NF4 layers in it a checkpoint's dtypes are kept, and the float16 product meets another dtype; without
    any, the value is cast to float16 as it is loaded, and becomes infinite.
    """
    source = resolve(str(make_tiny("llama", tmp_path / "m")))
    run = open_run(tmp_path / "run", source.identity())
    plan = plan_for(source, keep=keep)
    if target in plan.formats:
        plan = dataclasses.replace(plan, formats={**plan.formats, target: "16bit"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(q, "check_size", lambda *_: {})  # one more layer than the plan's bytes say
        folder = q.quantize(run, source, plan, device="cpu")
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{target}.weight"] = tensors[f"{target}.weight"].to(odd)
    tensors[f"{target}.weight"].view(-1)[0] = 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    weight = model.get_parameter(f"{target}.weight")
    if keep == 1:
        assert weight.dtype == torch.float16
        assert weight.view(-1)[0].isinf()
    else:
        assert weight.dtype == odd
        with pytest.raises(RuntimeError, match="same dtype"):
            model(torch.arange(8)[None])


# --- refusals --------------------------------------------------------------------------------------------


def assert_refused(run, source, plan, error, match, **options):
    with pytest.raises(error, match=match):
        q.quantize(run, source, plan, device="cpu", **options)
    assert not run.model_dir.exists()


def test_a_plan_with_int8_is_refused_before_anything_is_written(tiny, tmp_path):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    name = plan.protected[0]
    mixed = dataclasses.replace(plan, formats={**plan.formats, name: "int8"})
    assert_refused(run, source, mixed, PlanError, f"int8.*{name}")
    assert not run.partial.exists()


def test_plans_that_do_not_fit_the_model_are_refused(tiny, tmp_path):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    other = dataclasses.replace(plan, model={**plan.model, "id": "someone/else", "sha256": "0" * 64})
    assert_refused(run, source, other, PlanError, "someone/else")
    unknown = dataclasses.replace(plan, formats={**plan.formats, "model.layers.9.mlp.up_proj": "nf4"})
    assert_refused(run, source, unknown, PlanError, r"model\.layers\.9")
    output = dataclasses.replace(plan, formats={**plan.formats, "model.embed_tokens": "nf4"})
    assert_refused(run, source, output, PlanError, "embed_tokens")
    assert not run.partial.exists()


def test_no_bitsandbytes_disk_or_memory(tiny, tmp_path, monkeypatch):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        assert_refused(run, source, plan, CheckpointError, "pip install bitsandbytes")
    with monkeypatch.context() as patch:
        patch.setattr(q.shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000_000))
        assert_refused(run, source, plan, CheckpointError, "0.00 GB are free")
    with monkeypatch.context() as patch:
        patch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=100_000_000))
        assert_refused(run, source, plan, CheckpointError, "0.1 GB are available")


@pytest.mark.parametrize(
    "fails",
    ["OSError('libcudart.so.12: cannot open shared object file')", "RuntimeError('CUDA Setup failed')"],
)
def test_a_bitsandbytes_that_cannot_be_imported(tiny, tmp_path, monkeypatch, fails):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    broken = tmp_path / "broken" / "bitsandbytes"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text(f"raise {fails}")
    monkeypatch.syspath_prepend(broken.parent)
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    reason = fails.split("'")[1]
    assert_refused(
        run, source, plan, CheckpointError, rf"can't be used here \({reason}.*pip install bitsandbytes"
    )
    assert not run.partial.exists()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_shard_size": "2 potatoes"}, "potatoes"),
        ({"max_shard_size": "0GB"}, "0GB"),
        ({"overflow": "ignore"}, "ignore.*keep_bf16"),
        ({"storage_dtype": "float8"}, "float8"),
        ({"compute_dtype": "int4"}, "int4"),
    ],
)
def test_wrong_parameters(tiny, tmp_path, options, match):
    assert_refused(*prepare(tiny("llama"), tmp_path), CheckpointError, match, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_on_a_machine_without_it(tiny, tmp_path):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    with pytest.raises(ModelError, match="no CUDA"):
        q.quantize(run, source, plan, device="cuda:0")


def test_foreign_files_in_the_target_are_left_alone(tiny, tmp_path):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    run.model_dir.mkdir()
    (run.model_dir / "thesis.txt").write_text("irreplaceable")
    with pytest.raises(CheckpointError, match="did not write"):
        q.quantize(run, source, plan, device="cpu")
    (run.model_dir / "plan.json").write_text(json.dumps({"model": {"id": "a/b", "sha256": "1" * 64}}))
    with pytest.raises(CheckpointError, match="a/b"):
        q.quantize(run, source, plan, device="cpu")
    assert (run.model_dir / "thesis.txt").read_text() == "irreplaceable"


def test_its_own_output_is_no_source(tiny, tmp_path, here):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    folder = q.quantize(run, source, plan, device="cpu")
    with pytest.raises(ModelError, match="already quantized"):
        resolve(str(folder))


# --- the checks themselves must be able to fail ----------------------------------------------------------


def spoil(monkeypatch, change):
    real = q.verify

    def spoiled(folder, *rest):
        change(folder)
        return real(folder, *rest)

    monkeypatch.setattr(q, "verify", spoiled)


@pytest.mark.parametrize("part", ["mlp.up_proj.weight", "mlp.up_proj.weight.absmax", "norm.weight"])
def test_one_wrong_bit_is_found(tiny, tmp_path, here, monkeypatch, part):
    def flip(folder):
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith(part))
        tensors[name].view(torch.uint8).view(-1)[0] ^= 1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    spoil(monkeypatch, flip)
    run, source, plan = prepare(tiny("llama"), tmp_path, keep=0)
    assert_refused(run, source, plan, CheckpointError, part.removesuffix(".absmax"))


@pytest.fixture
def all_nf4(tiny, tmp_path, here):
    run, source, plan = prepare(tiny("llama"), tmp_path, keep=0)
    return q.quantize(run, source, plan, device="cpu"), source


def bits_match(folder, good):
    """Whether a folder's files hold the tensors that another's hold, as the stage's own proof judges it."""
    files = saved_files(good)
    written = {
        name: q.tensor_hash(q.read_part(path, name, shape)) for name, (path, _, shape) in files.items()
    }
    try:
        q.check_bits(folder, written)
    except CheckpointError as error:
        assert "differ from the source's" in str(error)
        return False
    return True


def test_a_forward_leaves_our_files_alone_and_what_is_saved_after_it_is_judged(all_nf4, tmp_path):
    """CPUs with AVX512-BF16 repack NF4 weights in the first forward: saved then, the absmax is transposed.

    Our files are written from the source's. What `save_pretrained` makes after a forward is compared with
    what it makes before one: whichever CPU this is, `check_bits` accepts it if and only if it is equal.
    """
    folder, source = all_nf4
    before = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    ours = AutoModelForCausalLM.from_pretrained(folder)
    config = BitsAndBytesConfig.from_dict(dict(ours.config.quantization_config.to_dict()))
    model = AutoModelForCausalLM.from_pretrained(source.directory, quantization_config=config)
    model.save_pretrained(tmp_path / "before")
    assert bits_match(folder, tmp_path / "before")
    with torch.inference_mode():
        ours(torch.arange(8)[None])
        model(torch.arange(8)[None])
    model.save_pretrained(tmp_path / "after")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == before
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    equal = first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert bits_match(tmp_path / "after", folder) == equal


def transposed_absmax(tensors):
    name = "model.layers.2.mlp.up_proj.weight.absmax"
    tensors[name] = tensors[name].view(256, 128 // 64).T.reshape(-1).contiguous()


def last_bit_of_the_largest(tensors):
    tensors["model.embed_tokens.weight"].view(torch.uint8).view(-1)[-1] ^= 1


def another_dtype(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"].view(torch.int16)


@pytest.mark.parametrize(
    "change",
    [
        transposed_absmax,
        last_bit_of_the_largest,
        another_dtype,
        lambda tensors: tensors.pop("model.norm.weight"),
        lambda tensors: tensors.update(more=torch.zeros(2)),
    ],
)
def test_tensors_that_are_other_too_few_or_too_many_are_found(all_nf4, tmp_path, change):
    folder, _ = all_nf4
    tensors = load_file(folder / "model.safetensors")
    (tmp_path / "same").mkdir()
    save_file(tensors, tmp_path / "same" / "model.safetensors")
    assert bits_match(tmp_path / "same", folder)
    change(tensors)
    save_file(tensors, tmp_path / "same" / "model.safetensors")
    assert not bits_match(tmp_path / "same", folder)


def test_a_truncated_file_is_found(tiny, tmp_path, here, monkeypatch):
    spoil(monkeypatch, lambda folder: os.truncate(folder / "model.safetensors", 100_000))
    run, source, plan = prepare(tiny("llama"), tmp_path)
    assert_refused(run, source, plan, CheckpointError, "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("drop", ["lm_head", None])
def test_a_wrong_skip_list_is_found(tiny, tmp_path, monkeypatch, drop):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        skipped = config["quantization_config"]["llm_int8_skip_modules"]
        skipped.remove(drop or skipped[0])
        (folder / "config.json").write_text(json.dumps(config))

    spoil(monkeypatch, change)
    run, source, plan = prepare(tiny("llama_untied"), tmp_path)
    assert_refused(run, source, plan, CheckpointError, "unplanned|can't load")


def test_a_size_that_was_not_planned_is_found(tiny, tmp_path, here):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    small = dataclasses.replace(plan, bytes={**plan.bytes, "total": plan.bytes["total"] // 2})
    assert_refused(run, source, small, CheckpointError, r"predicted.*\+\d+")


def test_logits_that_differ_are_found():
    text, said = {"finite": True, "first_nonfinite": None}, {"problem": None, "text": "a", "tokens": 1}
    answer = {"transformers": "5", "torch": "2", "finite": True, "logit_spread": 2.0}
    answer |= {"text": text, "generation": said}
    q.check_use(answer | {"max_logit_difference": 0.019}, torch.float16)
    for difference in (0.021, float("nan")):
        with pytest.raises(CheckpointError, match="logits differ"):
            q.check_use(answer | {"max_logit_difference": difference}, torch.float16)
    with pytest.raises(q.NotFinite, match="logits are not numbers"):
        q.check_use(answer | {"max_logit_difference": 0.0, "finite": False}, torch.float16)


def test_a_disk_that_fills_while_a_shard_is_written_is_said(tiny, tmp_path, here, monkeypatch):
    def full(*_, **__):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    run, source, plan = prepare(tiny("llama"), tmp_path)
    assert_refused(run, source, plan, RunError, "model.safetensors: No space left on device.*Free some space")
