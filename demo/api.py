"""The page's API: named endpoints for `gradio_client`, curl and MCP, which answer with the JSON of `whisper-moe transcribe --json`."""

from __future__ import annotations

from .page import Page


def build(page: Page) -> None:
    """Register the endpoints."""
