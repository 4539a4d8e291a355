"""The adapters tab: what is installed, from where, how good and how far trusted; and a button that fetches one for a language."""

from __future__ import annotations

from . import handlers, views
from .page import Page


def build(page: Page) -> None:
    """Put the tab's widgets here and wire them."""
    installed = list(page.transcriber.registry)
    page.gr.HTML(views.adapters(installed, [handlers.spoken_by(one) for one in installed]), elem_classes="wm", elem_id="adapters")
