"""float16 for the matrix products, float32 for all between them: how a T4 runs models made in bfloat16.

Some models (Qwen3.5 among them) leave float16's range, ±65,504, in their activations. Where every linear
layer takes and gives float32, and multiplies in float16 only what fits, the residual stream, products of
gates and norms can't overflow; a layer whose own result doesn't fit is computed again in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from spi_utils.checkpoints.safe_linear import SafeFP16Linear


class WideLinear(SafeFP16Linear):
    """A `SafeFP16Linear` with the policy "upcast" whose output is float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) -> (…, out_features), float32."""
        return super().forward(x).float()


def widen(model: nn.Module) -> bool:
    """Make a float16 model compute everything but its linear layers' products in float32, in place.

    Linear layers share their weights and names with what was there; other parameters, all of them small,
    become float32. A model with matrices elsewhere (stacked experts, GPT-2's Conv1D) stays as it was.

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
    for name, module in linear.items():
        model.set_submodule(name, WideLinear.from_linear(module, policy="upcast", label=name))
    for embedding in embeddings:
        embedding.register_forward_hook(_in_float32)
    return True


def _in_float32(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()
