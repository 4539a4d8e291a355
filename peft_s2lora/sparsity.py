"""Sparse rank coefficients: the penalty, the proximal step that reaches exact zeros, parameter groups for the optimizer, pruning.

Works on any model that holds S2-LoRA layers: a `PeftModel`, or a model adapted with `inject_adapter_in_model` or `add_adapter`.

The penalty is `sparsity_weight` times abs(s). Its gradient alone never makes a coefficient exactly zero under Adam, so training uses
the proximal operator instead: after each optimizer step, abs(s) is lowered by (learning rate of s) x sparsity_weight and stops at
zero (proximal gradient descent, decoupled from Adam's scaling as AdamW's weight decay is). That operator *is* the penalty: add
`regularization_loss` to the loss only where no proximal step is taken.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .config import S2LoraConfig
from .layer import S2LoraLayer
from .pool import users_of_pool
from .sharing import SharedFactors, adapted_layers, sharing_groups


def s2lora_configs(model: nn.Module) -> dict[str, S2LoraConfig]:
    """Adapter name -> configuration, of all S2-LoRA adapters of a model."""
    configs = {name: config for name, config in getattr(model, "peft_config", {}).items() if isinstance(config, S2LoraConfig)}
    if not configs:
        raise ValueError(
            f"This {type(model).__name__} has no S2-LoRA adapter. Make one with get_peft_model(model, S2LoraConfig(...)); "
            "if the model is wrapped for parallel training, pass the model inside (model.module)."
        )
    return configs


def chosen_configs(model: nn.Module, adapter_name: str | None) -> dict[str, S2LoraConfig]:
    """The one adapter that is named, or the active ones."""
    configs = s2lora_configs(model)
    if adapter_name is None:
        active = next(layer.active_adapters for layer in model.modules() if isinstance(layer, S2LoraLayer))
        return {name: configs[name] for name in active if name in configs}
    if adapter_name not in configs:
        raise ValueError(f"No S2-LoRA adapter {adapter_name!r}. Known: {', '.join(sorted(configs))}.")
    return {adapter_name: configs[adapter_name]}


def single_config(model: nn.Module, adapter_name: str | None) -> tuple[str, S2LoraConfig]:
    """Name and configuration of the adapter meant, which is the active one unless named."""
    configs = chosen_configs(model, adapter_name)
    if len(configs) != 1:
        raise ValueError(f"{len(configs)} adapters are active ({', '.join(configs) or 'none'}): say which one with adapter_name=.")
    return next(iter(configs.items()))


def regularization_loss(model: nn.Module, adapter_name: str | None = None) -> torch.Tensor:
    """`sparsity_weight` x mean abs(s) over all coefficients of an adapter, summed over the active adapters unless one is named.

    The mean makes the figure comparable between models. Zero, and free, where sparsity_weight is 0.
    """
    terms = []
    for name, config in chosen_configs(model, adapter_name).items():
        coefficients = [layer.s2lora_coefficients[name] for layer in adapted_layers(model, name).values()]
        if config.sparsity_weight > 0:
            device = coefficients[0].device
            terms.append(config.sparsity_weight * torch.cat([s.to(device) for s in coefficients]).abs().mean())
    return torch.stack(terms).sum() if terms else torch.zeros(())


@torch.no_grad()
def proximal_step(model: nn.Module, optimizer: torch.optim.Optimizer, adapter_name: str | None = None) -> None:
    """Soft-threshold the coefficients: call it after every `optimizer.step()`. Does nothing where sparsity_weight is 0.

    First every rank direction gets length one and s takes over its scale, which changes no output: otherwise A and B could grow
    to make up for a smaller s. Then abs(s) is lowered by (its learning rate in `optimizer`) x sparsity_weight, to zero at most.
    """
    learning_rates = {id(parameter): float(group["lr"]) for group in optimizer.param_groups for parameter in group["params"]}
    for name, config in chosen_configs(model, adapter_name).items():
        if config.sparsity_weight == 0:
            continue
        coefficients = [layer.s2lora_coefficients[name] for layer in adapted_layers(model, name).values()]
        trained = [s for s in coefficients if id(s) in learning_rates]
        if not trained:
            raise ValueError(
                f"The optimizer holds none of the rank coefficients of adapter {name!r}, so nothing can become sparse. Make it from "
                "s2lora_param_groups(model, lr=...) or model.parameters() after the adapter was added (and after prune())."
            )
        normalize_directions(model, name)
        for s in trained:
            s.copy_(soft_threshold(s, learning_rates[id(s)] * config.sparsity_weight))


def soft_threshold(values: torch.Tensor, threshold: float) -> torch.Tensor:
    """Every value moved towards zero by `threshold`, and no further: the proximal operator of threshold x abs."""
    return values.sign() * (values.abs() - threshold).clamp_min(0)


@torch.no_grad()
def normalize_directions(model: nn.Module, adapter_name: str | None = None) -> None:
    """Give every shared rank direction length one and let the coefficients take over its scale. Changes no output."""
    for name in chosen_configs(model, adapter_name):
        for group in sharing_groups(model, name).values():
            lengths = group.normalize()
            for s in group.coefficients():
                s.mul_(lengths.to(s.device, s.dtype))


def s2lora_param_groups(model: nn.Module, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups for any torch optimizer: rank coefficients learn `coefficient_lr_multiplier` times as fast, without decay.

    Holds everything that requires a gradient, so also biases and modules_to_save; those and A, B get `lr` and `weight_decay`.
    """
    multipliers = {
        id(layer.s2lora_coefficients[name]): config.coefficient_lr_multiplier
        for name, config in s2lora_configs(model).items()
        for layer in adapted_layers(model, name).values()
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [{"params": [p for p in trained if id(p) not in multipliers], "lr": lr, "weight_decay": weight_decay}]
    for multiplier in sorted(set(multipliers.values())):
        coefficients = [p for p in trained if multipliers.get(id(p)) == multiplier]
        groups.append({"params": coefficients, "lr": lr * multiplier, "weight_decay": 0.0})
    return [group for group in groups if group["params"]]


class S2LoraCallback(TrainerCallback):
    """Takes the proximal step after every optimizer step of transformers' `Trainer`.

    Give the Trainer an optimizer made from `s2lora_param_groups` as well, so that the coefficients get their own learning rate.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        assert model is not None
        if all(config.sparsity_weight == 0 for config in chosen_configs(model, None).values()):
            raise ValueError(
                "S2LoraCallback has nothing to do: sparsity_weight is 0 in every active S2-LoRA adapter. Set it in S2LoraConfig, for "
                "instance sparsity_weight=0.2, or leave the callback out."
            )

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        assert model is not None
        if not getattr(optimizer, "step_was_skipped", False):  # a mixed-precision overflow
            proximal_step(model, optimizer)


@torch.no_grad()
def prune(model: nn.Module, adapter_name: str | None = None, threshold: float = 0.0) -> dict[str, int]:
    """Drop the rank directions that no weight uses. Returns the directions left per sharing group.

    Coefficients with abs(s) <= `threshold` are set to zero first; at the default only exact zeros count, and no output changes.
    One direction stays where none is used. A, B and s become new, smaller parameters: an optimizer made before must be made anew.
    """
    name, config = single_config(model, adapter_name)
    if threshold < 0:
        raise ValueError(f"threshold must be 0 or above, got {threshold!r}. Use 0 to drop exact zeros only.")
    layers = adapted_layers(model, name)
    if any(name in layer.merged_adapters for layer in layers.values()):
        raise ValueError(f"Adapter {name!r} is merged into the weights. Call unmerge_adapter() before prune().")
    users = users_of_pool(s2lora_configs(model), name)
    if users:
        raise ValueError(f"Adapter {name!r} is the pool of {', '.join(users)}, which may use what it does not. Prune before sharing it.")
    for layer in layers.values():
        s = layer.s2lora_coefficients[name]
        s[s.abs() <= threshold] = 0
    ranks = {key: _prune_group(group) for key, group in sharing_groups(model, name).items()}
    if config.pool is None:
        config.group_ranks = {key: rank for key, rank in ranks.items() if rank != config.r} or None
    return ranks


def _prune_group(group: SharedFactors) -> int:
    used = torch.stack([(s != 0).cpu() for s in group.coefficients()]).any(dim=0)  # (r,)
    used[0] |= not used.any()
    if used.all():
        return len(used)
    name, kept = group.adapter_name, used.nonzero()[:, 0]
    A, B = group.A, group.B
    _replace(group.owner.s2lora_A, name, A[kept.to(A.device)])
    _replace(group.owner.s2lora_B, name, B[:, kept.to(B.device)])
    for layer in group.members:
        s = layer.s2lora_coefficients[name]
        _replace(layer.s2lora_coefficients, name, s[kept.to(s.device)])
        layer.r[name] = len(kept)
    return len(kept)


def _replace(parameters: nn.ParameterDict, name: str, values: torch.Tensor) -> None:
    parameters[name] = nn.Parameter(values.clone().contiguous(), requires_grad=parameters[name].requires_grad)


def count_parameters(layers: Iterable[S2LoraLayer], adapter_name: str) -> int:
    """Numbers an adapter consists of: the shared pairs once, and every layer's coefficients."""
    return sum(getattr(layer, name)[adapter_name].numel() for layer in layers for name in layer.parameter_dicts_with(adapter_name))
