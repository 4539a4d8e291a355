"""Scores in, gates out, and the two terms that keep a router healthy. Tensors only: knows no modules and no language names.

scores, gates: (..., E)       E experts
"""

from __future__ import annotations

import math

import torch

from whisper_moe.routing import rescaled


def gates_of(scores: torch.Tensor, temperature: float = 1.0, keep: torch.Tensor | None = None) -> torch.Tensor:
    """softmax(scores / temperature) in at least single precision; zero for experts that `keep` (E,) marks False.

    At least one expert must be kept.
    """
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    if temperature != 1.0:
        scores = scores / temperature
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    return scores.softmax(dim=-1)


def largest(gates: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., k) indices and (..., k) weights of the k largest gates, the weights scaled to sum to what all gates did.

    Of equal gates the first experts are taken, wherever this is computed: a router that was never trained gives equal ones.
    """
    weights, indices = gates.sort(dim=-1, descending=True, stable=True)
    return indices[..., :k], rescaled(weights[..., :k], gates.sum(dim=-1, keepdim=True))


def keep_largest(gates: torch.Tensor, k: int | None) -> torch.Tensor:
    """The gates with all but the k largest set to zero."""
    if k is None or k == gates.shape[-1]:
        return gates
    indices, weights = largest(gates, k)
    return torch.zeros_like(gates).scatter(-1, indices, weights)


def balance_loss(gates: torch.Tensor) -> torch.Tensor:
    """How unequally the experts are used over all rows and positions: 0 when equally, E - 1 when one takes everything."""
    num_experts = gates.shape[-1]
    use = gates.reshape(-1, num_experts).mean(dim=0)  # (E,)
    return num_experts * use.square().sum() - 1


def entropy_loss(gates: torch.Tensor) -> torch.Tensor:
    """Mean entropy of the gates as a part of the largest possible: 1 when all are equal, 0 when every choice is decided."""
    num_experts = gates.shape[-1]
    if num_experts == 1:
        return gates.sum() * 0
    return -torch.special.xlogy(gates, gates.clamp_min(torch.finfo(gates.dtype).tiny)).sum(dim=-1).mean() / math.log(num_experts)
