"""A linear layer that stays in 16 bits and can't overflow in silence; and a whole model made of such layers.

float16 ends at 65,504. Some models (Qwen3.5 among them) reach it in activations: a plain `nn.Linear` then
gives infinity, the next norm gives NaN, and nothing says which layer it was. `SafeFP16Linear` looks at every
output's smallest and largest value, in one pass, and acts only when one isn't finite.

It is a subclass of `nn.Linear`, and quantizers replace `nn.Linear` itself only: it can't be quantized by
accident. Its state dict is a plain linear's, so a checkpoint never shows that it was there.

`isolate` puts them in place of a plan's protected layers. `widen` is how a T4 runs models made in bfloat16:
float16 for the matrix products, float32 for all between them, so that the residual stream, products of gates
and norms can't overflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from spi_utils.errors import CheckpointError, EvaluationError, PlanError

if TYPE_CHECKING:
    from spi_utils.plan import ProtectionPlan

LIMIT = torch.finfo(torch.float16).max  # 65504
POLICIES = ("saturate", "upcast", "error")


def _finite(y: torch.Tensor) -> bool:
    # An infinity or NaN anywhere shows in the extremes: one pass, and no array of flags.
    if y.numel() == 0 or y.is_meta:  # no values
        return True
    low, high = torch.aminmax(y.detach())
    return bool((low - low + high - high) == 0)


class SafeFP16Linear(nn.Linear):
    """`y = x Wᵀ + b` with a float16 or bfloat16 weight; what float16 can't hold follows a policy.

    saturate: outputs (and inputs) beyond ±65,504 become ±65,504.
    upcast: the product is computed again in float32, and the output is float32.
    error: EvaluationError.

    On a CPU nothing but one pass over the output is added while all of it is finite. On CUDA, `saturate`
    never waits for the device; the other two policies read one flag back per call.
    bfloat16 has float32's range: its outputs aren't looked at.
    """

    def __init__(self, in_features: int, out_features: int, *, policy: str = "saturate", **more: Any) -> None:
        """`more` are nn.Linear's bias, device and dtype; the dtype is float16 if not given.

        Raises:
            PlanError: unknown policy.
        """
        super().__init__(in_features, out_features, **({"dtype": torch.float16} | more))
        if policy not in POLICIES:
            raise PlanError(f"policy={policy!r}: expected one of {', '.join(POLICIES)}.")
        self.policy, self.label = policy, type(self).__name__
        self._counts: dict[torch.device, torch.Tensor] = {}  # left on their devices until they are read

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, policy: str = "saturate", label: str = "") -> SafeFP16Linear:
        """Wrap a plain linear, whose parameters are shared; `label` is the module's name, for messages.

        Raises:
            PlanError: unknown policy.
        """
        safe = cls(linear.in_features, linear.out_features, device="meta", policy=policy)
        safe.label = label or safe.label
        safe.weight, safe.bias = linear.weight, linear.bias
        return safe.train(linear.training)

    @property
    def overflows(self) -> int:
        """Values that left float16's range so far, in inputs and outputs. Reading it waits for the device."""
        return sum(int(count) for count in self._counts.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) -> (…, out_features), in the weight's dtype (float32 after an upcast)."""
        if self.weight.dtype != torch.float16:
            return super().forward(x.to(self.weight.dtype))
        narrow = x.to(torch.float16)
        if x.dtype != torch.float16 and not _finite(narrow):
            self._count(narrow, "inputs")
            if self.policy == "upcast":
                return self._in_float32(x)
            narrow = narrow.clamp(-LIMIT, LIMIT)
        y = super().forward(narrow)
        if not (y.is_cuda and self.policy == "saturate") and _finite(y):
            return y
        self._count(y, "outputs")
        return self._in_float32(narrow) if self.policy == "upcast" else y.clamp_(-LIMIT, LIMIT)

    def extra_repr(self) -> str:
        """As a linear's, with the policy."""
        return f"{super().extra_repr()}, policy={self.policy}"

    def _count(self, values: torch.Tensor, what: str) -> None:
        count = values.detach().isinf().sum()
        self._counts[values.device] = count + self._counts.get(values.device, 0)
        if self.policy == "error" and count:
            raise EvaluationError(
                f"{self.label}: {int(count)} {what} exceed float16's {LIMIT:,.0f}. Use "
                "policy='upcast' or 'saturate', or bfloat16 where the device has it."
            )

    def _in_float32(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(x.float(), self.weight.float(), bias)


def isolate(model: nn.Module, plan: ProtectionPlan, *, policy: str = "saturate") -> nn.Module:
    """Swap a `SafeFP16Linear` in for every protected layer of a loaded model, in place; weights are shared.

    The model's state dict stays as it was, names and shapes. GPT-2's `Conv1D` layers stay as they are.

    Raises:
        PlanError: unknown policy, or a protected layer that isn't in the model.
        CheckpointError: a protected layer is quantized in this model.
    """
    modules = dict(model.named_modules())
    for name in plan.protected:
        if (module := modules.get(name)) is None:
            raise PlanError(f"{name}: protected by the plan, but not in this model.")
        if not all(tensor.is_floating_point() for tensor in module.parameters(recurse=False)):
            raise CheckpointError(
                f"{name}: protected by the plan, but it is a {type(module).__name__} in this model. Load the "
                "checkpoint that was made from this plan."
            )
        if type(module) is nn.Linear:
            model.set_submodule(name, SafeFP16Linear.from_linear(module, policy=policy, label=name))
    return model


# --- a whole model in float16 ----------------------------------------------------------------------------


class WideLinear(SafeFP16Linear):
    """A `SafeFP16Linear` with the policy "upcast" whose output is float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) -> (…, out_features), float32."""
        return super().forward(x).float()


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
    for name, module in linear.items():
        model.set_submodule(name, WideLinear.from_linear(module, policy="upcast", label=name))
    for embedding in embeddings:
        embedding.register_forward_hook(lambda module, inputs, output: output.float())
    return True
