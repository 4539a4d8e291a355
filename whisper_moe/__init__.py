"""Languages on Whisper: one adapter each, chosen by the language that is heard.

Speech in, text out (`Transcriber`), and the way to a new adapter (`load_clips`, `train_language_adapter`, `score`). Knows any
PEFT method and imports none of ours. Names are loaded when first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whisper_moe.audio import AudioError, load_audio
    from whisper_moe.base_signature import WrongBaseError, base_signature, check_base
    from whisper_moe.data import load_clips
    from whisper_moe.evaluate import normalize, score
    from whisper_moe.languages import LanguagePosterior, adapters_off, language_code, language_name, language_posterior
    from whisper_moe.registry import AdapterRegistry, AdapterSwitch, Decision, LanguageAdapter
    from whisper_moe.train import train_language_adapter
    from whisper_moe.transcribe import Segment, Transcriber, Transcript

_HOMES = {
    "audio": ("AudioError", "load_audio"),
    "base_signature": ("WrongBaseError", "base_signature", "check_base"),
    "data": ("load_clips",),
    "evaluate": ("normalize", "score"),
    "languages": ("LanguagePosterior", "adapters_off", "language_code", "language_name", "language_posterior"),
    "registry": ("AdapterRegistry", "AdapterSwitch", "Decision", "LanguageAdapter"),
    "train": ("train_language_adapter",),
    "transcribe": ("Segment", "Transcriber", "Transcript"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterRegistry",
    "AdapterSwitch",
    "AudioError",
    "Decision",
    "LanguageAdapter",
    "LanguagePosterior",
    "Segment",
    "Transcriber",
    "Transcript",
    "WrongBaseError",
    "adapters_off",
    "base_signature",
    "check_base",
    "language_code",
    "language_name",
    "language_posterior",
    "load_audio",
    "load_clips",
    "normalize",
    "score",
    "train_language_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
