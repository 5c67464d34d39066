"""Recipes for other engines, read by gguf, compressed-tensors, GPTQModel where installed, or public rules."""

import dataclasses
import json
import os
import re
import subprocess

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
MEANT = {"16bit": None, "int8": (8, None, True), "nf4": (4, 32, True)}
MEANT |= {name: (4, row.group, row.symmetric) for name, row in FORMATS.items() if row.group}
ARCHS = ("llama", "qwen3_5_multimodal", "gemma3", "phi3", "gpt2", "mixtral")
UP = "model.layers.0.mlp.up_proj"


def make_plan(source, formats):
    asked = (source.identity(), "fisher", "high", "budget_gb", 1.0)
    return ProtectionPlan(*asked, formats, (), False, {"total": 1}, 5.0, 5.0, None, "")


class Case:
    """A tiny model's run, a plan over many formats, and its recipes' files."""

    def __init__(self, arch, folder, **overrides):
        self.source = resolve(str(make_tiny(arch, folder / "model", **overrides)))
        rows = [dataclasses.asdict(layer) for layer in list_layers(self.source)]
        self.layers = pd.DataFrame(rows).assign(status="ok")
        self.run = open_run(folder / "run", self.source.identity())
        self.layers.to_csv(self.run.layers_csv, index=False)
        planned = self.layers[self.layers["quantizable"]]
        mixed = (MIX[index % len(MIX)] for index in range(len(planned)))
        sizes = zip(planned["name"], planned["cols"], mixed, strict=True)
        self.plan = make_plan(self.source, {n: fmt if fits(fmt, cols) else "int8" for n, cols, fmt in sizes})
        self.paths = write_recipes(self.run, self.plan, self.source)
        self.facts = recipes.model_facts(self.run, self.plan, self.source)
        self.dynamic = json.loads(self.text("GPTQModel"))["quantize_config"]["dynamic"]
        stage = yaml.safe_load(self.text("llm-compressor"))["default_stage"]
        self.groups = stage["quantization_modifiers"]["QuantizationModifier"]
        # llama-quantize's own reading: split at white space, then at the first "="; patterns in lower case.
        words = (self.run.path / "recipes" / "llama_cpp.tensor-types.txt").read_text().split()
        parts = (word.partition("=") for word in words)
        self.words, self.rules = words, [(re.compile(rule.lower()), kind) for rule, _, kind in parts]

    def text(self, engine):
        return self.paths[engine].read_text()

    def meant(self, conv1d=False):
        """{module: (bits, group, symmetric) or None} as planned, by MEANT."""
        role = dict(zip(self.layers["name"], self.layers["role"], strict=True))
        return {
            name: None if role[name] == "conv1d" and not conv1d else MEANT[fmt]
            for name, fmt in self.plan.formats.items()
        }

    def model(self, **options):
        return AutoModelForCausalLM.from_pretrained(self.source.directory, **options)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {arch: Case(arch, tmp_path_factory.mktemp(arch)) for arch in ARCHS[1:]}
    # Twelve blocks: blk.1 is a prefix of blk.10 and blk.11.
    small = {"num_hidden_layers": 12, "intermediate_size": 128}
    return made | {"llama": Case("llama_untied", tmp_path_factory.mktemp("llama"), **small)}


@pytest.fixture
def llama(cases):
    return cases["llama"]


def test_a_pattern_matches_its_name_alone():
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(120)]
    names += ["model.layers.1.mlp.up_proj2", "xmodel.layers.1.mlp.up_proj", "modelxlayers.1.mlp.up_proj"]
    for composite in (False, True):
        assert [n for n in names if re.search(pattern(names[1], composite), n)] == [names[1]]
    long = "model.language_model.layers.1.mlp.up_proj"
    assert re.search(pattern(names[1], True), long) and not re.search(pattern(names[1]), long)


# --- llama.cpp -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHS)
def test_llama_cpp_names_every_planned_tensor_once(cases, arch):
    case = cases[arch]
    tensors, cols = gguf_names(case.facts), dict(zip(case.layers["name"], case.layers["cols"], strict=True))
    for name, fmt in case.plan.formats.items():
        kinds = [kind for rule, kind in case.rules if rule.search(tensors[name])]
        assert kinds == [ggml_type(fmt, cols[name], "float16")], name
    assert len({tensors[name] for name in case.plan.formats}) == len(case.plan.formats)
    assert "without a GGUF name" not in case.text("llama.cpp")


def test_llama_cpp_names_of_linear_attention_and_of_architectures_under_other_names(cases):
    """By llama.cpp's own table of tensors for qwen35."""
    names = gguf_names(cases["qwen3_5_multimodal"].facts)
    found = {key.split("attn.")[1]: value for key, value in names.items() if "layers.0.linear_attn" in key}
    gguf = {"in_proj_qkv": "attn_qkv", "in_proj_z": "attn_gate", "in_proj_b": "ssm_beta"}
    gguf |= {"in_proj_a": "ssm_alpha", "out_proj": "ssm_out"}
    assert found == {leaf: f"blk.0.{tensor}.weight" for leaf, tensor in gguf.items()}
    planned = {"model.layers.0.self_attn.q_proj": ("linear", 64)}
    for model_type in ("mistral", "qwen3_moe", "qwen2", "cohere"):
        found = gguf_names(ModelFacts(model_type, "float16", False, planned, {}))
        assert list(found.values()) == ["blk.0.attn_q.weight"]
    with pytest.raises(PlanError, match=r"no architecture .*'brand_new'"):
        gguf_names(ModelFacts("brand_new", "float16", False, planned, {}))


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
    assert set(words[4:-3:2]) == {"--tensor-type"} and words[5:-3:2] == llama.words
    assert len(llama.words) == len(llama.plan.formats)


def test_llama_cpp_keeps_experts_in_16_bit_and_says_which_tensors_have_no_name(cases, llama):
    for tensor in ("ffn_gate_exps", "ffn_down_exps", "ffn_gate_up_exps", "ffn_gate_inp"):
        kinds = [kind for rule, kind in cases["mixtral"].rules if rule.search(f"blk.3.{tensor}.weight")]
        assert kinds == ([] if tensor == "ffn_gate_inp" else ["f16"])
    odd = "model.layers.0.strange.proj"
    facts = dataclasses.replace(llama.facts, planned={**llama.facts.planned, odd: ("linear", 128)})
    notes = recipes.llama_cpp(make_plan(llama.source, {**llama.plan.formats, odd: "int8"}), facts).notes
    assert any("without a GGUF name" in note and odd in note and "Q8_0" in note for note in notes)


def test_llama_cpp_types_are_the_nearest_in_bits():
    """Bits a weight by ggml's own block sizes: within half a bit of the format's."""
    for name, row in FORMATS.items():
        kind = ggml_type(name, 1024, "float16")
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind.upper()]]
        assert abs(8 * size / block - row.bits_per_weight) <= 0.5 and 1024 % block == 0, (name, kind)
    assert [ggml_type("int4_g64_asym", cols, "float16") for cols in (320, 512)] == ["q4_1", "q4_k"]
    assert ggml_type("nf4", 1000, "bfloat16") == "bf16"


# --- llm-compressor --------------------------------------------------------------------------------------


def schemes(model):
    """{module: (bits, group, symmetric)} that compressed-tensors has attached."""
    attached = {name: getattr(module, "quantization_scheme", None) for name, module in model.named_modules()}
    weights = {name: scheme.weights for name, scheme in attached.items() if scheme is not None}
    return {name: (one.num_bits, one.group_size, one.symmetric) for name, one in weights.items()}


@pytest.mark.parametrize("arch", ["llama", "qwen3_5_multimodal", "phi3", "mixtral"])
def test_llm_compressor_groups_reach_every_planned_module(cases, arch):
    """compressed-tensors resolves the targets itself, on the model."""
    case = cases[arch]
    model, wanted = case.model(), {name: want for name, want in case.meant().items() if want}
    apply_quantization_config(model, QuantizationConfig(**case.groups))
    assert schemes(model) == wanted
    if case.facts.composite:  # the text model inside a larger one, as a composite model holds it
        whole = nn.Module()
        whole.model = nn.Module()
        whole.model.language_model = case.model().model
        apply_quantization_config(whole, QuantizationConfig(**case.groups))
        longer = {name.replace("model.", "model.language_model.", 1): want for name, want in wanted.items()}
        assert schemes(whole) == longer


# --- GPTQModel -------------------------------------------------------------------------------------------


def resolve_dynamic(dynamic, names):
    """GPTQModel's rule (quantization/config.py): in order, without the prefix, `match` at the name's start.

    The first that matches decides; "-:" is False, anything else its dictionary.
    """
    found = {}
    for name in names:
        reached = [rule for rule in dynamic if re.match(rule[2:], name)]
        assert len(reached) <= 1 and all(rule.startswith(("+:", "-:")) for rule in reached), name
        found[name] = (False if reached[0].startswith("-:") else dynamic[reached[0]]) if reached else None
    return found


def gptq_meant(case):
    return {
        name: {"bits": want[0], "group_size": want[1] or -1, "sym": want[2]} if want else False
        for name, want in case.meant(conv1d=True).items()
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_gptqmodel_rules_match_exactly_their_module(cases, arch):
    case = cases[arch]
    assert resolve_dynamic(case.dynamic, case.plan.formats) == gptq_meant(case)
    reached = {rule: [n for n in case.plan.formats if re.match(rule[2:], n)] for rule in case.dynamic}
    assert all(len(names) == 1 or (rule.startswith("-:") and not names) for rule, names in reached.items())


def test_gptqmodel_keeps_what_is_not_planned(cases):
    dynamic = cases["mixtral"].dynamic
    others = ["lm_head", "model.layers.2.mlp.experts.3.gate_proj", "model.layers.2.mlp.experts.down_proj"]
    assert resolve_dynamic(dynamic, others) == dict.fromkeys(others, False)
    near = "model.layers.2.mlp.expertsx.up_proj"
    assert resolve_dynamic(dynamic, [near]) == {near: None}


def test_conv1d_stays_16_bit_where_only_linear_modules_are_taken(cases):
    case = cases["gpt2"]
    conv1d = list(case.layers["name"][case.layers["role"] == "conv1d"])
    assert conv1d and set(conv1d) >= set(case.plan.formats) and case.groups["config_groups"] == {}
    assert "kept in 16-bit" in case.text("llm-compressor") and conv1d[0] in case.text("torchao")


@pytest.mark.parametrize("arch", ["llama", "qwen3_5_multimodal", "mixtral"])
def test_gptqmodel_reads_its_configuration(cases, arch):
    config = pytest.importorskip("gptqmodel.quantization.config", reason="GPTQModel pins its own torch")
    case = cases[arch]
    read = config.QuantizeConfig(**json.loads(case.text("GPTQModel"))["quantize_config"])
    assert {name: read.dynamic_get(name) for name in case.plan.formats} == gptq_meant(case)


# --- torchao ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", ["llama", "gemma3", "mixtral"])
def test_torchao_file_gives_every_module_its_row(cases, arch):
    """The file's own tables, read without torchao: stand-ins note what they were given."""
    case = cases[arch]
    lines = case.text("torchao").splitlines()
    made = {"torch": torch, "IntxWeightOnlyConfig": lambda *given: given, "PerGroup": lambda group: group}
    made |= {"PerAxis": lambda axis: None}
    made["MappingType"] = type("MappingType", (), {"SYMMETRIC": True, "ASYMMETRIC": False})
    exec("\n".join(line for line in lines if not re.match(r"(from|import|config) ", line)), made)
    bits = {torch.int4: 4, torch.int8: 8}
    rows = {key: (bits[row[0]], *row[1:]) if row else None for key, row in made["formats"].items()}
    assert {name: rows[fmt] for name, fmt in made["plan"].items()} == case.meant()


# --- bad input -------------------------------------------------------------------------------------------


def test_bad_requests_are_explained_and_write_nothing(llama, tmp_path, capsys):
    run = dataclasses.replace(llama.run, path=tmp_path)
    (tmp_path / "layers.csv").write_bytes(llama.run.layers_csv.read_bytes())
    kept, foreign = (make_plan(llama.source, one) for one in ({UP: "16bit"}, {f"{UP}.x": "int8"}))
    another = dataclasses.replace(llama.plan, model={"id": "another/model", "sha256": "0"})
    for plan, said in (
        (foreign, "1 of the plan's 1 modules are not in this model"),
        (another, "this plan is for another/model, not for"),
    ):
        with pytest.raises(PlanError, match=said):
            write_recipes(run, plan, llama.source)
    assert write_recipes(run, kept, llama.source) == {}  # said, and no error
    assert "no recipes" in capsys.readouterr().out
    assert not (tmp_path / "recipes").exists()


def test_groups_that_do_not_divide_are_kept_and_said(llama):
    """An nf4 layer with odd columns has no integer equivalent in groups of 32."""
    facts = ModelFacts("llama", "bfloat16", False, {UP: ("linear", 100)}, {})
    made = {
        engine: make(make_plan(llama.source, {UP: "nf4"}), facts) for engine, (_, make) in ENGINES.items()
    }
    for engine, recipe in made.items():
        assert any("nf4" in note for note in recipe.notes), engine
        assert engine == "llama.cpp" or any("kept in 16-bit" in n and UP in n for n in recipe.notes)
    assert "nf4 → bf16" in made["llama.cpp"].notes[0]
    assert made["GPTQModel"].body["quantize_config"]["dynamic"] == {f"-:{pattern(UP)}": {}}
