"""vLLM: the log-probabilities of given tokens and the answer to a prompt. For benchmarks/serving.py.

The job's `settings`: `dtype`, `ids` (the start token first) and `prompt` (token ids), `new` tokens to answer.
Everything runs in this process, so that what fails says so on the last line.
"""

import json
import os
import sys
from importlib import metadata
from pathlib import Path

settings = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
settings |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "INFO"}
os.environ.update(settings)

from vllm import LLM, SamplingParams  # noqa: E402

job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
asked, out = job["settings"], Path(job["out"])
ids, prompt = ({"prompt_token_ids": asked[name]} for name in ("ids", "prompt"))
try:
    model = LLM(
        job["model"], dtype=asked["dtype"], max_model_len=512, enforce_eager=True, max_num_seqs=1,
        enable_prefix_caching=False, disable_log_stats=True,
    )  # fmt: skip
    (read,) = model.generate([ids], SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1))
except Exception as error:
    raise SystemExit(" ".join(str(error).split())) from None
rows = read.prompt_logprobs[1:]  # none for the first token
(said,) = model.generate([prompt], SamplingParams(max_tokens=asked["new"], temperature=0))
answer = {
    "version": f"vllm-cpu {metadata.version('vllm-cpu')}",
    "logprobs": [row[token].logprob for row, token in zip(rows, asked["ids"][1:], strict=True)],
    "top": [next(key for key, one in row.items() if one.rank == 1) for row in rows],
    "answer_ids": list(said.outputs[0].token_ids),
    "answer": said.outputs[0].text,
}
(out / "worker.json").write_text(json.dumps(answer), encoding="utf-8")
