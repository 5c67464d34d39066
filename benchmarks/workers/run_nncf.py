"""NNCF's weight compression without data: int4 in groups, the matrices that it finds sensitive in int8."""

import nncf
import torch
from common import Job, integer_bits
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.function_hook.wrapper import get_hook_storage

job = Job()
model = job.model()
asked = job.settings
options = {"mode": nncf.CompressWeightsMode.INT8_SYM}
if asked["ratio"]:
    options = {
        "mode": nncf.CompressWeightsMode.INT4_SYM,
        "ratio": asked["ratio"],
        "group_size": asked["group"],
    }
    options |= {"backup_mode": nncf.BackupMode.INT8_SYM}
    options |= {"sensitivity_metric": nncf.SensitivityMetric.WEIGHT_QUANTIZATION_ERROR}
example = nncf.Dataset([{"input_ids": torch.arange(1, 17)[None]}])  # its graph is traced with it; no data
made = nncf.compress_weights(model, dataset=example, **options)
held = {}
for hook, module in get_hook_storage(made).named_hooks():
    name = decode_hook_name(hook)[1].replace(":", ".").removesuffix(".weight")
    if name in job.layers:
        held[name] = (4, asked["group"]) if "INT4" in type(module).__name__ else (8, 0)
made = nncf.strip(made, strip_format=nncf.StripFormat.IN_PLACE)
values = {name: made.get_submodule(name).weight for name in job.layers}
job.finish(values, integer_bits(job, held), "nncf", allocation=held)
