"""The live tab: words while somebody speaks into the microphone, and the language as it changes."""

from __future__ import annotations

from .page import Page


def build(page: Page) -> None:
    """Put the tab's widgets here and wire them."""
