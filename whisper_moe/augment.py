"""What is done to a training clip so that the model does not learn it by heart: speed, level, noise, and SpecAugment's masks.

Plain functions of a clip and a random generator, so that a resumed run draws what the undisturbed one would have drawn.
"""

from __future__ import annotations

import numpy as np
import soxr
import torch

from whisper_moe.audio import SAMPLE_RATE


def augment_samples(samples: np.ndarray, rng: np.random.Generator, max_samples: int) -> np.ndarray:
    """Speed by up to a tenth (pitch moves with it), level, and white noise, each drawn by `rng`. (samples,) -> (samples',)"""
    if rng.random() < 0.5:
        speed = max(rng.uniform(0.9, 1.1), len(samples) / max_samples)  # a slower clip must still fit in the window
        samples = soxr.resample(samples, SAMPLE_RATE * speed, SAMPLE_RATE, quality="QQ")[:max_samples]
    samples = samples * np.float32(10 ** rng.uniform(-0.6, 0.2))
    if rng.random() < 0.4:
        level = samples.std() * 10 ** (-rng.uniform(10, 40) / 20)
        samples = samples + rng.standard_normal(len(samples), np.float32) * np.float32(level)
    return np.clip(samples, -1, 1)


def mask_features(features: torch.Tensor, num_frames: int, rng: np.random.Generator) -> None:
    """Blank two bands and two stretches of the first `num_frames` frames, in place (SpecAugment, Park et al. 2019).

    `features` is (n_mels, frames). A band is at most a sixth of the mels, a stretch at most a tenth of the clip.
    """
    num_mels = len(features)
    for _ in range(2):
        low, width = int(rng.integers(num_mels)), int(rng.integers(num_mels // 6 + 1))
        features[low : low + width] = 0
        start, length = int(rng.integers(max(1, num_frames))), int(rng.integers(num_frames // 10 + 1))
        features[:, start : start + length] = 0
