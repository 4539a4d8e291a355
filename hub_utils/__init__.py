"""Per-language adapters on the Hugging Face Hub: what they are called and what their card says.

Works on adapter folders and repository names alone: no audio, no models, no user interface, no network yet.
"""

from .card import AdapterCardData, render_card
from .naming import METHODS, AdapterName

__all__ = ["METHODS", "AdapterCardData", "AdapterName", "render_card"]
