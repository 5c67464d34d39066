"""The compressed-tensors checkpoint, judged by stock transformers and by compressed-tensors itself."""

from __future__ import annotations

import dataclasses
import json
import sys
from itertools import cycle

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from spi_utils import quantize as q
from spi_utils.checkpoint import BACKENDS, ct_formats, put_saved
from spi_utils.errors import CheckpointError, PlanError
from spi_utils.formats import FORMATS, dequantize, fits, layer_bytes, quantize
from spi_utils.models import load_model, open_weights, resolve
from spi_utils.plan import make_plan, price
from spi_utils.publish import unplanned
from spi_utils.runs import open_run
from tests.test_quantize import here, table  # noqa: F401
from tests.tiny import CONFIGS, make_tiny

ARCHS = ["llama", "llama_untied", "qwen3_5", "qwen3_5_multimodal", "gemma3", "phi3", "gemma3_multimodal"]
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


def prepare(directory, tmp_path, mix=MIX):
    source = resolve(str(directory))
    return open_run(tmp_path / "run", source.identity()), source, mixed_plan(source, mix)


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
        names = load_file(folder / "model.safetensors")
        assert (
            any(name.startswith("language_model.model.") for name in names) and unplanned(run, plan) is None
        )
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("fmt", [name for name, row in FORMATS.items() if row.bits and row.symmetric])
def test_file_tensors_decompress_to_the_chosen_values(fmt, dtype):
    weight = (torch.randn(44, 384, generator=torch.Generator().manual_seed(1)) * 0.03).to(dtype)
    made, (parts_of, values_of, _) = quantize(weight, fmt), BACKENDS["compressed-tensors"]
    parts = parts_of(made)
    theirs = values_of(fmt, parts)
    assert theirs.dtype == dtype and torch.equal(theirs, dequantize(made, dtype))
    assert sum(tensor.nbytes for tensor in parts.values()) == layer_bytes(fmt, 44, 384)


@pytest.mark.parametrize(
    ("arch", "mix", "backend", "match"),
    [
        ("llama", MIX, "bitsandbytes", "bitsandbytes checkpoint can't hold .*backend='compressed-tensors'"),
        ("llama", ("nf4", "int8"), CT["backend"], "can't hold nf4, which .* layers"),
        ("llama", ("int4_g32_asym",), CT["backend"], "int4_g32_asym.*zero points"),
        ("gpt2", MIX, CT["backend"], "Conv1D"),
        ("mixtral", MIX, CT["backend"], "stack of experts"),
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
