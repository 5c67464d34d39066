"""Stock transformers: what run_vllm.py is asked, from the same file. For benchmarks/serving.py.

The job's `settings`: `dtypes` that the file is loaded in, `ids` (the start token first) and `prompt` (token
ids), `new` tokens to answer. "exact" is the same file's weights, unpacked as transformers does it, in float32
arithmetic; the answer to the prompt comes from the first dtype.
"""

import json
import os
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
asked, out = job["settings"], Path(job["out"])
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
ids = torch.tensor([asked["ids"]])


def load(dtype: str) -> Any:
    """The file as a user loads it."""
    options = {"dtype": getattr(torch, dtype), "device_map": {"": "cpu"}}
    return AutoModelForCausalLM.from_pretrained(job["model"], **options).eval()


@torch.no_grad()
def read(model: Any) -> dict[str, list[Any]]:
    """Of every token after the first its log-probability, and the likeliest token in its place."""
    scores = torch.log_softmax(model(ids, use_cache=False).logits[0, :-1].float(), -1)
    own = scores.gather(1, ids[0, 1:, None])[:, 0]
    return {"logprobs": own.tolist(), "top": scores.argmax(-1).tolist()}


answer: dict[str, Any] = {"version": f"transformers {metadata.version('transformers')}"}
for dtype in asked["dtypes"]:
    model = load(dtype)
    answer[dtype] = read(model)
    if "answer" not in answer:
        prompt = torch.tensor([asked["prompt"]])
        with torch.no_grad():
            made = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=asked["new"], do_sample=False
            )
        answer["answer"] = made[0, prompt.shape[1] :].tolist()
        if getattr(model, "is_loaded_in_4bit", False):  # 4-bit kernels repack what they multiply
            del model
            model = load(dtype).dequantize()
        answer["exact"] = read(torch.nn.Module.float(model))  # transformers refuses of packed files
    del model
(out / "worker.json").write_text(json.dumps(answer), encoding="utf-8")
