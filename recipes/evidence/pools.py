"""S2-LoRA pools: A and B that many languages share, frozen, so that a language of its own is a few hundred coefficients.

    folder = joint_pool(context)                          # made once: one S2-LoRA trained on the base languages together
    trained = over_pool(context, folder, method, seed)    # a bare base, the pool, and coefficients to train

A pool is an artifact of the ground's work folder. That of zero steps holds random A and B: what is left of a pool's worth without them
having been trained. The broad one was trained on sixteen languages that the base cannot write, with four times the steps of the other: what
they need, the next one may need too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import peft_s2lora
from recipes.evidence.fitting import Schedule
from recipes.evidence.growth_speech import GROWTH, NUM_TRAIN, Spoken, growth_items
from recipes.evidence.methods import SIX_TYPES, Method, Trained, _no_step, _nothing, attach, target_pattern
from recipes.evidence.runs import Context, train
from whisper_moe.starts import POOL_NAME, Start, choose_start

POOL_METHOD = Method("s2lora", rank=64, modules=SIX_TYPES, learning_rate=1.5e-3)
POOL_SEED = 50


@dataclass(frozen=True)
class PoolKind:
    """Which pool.

    Args:
        name: of the artifact.
        rank: directions of each pair (A, B).
        share: steps of its training as a share of the settings'; 0 leaves A and B as they were drawn.
        languages: those of the growth curve that it is trained on; none: the base's own sets.
    """

    name: str = "s2-pool"
    rank: int = POOL_METHOD.rank
    share: float = 1.0
    languages: tuple[Spoken, ...] = ()


NEW_SETS = ("kichwa", "ca", "fi", "sv")
"""New languages that every part adds: not for a pool to have heard."""
POOL, RANDOM_POOL = PoolKind(), PoolKind("s2-pool-random", share=0)
BROAD_POOL = PoolKind("s2-pool-broad", share=4, languages=tuple(s for s in GROWTH if s.latin and not s.known and s.name not in NEW_SETS))


def joint_pool(context: Context, kind: PoolKind = POOL) -> Path:
    """Folder of a pool; trained by whoever needs it first."""

    def make(folder: Path) -> None:
        settings = context.settings
        num_steps = round(settings.num_steps * kind.share)
        method = replace(POOL_METHOD, rank=kind.rank)
        schedule = Schedule(num_steps=max(1, num_steps), batch_size=settings.batch_size, seed=POOL_SEED)
        if num_steps == 0:
            model = context.ground.fresh()
            trained = attach(model, method, decoder_only=context.ground.frozen_encoder, num_steps=1, seed=POOL_SEED)
        else:
            limit = 8 if settings.smoke else None
            items = [growth_items(context.ground, spoken, "train", limit or NUM_TRAIN) for spoken in kind.languages]
            items = items or [context.ground.items(name, "train", limit) for name in settings.base_sets]
            trained, _ = train(context, method, items, schedule)
        # Without save_embedding_layers=False, PEFT asks the Hub whether the base's vocabulary has grown.
        trained.model.save_pretrained(str(folder), save_embedding_layers=False)

    return context.artifact(kind.name, make)


def pool_start(context: Context, pool: Path, modules: tuple[str, ...]) -> Start:
    """A cold start that trains coefficients alone, for the weights whose last names are `modules`."""
    targets = target_pattern(modules, context.ground.frozen_encoder)
    return choose_start("cold", config=peft_s2lora.S2LoraConfig(pool=POOL_NAME, target_modules=targets), pool=pool)


def over_pool(context: Context, pool: Path, method: Method, seed: int) -> Trained:
    """A bare base with the pool and new coefficients over it, ready to be trained.

    Args:
        context: of the run.
        pool: from `joint_pool`.
        method: an S2-LoRA; of it count the modules, the learning rate and its multiplier for coefficients.
        seed: of the run. Coefficients begin at zero, so it draws nothing.
    """
    torch.manual_seed(1000 + seed)
    adapted = pool_start(context, pool, method.modules).attach(context.ground.fresh())
    groups: list[dict[str, Any]] = peft_s2lora.s2lora_param_groups(adapted, lr=method.learning_rate)
    return Trained(adapted, groups, _nothing, _no_step)
