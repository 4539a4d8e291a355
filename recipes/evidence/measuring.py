"""Errors of each clip: what a model writes, compared with what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from recipes.evidence.ground import Ground, Item
from whisper_moe.evaluate import autocast, count_errors, evaluating

NORMALIZER = "mark-preserving"
_TOKENS_A_SECOND = 15
"""Nobody says more; a decoder that repeats itself is stopped there."""


@dataclass(frozen=True)
class Measured:
    """Errors on one set, each list (clips,)."""

    word_errors: list[int]
    words: list[int]
    char_errors: list[int]
    chars: list[int]
    hypotheses: list[str]

    @property
    def wer(self) -> float:
        return sum(self.word_errors) / sum(self.words)

    @property
    def cer(self) -> float:
        return sum(self.char_errors) / sum(self.chars)


@torch.inference_mode()
def write(model: Any, ground: Ground, items: Sequence[Item], batch_size: int = 32) -> list[str]:
    """Greedy transcripts, in the order of the items."""
    texts = [""] * len(items)
    longest_answer = model.config.max_target_positions - 8
    prompts = {item.prompt for item in items}
    with evaluating(model):
        for prompt in sorted(prompts):
            rows = [row for row, item in enumerate(items) if item.prompt == prompt]
            rows.sort(key=lambda row: len(items[row].heard))
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                batch = [items[row] for row in part]
                with autocast(model.device.type):
                    states = ground.encoder_states(model, batch)
                tokens = model.generate(
                    encoder_outputs=BaseModelOutput(last_hidden_state=states.float()),
                    language=prompt,
                    task="transcribe",
                    num_beams=1,
                    do_sample=False,
                    use_cache=True,
                    max_length=min(longest_answer, int(14 + _TOKENS_A_SECOND * max(item.seconds for item in batch))),
                )
                for row, text in zip(part, ground.processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
                    texts[row] = text.strip()
    return texts


def measure(model: Any, ground: Ground, items: Sequence[Item], batch_size: int = 32) -> Measured:
    """Transcribe and count."""
    texts = write(model, ground, items, batch_size)
    counts = count_errors([item.text for item in items], texts, NORMALIZER, language=items[0].language)
    return Measured(counts.word_errors.tolist(), counts.words.tolist(), counts.char_errors.tolist(), counts.chars.tolist(), texts)
