"""llm-compressor: GPTQ (second moments of a text) and AWQ (scales folded into the layers before)."""

import torch
from common import Job, integer_bits
from datasets import Dataset
from llmcompressor import oneshot

if not torch.cuda.is_available():  # AWQ pins its cache for a GPU, and fails without one
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
job = Job()
model, ids = job.model(), job.windows()
data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
group = job.settings["group"]
weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
common = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
if job.settings["method"] == "gptq":
    from llmcompressor.modifiers.quantization import GPTQModifier

    recipe = [GPTQModifier(**common)]
else:
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    recipe = [AWQModifier(), QuantizationModifier(**common)]
oneshot(
    model=model, tokenizer=job.tokenizer(), dataset=data, recipe=recipe, max_seq_length=ids.shape[1],
    num_calibration_samples=len(ids), shuffle_calibration_samples=False,
)  # fmt: skip
values = {}
for name in job.layers:
    layer = model.get_submodule(name)
    scale = layer.weight_scale.detach().float()  # (rows, groups)
    step = scale.repeat_interleave(group, dim=1)
    values[name] = (layer.weight.detach().float() / step).round().clamp(-8, 7) * step
planned = {f"{name}.weight" for name in job.layers}
values |= {
    name: parameter
    for name, parameter in model.named_parameters()
    if name not in planned and "norm" in name  # AWQ folds its scales into them
}
job.finish(values, integer_bits(job, dict.fromkeys(job.layers, (4, group))), "llmcompressor")
