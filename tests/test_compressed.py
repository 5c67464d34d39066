"""The compressed-tensors checkpoint, judged by stock transformers and by compressed-tensors itself."""

from __future__ import annotations

import dataclasses
import json
import sys
from importlib.metadata import version

import pandas as pd
import pytest
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from spi_utils import fresh_check
from spi_utils import quantize as q
from spi_utils.checkpoint import (
    BACKENDS,
    ct_formats,
    ct_scheme,
    put_saved,
    read_part,
    saved_files,
    saved_weights,
)
from spi_utils.errors import CheckpointError, PlanError
from spi_utils.formats import FORMATS, dequantize, layer_bytes, quantize, size_tolerance
from spi_utils.models import list_layers, load_model, open_weights, resolve
from spi_utils.plan import ProtectionPlan, bit_rates, make_plan, price
from spi_utils.publish import unplanned
from spi_utils.runs import open_run, run_info
from tests.tiny import CONFIGS, make_tiny

ARCHS = ["llama", "llama_untied", "qwen3_5", "qwen3_5_multimodal", "gemma3", "phi3"]
MIX = ("int4_g64", "int8", "16bit", "int4_g32", "int4_g128_absmax")
ASYM = ("int4_g64", "int4_g32_asym", "int8")
CT = {"backend": "compressed-tensors", "device": "cpu"}


@pytest.fixture
def here(monkeypatch, tmp_path):
    """The fresh process' check, run in this one: a process costs seconds; one test starts a real one."""

    def ask(request):
        (tmp_path / "request.json").write_text(json.dumps(request))
        fresh_check.main(str(tmp_path / "request.json"), str(tmp_path / "answer.json"))
        return json.loads((tmp_path / "answer.json").read_text()) | {"spi_utils": False}

    monkeypatch.setattr(q, "ask", ask)


def table(source):
    rows = [dataclasses.asdict(layer) for layer in list_layers(source)]
    return pd.DataFrame(rows).assign(status="ok")


def mixed_plan(source, mix=MIX):
    """Formats in turn, where they fit; merged layers may differ: transformers doesn't mind."""
    layers = table(source)
    planned = layers[layers["quantizable"]]
    formats = {}
    for index, (name, cols) in enumerate(zip(planned["name"], planned["cols"], strict=True)):
        fmt = mix[index % len(mix)]
        formats[name] = fmt if cols % (FORMATS[fmt].group or 1) == 0 else "int8"
    plan = make_plan(layers, score="random", rule="top_k", value=0, model=source.identity())
    overall, matrix = bit_rates(layers, formats, False)
    return dataclasses.replace(
        plan,
        formats=formats,
        protected=tuple(name for name, fmt in formats.items() if fmt == "16bit"),
        bytes=price(layers, formats),
        bits_per_weight=overall,
        matrix_bits=matrix,
    )


def prepare(directory, tmp_path, mix=MIX):
    source = resolve(str(directory))
    return open_run(tmp_path / "run", source.identity()), source, mixed_plan(source, mix)


@pytest.mark.parametrize("arch", ARCHS)
def test_stock_transformers_load_exactly_the_plan(tiny, tmp_path, arch, here):
    run, source, plan = prepare(tiny(arch), tmp_path)
    folder = q.quantize(run, source, plan, **CT)
    model = AutoModelForCausalLM.from_pretrained(folder)
    packed = {name for name, module in model.named_modules() if hasattr(module, "weight_packed")}
    assert packed == {name for name, fmt in plan.formats.items() if fmt != "16bit"}
    model(torch.tensor([[1, 2, 3]]))  # the first forward unpacks
    with open_weights(source) as weights:
        for name, fmt in plan.formats.items():
            module = model.get_submodule(name)
            assert type(module) is nn.Linear
            expected = dequantize(quantize(weights.read(f"{name}.weight"), fmt), torch.float16)
            assert module.weight.dtype == torch.float16
            assert torch.equal(module.weight, expected), (name, fmt)
        rest = [name for name in weights.names if name.removesuffix(".weight") not in plan.formats]
        state = model.state_dict()
        assert rest and all(torch.equal(state[name], weights.read(name)) for name in rest)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert abs(size - plan.bytes["total"]) <= size_tolerance(size)
    assert run_info(run)["stages"]["quantize"]["bits"]["int8"] > 0


def test_a_fresh_process_computes_the_same_logits(tiny, tmp_path):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    q.quantize(run, source, plan, **CT)
    report = run_info(run)["stages"]["quantize"]["fresh_process"]
    assert report["loaded"] and report["finite"]
    assert report["max_logit_difference"] <= 1e-3 * report["logit_spread"]
    assert any("vLLM merges layers" in note for note in report["notes"])


def test_the_configuration_is_one_that_the_library_reads(tiny, tmp_path, here):
    run, source, plan = prepare(tiny("qwen3_5"), tmp_path)
    folder = q.quantize(run, source, plan, **CT)
    held = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert held["quant_method"] == "compressed-tensors" and held["format"] == "pack-quantized"
    assert held["quantization_status"] == "compressed"
    parsed = QuantizationConfig.model_validate({k: v for k, v in held.items() if k != "version"})
    assert CompressedTensorsConfig(**held).is_quantization_compressed
    targets = [target for group in parsed.config_groups.values() for target in group.targets]
    assert sorted(targets) == sorted(name for name, fmt in plan.formats.items() if fmt != "16bit")
    for name, group in parsed.config_groups.items():
        assert group.weights.num_bits == FORMATS[name].bits and group.weights.dynamic is False
        assert group.input_activations is None
    # vLLM looks for a target of every linear layer that isn't ignored, the output head included.
    model = load_model(source, device="cpu", dtype=torch.float32)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(targets) | set(parsed.ignore) == linear and "lm_head" in parsed.ignore
    assert not set(targets) & set(parsed.ignore)
    assert not any("re:" in name for name in [*targets, *parsed.ignore])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", [name for name, row in FORMATS.items() if row.bits])
def test_file_tensors_decompress_to_the_chosen_values_and_read_back(fmt, dtype):
    weight = (torch.randn(44, 384, generator=torch.Generator().manual_seed(1)) * 0.03).to(dtype)
    made = quantize(weight, fmt)
    backend = BACKENDS["compressed-tensors"]
    parts = backend.parts(made)
    theirs = PackedQuantizationCompressor.decompress(dict(parts), ct_scheme(fmt, []))["weight"]
    assert theirs.dtype == dtype and torch.equal(theirs, dequantize(made, dtype))
    back = backend.packed(fmt, parts)
    assert torch.equal(dequantize(back, dtype), theirs) and back.shape == made.shape
    nbytes = layer_bytes(fmt, 44, 384)
    assert sum(tensor.nbytes for tensor in parts.values()) == nbytes


def test_the_saved_plan_is_scored_from_its_own_file(tiny, tmp_path, here):
    run, source, plan = prepare(tiny("llama_untied"), tmp_path)
    folder = q.quantize(run, source, plan, **CT)
    stock = AutoModelForCausalLM.from_pretrained(folder)
    stock(torch.tensor([[1, 2, 3]]))
    model = load_model(source, device="cpu", dtype=torch.float32)
    with open_weights(source) as weights:
        found = put_saved(model, weights, plan.formats, folder)
    assert found == {fmt: plan.count(fmt) for fmt in set(plan.formats.values())}
    for name in plan.formats:
        assert torch.equal(model.get_submodule(name).weight, stock.get_submodule(name).weight.float())
    saved = saved_weights(folder)
    assert {name: saved.formats[name] for name in plan.formats} == plan.formats


def test_one_flipped_bit_is_found(tiny, tmp_path, here):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    folder = q.quantize(run, source, plan, **CT)
    path = folder / "model.safetensors"
    files = saved_files(folder)
    written = {name: q.tensor_hash(read_part(path, name, shape)) for name, (_, _, shape) in files.items()}
    q.check_bits(folder, written)
    raw = bytearray(path.read_bytes())
    name = next(name for name, fmt in plan.formats.items() if fmt == "int4_g64")
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    begin = header[f"{name}.weight_packed"]["data_offsets"][0] + 8 + int.from_bytes(raw[:8], "little")
    raw[begin] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=name):
        q.check_bits(folder, written)


def test_zero_points_are_written_only_where_they_can_be_loaded(tiny, tmp_path, here):
    run, source, plan = prepare(tiny("llama"), tmp_path, ASYM)
    if Version(version("compressed-tensors")) >= Version("0.18"):
        with pytest.raises(PlanError, match=r"int4_g32_asym: .* can't load zero points \(0\.17 can"):
            q.quantize(run, source, plan, **CT)
        return
    folder = q.quantize(run, source, plan, **CT)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model(torch.tensor([[1, 2, 3]]))
    with open_weights(source) as weights:
        for name, fmt in plan.formats.items():
            expected = dequantize(quantize(weights.read(f"{name}.weight"), fmt), torch.float16)
            assert torch.equal(model.get_submodule(name).weight, expected), (name, fmt)


def test_several_shards_hold_the_same_tensors(tiny, tmp_path, here):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    whole = load_file(q.quantize(run, source, plan, **CT) / "model.safetensors")
    folder = q.quantize(run, source, plan, max_shard_size="200KB", **CT)
    shards = sorted(folder.glob("*.safetensors"))
    parts = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert len(shards) > 2 and parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    AutoModelForCausalLM.from_pretrained(folder)


def test_what_the_backend_cannot_hold_is_refused_before_writing(tiny, tmp_path, monkeypatch):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    with pytest.raises(PlanError, match=r"bitsandbytes checkpoint can't hold .*backend='compressed-tensors'"):
        q.quantize(run, source, plan, device="cpu")
    nf4 = mixed_plan(source, ("nf4", "int8"))
    with pytest.raises(PlanError, match=r"compressed-tensors checkpoint can't hold nf4, which .* layers"):
        q.quantize(run, source, nf4, **CT)
    with pytest.raises(CheckpointError, match="Did you mean 'compressed-tensors'"):
        q.quantize(run, source, plan, backend="compressed_tensors", device="cpu")
    gpt2 = resolve(str(tiny("gpt2")))
    with pytest.raises(PlanError, match="Conv1D"):
        q.quantize(open_run(tmp_path / "gpt2", gpt2.identity()), gpt2, mixed_plan(gpt2), **CT)
    mixtral = resolve(str(tiny("mixtral")))
    with pytest.raises(PlanError, match="experts of a compressed-tensors checkpoint"):
        q.quantize(open_run(tmp_path / "moe", mixtral.identity()), mixtral, mixed_plan(mixtral), **CT)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(CheckpointError, match="pip install compressed-tensors"):
        q.quantize(run, source, plan, **CT)
    assert not run.model_dir.exists()


def test_groups_that_do_not_divide_are_refused(tiny, tmp_path):
    run, source, plan = prepare(tiny("llama"), tmp_path, ("int8",))
    narrow = dataclasses.replace(plan, formats=plan.formats | {next(iter(plan.formats)): "int4_g64"})
    name = next(iter(plan.formats))
    real = q.list_layers(source)
    listed = [dataclasses.replace(layer, cols=100) if layer.name == name else layer for layer in real]
    original, q.list_layers = q.list_layers, lambda source: listed
    try:
        with pytest.raises(PlanError, match=f"int4_g64 doesn't divide the 100 columns of {name}"):
            q.quantize(run, source, narrow, **CT)
    finally:
        q.list_layers = original


def test_another_programs_groups_are_refused():
    theirs = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}
    with pytest.raises(CheckpointError, match=r"group_0.*was not written by notebook 03_quantize"):
        ct_formats(theirs)
    zeros = {"num_bits": 4, "group_size": 64, "symmetric": False}
    named_as_ours = {"config_groups": {"int4_g64": {"targets": ["a"], "weights": zeros}}}
    with pytest.raises(CheckpointError, match=r"int4_g64.*was not written by notebook 03_quantize"):
        ct_formats(named_as_ours)


def test_files_may_call_modules_otherwise_than_the_model(tmp_path, here):
    """Gemma 3 with a vision part: model.language_model.… in memory, language_model.model.… in the file."""
    directory = gemma3_multimodal(tmp_path / "gemma")
    run, source, plan = prepare(directory, tmp_path, ("int4_g64", "int8", "16bit"))
    assert all(name.startswith("model.language_model.") for name in plan.formats)
    folder = q.quantize(run, source, plan, **CT)
    names = load_file(folder / "model.safetensors")
    assert any(name.startswith("language_model.model.") for name in names)
    model = AutoModelForCausalLM.from_pretrained(folder)
    packed = {name for name, module in model.named_modules() if hasattr(module, "weight_packed")}
    assert packed == {name for name, fmt in plan.formats.items() if fmt != "16bit"}
    assert unplanned(run, plan) is None


def gemma3_multimodal(directory):
    """A tiny random Gemma 3 with its vision tower, as its own class saves it."""
    from transformers import AutoConfig, Gemma3ForConditionalGeneration

    kinds = ["sliding_attention", "full_attention"]
    text = {**CONFIGS["gemma3"], "num_hidden_layers": 2, "layer_types": kinds}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config).half()
    make_tiny("gemma3", directory)  # its tokenizer
    for path in directory.glob("*.safetensors"):
        path.unlink()
    model.save_pretrained(directory)
    return directory


def test_code_of_the_models_own_is_trusted_only_when_asked(tiny, tmp_path, here):
    """put_saved reads config.json as JSON: it needs no code once the model is there."""
    run, source, plan = prepare(tiny("llama"), tmp_path)
    folder = q.quantize(run, source, plan, **CT)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "somebodys_own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(source, device="cpu", dtype=torch.float32)
    with open_weights(source) as weights:
        assert sum(put_saved(model, weights, plan.formats, folder).values()) == len(plan.formats)


def test_what_vllm_would_object_to():
    block = "model.layers.0."
    qkv = [f"{block}self_attn.{leaf}_proj" for leaf in "qkv"]
    shapes = dict.fromkeys([*qkv, f"{block}mlp.down_proj"], (256, 256))
    same = dict.fromkeys(qkv, "int8") | {f"{block}mlp.down_proj": "int4_g64"}
    assert q.serving_notes(same, shapes) == []
    (torn,) = q.serving_notes(same | {qkv[1]: "int4_g64"}, shapes)
    assert "1 groups" in torn and "q_proj" in torn
    (odd,) = q.serving_notes(same, shapes | {qkv[0]: (256, 576)})
    assert odd.startswith("1 quantized layers")
    assert q.serving_notes(dict.fromkeys(qkv, "16bit"), shapes | {qkv[0]: (5, 7)}) == []


def test_a_plan_keeps_merged_layers_together(tiny):
    layers = table(resolve(str(tiny("qwen3_5"))))
    planned = layers["quantizable"]
    generator = torch.Generator().manual_seed(0)
    for fmt in ("int4_g64", "int8"):
        cost = torch.rand(len(layers), generator=generator).numpy() * (1 if fmt == "int8" else 20)
        layers[f"fisher_{fmt}"] = layers[f"predicted_{fmt}"] = cost
    options = {
        "score": "fisher",
        "rule": "matrix_bits",
        "value": 6.5,
        "formats": ("int4_g64", "int8", "16bit"),
    }
    fused = make_plan(layers, group="fused", **options)
    free = make_plan(layers, **options)
    shapes = {row.name: (row.rows, row.cols) for row in layers[planned].itertuples()}
    merged = [note for note in q.serving_notes(fused.formats, shapes) if "merges" in note]
    assert merged == [] and any("merges" in note for note in q.serving_notes(free.formats, shapes))
    assert fused.predicted_kl > free.predicted_kl
    assert isinstance(fused, ProtectionPlan) and fused.writers == {"compressed-tensors"}
