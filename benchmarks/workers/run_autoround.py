"""AutoRound: rounding and clipping learnt block by block by signed gradients; AutoScheme, who gets bits."""

import json

from auto_round import AutoRound
from auto_round.auto_scheme.gen_auto_scheme import AutoScheme
from auto_round.schemes import QuantizationScheme
from common import Job, integer_bits

job = Job()
asked = job.settings
model, tokenizer = job.model(), job.tokenizer()
ids = job.windows()
options = {"nsamples": len(ids), "device_map": "cpu", "amp": False, "iters": asked["iters"]}
options |= {"batch_size": asked.get("batch", 8), "enable_torch_compile": False, "low_gpu_mem_usage": False}
scheme = QuantizationScheme(bits=4, group_size=asked["group"], sym=True)
if bits := asked.get("avg_bits"):
    # AutoScheme takes texts from a file, and drops those that are shorter than the length asked for
    eight = QuantizationScheme(bits=8, group_size=-1, sym=True)
    scheme = AutoScheme(avg_bits=bits, options=(scheme, eight, "BF16"), low_gpu_mem_usage=False)
    options |= {"dataset": job.texts_file, "seqlen": ids.shape[1] - 16}
else:
    options |= {"dataset": [row[None] for row in ids], "seqlen": ids.shape[1]}
maker = AutoRound(model, tokenizer, scheme=scheme, **options)
made, chosen = maker.quantize()
held = {}
for name in job.layers:
    layer = chosen.get(name, {})
    bits_here = int(layer.get("bits") or 16)
    held[name] = (bits_here if bits_here < 16 else 16, max(int(layer.get("group_size") or 0), 0))
values = {name: made.get_submodule(name).weight for name in job.layers}
job.finish(values, integer_bits(job, held), "auto-round", allocation=held if bits else None)
print(json.dumps({str(v): list(held.values()).count(v) for v in set(held.values())}))
