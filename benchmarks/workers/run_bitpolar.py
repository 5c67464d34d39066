"""BitPolar's TurboQuant-style codes (polar coordinates after a random rotation, and a sketch), row by row."""

import bitpolar
import numpy as np
import torch
from common import Job

job = Job()
values, total = {}, 0.0
quantizers: dict[int, bitpolar.TurboQuantizer] = {}
for name, weight in job.weights().items():
    rows, cols = weight.shape
    if cols not in quantizers:
        quantizers[cols] = bitpolar.TurboQuantizer(cols, job.settings["bits"], max(1, cols // 4), 0)
    quantizer = quantizers[cols]
    made = [quantizer.decode(quantizer.encode(row)) for row in weight.numpy()]
    values[name] = torch.from_numpy(np.stack(made))
    size = quantizer.code_size_bytes
    total += 8 * rows * (size() if callable(size) else size)
job.finish(values, total, "bitpolar")
