"""A tiny random Whisper, adapters for it and synthetic sound, all made here: the tests need no network and no files.

The models are the real classes with a width of 16, two layers a side and a window of two seconds; the tokenizer is byte-level
with Whisper's special and language tokens. `make_adapter` writes adapter folders as training does. Marks: `shared` and
`pocket` tests are skipped, with the reason, where their files are absent; `e2e` where there is no browser.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Collection, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the libraries are imported: a test that reaches for the Hub fails at once
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models this small only wait for more threads; test files run side by side

import numpy as np
import pytest
from browser import browser, kept_windows, new_page, open_page, page, server  # noqa: F401 - fixtures of the demo's tests

if TYPE_CHECKING:
    from torch import nn
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"
POCKET_WEIGHTS = ROOT / "whisper_moe" / "pocket" / "model" / "model.safetensors"
SAMPLE_RATE = 16_000
WINDOW_S = 2
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

HOW_TO_ENABLE = {  # the marks themselves are described in pyproject.toml
    "shared": "put the shared speech and text folders beside the checkout, as ../shared",
    "pocket": "make the pocket: python -m recipes.train_pocket (its weights go to whisper_moe/pocket/model)",
    "e2e": "install a browser (Debian: chromium) and the e2e extra",
    "gpu": "run on a machine with an NVIDIA GPU",
}


# ---- marks -------------------------------------------------------------------------------------------------------------


def _absent(mark: str) -> bool:
    if mark == "shared":
        return not SHARED.is_dir()
    if mark == "pocket":
        return not POCKET_WEIGHTS.is_file()
    if mark == "gpu":
        return shutil.which("nvidia-smi") is None
    return importlib.util.find_spec("playwright") is None or not any(map(shutil.which, BROWSERS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for mark, how in HOW_TO_ENABLE.items():
        if _absent(mark):
            skip = pytest.mark.skip(reason=f"[{mark}] to run it: {how}")
            for item in items:
                if item.get_closest_marker(mark) is not None:
                    item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What was skipped and how to enable it, one line a reason: a green run hides nothing."""
    reasons: dict[str, int] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        reasons[reason] = reasons.get(reason, 0) + 1
    if reasons:
        terminalreporter.section("skipped, and how to enable it")
        for reason, count in sorted(reasons.items()):
            terminalreporter.line(f"{count:4d}  {reason}")


# ---- time -------------------------------------------------------------------------------------------------------------

_seen_modules: set[str] = set()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Python's collector leaves alone what was there before the file's first test: going through the libraries takes half a second.

    Again where a test (a benchmark's clock) has ended that.
    """
    if item.path.name not in _seen_modules or not gc.get_freeze_count():
        _seen_modules.add(item.path.name)
        gc.collect()
        gc.freeze()


def run_async(work: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine gives, from a thread of its own: a browser that is open in this process keeps the event loop of this one running."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()


# ---- the tiny Whisper --------------------------------------------------------------------------------------------------


def build_tiny_processor(window_s: int = WINDOW_S) -> WhisperProcessor:
    """Byte-level tokenizer without merges, Whisper's special tokens in Whisper's order, mel features of a short window."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = WhisperTokenizer(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[])
    languages = [f"<|{code}|>" for code in LANGUAGES]
    tasks = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>", "<|startoftranscript|>", *languages, *tasks]})
    tokenizer.pad_token = "<|endoftext|>"
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=window_s, sampling_rate=SAMPLE_RATE), tokenizer)


def build_tiny_model(processor: WhisperProcessor, seed: int = 0, **sizes: Any) -> WhisperForConditionalGeneration:
    """Random weights, large enough that different sound gives different tokens."""
    import torch
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    to_id, features = processor.tokenizer.convert_tokens_to_ids, processor.feature_extractor
    end, start = to_id("<|endoftext|>"), to_id("<|startoftranscript|>")
    width = {"d_model": 16, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = WhisperConfig(
        vocab_size=len(processor.tokenizer),
        max_source_positions=features.nb_max_frames // 2,
        max_target_positions=64,
        pad_token_id=end,
        bos_token_id=end,
        eos_token_id=end,
        decoder_start_token_id=start,
        suppress_tokens=[],
        begin_suppress_tokens=[],
        init_std=0.4,
        **{"encoder_layers": 2, "decoder_layers": 2, **width, **sizes},
    )
    torch.manual_seed(seed)
    model = WhisperForConditionalGeneration(config).eval()
    model.generation_config = GenerationConfig(
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": to_id(f"<|{code}|>") for code in LANGUAGES},
        task_to_id={task: to_id(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=to_id("<|notimestamps|>"),
        prev_sot_token_id=to_id("<|startofprev|>"),
        decoder_start_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
        max_length=64,
        return_timestamps=False,
    )
    return model


@pytest.fixture(scope="session")
def tiny_processor() -> WhisperProcessor:
    return build_tiny_processor()


@pytest.fixture
def tiny_model(tiny_processor: WhisperProcessor) -> WhisperForConditionalGeneration:
    """A fresh copy for every test: the same weights each time."""
    return build_tiny_model(tiny_processor)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tiny_processor: WhisperProcessor) -> Path:
    """The tiny model and its processor, saved as `from_pretrained` expects them."""
    folder = tmp_path_factory.mktemp("tiny_whisper")
    build_tiny_model(tiny_processor).save_pretrained(folder)
    tiny_processor.save_pretrained(folder)
    return folder


def base_hash(model: nn.Module, names: Collection[str]) -> str:
    """Digest of the bytes of the weights called `names` in the bare base, whether adapters are attached or not."""
    wrappings = {".base_layer.": ".", ".original_module.": "."}
    digest, found = hashlib.sha256(), {}
    for name, tensor in model.state_dict().items():
        for wrapping, bare in wrappings.items():
            name = name.removeprefix("base_model.model.").replace(wrapping, bare)
        found[name] = tensor.detach().cpu().contiguous()
    for name in sorted(names):
        digest.update(name.encode() + found[name].numpy().tobytes())
    return digest.hexdigest()


# ---- adapters ----------------------------------------------------------------------------------------------------------


def write_adapter(
    folder: Path,
    model: WhisperForConditionalGeneration,
    language: str,
    *,
    name: str | None = None,
    domain: str | None = None,
    carrier: str | None = None,
    peft_config: Any = None,
    seed: int = 1,
) -> Path:
    """Save an adapter with random weights for `model` (which stays as it is), with the files that training writes."""
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    from whisper_moe.base_signature import base_signature

    if peft_config is None:
        peft_config = LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj", "out_proj"])
    torch.manual_seed(seed)
    adapted = get_peft_model(copy.deepcopy(model), peft_config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)  # else PEFT asks the Hub about the vocabulary
    row = {
        "format": 1,
        "name": folder.name if name is None else name,
        "language": language,
        "domain": domain,
        "carrier": carrier,
        "base_model": "tiny-whisper",
        "base_signature": base_signature(model),
        "num_parameters": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
        "train_data": "none: random weights",
        "metrics": {"before": {"wer": 1.5, "cer": 0.9, "clips": 3}, "after": {"wer": 0.5, "cer": 0.25, "clips": 3}},
        "training": {},
    }
    (folder / "language_adapter.json").write_text(json.dumps(row))
    return folder


@pytest.fixture
def make_adapter(tmp_path: Path, tiny_model: WhisperForConditionalGeneration) -> Callable[..., Path]:
    """`make_adapter("cy")` writes an adapter for the tiny model into its own folder and returns the folder."""

    def make(language: str, *, name: str | None = None, **options: Any) -> Path:
        name = language if name is None else name
        return write_adapter(tmp_path / "adapters" / name, options.pop("model", tiny_model), language, name=name, **options)

    return make


# ---- sound -------------------------------------------------------------------------------------------------------------


def tone(frequency: float, duration_s: float = 1.0, level: float = 0.3, rate: int = SAMPLE_RATE) -> np.ndarray:
    """(samples,) a sine whose loudness swells three times a second, somewhat as syllables do."""
    t = np.arange(round(duration_s * rate)) / rate
    return (level * np.sin(2 * np.pi * frequency * t) * (0.6 - 0.4 * np.cos(2 * np.pi * 3 * t))).astype(np.float32)


def noise(duration_s: float = 1.0, level: float = 0.1, seed: int = 0) -> np.ndarray:
    """(samples,) white noise of standard deviation `level`."""
    return np.random.default_rng(seed).normal(0, level, round(duration_s * SAMPLE_RATE)).astype(np.float32)


def silence(duration_s: float = 1.0) -> np.ndarray:
    """(samples,) zeros."""
    return np.zeros(round(duration_s * SAMPLE_RATE), np.float32)
