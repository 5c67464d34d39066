"""lm-evaluation-harness on a saved checkpoint, by its own `hf` model. For benchmarks/serving.py.

The job's `settings`: `tasks`, a folder with a yaml and its questions for each task; `names`; `limit`.
"""

import json
import os
import sys
from importlib import metadata
from pathlib import Path

os.environ |= {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}

import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
asked = job["settings"]
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
said = simple_evaluate(
    model="hf", model_args={"pretrained": job["model"], "dtype": "auto"}, device="cpu", batch_size=1,
    tasks=asked["names"], limit=asked["limit"], bootstrap_iters=0,
    task_manager=TaskManager(include_path=asked["tasks"], include_defaults=False),
)  # fmt: skip
results = {}
for name in asked["names"]:
    numbers = {key: one for key, one in said["results"][name].items() if isinstance(one, int | float)}
    results[name] = numbers | {"samples": said["n-samples"][name]["effective"]}
held = {"version": f"lm-eval {metadata.version('lm-eval')}", "results": results}
(Path(job["out"]) / "worker.json").write_text(json.dumps(held), encoding="utf-8")
