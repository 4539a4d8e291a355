"""S2-LoRA as a plain LoRA adapter, without loss: `A' = A[kept]`, `B' = c * B[:, kept] diag(s[kept])`, with rank = number of kept ones.

The folder it writes is PEFT's own LoRA format and needs nothing of this package, so everything that serves LoRA can serve it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from .config import S2LoraConfig
from .layer import Embedding, S2LoraLayer
from .sharing import CHECKPOINT_PREFIX, adapted_layers, base_model_of
from .sparsity import single_config
from .targets import own_modules

LORA_BIAS = {"none": "none", "all": "all", "s2lora_only": "lora_only"}


def to_lora(
    model: nn.Module, adapter_name: str | None = None, folder: str | os.PathLike[str] | None = None, *, uniform_rank: bool = False
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """The plain LoRA adapter that computes the same as an S2-LoRA adapter of `model` (the active one unless named).

    Weights whose coefficients are all zero are left out of the LoRA's targets. Every scaling is 1 (alpha = rank).

    Args:
        model: A model with the S2-LoRA adapter, unmerged or merged.
        adapter_name: Which adapter; the active one unless named.
        folder: Where to write `adapter_config.json` and `adapter_model.safetensors`; nothing is written if left out.
        uniform_rank: Pad all weights with zeros to the largest rank, for programs that know one rank per adapter (no rank_pattern).

    Returns:
        The LoRA configuration and its tensors, named as in the file.
    """
    name, config = single_config(model, adapter_name)
    base_model = base_model_of(model)
    layers = adapted_layers(base_model, name)
    kept = {module: layer.s2lora_coefficients[name].detach().nonzero()[:, 0] for module, layer in layers.items()}
    least = 0 if config.bias == "none" else 1  # a bias that was trained can only be loaded where there is a LoRA layer
    ranks = {module: max(len(indices), least) for module, indices in kept.items() if max(len(indices), least)}
    if not ranks:
        raise ValueError(
            f"All coefficients of adapter {name!r} are zero: it changes nothing, and there is no LoRA to export. Train it first."
        )
    largest = max(ranks.values())
    if uniform_rank:
        ranks = dict.fromkeys(ranks, largest)
    tensors = _other_tensors(model, name)
    for module, rank in ranks.items():
        tensors.update(_lora_tensors(module, layers[module], name, kept[module], rank))
    lora_config = _lora_config(config, base_model, ranks, largest)
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(tensors, Path(folder) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        lora_config.save_pretrained(str(folder))
    return lora_config, tensors


def _lora_tensors(module: str, layer: S2LoraLayer, adapter_name: str, kept: torch.Tensor, rank: int) -> dict[str, torch.Tensor]:
    A, B, scaled_s = (tensor.detach() for tensor in layer.factors(adapter_name, kept.device))
    padding = rank - len(kept)
    lora_A = F.pad(A[kept], (0, 0, 0, padding))  # (rank, d_in)
    lora_B = F.pad(B[:, kept] * scaled_s[kept], (0, padding))  # (d_out, rank)
    keys = ("lora_embedding_A", "lora_embedding_B") if isinstance(layer, Embedding) else ("lora_A.weight", "lora_B.weight")
    return {f"{CHECKPOINT_PREFIX}{module}.{key}": tensor.contiguous().cpu() for key, tensor in zip(keys, (lora_A, lora_B), strict=True)}


def _other_tensors(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    """What the adapter saves besides S2-LoRA's own tensors: biases, modules_to_save, token rows."""
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name)
    others = {key: tensor for key, tensor in state_dict.items() if ".s2lora_" not in key}
    return {
        key if key.startswith(CHECKPOINT_PREFIX) else CHECKPOINT_PREFIX + key: tensor.contiguous().cpu() for key, tensor in others.items()
    }


def _lora_config(config: S2LoraConfig, base_model: nn.Module, ranks: dict[str, int], largest: int) -> LoraConfig:
    # r and alpha are the largest rank, so that a program that ignores the patterns still gets the scaling, 1, right.
    pattern = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != largest}
    base_class = {"base_model_class": type(base_model).__name__, "parent_library": type(base_model).__module__}  # as PEFT saves it
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        target_modules=_target_modules(base_model, ranks),
        bias=LORA_BIAS[config.bias],
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        auto_mapping=base_class if config.task_type is None else None,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )


def _target_modules(base_model: nn.Module, modules: Collection[str]) -> list[str] | str:
    """The shortest way to name exactly these modules: last names, whole names, or a regular expression."""
    names = list(own_modules(base_model))

    def matched(targets: Collection[str]) -> set[str]:
        return {name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)}

    for targets in (sorted({module.rpartition(".")[2] for module in modules}), sorted(modules)):
        if matched(targets) == set(modules):
            return targets
    return "|".join(re.escape(module) for module in sorted(modules))
