"""The batch tab: many files, a table, and one zip with every text."""

from __future__ import annotations

from .page import Page


def build(page: Page) -> None:
    """Put the tab's widgets here and wire them."""
