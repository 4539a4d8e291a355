"""Languages on Whisper: one adapter each, chosen by the language that is heard.

Speech in, text out (`Transcriber`), and the way to a new adapter (`load_clips`, `train_language_adapter`, `score`). Knows any
PEFT method and imports none of ours. Names are loaded when first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whisper_moe.audio import AudioError, load_audio
    from whisper_moe.base_signature import WrongBaseError, check_base
    from whisper_moe.comparison import Comparison, EvalSet, OldLanguage, evaluate_adapters
    from whisper_moe.data import Filters, StreamMixture, load_clips, mix_clips, stream_clips
    from whisper_moe.encoder_states import EncoderStates, StatesCollator, StatesView, cache_encoder_states
    from whisper_moe.evaluate import normalize, score
    from whisper_moe.expert_sources import fetch_experts_with
    from whisper_moe.growth import Growth, merge_similar
    from whisper_moe.intervals import bootstrap_rate, paired_difference
    from whisper_moe.language_table import LanguageTable, StaticRows
    from whisper_moe.languages import LanguagePosterior, adapters_off, language_code, language_name, language_posterior
    from whisper_moe.layouts import compose_adapters, decoder_only, layout_size, lower_shared, upper_private
    from whisper_moe.mixed_batch import MixedRow, generate_mixed
    from whisper_moe.moe import (
        ExportedLora,
        GateReport,
        LoraMoeConfig,
        LoraMoeLayer,
        LoraMoeModel,
        distil,
        mask_experts,
        record_gates,
        regularization_loss,
        to_lora,
        use_gates,
    )
    from whisper_moe.ray_batch import BatchSettings, BatchSummary, transcribe_batch
    from whisper_moe.registry import AdapterRegistry, AdapterSwitch, Decision, LanguageAdapter
    from whisper_moe.routing import Routing, RoutingSlot
    from whisper_moe.similarity import language_similarity, similarity_matrix
    from whisper_moe.starts import Start, choose_start
    from whisper_moe.train import train_language_adapter
    from whisper_moe.train_many import LanguageData, ManySettings, train_many_languages
    from whisper_moe.transcribe import Segment, Transcriber, Transcript

_HOMES = {
    "audio": ("AudioError", "load_audio"),
    "base_signature": ("WrongBaseError", "check_base"),
    "comparison": ("Comparison", "EvalSet", "OldLanguage", "evaluate_adapters"),
    "data": ("Filters", "StreamMixture", "load_clips", "mix_clips", "stream_clips"),
    "encoder_states": ("EncoderStates", "StatesCollator", "StatesView", "cache_encoder_states"),
    "evaluate": ("normalize", "score"),
    "expert_sources": ("fetch_experts_with",),
    "growth": ("Growth", "merge_similar"),
    "intervals": ("bootstrap_rate", "paired_difference"),
    "language_table": ("LanguageTable", "StaticRows"),
    "languages": ("LanguagePosterior", "adapters_off", "language_code", "language_name", "language_posterior"),
    "layouts": ("compose_adapters", "decoder_only", "layout_size", "lower_shared", "upper_private"),
    "mixed_batch": ("MixedRow", "generate_mixed"),
    "moe": (
        "ExportedLora",
        "GateReport",
        "LoraMoeConfig",
        "LoraMoeLayer",
        "LoraMoeModel",
        "distil",
        "mask_experts",
        "record_gates",
        "regularization_loss",
        "to_lora",
        "use_gates",
    ),
    "ray_batch": ("BatchSettings", "BatchSummary", "transcribe_batch"),
    "registry": ("AdapterRegistry", "AdapterSwitch", "Decision", "LanguageAdapter"),
    "routing": ("Routing", "RoutingSlot"),
    "similarity": ("language_similarity", "similarity_matrix"),
    "starts": ("Start", "choose_start"),
    "train": ("train_language_adapter",),
    "train_many": ("LanguageData", "ManySettings", "train_many_languages"),
    "transcribe": ("Segment", "Transcriber", "Transcript"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AdapterRegistry",
    "AdapterSwitch",
    "AudioError",
    "BatchSettings",
    "BatchSummary",
    "Comparison",
    "Decision",
    "EncoderStates",
    "EvalSet",
    "ExportedLora",
    "Filters",
    "GateReport",
    "Growth",
    "LanguageAdapter",
    "LanguageData",
    "LanguagePosterior",
    "LanguageTable",
    "LoraMoeConfig",
    "LoraMoeLayer",
    "LoraMoeModel",
    "ManySettings",
    "MixedRow",
    "OldLanguage",
    "Routing",
    "RoutingSlot",
    "Segment",
    "Start",
    "StatesCollator",
    "StatesView",
    "StaticRows",
    "StreamMixture",
    "Transcriber",
    "Transcript",
    "WrongBaseError",
    "adapters_off",
    "bootstrap_rate",
    "cache_encoder_states",
    "check_base",
    "choose_start",
    "compose_adapters",
    "decoder_only",
    "distil",
    "evaluate_adapters",
    "fetch_experts_with",
    "generate_mixed",
    "language_code",
    "language_name",
    "language_posterior",
    "language_similarity",
    "layout_size",
    "load_audio",
    "load_clips",
    "lower_shared",
    "mask_experts",
    "merge_similar",
    "mix_clips",
    "normalize",
    "paired_difference",
    "record_gates",
    "regularization_loss",
    "score",
    "similarity_matrix",
    "stream_clips",
    "to_lora",
    "train_language_adapter",
    "train_many_languages",
    "transcribe_batch",
    "upper_private",
    "use_gates",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
