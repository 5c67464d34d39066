"""A linear layer that stays in 16 bits and can't overflow in silence; and a report of what runs where.

float16 ends at 65,504. Some models (Qwen3.5 among them) reach it in activations: a plain `nn.Linear` then
gives infinity, the next norm gives NaN, and nothing says which layer it was. `SafeFP16Linear` looks at every
output's smallest and largest value, in one pass, and acts only when one isn't finite.

It is a subclass of `nn.Linear`, and quantizers replace `nn.Linear` itself only: it can't be quantized by
accident. Its state dict is a plain linear's, so a checkpoint never shows that it was there. `SafeFP16Conv1D`
is the same for GPT-2's layers.

`isolate` puts them in place of a plan's protected layers. `widen` is how a T4 runs models made in bfloat16:
float16 for the matrix products, float32 for all between them, so that the residual stream, products of gates
and norms can't overflow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from spi_utils.errors import CheckpointError, EvaluationError, PlanError

if TYPE_CHECKING:
    from transformers.pytorch_utils import Conv1D

    from spi_utils.plan import ProtectionPlan

LIMIT = torch.finfo(torch.float16).max  # 65504
POLICIES = ("saturate", "upcast", "error")


class _Safe(nn.Module):
    """A matrix product whose result float16 may not be able to hold, and what is done then."""

    weight: torch.Tensor
    bias: Any  # a tensor or None
    policy: str
    label: str
    _counted: int
    _on_device: dict[torch.device, torch.Tensor]  # counts that nobody has read back yet

    def _guard(self, policy: str, label: str) -> None:
        if policy not in POLICIES:
            raise PlanError(f"policy={policy!r}: expected one of {', '.join(POLICIES)}.")
        self.policy, self.label, self._counted, self._on_device = policy, label, 0, {}

    @staticmethod
    def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(…, in) -> (…, out)."""
        raise NotImplementedError

    @property
    def overflows(self) -> int:
        """Values that left float16's range so far, in inputs and outputs. Reading it waits for the device."""
        return self._counted + sum(int(count) for count in self._on_device.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) -> (…, out_features), in the weight's dtype (float32 after an upcast)."""
        if self.weight.dtype != torch.float16:
            return self._product(x.to(self.weight.dtype), self.weight, self.bias)
        narrow = x.to(torch.float16)
        if x.dtype != torch.float16 and not _finite(narrow):
            self._count(narrow, "inputs")
            if self.policy == "upcast":
                return self._in_float32(x)
            narrow = narrow.clamp(-LIMIT, LIMIT)
        y = self._product(narrow, self.weight, self.bias)
        if y.is_cuda and self.policy == "saturate":  # never waits for the device
            count = y.detach().isinf().sum()
            held = self._on_device.get(y.device)
            self._on_device[y.device] = count if held is None else held.add_(count)
            return y.clamp_(-LIMIT, LIMIT)
        if _finite(y):
            return y
        self._count(y, "outputs")
        return self._in_float32(narrow) if self.policy == "upcast" else y.clamp(-LIMIT, LIMIT)

    def extra_repr(self) -> str:
        """As a linear's, with the policy."""
        return ", ".join(part for part in (super().extra_repr(), f"policy={self.policy}") if part)

    def _count(self, values: torch.Tensor, what: str) -> None:
        count = int(values.detach().isinf().sum())
        self._counted += count
        if count and self.policy == "error":
            raise EvaluationError(
                f"{self.label or 'SafeFP16Linear'}: {count} {what} exceed float16's {LIMIT:,.0f}. Use "
                "policy='upcast' or 'saturate', or bfloat16 where the device has it."
            )

    def _in_float32(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return self._product(x.float(), self.weight.float(), bias)


def _finite(y: torch.Tensor) -> bool:
    # An infinity or NaN anywhere shows in the extremes: one pass, and no array of flags.
    if y.numel() == 0 or y.is_meta:  # no values
        return True
    low, high = torch.aminmax(y.detach())
    return bool((low - low + high - high) == 0)


class SafeFP16Linear(_Safe, nn.Linear):
    """`y = x Wᵀ + b` with a float16 or bfloat16 weight; what float16 can't hold follows a policy.

    saturate: outputs (and inputs) beyond ±65,504 become ±65,504.
    upcast: the product is computed again in float32, and the output is float32.
    error: EvaluationError.

    On a CPU nothing but one pass over the output is added while all of it is finite. On CUDA, `saturate`
    never waits for the device; the other two policies read one flag back per call.
    bfloat16 has float32's range: its outputs aren't looked at.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = torch.float16,
        *,
        policy: str = "saturate",
        label: str = "",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._guard(policy, label)

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, policy: str = "saturate", label: str = "") -> SafeFP16Linear:
        """Wrap a plain linear, whose parameters are shared; `label` is the module's name, for messages.

        Raises:
            PlanError: unknown policy.
        """
        bias = linear.bias is not None
        safe = cls(linear.in_features, linear.out_features, bias, "meta", policy=policy, label=label)
        safe.weight, safe.bias = linear.weight, linear.bias
        return safe.train(linear.training)

    @staticmethod
    def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return functional.linear(x, weight, bias)


class SafeFP16Conv1D(_Safe):
    """The same for GPT-2's `Conv1D`: `y = x W + b` with W as (in, out), and a plain Conv1D's state dict.

    It is no subclass of `Conv1D`, because quantizers replace those too.
    """

    def __init__(self, conv: Conv1D, *, policy: str = "saturate", label: str = "") -> None:
        """Take a plain `Conv1D`'s place; the parameters are shared. PlanError for an unknown policy."""
        super().__init__()
        self._guard(policy, label)
        self.weight, self.bias = conv.weight, conv.bias
        self.train(conv.training)

    @staticmethod
    def _product(x: torch.Tensor, weight: torch.Tensor, bias: Any) -> torch.Tensor:
        y = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight)
        return y.view(*x.shape[:-1], weight.shape[1])


# --- protected layers ------------------------------------------------------------------------------------


def isolate(model: nn.Module, plan: ProtectionPlan, *, policy: str = "saturate") -> nn.Module:
    """Swap a `SafeFP16Linear` in for every protected layer of a loaded model, in place; weights are shared.

    GPT-2's `Conv1D` becomes a `SafeFP16Conv1D`. The model's state dict stays as it was, names and shapes.

    Raises:
        PlanError: unknown policy, or a protected layer that isn't in the model.
        CheckpointError: a protected layer is quantized in this model.
    """
    from transformers.pytorch_utils import Conv1D

    for name in plan.protected:
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise PlanError(f"{name}: protected by the plan, but not in this model.") from None
        if _is_quantized(module):
            raise CheckpointError(
                f"{name}: protected by the plan, but it is a {type(module).__name__} in this model. Load the "
                "checkpoint that was made from this plan."
            )
        if type(module) is nn.Linear:
            model.set_submodule(name, SafeFP16Linear.from_linear(module, policy=policy, label=name))
        elif isinstance(module, Conv1D):
            model.set_submodule(name, SafeFP16Conv1D(module, policy=policy, label=name))
    return model


def isolation_report(model: nn.Module) -> pd.DataFrame:
    """One row for each module with a weight matrix: what holds it, and what touches it.

    Columns: module, class, dtype, device, bytes (quantization state included), kernel, quantized (whether any
    of its tensors is), hooks (forward hooks, accelerate's included), overflows (isolated layers only).
    """
    rows = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.Tensor) or weight.ndim < 2:
            continue
        dtype = str(weight.dtype).removeprefix("torch.")
        state = getattr(weight, "quant_state", None)
        states = [part for part in (state, getattr(state, "state2", None)) if part is not None]
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        tensors += [tensor for part in states for tensor in (part.absmax, part.code)]
        quantized = _is_quantized(module)
        if isinstance(module, nn.Embedding):
            kernel = "lookup"
        elif not quantized:
            kernel = f"16-bit matrix product ({dtype})"
        elif weight.device.type != "cpu":
            kernel = f"bitsandbytes 4-bit, {weight.device.type}"
        elif getattr(module, "support_avx512bf16_for_cpu", False):
            kernel = "bitsandbytes 4-bit, AVX512-BF16 (computes in bfloat16)"
        else:
            kernel = "bitsandbytes dequantization, then a matrix product"
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
        rows.append(
            {
                "module": name,
                "class": type(module).__name__,
                "dtype": dtype,
                "device": str(weight.device),
                "bytes": sum(tensor.nbytes for tensor in tensors),
                "kernel": kernel,
                "quantized": quantized,
                "hooks": hooks + (getattr(module, "_hf_hook", None) is not None),
                "overflows": module.overflows if isinstance(module, _Safe) else None,
            }
        )
    columns = ["module", "class", "dtype", "device", "bytes", "kernel", "quantized", "hooks", "overflows"]
    return pd.DataFrame(rows, columns=columns).astype({"overflows": "Int64"})


def _is_quantized(module: nn.Module) -> bool:
    return any(
        not tensor.is_floating_point() or getattr(tensor, "quant_state", None) is not None
        for tensor in module.parameters(recurse=False)
    )


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
        embedding.register_forward_hook(_in_float32)
    return True


def _in_float32(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
    return output.float()
