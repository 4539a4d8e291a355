"""Where the embedded checkpoint and its adapters lie. Holds paths only; the model card is in `model/README.md`."""

from pathlib import Path

MODEL: Path = Path(__file__).parent / "model"
"""Folder of the pocket Whisper, loadable with `from_pretrained`."""

ADAPTERS: Path = Path(__file__).parent / "adapters"
"""Folder of the shipped language adapters, one sub-folder each."""

__all__ = ["ADAPTERS", "MODEL"]
