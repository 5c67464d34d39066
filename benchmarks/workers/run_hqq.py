"""HQQ: half-quadratic search of a zero point a group, no data. 16-bit scales and zero points."""

import torch
from common import Job, integer_bits
from hqq.core.quantize import Quantizer

job = Job()
bits, group = job.settings["bits"], job.settings["group"]
values = {}
weights = job.weights()
for name, weight in weights.items():
    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group, axis=1, device="cpu", compute_dtype=torch.float32
    )
    # as stored: HQQ's own layer holds scales and zero points in the compute dtype, 16-bit
    meta |= {
        "scale": meta["scale"].half().float(),
        "zero": meta["zero"].half().float(),
        "compute_dtype": torch.float32,
    }
    values[name] = Quantizer.dequantize(codes, meta)
job.finish(values, integer_bits(job, dict.fromkeys(job.layers, (bits, group)), 16), "hqq")
