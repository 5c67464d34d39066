"""Recipes for other engines, judged by the engines' own packages where installed, and by their public rules.

llm-compressor, GPTQModel and torchao pin versions of their own; their tests run wherever they are installed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
from importlib import metadata

import pandas as pd
import pytest
import torch
import yaml
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from torch import nn
from transformers import AutoModelForCausalLM

from spi_utils import recipes
from spi_utils.errors import PlanError
from spi_utils.formats import FORMATS, fits
from spi_utils.models import list_layers, resolve
from spi_utils.plan import ProtectionPlan
from spi_utils.recipes import ENGINES, ModelFacts, ggml_type, gguf_names, pattern, write_recipes
from spi_utils.runs import open_run
from tests.tiny import make_tiny

MIX = ("int4_g64", "int8", "16bit", "int4_g32_asym", "int4_g128_absmax", "nf4", "int4_g32")
# what a format should become: bits, group, symmetric
MEANT = {
    "16bit": None,
    "int8": (8, None, True),
    "nf4": (4, 32, True),
    **{name: (4, row.group, row.symmetric) for name, row in FORMATS.items() if row.group},
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model's run, a plan over many formats, and its recipes' files."""

    source: object
    run: object
    plan: ProtectionPlan
    layers: pd.DataFrame
    paths: dict

    def text(self, engine):
        return self.paths[engine].read_text()


def make_plan(source, formats):
    size = {"total": 1}
    return ProtectionPlan(
        source.identity(), "fisher", "high", "budget_gb", 1.0, formats, (), False, size, 5.0, 5.0, None, ""
    )


def make_case(arch, folder, mix=MIX, **overrides):
    source = resolve(str(make_tiny(arch, folder / "model", **overrides)))
    layers = pd.DataFrame([dataclasses.asdict(layer) for layer in list_layers(source)]).assign(status="ok")
    run = open_run(folder / "run", source.identity())
    layers.to_csv(run.layers_csv, index=False)
    planned = layers[layers["quantizable"]]
    formats = {}
    for index, (name, cols) in enumerate(zip(planned["name"], planned["cols"], strict=True)):
        fmt = mix[index % len(mix)]
        formats[name] = fmt if fits(fmt, cols) else "int8"
    plan = make_plan(source, formats)
    return Case(source, run, plan, layers, write_recipes(run, plan, source))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Twelve blocks: blk.1 is a prefix of blk.10 and blk.11."""
    small = {"num_hidden_layers": 12, "intermediate_size": 128}
    return make_case("llama_untied", tmp_path_factory.mktemp("llama"), **small)


@pytest.fixture(scope="module")
def cases(tmp_path_factory, llama):
    archs = ("qwen3_5_multimodal", "gemma3", "phi3", "gpt2", "mixtral")
    made = {arch: make_case(arch, tmp_path_factory.mktemp(arch)) for arch in archs}
    return {"llama": llama, **made}


def rules_of(case):
    """llama-quantize's own reading: split at white space, then at the first "="; patterns in lower case."""
    words = (case.run.path / "recipes" / "llama_cpp.tensor-types.txt").read_text().split()
    return [(re.compile(rule.lower()), kind) for rule, _, kind in (word.partition("=") for word in words)]


def dynamic_of(case):
    return json.loads(case.text("GPTQModel"))["quantize_config"]["dynamic"]


def groups_of(case):
    stage = yaml.safe_load(case.text("llm-compressor"))["default_stage"]
    return stage["quantization_modifiers"]["QuantizationModifier"]


def held(case, engine_takes_conv1d=False):
    """{module: (bits, group, symmetric) or None} as planned, by MEANT."""
    role = dict(zip(case.layers["name"], case.layers["role"], strict=True))
    return {
        name: None if role[name] == "conv1d" and not engine_takes_conv1d else MEANT[fmt]
        for name, fmt in case.plan.formats.items()
    }


# --- all of them -----------------------------------------------------------------------------------------


def test_every_engine_has_a_file_that_says_who_checked_it(llama):
    assert list(llama.paths) == ["llama.cpp", "llm-compressor", "GPTQModel", "torchao"]
    for engine, path in llama.paths.items():
        assert path.parent == llama.run.path / "recipes"
        text = path.read_text()
        assert engine in text and "checked" in text and "predicted KL" in text and "nf4" in text


def test_checked_is_found_out_and_not_typed(llama, monkeypatch):
    recipe = ENGINES["GPTQModel"].make(llama.plan, facts_of(llama))
    read = []

    def version(package):
        if package == "gptqmodel":
            return "9.9"
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(recipes.metadata, "version", version)
    row = dataclasses.replace(ENGINES["GPTQModel"], readers=(("gptqmodel", read.append, recipes.PARSED),))
    monkeypatch.setitem(recipes.ENGINES, "GPTQModel", row)
    assert recipes.check("GPTQModel", recipe) == "parsed with gptqmodel 9.9"
    assert read == [recipe.body]
    assert recipes.check("torchao", recipe) == "by rule, not parsed"


def test_a_package_that_does_not_import_has_parsed_nothing(llama, monkeypatch):
    def broken(body):
        raise ImportError("no module named pcre")

    monkeypatch.setattr(recipes.metadata, "version", lambda package: "9.9")
    row = dataclasses.replace(ENGINES["GPTQModel"], readers=(("gptqmodel", broken, recipes.PARSED),))
    monkeypatch.setitem(recipes.ENGINES, "GPTQModel", row)
    checked = recipes.check("GPTQModel", recipes.Recipe({}, ()))
    assert checked.startswith("by rule, not parsed (gptqmodel 9.9 is installed, but") and "pcre" in checked


def test_a_recipe_that_its_reader_refuses_is_an_error(monkeypatch):
    monkeypatch.setattr(recipes.metadata, "version", lambda package: "9.9")
    with pytest.raises(PlanError, match=r"gguf 9\.9 refuses .* llama\.cpp.*Q9_9"):
        recipes.check("llama.cpp", recipes.Recipe("--tensor-type '^a$=q9_9'", ()))


def facts_of(case):
    return recipes.model_facts(case.run, case.plan, case.source)


def test_a_pattern_matches_its_name_alone():
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(120)]
    names += ["model.layers.1.mlp.up_proj2", "xmodel.layers.1.mlp.up_proj", "modelxlayers.1.mlp.up_proj"]
    for composite in (False, True):
        found = [name for name in names if re.search(pattern(names[1], composite), name)]
        assert found == [names[1]]
    long = "model.language_model.layers.1.mlp.up_proj"
    assert re.search(pattern(names[1], True), long) and not re.search(pattern(names[1]), long)


# --- llama.cpp -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "qwen3_5_multimodal", "gemma3", "phi3", "gpt2", "mixtral"])
def test_llama_cpp_names_every_planned_tensor_once(cases, arch):
    case = cases[arch]
    tensors, rules = gguf_names(facts_of(case)), rules_of(case)
    cols = dict(zip(case.layers["name"], case.layers["cols"], strict=True))
    for name, fmt in case.plan.formats.items():
        matches = [kind for rule, kind in rules if rule.search(tensors[name])]
        assert matches == [ggml_type(fmt, cols[name], "float16")], name
    planned = [tensors[name] for name in case.plan.formats]
    assert len(set(planned)) == len(planned)
    assert "without a GGUF name" not in case.text("llama.cpp")


def test_llama_cpp_names_of_linear_attention(cases):
    """By llama.cpp's own table of tensors for qwen35."""
    names = gguf_names(facts_of(cases["qwen3_5_multimodal"]))
    found = {
        key.split("layers.0.linear_attn.")[1]: value for key, value in names.items() if "0.linear" in key
    }
    assert found == {
        "in_proj_qkv": "blk.0.attn_qkv.weight",
        "in_proj_z": "blk.0.attn_gate.weight",
        "in_proj_b": "blk.0.ssm_beta.weight",
        "in_proj_a": "blk.0.ssm_alpha.weight",
        "out_proj": "blk.0.ssm_out.weight",
    }


def test_llama_cpp_command_reaches_llama_quantize_as_meant(llama, tmp_path):
    """A shell runs it; a stand-in prints its arguments."""
    stand_in = tmp_path / "llama-quantize"
    stand_in.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    stand_in.chmod(0o755)
    command = ["sh", str(llama.paths["llama.cpp"]), "a model.gguf", "out.gguf"]
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = subprocess.run(command, env=path, capture_output=True, text=True, check=True).stdout.splitlines()
    assert words[:4] == ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
    assert words[-3:] == ["a model.gguf", "out.gguf", "Q8_0"]
    assert set(words[4:-3:2]) == {"--tensor-type"}
    assert words[5:-3:2] == (llama.run.path / "recipes" / "llama_cpp.tensor-types.txt").read_text().split()
    assert len(words[5:-3:2]) == len(llama.plan.formats)


def test_llama_cpp_keeps_experts_in_16_bit(cases):
    def kinds(tensor):
        return [kind for rule, kind in rules_of(cases["mixtral"]) if rule.search(tensor)]

    for tensor in ("ffn_gate_exps", "ffn_down_exps", "ffn_gate_up_exps"):
        assert kinds(f"blk.3.{tensor}.weight") == ["f16"]
    assert kinds("blk.3.ffn_gate_inp.weight") == []


def test_llama_cpp_types_are_the_nearest_in_bits():
    """Bits a weight by ggml's own block sizes: within half a bit of the format's."""
    for name, row in FORMATS.items():
        kind = ggml_type(name, 1024, "float16")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
        assert abs(8 * size / block - row.bits_per_weight) <= 0.5, (name, kind)
        assert 1024 % block == 0
    assert ggml_type("int4_g64_asym", 320, "float16") == "q4_1"
    assert ggml_type("int4_g64_asym", 512, "float16") == "q4_k"
    assert ggml_type("nf4", 1000, "bfloat16") == "bf16"


def test_llama_cpp_says_which_tensors_have_no_name(llama):
    facts = facts_of(llama)
    odd = "model.layers.0.strange.proj"
    more = dataclasses.replace(facts, planned={**facts.planned, odd: ("linear", 128)})
    plan = dataclasses.replace(llama.plan, formats={**llama.plan.formats, odd: "int8"})
    notes = recipes.llama_cpp(plan, more).notes
    assert any("without a GGUF name" in note and odd in note and "Q8_0" in note for note in notes)


@pytest.mark.parametrize(
    ("model_type", "tensor"),
    [("mistral", "blk.0.attn_q"), ("qwen3_moe", "blk.0.attn_q"), ("qwen2", "blk.0.attn_q"), ("cohere", None)],
)
def test_llama_cpp_architectures_under_other_names(model_type, tensor):
    name = "model.layers.0.self_attn.q_proj"
    found = gguf_names(ModelFacts(model_type, "float16", False, {name: ("linear", 64)}, {}))
    assert found == {name: f"{tensor or 'blk.0.attn_q'}.weight"}


# --- llm-compressor --------------------------------------------------------------------------------------


class Tiny(nn.Module):
    """The text model inside a larger one, as a composite model holds it."""

    def __init__(self, inner):
        super().__init__()
        self.model = nn.Module()
        self.model.language_model = inner.model


def schemes(model):
    """{module: (bits, group, symmetric)} that compressed-tensors has attached."""
    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            found[name] = (scheme.weights.num_bits, scheme.weights.group_size, scheme.weights.symmetric)
    return found


@pytest.mark.parametrize("arch", ["llama", "qwen3_5_multimodal", "phi3", "mixtral"])
def test_llm_compressor_groups_reach_every_planned_module(cases, arch):
    """compressed-tensors resolves the targets itself, on the model."""
    case = cases[arch]
    model = AutoModelForCausalLM.from_pretrained(case.source.directory)
    apply_quantization_config(model, QuantizationConfig(**groups_of(case)))
    assert schemes(model) == {name: want for name, want in held(case).items() if want}


def test_llm_compressor_reaches_the_text_part_of_a_larger_model(cases):
    case = cases["qwen3_5_multimodal"]
    whole = Tiny(AutoModelForCausalLM.from_pretrained(case.source.directory))
    apply_quantization_config(whole, QuantizationConfig(**groups_of(case)))
    wanted = {name.replace("model.", "model.language_model.", 1): w for name, w in held(case).items() if w}
    assert schemes(whole) == wanted


def test_llm_compressor_searches_scales_where_the_plan_does(llama):
    observers = {
        fmt: group["weights"]["observer"] for fmt, group in groups_of(llama)["config_groups"].items()
    }
    assert observers == {
        "int4_g128_absmax": "memoryless_minmax",
        "int4_g32": "memoryless_mse",
        "int4_g32_asym": "memoryless_mse",
        "int4_g64": "memoryless_mse",
        "int8": "memoryless_minmax",
    }
    assert "lm_head" in groups_of(llama)["ignore"]


def test_conv1d_stays_16_bit_where_only_linear_modules_are_taken(cases):
    case = cases["gpt2"]
    conv1d = list(case.layers["name"][case.layers["role"] == "conv1d"])
    assert conv1d and set(conv1d) >= set(case.plan.formats)
    assert groups_of(case)["config_groups"] == {}
    assert "kept in 16-bit" in case.text("llm-compressor") and conv1d[0] in case.text("torchao")
    assert resolve_dynamic(dynamic_of(case), case.plan.formats) == gptq_meant(case)


def test_llm_compressor_reads_its_recipe(llama):
    theirs = pytest.importorskip(
        "llmcompressor.recipe", reason="llm-compressor pins its own compressed-tensors"
    )
    (modifier,) = theirs.Recipe.create_instance(str(llama.paths["llm-compressor"])).modifiers
    found = {
        target: (group.weights.num_bits, group.weights.group_size, group.weights.symmetric)
        for group in modifier.resolved_config.config_groups.values()
        for target in group.targets
    }
    assert found == {name: want for name, want in held(llama).items() if want}
    assert modifier.resolved_targets == set(found)
    version = metadata.version("llmcompressor")
    assert f"# checked: parsed with llmcompressor {version}\n" in llama.text("llm-compressor")


# --- GPTQModel -------------------------------------------------------------------------------------------


def resolve_dynamic(dynamic, names):
    """GPTQModel's rule (quantization/config.py): in order, without the prefix, `match` at the name's start.

    The first that matches decides; "-:" is False, anything else its dictionary.
    """
    found = {}
    for name in names:
        matches = [rule for rule in dynamic if re.match(rule.removeprefix("+:").removeprefix("-:"), name)]
        assert len(matches) <= 1, name
        found[name] = (False if matches[0].startswith("-:") else dynamic[matches[0]]) if matches else None
    return found


def gptq_meant(case):
    return {
        name: {"bits": want[0], "group_size": want[1] or -1, "sym": want[2]} if want else False
        for name, want in held(case, engine_takes_conv1d=True).items()
    }


@pytest.mark.parametrize("arch", ["llama", "qwen3_5_multimodal", "gemma3", "phi3", "mixtral"])
def test_gptqmodel_rules_match_exactly_their_module(cases, arch):
    case = cases[arch]
    dynamic = dynamic_of(case)
    assert resolve_dynamic(dynamic, case.plan.formats) == gptq_meant(case)
    for rule in dynamic:
        reached = [n for n in case.plan.formats if re.match(rule.removeprefix("+:").removeprefix("-:"), n)]
        assert len(reached) == (0 if rule.startswith("-:") and not reached else 1)


def test_gptqmodel_keeps_what_is_not_planned(cases):
    dynamic = dynamic_of(cases["mixtral"])
    others = ["lm_head", "model.layers.2.mlp.experts.3.gate_proj", "model.layers.2.mlp.experts.down_proj"]
    assert resolve_dynamic(dynamic, others) == dict.fromkeys(others, False)
    assert resolve_dynamic(dynamic, ["model.layers.2.mlp.expertsx.up_proj"]) == {
        "model.layers.2.mlp.expertsx.up_proj": None
    }


def test_gptqmodel_reads_its_configuration(cases):
    config = pytest.importorskip(
        "gptqmodel.quantization.config", reason="GPTQModel pins its own torch and transformers"
    )
    for arch in ("llama", "qwen3_5_multimodal", "mixtral"):
        case = cases[arch]
        held = json.loads(case.text("GPTQModel"))
        read = config.QuantizeConfig(**held["quantize_config"])
        found = {name: read.dynamic_get(name) for name in case.plan.formats}
        assert found == gptq_meant(case)
        assert held["checked"] == f"parsed with gptqmodel {metadata.version('gptqmodel')}"


# --- torchao ---------------------------------------------------------------------------------------------


def stand_in():
    """Names as torchao's configuration has them, that only note what they were given."""

    def note(*given):
        return given

    return {"IntxWeightOnlyConfig": note, "PerGroup": lambda g: g, "PerAxis": lambda axis: None}


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mixtral"])
def test_torchao_file_gives_every_module_its_row(cases, arch):
    """The file's own tables, read without torchao."""
    case = cases[arch]
    lines = [
        line for line in case.text("torchao").splitlines() if not re.match(r"(from|import|config) ", line)
    ]
    mapping = type("MappingType", (), {"SYMMETRIC": True, "ASYMMETRIC": False})
    made = {"torch": torch, "MappingType": mapping, **stand_in()}
    exec("\n".join(lines), made)
    bits = {torch.int4: 4, torch.int8: 8}
    rows = {key: (bits[row[0]], *row[1:]) if row else None for key, row in made["formats"].items()}
    assert {name: rows[fmt] for name, fmt in made["plan"].items()} == held(case)


@pytest.mark.parametrize("arch", ["llama", "qwen3_5_multimodal"])
def test_torchao_quantizes_a_model_with_it(cases, arch):
    torchao = pytest.importorskip("torchao", reason="torchao is not among this project's packages")
    case = cases[arch]
    made = {}
    exec(case.text("torchao"), made)
    model = AutoModelForCausalLM.from_pretrained(case.source.directory, dtype=torch.float32)
    before = {
        name: module.weight.clone() for name, module in model.named_modules() if name in case.plan.formats
    }
    torchao.quantize_(model, made["config"], filter_fn=None)
    for name, want in held(case).items():
        weight = model.get_submodule(name).weight
        if want is None:
            assert torch.equal(weight, before[name]), name
            continue
        bits, group, _ = want
        assert weight.target_dtype == {4: torch.int4, 8: torch.int8}[bits]
        assert weight.block_size == (1, group or before[name].shape[1])
        error = (weight.dequantize() - before[name]).norm() / before[name].norm()
        assert 0 < error < (0.2 if bits == 4 else 0.02)
    assert type(model.get_output_embeddings().weight) is nn.Parameter
    assert torch.isfinite(model(torch.ones(1, 4, dtype=torch.long)).logits).all()
    assert f"# checked: parsed with torchao {metadata.version('torchao')}\n" in case.text("torchao")


# --- bad input -------------------------------------------------------------------------------------------


def test_bad_requests_are_explained_and_write_nothing(llama, tmp_path, capsys):
    first = next(iter(llama.plan.formats))
    run = dataclasses.replace(llama.run, path=tmp_path)
    (tmp_path / "layers.csv").write_bytes(llama.run.layers_csv.read_bytes())

    def ask(plan=llama.plan, **options):
        return write_recipes(run, plan, llama.source, **options)

    with pytest.raises(PlanError, match="no recipes for 'ollama'; the engines are llama"):
        ask(engines=["ollama"])
    with pytest.raises(PlanError, match="keeps every layer in 16-bit"):
        ask(make_plan(llama.source, {first: "16bit"}), engines=["torchao"])
    assert ask(make_plan(llama.source, {first: "16bit"})) == {}  # none asked for: said, and no error
    assert capsys.readouterr().out.count("no recipe for") == len(ENGINES)
    with pytest.raises(
        PlanError, match=r"1 of the plan's 1 modules are not in this model: model\.layers\.77"
    ):
        ask(make_plan(llama.source, {"model.layers.77.mlp.up_proj": "int8"}))
    with pytest.raises(PlanError, match="this plan is for another/model, not for"):
        ask(dataclasses.replace(llama.plan, model={"id": "another/model", "sha256": "0"}))
    assert not (tmp_path / "recipes").exists()


def test_an_architecture_that_gguf_does_not_know():
    facts = ModelFacts("brand_new", "float16", False, {"model.layers.0.a": ("linear", 64)}, {})
    with pytest.raises(PlanError, match=r"gguf [\d.]+ knows no architecture .*'brand_new'.*`engines`"):
        gguf_names(facts)


def test_groups_that_do_not_divide_are_kept_and_said(llama):
    """An nf4 layer with odd columns has no integer equivalent in groups of 32."""
    name = "model.layers.0.mlp.up_proj"
    facts = ModelFacts("llama", "bfloat16", False, {name: ("linear", 100)}, {})
    plan = make_plan(llama.source, {name: "nf4"})
    for engine, row in ENGINES.items():
        recipe = row.make(plan, facts)
        assert any("nf4" in note for note in recipe.notes), engine
        assert engine == "llama.cpp" or any("kept in 16-bit" in n and name in n for n in recipe.notes)
    assert "nf4 → bf16" in recipes.llama_cpp(plan, facts).notes[0]
    assert recipes.gptqmodel(plan, facts).body["quantize_config"]["dynamic"] == {f"-:{pattern(name)}": {}}
