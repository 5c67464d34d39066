"""SINQ: a scale for rows and one for columns by a Sinkhorn-like iteration, no data."""

import torch
from common import Job, integer_bits
from sinq.quantizer import Quantizer

job = Job()
bits, group = job.settings["bits"], job.settings["group"]
values = {}
for name, weight in job.weights().items():
    codes, meta = Quantizer.quantize(
        weight, None, nbits=bits, group_size=group, axis=1, device="cpu",
        compute_dtype=torch.float32, tiling_mode="1D", method="sinq",
    )  # fmt: skip
    for key in ("scale", "scale2", "zero"):
        meta[key] = meta[key].half().float()
    values[name] = Quantizer.dequantize(codes, meta)
total = integer_bits(job, dict.fromkeys(job.layers, (bits, group)), 16)
total += sum(16 * cols for _, cols in job.layers.values())  # the scale of each column
job.finish(values, total, "sinq")
