"""Which expert of a LoRA-MoE helped when: the gates over a recording, as data for a figure.

A router "token" decides at every position of the encoder: its gates are averaged over the adapted weights, and in steps of 0.1 s. The
other routers decide once per window, so their map is constant there, and says nothing finer. Knows tensors and seconds, no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from whisper_moe.audio import Span
from whisper_moe.languages import adapters_off, language_posterior

if TYPE_CHECKING:
    import torch

    from whisper_moe.language_table import LanguageTable

STEP_S = 0.1  # of a map over time; shorter than a sound of speech

_FRAMES_PER_S = 100  # of Whisper's features
_WINDOWS = 8  # that are encoded at a time


@dataclass(frozen=True)
class GateMap:
    """The gates of a mixture over a recording.

    Args:
        experts: Names of the experts.
        times_s: (time, 2) where each stretch begins and ends, in seconds; in order. Between windows there are gaps: nothing is said there.
        weights: (time, experts) mean gates of each stretch, 0 to 1.
        over_time: Whether the gates may change within a window. If not, a stretch is a window.
    """

    experts: tuple[str, ...]
    times_s: np.ndarray
    weights: np.ndarray
    over_time: bool

    @property
    def shares(self) -> dict[str, float]:
        """Expert -> its mean gate over everything that is said."""
        seconds = self.times_s[:, 1] - self.times_s[:, 0]
        return dict(zip(self.experts, (seconds @ self.weights / seconds.sum()).tolist(), strict=True))

    @classmethod
    def joined(cls, maps: Sequence[GateMap]) -> GateMap:
        """The maps of several parts of one recording as one, in order of time."""
        times, weights = np.concatenate([each.times_s for each in maps]), np.concatenate([each.weights for each in maps])
        order = times[:, 0].argsort(kind="stable")
        return cls(maps[0].experts, times[order], weights[order], maps[0].over_time)


def gate_map(table: LanguageTable, language: str, features: torch.Tensor, spans: Sequence[Span]) -> GateMap:
    """The gates of a mixture over a recording, from one pass of the encoder with the mixture at work.

    Averaged over all weights that its experts add something to. Gates that are read off the text (those of a router "token" in the
    decoder) have no place in time and are left out.

    Args:
        table: A table that holds the mixture.
        language: What the mixture is called there.
        features: `(windows, n_mels, frames)`.
        spans: Where in the recording each window is; the rest of a window is silence that fills it up.

    Raises:
        ValueError: The language is no LoRA-MoE, there is no window, or its routers read nothing but text.
    """
    router = table.router(language)
    if router is None:
        raise ValueError(f"{language!r} is no LoRA-MoE with experts, so there are no gates to look at.")
    if len(features) != len(spans) or not spans:
        raise ValueError(f"One window of features per span, and at least one; got {len(features)} and {len(spans)}.")
    per_position = router == "token"
    times, weights = [], []
    for start in range(0, len(spans), _WINDOWS):
        batch, own = features[start : start + _WINDOWS], spans[start : start + _WINDOWS]
        gates = _mean_gates(table, language, batch, per_position)  # (windows, positions or 1, experts)
        for span, of_window in zip(own, gates, strict=True):
            ends, means = _steps(of_window, span, batch.shape[-1]) if per_position else (np.array([span.end_s - span.start_s]), of_window)
            times.append(span.start_s + np.stack([np.append(0.0, ends[:-1]), ends], axis=1))
            weights.append(means)
    return GateMap(table.experts(language), np.concatenate(times), np.concatenate(weights), per_position)


def _mean_gates(table: LanguageTable, language: str, features: torch.Tensor, per_position: bool) -> np.ndarray:
    """Mean over the weights: (windows, positions or 1, experts)."""
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    from whisper_moe.cropped_encoder import encode

    model: Any = table.model
    sums: list[torch.Tensor] = []
    count = 0

    def record(_: str, gates: torch.Tensor) -> None:
        nonlocal count
        gates = gates.float().cpu()
        gates = gates if gates.dim() == 3 else gates[:, None]
        sums[:] = [sums[0] + gates] if sums else [gates]
        count += 1

    features = features.to(model.device, model.dtype)
    rows = [language] * len(features)
    with torch.no_grad():
        given = None
        if table.wants_gates(language):
            with adapters_off(model):
                heard = BaseModelOutput(last_hidden_state=encode(model, features))
            given = language_posterior(model, None, encoder_outputs=heard)
        with table.rows(rows, gates=given, record=record):
            if count == 0:  # the gates are not known already: a router reads the sound
                states = encode(model, features)
                if not per_position:  # what the decoder's routers read is there before its first token
                    first = torch.full((len(features), 1), model.generation_config.decoder_start_token_id, device=states.device)
                    model.get_decoder()(input_ids=first, encoder_hidden_states=states, use_cache=False)
    if count == 0:
        raise ValueError(f"The routers of {language!r} read only the text as it is written: their gates have no place in the recording.")
    return (sums[0] / count).numpy()


def _steps(gates: np.ndarray, span: Span, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Gates (positions, experts) of a window -> the end of every step from the span's start, and its mean gates."""
    duration_s, per_position_s = span.end_s - span.start_s, num_frames / _FRAMES_PER_S / len(gates)
    num_positions = max(1, min(len(gates), round(duration_s / per_position_s)))
    starts = np.arange(0, num_positions, max(1, round(STEP_S / per_position_s)))
    counts = np.diff(np.append(starts, num_positions))
    means = np.add.reduceat(gates[:num_positions].astype(np.float64), starts, axis=0) / counts[:, None]
    ends = np.append(starts[1:] * per_position_s, duration_s)
    return ends, means
