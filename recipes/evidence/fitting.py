"""One loop for every method: the same clips in the same order, AdamW, warm-up and a linear fall; only the trained weights differ.

Not the trainer that ships (`whisper_moe.train`), which trains adapters alone: here full fine-tuning, BitFit and one adapter for many
languages have to see exactly what the adapters see.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from recipes.evidence.ground import Ground, Item
from recipes.evidence.methods import Trained
from whisper_moe.data import IGNORED
from whisper_moe.evaluate import autocast

NUM_PROMPT = 3
"""Label tokens before the text: language, task, no timestamps. They are given, so nothing is learned from them."""


@dataclass(frozen=True)
class Schedule:
    """How long, and how fast."""

    num_steps: int = 200
    batch_size: int = 16
    warmup_share: float = 0.1
    seed: int = 0
    rate_scale: float = 1.0
    """Multiplies every learning rate."""

    def rate(self, step: int) -> float:
        """Multiplies the learning rates at a step, from 0."""
        warmup = max(1, round(self.num_steps * self.warmup_share))
        return self.rate_scale * min((step + 1) / warmup, max(0.0, (self.num_steps - step) / max(1, self.num_steps - warmup)))


@dataclass(frozen=True)
class Fit:
    """What became of a run."""

    seconds: float
    """Of the steps, without measuring or loading."""
    first_loss: float
    last_loss: float
    """Means of the first and of the last tenth of the steps, per token."""


def order(items: Sequence[Sequence[Item]], schedule: Schedule) -> list[list[Item]]:
    """The batches of a run. Several sets are drawn from evenly: each gives the same number of clips, none twice before all its others."""
    rng = np.random.default_rng((schedule.seed, 7))
    needed = schedule.num_steps * schedule.batch_size
    drawn: list[Item] = []
    queues: list[list[int]] = [[] for _ in items]
    while len(drawn) < needed:
        for queue, each in zip(queues, items, strict=True):
            if not queue:
                queue.extend(rng.permutation(len(each)).tolist())
            drawn.append(each[queue.pop()])
    batches: list[list[Item]] = []
    # Clips of similar length together, within a stretch of eight batches: less padding, and the order stays random.
    stretch = 8 * schedule.batch_size
    for start in range(0, needed, stretch):
        part = sorted(drawn[start : min(start + stretch, needed)], key=lambda item: len(item.heard))
        cut = [part[at : at + schedule.batch_size] for at in range(0, len(part), schedule.batch_size)]
        batches += [cut[index] for index in rng.permutation(len(cut))]
    return batches


def token_loss(model: Any, ground: Ground, items: Sequence[Item]) -> torch.Tensor:
    """Mean cross-entropy over the text tokens of a batch."""
    end = model.config.pad_token_id
    start = model.config.decoder_start_token_id
    width = max(len(item.labels) for item in items)
    inputs = torch.tensor([[start, *item.labels[:-1]] + [end] * (width - len(item.labels)) for item in items], device=model.device)
    wanted = [[IGNORED] * NUM_PROMPT + list(item.labels[NUM_PROMPT:]) + [IGNORED] * (width - len(item.labels)) for item in items]
    labels = torch.tensor(wanted, device=model.device)
    with autocast(model.device.type):
        states = ground.encoder_states(model, items)
        outputs = model(encoder_outputs=(states,), decoder_input_ids=inputs, use_cache=False)
    return functional.cross_entropy(outputs.logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)


def fit(
    ground: Ground,
    trained: Trained,
    items: Sequence[Sequence[Item]],
    schedule: Schedule,
    on_step: Callable[[int], None] | None = None,
) -> Fit:
    """Train in place.

    Args:
        ground: the base's.
        trained: from `methods.attach`.
        items: one list per set.
        schedule: how long.
        on_step: called with the number of steps done.
    """
    if ground.rehearsal is not None:
        return Fit(*ground.rehearsal.fitted(trained, schedule))
    model = trained.model
    # Copies of the groups: the optimizer writes rates into them, and a model may be trained again.
    optimizer = torch.optim.AdamW([dict(group) for group in trained.groups], weight_decay=0.0)
    rates = [group["lr"] for group in optimizer.param_groups]
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    losses = []
    model.train()
    torch.manual_seed(schedule.seed)
    batches = order(items, schedule)
    started = time.perf_counter()
    for step, batch in enumerate(batches):
        loss = token_loss(model, ground, batch)
        losses.append(loss.item())
        if not np.isfinite(losses[-1]):
            raise ValueError(f"The loss became {losses[-1]} at step {step}. Lower the learning rate ({rates}).")
        (loss + trained.extra_loss()).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * schedule.rate(step)
        optimizer.step()
        trained.after_step(optimizer, step)  # before the gradients go: AdaLoRA judges weights by them
        optimizer.zero_grad(set_to_none=True)
        if on_step is not None:
            on_step(step + 1)
    seconds = time.perf_counter() - started
    model.eval()
    tenth = max(1, len(losses) // 10)
    return Fit(seconds, float(np.mean(losses[:tenth])), float(np.mean(losses[-tenth:])))
