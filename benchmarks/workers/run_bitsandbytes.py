"""bitsandbytes' own codes: NF4 (blocks of 64) and LLM.int8's weights (a scale a row)."""

from bitsandbytes import functional
from common import Job

job = Job()
values, total = {}, 0.0
for name, weight in job.weights().items():
    if job.settings["kind"] == "nf4":
        codes, state = functional.quantize_4bit(weight.half(), blocksize=64, quant_type="nf4")
        values[name] = functional.dequantize_4bit(codes, state).float()
        total += 8 * codes.numel() + 32 * state.absmax.numel()
    else:
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        values[name] = codes.float() * (scales.float() / 127)[:, None]
        total += 8 * codes.numel() + 32 * len(scales)
remark = "" if job.settings["kind"] == "nf4" else "weights alone; its 8-bit activations are not in the KL"
job.finish(values, total, "bitsandbytes", remark=remark)
