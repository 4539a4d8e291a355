"""Whisper's encoder on less than its window: most of the work on a short clip is spent on the silence behind it.

For training, and for models that were trained on windows cropped to the speech in them; others want to hear the silence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def encode(model: Any, features: torch.Tensor) -> torch.Tensor:
    """(batch, n_mels, frames) -> (batch, positions, d_model), for whole windows and for cropped ones, with the adapters at work."""
    encoder = model.get_encoder()
    if features.shape[-1] < 2 * encoder.config.max_source_positions:
        return encode_cropped(model, features)
    states: torch.Tensor = encoder(features).last_hidden_state
    return states


def encode_cropped(model: Any, features: torch.Tensor) -> torch.Tensor:
    """(batch, n_mels, frames) -> (batch, frames / 2, d_model), for any even number of frames up to the window's.

    `WhisperEncoder.forward` refuses anything but whole windows; the arithmetic is the same. `model` is a Whisper, or a
    `PeftModel` over one, whose adapters in the encoder take part.
    """
    encoder = model.get_encoder()
    hidden = functional.gelu(encoder.conv2(functional.gelu(encoder.conv1(features)))).transpose(1, 2)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    hidden = functional.dropout(hidden, encoder.dropout, encoder.training)
    for layer in encoder.layers:
        hidden = layer(hidden, None)
    encoded: torch.Tensor = encoder.layer_norm(hidden)
    return encoded
