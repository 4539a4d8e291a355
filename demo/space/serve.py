"""Serves the page on a Space: settings from the environment, and the model in ZeroGPU's processes if that is the hardware."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from .settings import Settings, is_zero_gpu

ZERO_GPU = "spaces"  # the platform's own package: present on Spaces, no dependency of ours, and never imported elsewhere


def main(variables: Mapping[str, str] = os.environ) -> None:
    """Serve the page until the Space is stopped."""
    spaces: Any = import_module(ZERO_GPU) if is_zero_gpu(variables) else None  # before torch, which it changes
    from whisper_moe.registry import printable

    from .. import api, app
    from ..catalogue import Catalogue
    from .zero import ForkedTranscriber

    problems: list[str] = []
    try:
        settings = Settings.from_environment(variables)
        if settings.mcp:
            api.expect_mcp()
        options: dict[str, Any] = {
            "base_model": settings.base_model,
            "device": settings.device,
            "dtype": settings.dtype,
            "problems": problems,
        }
        transcriber: Any = app.load(settings.model, settings.adapters, settings.registry, **options)
        if spaces is not None:
            transcriber = ForkedTranscriber(transcriber, spaces.GPU, seconds=settings.gpu_seconds)
        catalogue = Catalogue(transcriber, problems=tuple(problems))  # visitors of a public page fetch nothing
        app.run(transcriber, settings.limits, catalogue, host="0.0.0.0", port=settings.port, mcp=settings.mcp)
    except (ValueError, OSError, RuntimeError, ImportError) as error:  # said in one line, where the Space's log ends
        raise SystemExit(f"The page cannot start: {printable(str(error)) or type(error).__name__}") from error
