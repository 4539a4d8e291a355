"""Linear layers on a CPU, by the quicker of the two libraries that torch brings along. Same weights, same precision, other rounding.

torch sends products of float32 to MKL, which takes a slow path on processors that are not Intel's; oneDNN, which torch uses for bfloat16,
does them at twice the speed there. No module is changed, so that adapters, copies and `isinstance` see what they always saw.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

MANY_ROWS = 16  # of the input, from which on oneDNN is quicker


class _OneDnnProducts(TorchFunctionMode):
    """Within a `with` block of this thread, `F.linear` of float32 on a CPU goes to oneDNN."""

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.linear and not kwargs and len(args) >= 2 and _fits(args[0], args[1]):
            x, weight, bias = (*args, None)[:3]
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _fits(x: Any, weight: Any) -> bool:
    is_plain = (
        type(x) is torch.Tensor
        and type(weight) in (torch.Tensor, torch.nn.Parameter)
        and x.dtype == weight.dtype == torch.float32
        and x.is_cpu
        and weight.is_cpu
        and x.dim() > 1
    )
    return is_plain and not torch.is_grad_enabled() and weight.dim() == 2 and x.numel() >= MANY_ROWS * x.shape[-1]


def fast_products(device: torch.device | str = "cpu") -> AbstractContextManager[Any]:
    """A `with` block in which linear layers are quicker, where that is so; it changes nothing elsewhere, nor where gradients are wanted."""
    return _OneDnnProducts() if torch.device(device).type == "cpu" and _onednn_is_quicker() else nullcontext()


@functools.cache
def _onednn_is_quicker() -> bool:
    """Whether this is an x86 processor that MKL does not favour, and torch has oneDNN."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and hasattr(torch.ops.mkldnn, "_linear_pointwise") and platform.machine() in ("x86_64", "AMD64") and not _is_intel()


def _is_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:  # not Linux: it says so itself, or is taken for one
        return "AMD" not in platform.processor()
