"""llama.cpp: its converter and llama-quantize, the file read back by transformers' GGUF reader."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import gguf
import ik_llama_cpp
import numpy as np
from common import Job
from transformers import AutoModelForCausalLM

# The converter that is shipped knows types of its fork, which PyPI's gguf lacks; none of them is asked for.
CONVERT = """
import enum, runpy, sys, gguf
names = {one.name: one.value for one in gguf.LlamaFileType} | {"MOSTLY_Q6_0": 135}
gguf.LlamaFileType = enum.IntEnum("LlamaFileType", names)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Q6_0, the fork's own 6-bit type (32 weights: a half-precision scale, high bits, low bits), is what its Q5_K
# falls back to where 256 doesn't divide the columns; gguf's reader and transformers are taught it here.
Q6_0 = int.__new__(gguf.GGMLQuantizationType, 133)
Q6_0._name_, Q6_0._value_ = "Q6_0", 133
gguf.GGMLQuantizationType._value2member_map_[133] = Q6_0
gguf.constants.GGML_QUANT_SIZES[Q6_0] = (32, 26)


class _Q6(gguf.quants.Q5_0.__base__, qtype=Q6_0):  # type: ignore[call-arg, misc, name-defined]
    @classmethod
    def quantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    @classmethod
    def dequantize_blocks(cls, blocks: np.ndarray) -> np.ndarray:
        scale, high, low = np.hsplit(blocks, [2, 10])  # (blocks, 2), (blocks, 8), (blocks, 16)
        high = np.concatenate([high, high >> 4], axis=1)  # two bits for codes j and j + 16
        codes = np.concatenate([low & 15 | (high & 3) << 4, low >> 4 | (high >> 2 & 3) << 4], axis=1)
        return scale.view(np.float16).astype(np.float32) * (codes.astype(np.float32) - 32)


job = Job()
tools = Path(ik_llama_cpp.__file__).parents[1] / "bin"
tools = tools if (tools / "llama-quantize").exists() else Path(sys.prefix) / "bin"


def run(what: str, command: list, **variables: str) -> None:
    """Run a tool; where it fails, its last line is what the row says."""
    told = {"stderr": subprocess.PIPE, "text": True, "env": os.environ | variables}
    done = subprocess.run(command, check=False, **told)  # type: ignore[call-overload]
    sys.stderr.write(done.stderr)
    if done.returncode:
        raise SystemExit(f"{what}: {done.stderr.strip().splitlines()[-1]}")


half, out = job.out / "half.gguf", job.out / "out.gguf"
convert = [sys.executable, "-c", CONVERT, tools / "convert_hf_to_gguf.py", job.model_dir]
convert += ["--outfile", half, "--outtype", "f16"]
run("the converter", convert, NO_LOCAL_GGUF="1")
kept = ["--token-embedding-type", "f16", "--output-tensor-type", "f16"]
if recipe := job.settings.get("rules"):  # pattern=type, as recipes/llama_cpp.tensor-types.txt has them
    kept += ["--custom-q", ",".join(recipe)]
tool = tools / "llama-quantize"
tool.chmod(0o755)
run("llama-quantize", [tool, *kept, half, out, job.settings["type"]])
tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 200)
planned = {name: tensors[f"{names.get_name(name)}.weight"] for name in job.layers}
types = Counter(tensor.tensor_type.name for tensor in planned.values())
bits = 8.0 * sum(int(tensor.n_bytes) for tensor in planned.values())
model = AutoModelForCausalLM.from_pretrained(job.out, gguf_file=out.name)
values = {name: model.get_submodule(name).weight.float() for name in job.layers}
for name, weight in job.weights().items():  # a type that was read wrongly would show here
    if (weight - values[name]).norm() > 0.3 * weight.norm():
        raise SystemExit(f"{name}: {planned[name].tensor_type.name} was not read back as it was written")
size = out.stat().st_size
half.unlink()
out.unlink()
job.finish(
    values, bits, "ik-llama-cpp-python", bytes=size,
    remark=", ".join(f"{count} {kind}" for kind, count in types.most_common()),
)  # fmt: skip
