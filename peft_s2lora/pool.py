"""Adapters that own nothing but coefficients: they use the frozen A and B of another adapter, their pool.

A pooled adapter is saved as its coefficients and a hash of the pool it was trained on; with another pool it is refused. This is our
own extension of S2-LoRA: one pool, then a few thousand numbers per language.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import S2LoraConfig
from .layer import S2LoraLayer
from .sharing import SharedFactors, sharing_groups

TAKEN_OVER = ("r", "share_scope", "share_groups", "group_ranks")  # what a pooled adapter has from its pool


def factors_hash(model: nn.Module, adapter_name: str) -> str:
    """SHA-256 of an adapter's shared tensors, as float32, group by group."""
    digest = hashlib.sha256()
    for key, group in sorted(sharing_groups(model, adapter_name).items()):
        for factor in (group.A, group.B):
            if factor.is_meta:
                raise ValueError(
                    f"The pool {adapter_name!r} has no values yet (meta device). Load its weights before adapters that use it."
                )
            digest.update(f"{key}:{tuple(factor.shape)}".encode())
            digest.update(factor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return digest.hexdigest()


def join_pool(model: nn.Module, adapter_name: str, configs: Mapping[str, Any]) -> None:
    """Check a new adapter's configuration against its pool and complete it: the pool's rank and sharing, and its hash."""
    config = configs[adapter_name]
    config.pool = _find_pool(model, adapter_name, config, configs)
    pool_config = configs[config.pool]
    default = S2LoraConfig()
    for name in TAKEN_OVER:
        chosen, given = getattr(config, name), getattr(pool_config, name)
        if chosen not in (given, getattr(default, name)):
            raise ValueError(
                f"{name}={chosen!r} does not fit the pool {config.pool!r}, which has {name}={given!r}. Leave {name} out: it is the pool's."
            )
    if config.s2lora_alpha == config.r:  # alpha was left out, or means the same
        config.s2lora_alpha = pool_config.r
    for name in TAKEN_OVER:
        setattr(config, name, getattr(pool_config, name))
    if config.target_modules is None:
        config.target_modules = pool_config.target_modules
    config.pool_hash = factors_hash(model, config.pool)


def _find_pool(model: nn.Module, adapter_name: str, config: S2LoraConfig, configs: Mapping[str, Any]) -> str:
    """Name of the loaded adapter that is the pool: the one named, or another with the right hash."""
    candidates = [name for name, c in configs.items() if name != adapter_name and isinstance(c, S2LoraConfig) and c.pool is None]
    hashes = {name: factors_hash(model, name) for name in candidates}
    if config.pool in candidates and config.pool_hash in (None, hashes[config.pool]):
        return config.pool
    same = [name for name, value in hashes.items() if value == config.pool_hash]
    if same:
        return same[0]
    if config.pool in candidates:
        raise ValueError(
            f"Adapter {adapter_name!r} was trained on a pool {config.pool!r} with other values than the one loaded under that name "
            f"(hash {str(config.pool_hash)[:12]}... expected, {hashes[config.pool][:12]}... found). Load the pool it was trained on."
        )
    raise ValueError(
        f"Adapter {adapter_name!r} needs the pool {config.pool!r}, which is not loaded. Loaded adapters with shared tensors of their own: "
        f"{', '.join(sorted(candidates)) or 'none'}. Load the pool first: load_adapter(folder, adapter_name={config.pool!r})."
    )


def pool_group(target: nn.Module, module_name: str, config: S2LoraConfig) -> SharedFactors:
    """The pool's sharing group that a module belongs to."""
    if isinstance(target, S2LoraLayer) and config.pool in target.shared_factors:
        return target.shared_factors[config.pool]
    raise ValueError(
        f"Module {module_name} is not adapted by the pool {config.pool!r}, so there is no A and B for it. Choose target_modules among "
        "the pool's, or leave them out to take all of them."
    )


def users_of_pool(configs: Mapping[str, Any], pool: str) -> list[str]:
    """Adapters that use another one's A and B."""
    return sorted(name for name, config in configs.items() if getattr(config, "pool", None) == pool)
