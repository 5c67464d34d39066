"""A plan as arguments of llama.cpp's llama-quantize."""

from __future__ import annotations

import re
from importlib import metadata

from spi_utils.engines.common import ModelFacts, Recipe, pattern
from spi_utils.errors import PlanError
from spi_utils.formats import format_row
from spi_utils.plan import ProtectionPlan

BASE_TYPE = "Q8_0"  # llama.cpp's, for a tensor that no rule names: nearly lossless, and no mixture of types
# model_type -> llama.cpp's architecture, where they differ by more than "_", "-" and "_text"
GGUF_ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "cohere": "command-r", "phi": "phi2"}


def ggml_type(fmt: str, cols: int, storage_dtype: str) -> str:
    """llama.cpp's nearest type, all with blocks of 32 (q4_k: 256), in bits a weight.

    16bit → f16 or bf16; nf4 (4.5) → iq4_nl (4.5: its 16 levels are unequal too); int8 (8) → q8_0 (8.5);
    int4 (4.125 to 4.5) → q4_0 (4.5); int4 asymmetric (4.16 to 4.63) → q4_k (4.5), or q4_1 (5) where 256
    doesn't divide the columns. Columns that 32 doesn't divide stay 16-bit, as in llama-quantize.
    """
    half = {"float16": "f16", "bfloat16": "bf16"}[storage_dtype]
    row = format_row(fmt)
    if fmt == "16bit" or cols % 32:
        return half
    if fmt == "nf4":
        return "iq4_nl"
    if row.bits == 8:
        return "q8_0"
    if row.symmetric:
        return "q4_0"
    return "q4_1" if cols % 256 else "q4_k"


def gguf_names(facts: ModelFacts) -> dict[str, str | None]:
    """{module: GGUF tensor} by gguf's own map; None where it has no name.

    Raises:
        PlanError: gguf knows no such architecture.
    """
    import gguf

    def plain(name: str) -> str:
        return re.sub(r"_text$|[-_]", "", name)

    wanted = plain(GGUF_ARCHITECTURES.get(facts.model_type, facts.model_type))
    found = [arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if plain(name) == wanted]
    if not found:
        raise PlanError(
            f"gguf {metadata.version('gguf')} knows no architecture for the model type {facts.model_type!r}: "
            "install a newer gguf, or leave llama.cpp out of `engines`."
        )
    names = [*facts.planned, *facts.others]
    blocks = [int(number) for name in names for number in re.findall(r"\.(\d+)\.", name)[:1]]
    table = gguf.get_tensor_name_map(found[0], max(blocks, default=0) + 1)
    held = {name: table.get_name(name) for name in names}
    return {name: f"{tensor}.weight" if tensor else None for name, tensor in held.items()}


def llama_cpp(plan: ProtectionPlan, facts: ModelFacts) -> Recipe:
    """A llama-quantize command with one `--tensor-type` a tensor, and the same as a `--tensor-type-file`.

    llama-quantize searches each tensor's name for the patterns (`std::regex_search`, lower case); the first
    match has won in some versions, the last in others: here no tensor matches two. It drops them with a base
    type that isn't quantized, and older versions with `--pure`; both are avoided.
    """
    half, tensors = ggml_type("16bit", 32, facts.storage_dtype), gguf_names(facts)
    cols = {name: size for name, (_, size) in facts.planned.items()}
    types = {name: ggml_type(fmt, cols[name], facts.storage_dtype) for name, fmt in plan.formats.items()}
    own_flag = ("embedding", "head", "experts")
    types |= {name: half for name, role in facts.others.items() if role not in own_flag}
    rules = [
        f"{pattern(tensor)}={types[name]}" for name, tensor in tensors.items() if tensor and name in types
    ]
    if "experts" in facts.others.values():
        rules.append(rf"^blk\.[0-9]+\.ffn_[a-z_]*exps\.weight$={half}")
    pairs = sorted({f"{fmt} → {types[name]}" for name, fmt in plan.formats.items()})
    notes = [f"{', '.join(pairs)}; the types round in their own ways: the plan's predicted KL doesn't hold."]
    if nameless := [name for name in types if tensors[name] is None]:
        notes.append(f"without a GGUF name, so {BASE_TYPE} whatever was planned: {', '.join(nameless)}.")
    notes.append("run: sh llama_cpp.sh MODEL-16BIT.gguf OUT.gguf (from convert_hf_to_gguf.py, not quantized)")
    flags = [f"--token-embedding-type {half}", f"--output-tensor-type {half}"]
    flags += [f"--tensor-type '{rule}'" for rule in rules]
    body = " \\\n  ".join(["llama-quantize", *flags, f'"$1" "$2" {BASE_TYPE}']) + "\n"
    return Recipe(body, tuple(notes), {"llama_cpp.tensor-types.txt": "\n".join(rules) + "\n"})


def read_ggml(body: str) -> None:
    """Every type is one of gguf's own; KeyError names one that is not."""
    from gguf import GGMLQuantizationType

    for kind in re.findall(r"=(\w+)'", body):
        GGMLQuantizationType[kind.upper()]
