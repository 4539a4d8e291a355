"""What it costs not to know the language: detect, adapt and transcribe beside transcribing with the language given.

    python -m benchmarks.detect                   whisper-tiny's sizes: recordings of one window and of ten
    python -m benchmarks.detect --model small     minutes a round

Random weights of the published sizes, fp32, one thread, 100 tokens a window, greedy, windows in batches of 8. Ours from the samples to the
text, with an adapter on the decoder only and with one in the encoder too; Transformers' own `generate` on the same windows, without an
adapter, features included. Every arm is timed in one process, round by round; how many windows each gave to the encoder is counted.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks._measure import RESULTS, Arms, provenance, summary, table, time_rounds, use_threads, write_results
from benchmarks.s2lora import MODELS as S2LORA_MODELS
from benchmarks.s2lora import Sizes, whisper

if TYPE_CHECKING:
    import numpy as np
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    from whisper_moe import Transcriber

LANGUAGE = "cy"
TOKENS, PROMPT = 100, 4
RANK, BATCH_SIZE = 32, 8
ROUNDS = {"tiny": 7, "small": 3}
RATE = 16_000
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# arm -> what it is compared with
ARMS = {
    "ours, decoder adapter, given": None,
    "ours, decoder adapter, detected": "ours, decoder adapter, given",
    "ours, encoder adapter, given": None,
    "ours, encoder adapter, detected": "ours, encoder adapter, given",
    "transformers, given": None,
    "transformers, detected": "transformers, given",
}
MODELS = {name: replace(sizes, positions=TOKENS + PROMPT) for name, sizes in S2LORA_MODELS.items()}


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    model: Literal["tiny", "small"] = "tiny"
    """Whose sizes."""
    windows: tuple[int, ...] = (1, 10)
    """Lengths of the recordings."""
    rounds: int | None = None
    """Times every arm is measured; left out, as many as fit ten minutes on one core."""
    threads: int = 1
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the time that this process had the processor, to try something out while the machine is busy. No figures for publication."""
    out: Path = RESULTS
    """Folder for the JSON."""


# ---- what is transcribed, and by whom ----------------------------------------------------------------------------------


def recording(num_windows: int, window_s: float) -> np.ndarray:
    """(samples,) tones that swell as syllables do, nearly a window each, with pauses between them."""
    import numpy as np

    t = np.arange(round((window_s - 0.5) * RATE)) / RATE
    swell = 0.6 - 0.4 * np.cos(2 * np.pi * 3 * t)
    pause = np.zeros(round(1.5 * RATE))
    parts = [np.concatenate([0.3 * np.sin(2 * np.pi * (200 + 90 * number) * t) * swell, pause]) for number in range(num_windows)]
    return np.concatenate(parts).astype(np.float32)


def processor_for(sizes: Sizes) -> WhisperProcessor:
    """Whisper's features and special tokens; the words are made up, as many as the vocabulary has room for."""
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    tasks = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), *tasks]
    words = [f"w{number}" for number in range(sizes.vocab_size - len(special))]
    tokenizer = WhisperTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.pad_token = "<|endoftext|>"
    return WhisperProcessor(WhisperFeatureExtractor(chunk_length=sizes.frames // 100, sampling_rate=RATE), tokenizer)


def base_for(sizes: Sizes, processor: WhisperProcessor) -> WhisperForConditionalGeneration:
    """A Whisper with random weights that knows Whisper's languages and never ends a text by itself."""
    from transformers import GenerationConfig
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    model, to_id = whisper(sizes).eval(), processor.tokenizer.convert_tokens_to_ids
    model.requires_grad_(False)
    end, start = to_id("<|endoftext|>"), to_id("<|startoftranscript|>")
    model.generation_config = GenerationConfig(
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": to_id(f"<|{code}|>") for code in LANGUAGES},
        task_to_id={task: to_id(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=to_id("<|notimestamps|>"),
        prev_sot_token_id=to_id("<|startofprev|>"),
        decoder_start_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
        suppress_tokens=[end],
        max_length=sizes.positions,
        return_timestamps=False,
    )
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
        setattr(model.config, name, start if name.startswith("decoder") else end)
    return model


def transcriber_for(base: WhisperForConditionalGeneration, processor: WhisperProcessor, place: str, folder: Path) -> Transcriber:
    """A copy of the base with a LoRA for one language, on the decoder or everywhere."""
    from peft import LoraConfig, get_peft_model

    from whisper_moe import AdapterRegistry, Transcriber
    from whisper_moe.layouts import MODULES, decoder_only

    targets = decoder_only(base) if place == "decoder" else list(MODULES)
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(copy.deepcopy(base), config)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    row = {"format": 1, "name": LANGUAGE, "language": LANGUAGE, "base_model": "random", "num_parameters": 0}
    (folder / "language_adapter.json").write_text(json.dumps(row))
    transcriber = Transcriber(copy.deepcopy(base), processor, AdapterRegistry([folder]))
    assert transcriber.registry[LANGUAGE].touches_encoder == (place == "encoder")
    return transcriber


def transcribe(transcriber: Transcriber, samples: np.ndarray, detect: bool) -> str:
    """Ours. Detected among all languages; random weights are sure of none, so the one with the adapter is asked for afterwards."""
    options: dict[str, Any] = {"allowed": [LANGUAGE], "threshold": 0.0} if detect else {"language": LANGUAGE}
    return transcriber.transcribe(samples, batch_size=BATCH_SIZE, **options).text


def generate(model: Any, processor: WhisperProcessor, samples: np.ndarray, window_s: float, detect: bool) -> list[str]:
    """Transformers' own, on the windows that ours finds."""
    from whisper_moe.audio import find_windows

    spans = find_windows(samples, window_s)
    waves = [samples[round(span.start_s * RATE) : round(span.end_s * RATE)] for span in spans]
    texts: list[str] = []
    for start in range(0, len(waves), BATCH_SIZE):
        inputs = processor(waves[start : start + BATCH_SIZE], sampling_rate=RATE, return_tensors="pt", return_attention_mask=True)
        told = {} if detect else {"language": LANGUAGE}
        tokens = model.generate(**inputs, task="transcribe", max_length=model.config.max_target_positions, **told)
        texts += processor.batch_decode(tokens, skip_special_tokens=True)
    return texts


# ---- measuring ---------------------------------------------------------------------------------------------------------


def encoded_windows(models: list[Any], call: Callable[[], object]) -> int:
    """How many windows a call gives to the encoder."""
    rows: list[int] = []

    def count(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        rows.append(len(args[0] if args else kwargs["input_features"]))

    handles = [model.get_encoder().register_forward_hook(count, with_kwargs=True) for model in models]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return sum(rows)


def measure(sizes: Sizes, windows: tuple[int, ...], rounds: int, *, threads: int = 1, clock: str = "wall") -> dict[str, Any]:
    """Seconds of every arm for recordings of each length, the ratios, and the windows that were encoded."""
    from whisper_moe.audio import find_windows

    use_threads(threads)
    processor, window_s = processor_for(sizes), sizes.frames / 100
    base = base_for(sizes, processor)
    found: dict[str, Any] = {"summary": {}, "encoded": {}, "seconds": {}}
    with tempfile.TemporaryDirectory() as folder:
        ours = {place: transcriber_for(base, processor, place, Path(folder) / place) for place in ("decoder", "encoder")}
        for number in windows:
            samples = recording(number, window_s)
            assert len(find_windows(samples, window_s)) == number
            arms: Arms = {
                name: partial(generate, base, processor, samples, window_s, name.endswith("detected"))
                if name.startswith("transformers")
                else partial(transcribe, ours["decoder" if "decoder" in name else "encoder"], samples, name.endswith("detected"))
                for name in ARMS
            }
            models = [base, *(each.model for each in ours.values())]
            stage = f"{number} window{'s' if number > 1 else ''}"
            found["encoded"][stage] = {name: encoded_windows(models, arm) for name, arm in arms.items()}  # warms up as well
            for place in ours:  # the same text, or the comparison would be of two different works
                assert arms[f"ours, {place} adapter, given"]() == arms[f"ours, {place} adapter, detected"]()
            seconds = time_rounds({stage: arms}, rounds, warmups=0, clock=CLOCKS[clock], progress=True)[stage]
            found["seconds"][stage] = seconds
            rows = summary(seconds, tuple({name for name in ARMS.values() if name is not None}))
            found["summary"][stage] = {
                name: {"seconds": rows[name]["seconds"]} | ({} if given is None else {"to_given": rows[name][f"to_{given}"]})
                for name, given in ARMS.items()
            }
    return found


def detect_table(results: dict[str, Any]) -> str:
    """A line for each arm and length."""
    lines = []
    for stage, rows in results["summary"].items():
        for name, row in rows.items():
            ratio = row.get("to_given")
            shown = ["-", "-"] if ratio is None else [f"{ratio['median']:.3f}", f"{ratio['lowest']:.3f}-{ratio['highest']:.3f}"]
            lines.append([f"{stage}: {name}", f"{row['seconds']:.3f}", *shown, f"{results['encoded'][stage][name]}"])
    return table(["detection", "s", "to given", "range", "windows encoded"], lines)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    sizes = MODELS[settings.model]
    rounds = ROUNDS[settings.model] if settings.rounds is None else settings.rounds
    results = measure(sizes, settings.windows, rounds, threads=settings.threads, clock=settings.clock)
    header = provenance() | {"part": "detect", "model": {"name": settings.model, **vars(sizes)}, "rounds": rounds, "clock": settings.clock}
    path = write_results(settings.out, "detect", settings.model, header | results)
    print(f"\nwhisper-{settings.model} sizes, {rounds} rounds, {settings.threads} thread(s)\n{detect_table(results)}\n{path}\n", flush=True)


if __name__ == "__main__":
    main()
