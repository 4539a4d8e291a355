"""Who shares A and B with whom. One group of layers, one pair: the first layer of the group owns it, the others reach it through here.

Knows layers and their names; nothing of configuration files, training or merging.
"""

from __future__ import annotations

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from .config import S2LoraConfig
from .layer import S2LoraLayer, parameter_of
from .projection import SharedProjection

INIT_STD = 0.02  # of A and B
CHECKPOINT_PREFIX = "base_model.model."  # PEFT writes it before every name; a model without PeftModel around it lacks it
FACTORS = ("s2lora_A", "s2lora_B")


class SharedFactors:
    """One sharing group of one adapter. The first member owns A and B; if it leaves, the next one takes them over."""

    def __init__(self, adapter_name: str, key: str) -> None:
        self.adapter_name = adapter_name
        self.key = key
        self.members: list[S2LoraLayer] = []
        self.projection = SharedProjection()

    @property
    def owner(self) -> S2LoraLayer:
        return self.members[0]

    @property
    def A(self) -> nn.Parameter:  # (r, d_in)
        return parameter_of(self.members[0]._modules["s2lora_A"], self.adapter_name)

    @property
    def B(self) -> nn.Parameter:  # (d_out, r)
        return parameter_of(self.members[0]._modules["s2lora_B"], self.adapter_name)

    def replace(self, A: torch.Tensor, B: torch.Tensor) -> None:
        """Put new tensors in the place of A and B."""
        self.owner.s2lora_A[self.adapter_name] = nn.Parameter(A)
        self.owner.s2lora_B[self.adapter_name] = nn.Parameter(B)

    def join(self, layer: S2LoraLayer, config: S2LoraConfig) -> None:
        """Add a layer. The pair is made for the first one, and made anew, larger, for a layer that needs more (scope "global")."""
        if any(member is layer for member in self.members):
            return
        self.members.append(layer)
        if layer is self.owner:
            self._make_pair(layer.out_features, layer.in_features, config)
            return
        d_out, d_in = self.B.shape[0], self.A.shape[1]
        if layer.out_features > d_out or layer.in_features > d_in:
            self._make_pair(max(d_out, layer.out_features), max(d_in, layer.in_features), config)

    def leave(self, layer: S2LoraLayer) -> None:
        """Take a layer out; if it was the owner, its A and B move, as the same `Parameter` objects, to the next member."""
        owner_leaves = self.owner is layer
        self.members = [member for member in self.members if member is not layer]
        if owner_leaves and self.members:
            self.owner.s2lora_A[self.adapter_name] = layer.s2lora_A.pop(self.adapter_name)
            self.owner.s2lora_B[self.adapter_name] = layer.s2lora_B.pop(self.adapter_name)

    def _make_pair(self, d_out: int, d_in: int, config: S2LoraConfig) -> None:
        rank = config.group_rank(self.key)
        self.replace(torch.empty(rank, d_in), torch.empty(d_out, rank))
        if self.A.is_meta:  # low_cpu_mem_usage: the values come from a file
            return
        nn.init.normal_(self.A, std=INIT_STD)
        nn.init.normal_(self.B, std=INIT_STD)
        if config.sparsity_weight > 0 or not config.init_weights:
            self.normalize()

    def coefficients(self) -> list[nn.Parameter]:  # each (r,)
        """Everything that is multiplied with this pair: s of every member, of this adapter and of those that use it as their pool."""
        return [
            layer.s2lora_coefficients[name] for layer in self.members for name, shared in layer.shared_factors.items() if shared is self
        ]

    @torch.no_grad()
    def normalize(self) -> torch.Tensor:
        """Give every row of A and column of B length one, and return what s must be multiplied with to make up for it: (r,)."""
        A, B = self.A, self.B
        lengths_A, lengths_B = A.norm(dim=1), B.norm(dim=0)
        A.div_(lengths_A.where(lengths_A > 0, 1.0)[:, None])  # a direction of zeros stays one
        B.div_(lengths_B.where(lengths_B > 0, 1.0)[None, :])
        return lengths_A * lengths_B.to(lengths_A.device)


def base_model_of(model: nn.Module) -> nn.Module:
    """The adapted model without PEFT's wrappers, so that module names are the base model's own."""
    inner = model.base_model if isinstance(model, PeftModel) else model
    return inner.model if isinstance(inner, BaseTuner) else inner


def adapted_layers(model: nn.Module, adapter_name: str) -> dict[str, S2LoraLayer]:
    """Module name -> S2-LoRA layer, of the layers that hold the adapter, in the model's order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, S2LoraLayer) and adapter_name in module.s2lora_coefficients
    }


def sharing_groups(model: nn.Module, adapter_name: str) -> dict[str, SharedFactors]:
    """Sharing key -> group, of the groups that are an adapter's own; none for one that uses another adapter's pool."""
    shared = (layer.shared_factors[adapter_name] for layer in adapted_layers(model, adapter_name).values())
    return {group.key: group for group in shared if group.adapter_name == adapter_name}


def rehome(model: nn.Module, adapter_name: str) -> dict[str, S2LoraLayer]:
    """Hand over pairs whose owner is no longer part of the model (somebody replaced or cut out that layer). Returns the new owners."""
    layers = adapted_layers(model, adapter_name)
    name_of = {id(layer): name for name, layer in layers.items()}
    new_owners = {}
    for layer in layers.values():
        shared = layer.shared_factors[adapter_name]
        if shared.adapter_name != adapter_name:
            continue
        while id(shared.owner) not in name_of:
            shared.leave(shared.owner)
            if id(shared.owner) in name_of:
                new_owners[name_of[id(shared.owner)]] = shared.owner
    return new_owners


def factors_to_owners(model: nn.Module, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the A and B of a checkpoint to the layers that own them here. The same name, unless this model lacks or orders layers
    otherwise than the one that was saved. Refuses a checkpoint whose factors do not fit."""
    rehome(model, adapter_name)
    layers = {name.removeprefix(CHECKPOINT_PREFIX): layer for name, layer in adapted_layers(model, adapter_name).items()}
    groups = {layer.shared_factors[adapter_name].key: layer.shared_factors[adapter_name] for layer in layers.values()}
    owner_names = {key: next(name for name, layer in layers.items() if layer is group.owner) for key, group in groups.items()}
    renamed: dict[str, torch.Tensor] = {}
    for key, tensor in state_dict.items():
        module_name, _, parameter = key.rpartition(".")
        if parameter in FACTORS:
            layer = layers.get(module_name.removeprefix(CHECKPOINT_PREFIX))
            group = layer.shared_factors[adapter_name] if layer is not None else _group_of_shape(groups, parameter, tensor, key)
            prefix = CHECKPOINT_PREFIX if key.startswith(CHECKPOINT_PREFIX) else ""
            key = f"{prefix}{owner_names[group.key]}.{parameter}"
            if key in renamed:
                raise ValueError(
                    f"The checkpoint holds several {parameter} for the sharing group {group.key!r}: it was saved with another "
                    "share_scope or share_groups than this adapter's configuration has. Load it with its own adapter_config.json."
                )
        renamed[key] = tensor
    _check_factors_present(layers, owner_names, adapter_name, renamed)
    return renamed


def _group_of_shape(groups: dict[str, SharedFactors], parameter: str, tensor: torch.Tensor, key: str) -> SharedFactors:
    """The group that a factor belongs to whose layer this model does not have: the only one of its shape, or an error."""
    fitting = [group for group in groups.values() if (group.A if parameter == FACTORS[0] else group.B).shape == tensor.shape]
    if len(fitting) == 1:
        return fitting[0]
    raise ValueError(
        f"The checkpoint's {key} of shape {tuple(tensor.shape)} belongs to a layer that this model does not adapt, and "
        f"{len(fitting) or 'no'} sharing group(s) here have that shape. Load the adapter into the model it was trained for."
    )


def _check_factors_present(
    layers: dict[str, S2LoraLayer], owner_names: dict[str, str], adapter_name: str, state_dict: dict[str, torch.Tensor]
) -> None:
    present = {key.removeprefix(CHECKPOINT_PREFIX) for key in state_dict}
    for name, layer in layers.items():
        owner = owner_names[layer.shared_factors[adapter_name].key]
        missing = [factor for factor in FACTORS if f"{owner}.{factor}" not in present]
        if f"{name}.s2lora_coefficients" in present and missing:
            raise ValueError(
                f"The checkpoint has rank coefficients for {name} but not the shared {' and '.join(missing)} they belong to "
                f"(expected under {owner}). It is incomplete, or was saved with other target_modules or another share_scope."
            )
