"""A linear layer in float16 that can't overflow in silence; and a whole model made of such layers.

float16 ends at 65,504. Some models (Qwen3.5 among them) reach it in activations: a plain `nn.Linear` then
gives infinity, the next norm gives NaN, and nothing says which layer it was. `SafeFP16Linear` looks at every
output's smallest and largest value, in one pass, and computes again in float32 what isn't finite.

It is a subclass of `nn.Linear`, and quantizers replace `nn.Linear` itself only: it can't be quantized by
accident. Its state dict is a plain linear's, so a checkpoint never shows that it was there.

`widen` is how a T4 runs models made in bfloat16: float16 for the matrix products, float32 for all between
them, so that the residual stream, products of gates and norms can't overflow.
"""

from __future__ import annotations

import torch
from torch import nn


class SafeFP16Linear(nn.Linear):
    """`y = x Wᵀ + b` with a float16 weight, or in float32 where float16 can't hold an input or output.

    On a CPU nothing but one pass over the output is added while all of it is finite; on CUDA one flag is read
    back a call. A bfloat16 weight has float32's range: its outputs aren't looked at.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SafeFP16Linear:
        """Wrap a plain linear, whose parameters are shared."""
        safe = cls(linear.in_features, linear.out_features, device="meta")
        safe.weight, safe.bias = linear.weight, linear.bias
        return safe.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) -> (…, out_features), in the weight's dtype, or float32."""
        y = super().forward(x.to(self.weight.dtype))
        if self.weight.dtype != torch.float16 or y.is_meta or y.numel() == 0:  # nothing to look at
            return y
        low, high = torch.aminmax(y.detach())  # an infinity or NaN anywhere, in an input too, shows in them
        if low.isfinite() & high.isfinite():
            return y
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.weight.float(), bias)


def widen(model: nn.Module) -> bool:
    """Make a float16 model compute everything but its linear layers' products in float32, in place.

    Linear layers share their weights and names with what was there; a product that doesn't fit is computed
    again in float32. Other parameters, all of them small, become float32. A model with matrices elsewhere
    (stacked experts, GPT-2's Conv1D) stays as it was.

    Returns:
        Whether it was changed.
    """
    modules = dict(model.named_modules())
    linear = {name: module for name, module in modules.items() if type(module) is nn.Linear}
    embeddings = [module for module in modules.values() if isinstance(module, nn.Embedding)]
    matrices = {id(module.weight) for module in (*linear.values(), *embeddings)}
    kernels = {id(module.weight) for module in modules.values() if isinstance(module, nn.Conv1d)}
    others = [parameter for parameter in model.parameters() if id(parameter) not in matrices]
    if any(parameter.ndim >= 2 and id(parameter) not in kernels for parameter in others):
        return False
    for parameter in others:
        parameter.data = parameter.data.float()
    safe = {name: SafeFP16Linear.from_linear(module) for name, module in linear.items()}
    for name, layer in safe.items():
        model.set_submodule(name, layer)
    for module in (*safe.values(), *embeddings):
        module.register_forward_hook(lambda module, inputs, output: output.float())
    return True
