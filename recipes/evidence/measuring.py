"""Errors of each clip: what a model writes, compared with what was said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from recipes.evidence.ground import Ground, Item
from whisper_moe.evaluate import autocast, count_errors, evaluating
from whisper_moe.fast_decoding import GreedyDecoder

NORMALIZER = "mark-preserving"
TOKENS_A_SECOND = 12
"""A decoder that repeats itself is stopped there. Nobody says more in the languages whose letters are tokens; where they are bytes, more is
to be allowed."""


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
def write(model: Any, ground: Ground, items: Sequence[Item], batch_size: int = 32, tokens_a_second: float = TOKENS_A_SECOND) -> list[str]:
    """Greedy transcripts, in the order of the items."""
    if ground.rehearsal is not None:
        written: list[str] = ground.rehearsal.wrote(model, items)
        return written
    texts = [""] * len(items)
    whisper = model.get_base_model() if hasattr(model, "get_base_model") else model
    fast = GreedyDecoder(whisper)
    longest_answer = whisper.config.max_target_positions - 8
    rows = sorted(range(len(items)), key=lambda row: len(items[row].heard))
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = [items[row] for row in part]
            limit = min(longest_answer, int(10 + tokens_a_second * max(item.seconds for item in batch)))
            with autocast(model.device.type):
                states = ground.encoder_states(model, batch).float()
            if fast.refusal() is None:
                tokens = fast(states, [item.prompt for item in batch], limit)
            else:
                tokens = _generate(model, states, [item.prompt for item in batch], limit)
            for row, text in zip(part, ground.processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
                texts[row] = text.strip()
    return texts


def _generate(model: Any, states: torch.Tensor, prompts: list[str], limit: int) -> torch.Tensor:
    """The same by `generate`, for models with hooks on their decoder: mixtures. (rows, tokens)"""
    return model.generate(
        encoder_outputs=BaseModelOutput(last_hidden_state=states),
        language=prompts,
        task="transcribe",
        num_beams=1,
        do_sample=False,
        use_cache=True,
        max_length=limit + 4,
    )


def measure(model: Any, ground: Ground, items: Sequence[Item], batch_size: int = 32, tokens_a_second: float = TOKENS_A_SECOND) -> Measured:
    """Transcribe and count."""
    texts = write(model, ground, items, batch_size, tokens_a_second)
    if ground.rehearsal is not None:  # nothing was heard, so there are no errors to count
        none, some = [0] * len(items), [1] * len(items)
        return Measured(none, some, none, some, texts)
    counts = count_errors([item.text for item in items], texts, NORMALIZER, language=items[0].language)
    return Measured(counts.word_errors.tolist(), counts.words.tolist(), counts.char_errors.tolist(), counts.chars.tolist(), texts)
