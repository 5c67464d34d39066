"""The compressed-tensors checkpoint, judged by stock transformers and by compressed-tensors itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from spi_utils import quantize as q
from spi_utils.checkpoint import BACKENDS, ct_formats, put_saved, read_part, saved_files
from spi_utils.errors import CheckpointError, PlanError
from spi_utils.formats import FORMATS, dequantize, layer_bytes, quantize, size_tolerance
from spi_utils.models import load_model, open_weights, resolve
from spi_utils.plan import bit_rates, make_plan, price
from spi_utils.publish import unplanned
from spi_utils.runs import open_run, run_info
from tests.test_quantize import here, table  # noqa: F401
from tests.tiny import CONFIGS, make_tiny

ARCHS = ["llama", "llama_untied", "qwen3_5", "qwen3_5_multimodal", "gemma3", "phi3", "gemma3_multimodal"]
MIX = ("int4_g64", "int8", "16bit", "int4_g32", "int4_g128_absmax")
CT = {"backend": "compressed-tensors", "device": "cpu"}


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
    kept = tuple(name for name, fmt in formats.items() if fmt == "16bit")
    changes = {"bytes": price(layers, formats), "bits_per_weight": overall, "matrix_bits": matrix}
    return dataclasses.replace(plan, formats=formats, protected=kept, **changes)


def prepare(directory, tmp_path, mix=MIX):
    source = resolve(str(directory))
    return open_run(tmp_path / "run", source.identity()), source, mixed_plan(source, mix)


@pytest.fixture(scope="module")
def llama(tiny, tmp_path_factory, here):  # noqa: F811
    run, source, plan = prepare(tiny("llama"), tmp_path_factory.mktemp("ct"))
    return q.quantize(run, source, plan, **CT), source, plan


def gemma3_multimodal(directory):
    """A tiny random Gemma 3 with its vision tower, as its own class saves it: model.language_model.… in
    memory, language_model.model.… in the file."""
    from transformers import AutoConfig, Gemma3ForConditionalGeneration

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


@pytest.mark.parametrize("arch", ARCHS)
def test_stock_transformers_load_exactly_the_plan(tiny, tmp_path, arch):
    multimodal = arch == "gemma3_multimodal"
    run, source, plan = prepare(gemma3_multimodal(tmp_path / "g") if multimodal else tiny(arch), tmp_path)
    folder = q.quantize(run, source, plan, **CT)
    if multimodal:
        assert any(
            name.startswith("language_model.model.") for name in load_file(folder / "model.safetensors")
        )
        assert unplanned(run, plan) is None
    model = AutoModelForCausalLM.from_pretrained(folder)
    packed = {name for name, module in model.named_modules() if hasattr(module, "weight_packed")}
    assert packed == {name for name, fmt in plan.formats.items() if fmt != "16bit"}
    model(torch.tensor([[1, 2, 3]]))  # the first forward unpacks
    with open_weights(source) as weights:
        for name, fmt in plan.formats.items():
            module = model.get_submodule(name)
            expected = dequantize(quantize(weights.read(f"{name}.weight"), fmt), torch.float16)
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
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert abs(size - plan.bytes["total"]) <= size_tolerance(size)


@pytest.mark.slow
def test_a_fresh_process_computes_the_same_logits(tiny, tmp_path, here, monkeypatch):  # noqa: F811
    monkeypatch.setattr(q, "ask", here)
    run, source, plan = prepare(tiny("llama"), tmp_path)
    q.quantize(run, source, plan, **CT)
    report = run_info(run)["stages"]["quantize"]["fresh_process"]
    assert report["loaded"] and report["finite"] and not report["spi_utils"]
    assert report["max_logit_difference"] <= 1e-3 * report["logit_spread"]


def test_the_configuration_is_one_that_the_library_reads(llama):
    folder, source, plan = llama
    held = json.loads((folder / "config.json").read_text())["quantization_config"]
    wanted = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    assert held | wanted | {"quantization_status": "compressed"} == held
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
@pytest.mark.parametrize("fmt", [name for name, row in FORMATS.items() if row.bits and row.symmetric])
def test_file_tensors_decompress_to_the_chosen_values(fmt, dtype):
    weight = (torch.randn(44, 384, generator=torch.Generator().manual_seed(1)) * 0.03).to(dtype)
    made, backend = quantize(weight, fmt), BACKENDS["compressed-tensors"]
    parts = backend.parts(made)
    theirs = backend.values(fmt, parts)
    assert theirs.dtype == dtype and torch.equal(theirs, dequantize(made, dtype))
    assert sum(tensor.nbytes for tensor in parts.values()) == layer_bytes(fmt, 44, 384)


def test_one_flipped_bit_is_found_and_code_of_the_models_own_is_not_run(llama, tmp_path):
    """put_saved reads config.json as JSON: it needs no code once the model is there."""
    folder, source, plan = Path(shutil.copytree(llama[0], tmp_path / "c")), *llama[1:]
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "somebodys_own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    model = load_model(source, device="cpu", dtype=torch.float32)
    with open_weights(source) as weights:
        assert sum(put_saved(model, weights, plan.formats, folder).values()) == len(plan.formats)
    files = saved_files(folder)
    written = {name: q.tensor_hash(read_part(path, name, shape)) for name, (path, _, shape) in files.items()}
    raw = bytearray((folder / "model.safetensors").read_bytes())
    name, start = next(name for name, fmt in plan.formats.items() if fmt == "int4_g64"), 8
    start += int.from_bytes(raw[:8], "little")
    raw[json.loads(raw[8:start])[f"{name}.weight_packed"]["data_offsets"][0] + start] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    with pytest.raises(CheckpointError, match=name):
        q.check_bits(folder, written)


def test_several_shards_hold_the_same_tensors(tiny, tmp_path, llama):
    run, source, plan = prepare(tiny("llama"), tmp_path)
    whole = load_file(llama[0] / "model.safetensors")
    folder = q.quantize(run, source, plan, max_shard_size="200KB", **CT)
    shards = [load_file(path) for path in folder.glob("*.safetensors")]
    parts = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert len(shards) > 2 and parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)


@pytest.mark.parametrize(
    ("arch", "mix", "backend", "match"),
    [
        ("llama", MIX, "bitsandbytes", "bitsandbytes checkpoint can't hold .*backend='compressed-tensors'"),
        ("llama", ("nf4", "int8"), "compressed-tensors", "can't hold nf4, which .* layers"),
        ("llama", ("int4_g32_asym",), "compressed-tensors", "int4_g32_asym.*zero points"),
        ("gpt2", MIX, "compressed-tensors", "Conv1D"),
        ("mixtral", MIX, "compressed-tensors", "stack of experts"),
    ],
)
def test_what_the_backend_cannot_hold_is_refused_before_writing(tiny, tmp_path, arch, mix, backend, match):
    run, source, plan = prepare(tiny(arch), tmp_path, mix)
    with pytest.raises(PlanError, match=match):
        q.quantize(run, source, plan, backend=backend, device="cpu")
    assert not run.model_dir.exists() and not run.partial.exists()


def test_groups_that_do_not_divide_or_a_missing_package_are_refused(tmp_path, monkeypatch):
    run, source, plan = prepare(
        make_tiny("llama", tmp_path / "m", intermediate_size=200), tmp_path, ("int8",)
    )
    layers = table(source)
    with pytest.raises(PlanError, match=r"int4_g128: groups of 128 don't divide its 200 columns"):
        price(layers, dict.fromkeys(layers["name"][layers["quantizable"]], "int4_g128"))
    name = next(name for name in plan.formats if name.endswith("down_proj"))
    narrow = dataclasses.replace(plan, formats=plan.formats | {name: "int4_g64"})
    with pytest.raises(PlanError, match=f"{name} can't be int4_g64.*200 columns"):
        q.quantize(run, source, narrow, **CT)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(CheckpointError, match="pip install compressed-tensors"):
        q.quantize(run, source, plan, **CT)


@pytest.mark.parametrize("name", ["group_0", "int4_g64"])
def test_another_programs_groups_are_refused(name):
    zeros = {"num_bits": 4, "group_size": 64, "symmetric": False}
    with pytest.raises(CheckpointError, match=rf"{name}.*03_quantize"):
        ct_formats({"config_groups": {name: {"targets": ["a"], "weights": zeros}}})


def test_a_plan_keeps_merged_layers_together(tiny):
    layers = table(resolve(str(tiny("qwen3_5"))))
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
    fused, free = make_plan(layers, group="fused", **options), make_plan(layers, **options)

    def torn(plan):
        merged = {}
        for name, fmt in plan.formats.items():
            merged.setdefault(name.replace("up_", "gate_").replace("k_proj", "q_proj"), set()).add(fmt)
        return any(len(found) > 1 for found in merged.values())

    assert torn(free) and not torn(fused) and fused.predicted_kl > free.predicted_kl
    assert fused.writers == {"compressed-tensors"}
