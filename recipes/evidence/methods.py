"""What is trained: every method as weights to give an optimizer, what it wants done after a step, and what it saves.

LoRA, AdaLoRA and VeRA are PEFT's own; S2-LoRA is ours through `get_peft_model`, as any PEFT user calls it. Knows no clips and no loop.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peft_s2lora

ATTENTION = ("q_proj", "k_proj", "v_proj", "out_proj")
SIX_TYPES = (*ATTENTION, "fc1", "fc2")
ORTHOGONALITY = 0.5
"""Weight of AdaLoRA's orthogonality term: PEFT's default."""


@dataclass(frozen=True)
class Method:
    """One way to train."""

    kind: str
    """"none", "full", "bitfit", "lora", "adalora", "vera" or "s2lora"."""
    learning_rate: float = 1e-3
    rank: int = 0
    modules: tuple[str, ...] = SIX_TYPES
    """Last names of the adapted linear layers."""
    scope: str = "shape"
    """S2-LoRA: which weights share a pair (A, B)."""
    sparsity: float = 0.0
    """S2-LoRA: pull of the coefficients towards zero."""
    coefficient_multiplier: float = 10.0
    """S2-LoRA: their learning rate relative to that of A and B."""
    scaling: float = 1.0
    """alpha / r."""

    def with_rate(self, learning_rate: float) -> Method:
        return replace(self, learning_rate=learning_rate)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "modules": list(self.modules)}


@dataclass
class Trained:
    """A model with something to train in it."""

    model: Any
    """A Whisper, or a `PeftModel` over one."""
    groups: list[dict[str, Any]]
    """For the optimizer."""
    extra_loss: Callable[[], torch.Tensor]
    after_step: Callable[[torch.optim.Optimizer, int], None]
    """`(optimizer, step)`, between the optimizer's step and the end of the gradients."""

    @property
    def num_trained(self) -> int:
        """Numbers that are trained. Those of S2-LoRA that became zero count: they were."""
        return sum(weight.numel() for group in self.groups for weight in group["params"])

    def num_bytes(self) -> int:
        """Of what has to be kept: the adapter's file as PEFT writes it, or the trained weights in fp32."""
        if not hasattr(self.model, "peft_config"):
            return 4 * self.num_trained
        with tempfile.TemporaryDirectory() as folder:
            # Without save_embedding_layers=False, PEFT asks the Hub whether the base's vocabulary has grown.
            # What lies beside the trained adapter, a pool for instance, is not its own.
            self.model.save_pretrained(folder, selected_adapters=[self.model.active_adapter], save_embedding_layers=False)
            return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))

    def finish(self) -> None:
        """After training: S2-LoRA drops the directions that no weight uses."""
        for config in getattr(self.model, "peft_config", {}).values():
            if isinstance(config, peft_s2lora.S2LoraConfig) and config.sparsity_weight > 0:
                peft_s2lora.prune(self.model)


def _nothing() -> torch.Tensor:
    return torch.zeros(())


def _no_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    return None


def target_pattern(modules: tuple[str, ...], decoder_only: bool) -> str:
    """A regular expression for the full names of the layers to adapt."""
    return rf".*{'decoder' if decoder_only else '(encoder|decoder)'}\.layers\..*\.({'|'.join(modules)})"


def attach(model: nn.Module, method: Method, *, decoder_only: bool, num_steps: int, seed: int = 0) -> Trained:
    """Make a bare, frozen model trainable by a method.

    Args:
        model: a Whisper none of whose weights requires a gradient.
        method: the way.
        decoder_only: the encoder stays as it is.
        num_steps: of the run: AdaLoRA plans its budget by them.
        seed: of random initial weights.

    Raises:
        ValueError: A kind of method that is not known.
    """
    torch.manual_seed(1000 + seed)
    if method.kind in ("full", "bitfit"):
        return _weights(model, method, decoder_only)
    makers = {"lora": _lora, "adalora": _adalora, "vera": _vera, "s2lora": _s2lora}
    if method.kind not in makers:
        raise ValueError(f"No method is called {method.kind!r}. Known: full, bitfit, {', '.join(makers)}.")
    return makers[method.kind](model, method, target_pattern(method.modules, decoder_only), num_steps, seed)


def trainable(model: Any, learning_rate: float) -> list[dict[str, Any]]:
    """One group of all that requires a gradient."""
    return [{"params": [weight for weight in model.parameters() if weight.requires_grad], "lr": learning_rate}]


def _weights(model: Any, method: Method, decoder_only: bool) -> Trained:
    part = model.model.decoder if decoder_only else model.model
    for name, weight in part.named_parameters():
        # The encoder's positions are sinusoids, which Whisper never trains.
        weight.requires_grad_("encoder.embed_positions" not in name and (method.kind == "full" or name.endswith(".bias")))
    return Trained(model, trainable(model, method.learning_rate), _nothing, _no_step)


def _lora(model: Any, method: Method, targets: str, num_steps: int, seed: int) -> Trained:
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(model, LoraConfig(r=method.rank, lora_alpha=method.rank * method.scaling, target_modules=targets))
    return Trained(adapted, trainable(adapted, method.learning_rate), _nothing, _no_step)


def _adalora(model: Any, method: Method, targets: str, num_steps: int, seed: int) -> Trained:
    """Starts at one and a half times the rank, and has come down to it after three fifths of the steps."""
    from peft import AdaLoraConfig, get_peft_model

    config = AdaLoraConfig(
        init_r=max(method.rank + 1, method.rank * 3 // 2),
        target_r=method.rank,
        lora_alpha=max(method.rank + 1, method.rank * 3 // 2) * method.scaling,
        tinit=num_steps // 10,
        tfinal=num_steps * 4 // 10,
        deltaT=max(1, num_steps // 50),
        total_step=num_steps,
        orth_reg_weight=ORTHOGONALITY,
        target_modules=targets,
    )
    adapted = get_peft_model(model, config)
    factors = [(name, weight) for name, weight in adapted.named_parameters() if "lora_A" in name or "lora_B" in name]

    def orthogonality() -> torch.Tensor:
        # PEFT adds it to a loss that the model itself computes; ours is computed outside.
        terms = []
        for name, weight in factors:
            product = weight @ weight.T if "lora_A" in name else weight.T @ weight
            terms.append(torch.linalg.matrix_norm(product - torch.eye(len(product), device=product.device)))
        return ORTHOGONALITY * torch.stack(terms).mean()

    return Trained(
        adapted,
        trainable(adapted, method.learning_rate),
        orthogonality,
        lambda optimizer, step: adapted.base_model.update_and_allocate(step),
    )


def _vera(model: Any, method: Method, targets: str, num_steps: int, seed: int) -> Trained:
    from peft import VeraConfig, get_peft_model

    adapted = get_peft_model(model, VeraConfig(r=method.rank, target_modules=targets, save_projection=False, projection_prng_key=seed))
    return Trained(adapted, trainable(adapted, method.learning_rate), _nothing, _no_step)


def _s2lora(model: Any, method: Method, targets: str, num_steps: int, seed: int) -> Trained:
    from peft import get_peft_model

    config = peft_s2lora.S2LoraConfig(
        r=method.rank,
        s2lora_alpha=method.rank * method.scaling,
        target_modules=targets,
        share_scope=method.scope,
        sparsity_weight=method.sparsity,
        coefficient_lr_multiplier=method.coefficient_multiplier,
    )
    adapted = get_peft_model(model, config)
    groups = peft_s2lora.s2lora_param_groups(adapted, lr=method.learning_rate)
    return Trained(adapted, groups, _nothing, lambda optimizer, step: peft_s2lora.proximal_step(adapted, optimizer))


def rank_pattern(trained: Trained) -> dict[str, int] | None:
    """Ranks that each adapted weight has come to use, for the methods that choose them: module -> rank."""
    for name, config in getattr(trained.model, "peft_config", {}).items():
        if isinstance(config, peft_s2lora.S2LoraConfig):
            return {weight.module: weight.used for weight in peft_s2lora.rank_report(trained.model).weights}
        if str(getattr(config.peft_type, "value", config.peft_type)) == "ADALORA":
            return {
                module.removeprefix("base_model.model."): int((layer.lora_E[name] != 0).sum())
                for module, layer in trained.model.named_modules()
                if hasattr(layer, "lora_E") and name in layer.lora_E
            }
    return None
