"""A linear layer that stays in 16 bits and can't overflow in silence; and a report of what runs where.

float16 ends at 65,504. Some models (Qwen3.5 among them) reach it in activations: a plain `nn.Linear` then
gives infinity, the next norm gives NaN, and nothing says which layer it was. `SafeFP16Linear` looks at every
output's smallest and largest value, in one pass, and acts only when one isn't finite.

It is a subclass of `nn.Linear`, and quantizers replace `nn.Linear` itself only: it can't be quantized by
accident. Its state dict is a plain linear's, so a checkpoint never shows that it was there. `SafeFP16Conv1D`
is the same for GPT-2's layers.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    weight_overflow: int  # weights that a cast could not hold; what became of them says `from_linear`
    weight_underflow: int  # weights that a cast made zero
    _overflows: int
    _on_device: dict[torch.device, torch.Tensor]  # counts that nobody has read back yet

    def _guard(self, policy: str, label: str) -> None:
        if policy not in POLICIES:
            raise PlanError(f"policy={policy!r}: expected one of {', '.join(POLICIES)}.")
        self.policy = policy
        self.label = label
        self.weight_overflow = self.weight_underflow = self._overflows = 0
        self._on_device = {}

    @staticmethod
    def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """(…, in) -> (…, out)."""
        raise NotImplementedError

    @property
    def overflows(self) -> int:
        """Values that left float16's range so far, in inputs and outputs. Reading it waits for the device."""
        return self._overflows + sum(int(count) for count in self._on_device.values())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in_features) -> (…, out_features), in the weight's dtype (float32 after an upcast)."""
        if self.weight.dtype != torch.float16:
            return self._product(x.to(self.weight.dtype), self.weight, self.bias)
        if x.dtype != torch.float16:
            narrow = x.to(torch.float16)
            if self._is_finite(narrow):
                x = narrow
            elif self._counted(narrow, "inputs") == "upcast":
                return self._in_float32(x)
            else:
                x = narrow.clamp(-LIMIT, LIMIT)
        y = self._product(x, self.weight, self.bias)
        if y.is_cuda and self.policy == "saturate":
            return self._saturated_on_device(y)
        if self._is_finite(y):
            return y
        if self._counted(y, "outputs") == "upcast":
            return self._in_float32(x)
        return y.clamp(-LIMIT, LIMIT)

    def extra_repr(self) -> str:
        """As a linear's, with the policy."""
        return ", ".join(part for part in (super().extra_repr(), f"policy={self.policy}") if part)

    def _cast(self, parameter: torch.Tensor, dtype: torch.dtype | None) -> nn.Parameter:
        assert isinstance(parameter, nn.Parameter)
        if dtype is None or parameter.dtype == dtype:
            return parameter
        value = parameter.detach()
        cast = value.to(dtype)
        over = int((cast.isinf() & value.isfinite()).sum())
        self.weight_overflow += over
        self.weight_underflow += int(((cast == 0) & (value != 0)).sum())
        if over and self.policy == "error":
            raise CheckpointError(
                f"{self.label}: {over} weights are too large for {dtype} (largest "
                f"{value.abs().max().item():.3g}). Use policy='upcast' or 'saturate', or bfloat16."
            )
        if over and self.policy == "upcast":
            return parameter
        return nn.Parameter(cast.clamp(-LIMIT, LIMIT) if over else cast, requires_grad=False)

    @staticmethod
    def _is_finite(y: torch.Tensor) -> bool:
        # An infinity or NaN anywhere shows in the extremes: one pass, and no array of flags.
        if y.numel() == 0 or y.is_meta:  # no values
            return True
        low, high = torch.aminmax(y.detach())
        return bool((low - low + high - high) == 0)

    def _counted(self, y: torch.Tensor, what: str) -> str:
        """Count infinities and return the policy, or raise if that is "error"."""
        count = int(y.detach().isinf().sum())
        self._overflows += count
        if count and self.policy == "error":
            raise EvaluationError(
                f"{self.label or 'SafeFP16Linear'}: {count} {what} exceed float16's {LIMIT:,.0f}. Use "
                "policy='upcast' or 'saturate', or bfloat16 where the device has it."
            )
        return self.policy

    def _saturated_on_device(self, y: torch.Tensor) -> torch.Tensor:
        count = y.detach().isinf().sum()
        held = self._on_device.get(y.device)
        self._on_device[y.device] = count if held is None else held.add_(count)
        return y.clamp_(-LIMIT, LIMIT)

    def _in_float32(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return self._product(x.float(), self.weight.float(), bias)


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
    def from_linear(
        cls, linear: nn.Linear, *, policy: str = "saturate", label: str = "", dtype: torch.dtype | None = None
    ) -> SafeFP16Linear:
        """Wrap a plain linear; the parameters are shared unless a cast is asked for.

        Args:
            label: the module's name, for messages.
            dtype: cast the weight to float16 or bfloat16. Where float16 can't hold it, `saturate` clamps it,
                `upcast` keeps it in the dtype it had, `error` raises; `weight_overflow` and
                `weight_underflow` count.

        Raises:
            PlanError: unknown policy. CheckpointError: the cast would overflow and the policy is "error".
        """
        bias = linear.bias is not None
        safe = cls(linear.in_features, linear.out_features, bias, "meta", policy=policy, label=label)
        safe.weight = safe._cast(linear.weight, dtype)
        if bias:
            safe.bias = safe._cast(linear.bias, safe.weight.dtype)
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
    rows = [
        {
            "module": name,
            "class": type(module).__name__,
            "dtype": str(module.weight.dtype).removeprefix("torch."),
            "device": str(module.weight.device),
            "bytes": sum(tensor.nbytes for tensor in _tensors(module)),
            "kernel": _kernel(module),
            "quantized": _is_quantized(module),
            "hooks": _count_hooks(module),
            "overflows": module.overflows if isinstance(module, _Safe) else None,
        }
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim >= 2
    ]
    columns = ["module", "class", "dtype", "device", "bytes", "kernel", "quantized", "hooks", "overflows"]
    return pd.DataFrame(rows, columns=columns).astype({"overflows": "Int64"})


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    state = getattr(module.weight, "quant_state", None)
    if state is not None:
        parts = (state, state.state2) if getattr(state, "state2", None) is not None else (state,)
        for part in parts:
            yield part.absmax
            yield part.code


def _is_quantized(module: nn.Module) -> bool:
    return any(
        not tensor.is_floating_point() or getattr(tensor, "quant_state", None) is not None
        for tensor in module.parameters(recurse=False)
    )


def _count_hooks(module: nn.Module) -> int:
    attached = len(module._forward_hooks) + len(module._forward_pre_hooks)
    return attached + (getattr(module, "_hf_hook", None) is not None)


def _kernel(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "lookup"
    if not _is_quantized(module):
        return f"16-bit matrix product ({str(module.weight.dtype).removeprefix('torch.')})"
    if module.weight.device.type != "cpu":
        return f"bitsandbytes 4-bit, {module.weight.device.type}"
    if getattr(module, "support_avx512bf16_for_cpu", False):
        return "bitsandbytes 4-bit, AVX512-BF16 (computes in bfloat16)"
    return "bitsandbytes dequantization, then a matrix product"
