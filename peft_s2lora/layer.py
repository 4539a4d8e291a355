"""S2-LoRA on one weight: forward, merge, unmerge. Knows nothing of the model around it; what it shares with others
is in `SharedFactors` (sharing.py).

    y = W0 x + c * B diag(s) A x        A: (r, d_in), B: (d_out, r), s: (r,)

A, B are shared by a group of layers, s is private. The first layer of a group (its owner) holds A and B as its own parameters; the
others reach them through a plain Python object. So each shared tensor exists once: it is saved, moved, cast and counted once.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from .config import S2LoraConfig

if TYPE_CHECKING:
    from .sharing import SharedFactors

FEW_ROWS = 32  # up to this many, computing A x costs less than looking whether it is known
BASE_MODEL = "__base__"  # PEFT's name, in `adapter_names`, for a row that uses no adapter


class S2LoraLayer(nn.Module, BaseTunerLayer):
    """What S2-LoRA layers of every type have in common. A type adds the down-projection of its input and the weight's layout."""

    adapter_layer_names = ("s2lora_A", "s2lora_B", "s2lora_coefficients")
    other_param_names = ("s2lora_dropout", "r", "scaling", "shared_factors")
    transposes_weight = False  # True: the base weight is stored as (d_in, d_out)
    takes_features = True  # a row of the input is a vector; False: a number

    # What PEFT's mixin brings; said here because the type checker sees PEFT as untyped.
    get_base_layer: Callable[[], nn.Module]
    set_base_weight: Callable[[torch.Tensor], None]
    set_adapter: Callable[..., None]
    _cast_input_dtype: Callable[[torch.Tensor, torch.dtype], torch.Tensor]
    _get_embed_scale: Callable[[], torch.Tensor | None]
    active_adapters: list[str]
    merged: bool
    disable_adapters: bool

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, shared: SharedFactors, config: S2LoraConfig, **quantization_kwargs: Any
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **quantization_kwargs)
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.s2lora_A = nn.ParameterDict()
        self.s2lora_B = nn.ParameterDict()
        self.s2lora_coefficients = nn.ParameterDict()
        self.s2lora_dropout = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.shared_factors: dict[str, SharedFactors] = {}
        self.merged_adapters: list[str] = []
        self.block = ""  # name of the module around this one, whose layers may share A x (see projection.py)
        self._disable_adapters = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, shared, config)

    def update_layer(self, adapter_name: str, shared: SharedFactors, config: S2LoraConfig) -> None:
        """Give this layer an adapter: coefficients of its own, and a place in the group that shares A and B."""
        rank = config.group_rank(shared.key)
        self.r[adapter_name] = rank
        self.scaling[adapter_name] = config.scaling
        self.s2lora_dropout[adapter_name] = nn.Dropout(config.s2lora_dropout) if config.s2lora_dropout > 0 else nn.Identity()
        self.s2lora_coefficients[adapter_name] = nn.Parameter(torch.zeros(rank))
        self.shared_factors[adapter_name] = shared
        if shared.adapter_name == adapter_name:  # otherwise the pair is another adapter's, and this layer is in its group already
            shared.join(self, config)
        if not config.init_weights and not self.s2lora_coefficients[adapter_name].is_meta:
            nn.init.normal_(self.s2lora_coefficients[adapter_name])
        self._move_adapter_to_device_of_base_layer(adapter_name)
        shared.owner._move_adapter_to_device_of_base_layer(adapter_name)  # its pair may have been made anew
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's version makes new parameters where device or dtype change, and those always require a gradient.
        required = {name: getattr(self, name)[adapter_name].requires_grad for name in self.parameter_dicts_with(adapter_name)}
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        for name, requires_grad in required.items():
            getattr(self, name)[adapter_name].requires_grad_(requires_grad)

    def parameter_dicts_with(self, adapter_name: str) -> list[str]:
        return [name for name in self.adapter_layer_names if adapter_name in getattr(self, name)]

    def delete_adapter(self, adapter_name: str) -> None:
        shared = self.shared_factors.get(adapter_name)
        users = [name for name, other in self.shared_factors.items() if other is shared and name != adapter_name]
        if shared is not None and shared.adapter_name == adapter_name:
            if users:
                raise ValueError(f"Adapter {adapter_name!r} is the pool of {', '.join(sorted(users))}. Delete those first.")
            shared.leave(self)
        super().delete_adapter(adapter_name)

    def factors(self, adapter_name: str, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A: (r, d_in), B: (d_out, r) and c * s: (r,), cut to this layer's size and on one device."""
        A = self.factor_A(adapter_name, device)
        return A, self.factor_B(adapter_name, device), self.scaled_coefficients(adapter_name, device, A.dtype)

    def factor_A(self, adapter_name: str, device: torch.device) -> torch.Tensor:  # (r, d_in)
        A = self.shared_factors[adapter_name].A.to(device)
        return A if A.shape[1] == self.in_features else A[:, : self.in_features]

    def factor_B(self, adapter_name: str, device: torch.device) -> torch.Tensor:  # (d_out, r)
        B = self.shared_factors[adapter_name].B.to(device)
        return B if B.shape[0] == self.out_features else B[: self.out_features]

    def scaled_coefficients(self, adapter_name: str, device: torch.device, dtype: torch.dtype) -> torch.Tensor:  # (r,)
        s, c = parameter_of(self._modules["s2lora_coefficients"], adapter_name).to(device, dtype), self.scaling[adapter_name]
        return s if c == 1 else s * c

    def projected(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:
        """A x: (rows, r), the part of the adapter that layers with the same input share."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None) if kwargs else None
        base_layer = cast(nn.Module, self._modules["base_layer"])
        if self._disable_adapters:
            if self.merged:
                self.unmerge()
            return base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            self._check_adapter_names(x, adapter_names)
            if x.numel() == 0:  # no rows or no positions: nothing is added to nothing
                return base_layer(x, *args, **kwargs)
        elif self.merged_adapters:
            return base_layer(x, *args, **kwargs)
        in_place = _result_is_ours(base_layer)
        if in_place:  # flat, because what a flat input gives is no view, and adding in place to a view costs a graph full-size copies
            leading = x.shape[:-1] if self.takes_features else x.shape
            result = base_layer(x.reshape(-1, x.shape[-1]) if self.takes_features else x.reshape(-1), *args, **kwargs)
        else:
            result = base_layer(x, *args, **kwargs)
            leading = result.shape[:-1]
            result = result.reshape(-1, result.shape[-1])
        if adapter_names is not None:
            result = self._add_deltas_of_rows(result if in_place else result.clone(), x, adapter_names)
        else:
            coefficients = cast(nn.ParameterDict, self._modules["s2lora_coefficients"])
            for adapter_name in self.active_adapters:
                if adapter_name in coefficients:
                    result = self._add_delta(result, x, adapter_name, in_place)
        return result.view(*leading, result.shape[-1])

    def _add_delta(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str, in_place: bool) -> torch.Tensor:
        """result + c * B diag(s) A x; result: (rows, d_out), x: any shape with as many rows."""
        h = self.projected(x, adapter_name)
        B = self.factor_B(adapter_name, result.device)
        scaled_s = self.scaled_coefficients(adapter_name, result.device, B.dtype)
        if len(h) < len(B):  # scale what is smaller
            return add_product(result, h * scaled_s.to(h.dtype), B, in_place)
        return add_product(result, h, B * scaled_s, in_place)

    def _add_deltas_of_rows(self, result: torch.Tensor, x: torch.Tensor, adapter_names: Sequence[str]) -> torch.Tensor:
        """Sample i goes through the adapter `adapter_names[i]`. Adapters that use one pair (a pool's) take one product together."""
        num_rows = len(result) // len(adapter_names)  # of one sample
        for shared in {self.shared_factors[name] for name in adapter_names if name in self.s2lora_coefficients}:
            samples = [i for i, name in enumerate(adapter_names) if self.shared_factors.get(name) is shared]
            names = list(dict.fromkeys(adapter_names[i] for i in samples))
            B = self.factor_B(names[0], result.device)
            scaled_s = torch.stack([self.scaled_coefficients(name, result.device, B.dtype) for name in names])
            scaled_s = scaled_s[[names.index(adapter_names[i]) for i in samples]]  # (samples, r)
            everybody = len(samples) == len(adapter_names)
            h = self.projected(x if everybody else x[samples], names[0]).view(len(samples), num_rows, -1)
            h = (h * scaled_s[:, None].to(h.dtype)).flatten(0, 1)
            if everybody:
                result = add_product(result, h, B, in_place=True)
            else:
                by_sample = result.view(len(adapter_names), num_rows, -1)
                by_sample[samples] = add_product(by_sample[samples].flatten(0, 1), h, B, in_place=True).view(len(samples), num_rows, -1)
        return result

    def _check_adapter_names(self, x: torch.Tensor, adapter_names: Sequence[str]) -> None:
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError("Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first.")

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What the adapter adds to the base weight, in the base weight's layout."""
        device = self.s2lora_coefficients[adapter_name].device
        A, B, scaled_s = self.factors(adapter_name, device)
        dtype = A.dtype
        if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):  # half precision is slow there, and less exact
            A, B, scaled_s = A.float(), B.float(), scaled_s.float()
        delta = ((B * scaled_s) @ A).to(dtype)  # (d_out, d_in)
        return delta.T if self.transposes_weight else delta

    def get_base_weight(self) -> torch.Tensor:
        state = getattr(getattr(self.get_base_layer(), "weight", None), "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):  # PEFT's backend would read the repacked bytes as if they were the old ones
            raise ValueError(
                "bitsandbytes has repacked this 4-bit weight for the CPU in its first forward pass, so it cannot be merged any more. Merge "
                "before the first forward pass or on a GPU, or use to_lora instead."
            )
        return super().get_base_weight()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters (default: the active ones) to the base weight. `safe_merge`: on a copy, refused if it is not finite."""
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.s2lora_coefficients:
                continue
            weight = self.get_base_weight()
            if safe_merge:
                weight = weight.clone()
            weight += self.get_delta_weight(adapter_name).to(weight.device)
            if safe_merge and not torch.isfinite(weight).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
            self.set_base_weight(weight)
            self.merged_adapters.append(adapter_name)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            adapter_name = self.merged_adapters.pop()
            if adapter_name in self.s2lora_coefficients:
                weight = self.get_base_weight()
                weight -= self.get_delta_weight(adapter_name).to(weight.device)
                self.set_base_weight(weight)

    def extra_repr(self) -> str:
        groups = ", ".join(
            f"{name}: {shared.key}{' (owner)' if shared.owner is self else ''}" for name, shared in self.shared_factors.items()
        )
        return ", ".join(part for part in (f"shares {{{groups}}}", quantization_extra_repr(self)) if part)

    def __repr__(self) -> str:
        return "s2lora." + super().__repr__()


class Linear(S2LoraLayer):
    """S2-LoRA on `nn.Linear`, on transformers' `Conv1D` (whose weight is stored transposed) and on quantised linear layers."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self.transposes_weight = isinstance(self.get_base_layer(), Conv1D)

    def projected(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:  # (..., d_in) -> (rows, r)
        dropout = self.s2lora_dropout[adapter_name]
        drops = dropout.training and type(dropout) is nn.Dropout  # then every layer drops other entries
        if drops or x.numel() <= FEW_ROWS * self.in_features:
            return self._project(x, adapter_name, dropout if drops else None)
        shared = self.shared_factors[adapter_name]
        return shared.projection(x, shared.A, partial(self._project, x, adapter_name), self, self.block)

    def _project(self, x: torch.Tensor, adapter_name: str, dropout: nn.Module | None = None) -> torch.Tensor:
        A = self.factor_A(adapter_name, x.device)
        x = self._cast_input_dtype(x, A.dtype).reshape(-1, x.shape[-1])
        return F.linear(x if dropout is None else dropout(x), A)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True


class Embedding(S2LoraLayer):
    """S2-LoRA on `nn.Embedding`: d_in is the number of rows, d_out their length. No dropout, as in LoRA."""

    transposes_weight = True
    takes_features = False

    def projected(self, x: torch.Tensor, adapter_name: str) -> torch.Tensor:  # (...,) token ids -> (rows, r)
        A = self.factor_A(adapter_name, x.device)
        base_layer = cast(nn.Embedding, self.get_base_layer())
        columns = F.embedding(x.reshape(-1), A.T, padding_idx=base_layer.padding_idx, scale_grad_by_freq=base_layer.scale_grad_by_freq)
        embed_scale = self._get_embed_scale()  # some embeddings multiply their output
        return columns if embed_scale is None else columns * embed_scale.to(columns.dtype)


def add_product(result: torch.Tensor, h: torch.Tensor, B: torch.Tensor, in_place: bool) -> torch.Tensor:
    """result + h B^T in the dtype of result; result: (rows, d_out), h: (rows, r), B: (d_out, r). In place saves two full-size tensors."""
    if in_place and result.dtype == h.dtype == B.dtype:
        return result.addmm_(h, B.T)
    delta = F.linear(h, B)
    return result.add_(delta) if in_place else (result + delta).to(result.dtype)


def _result_is_ours(base_layer: nn.Module) -> bool:
    """Whether nobody else can hold what the base layer returns, so that it may be added to in place."""
    if type(base_layer) not in (nn.Linear, Conv1D, nn.Embedding) or torch.compiler.is_compiling():
        return False
    b = base_layer
    return not (b._forward_hooks or b._forward_pre_hooks or b._backward_hooks or b._backward_pre_hooks)


def parameter_of(parameters: nn.Module | None, name: str) -> nn.Parameter:
    """`parameters[name]` of a ParameterDict, without the detours that would take longer than the products of one token."""
    assert isinstance(parameters, nn.ParameterDict)
    found = parameters._parameters.get(name)
    return parameters[name] if found is None else found
