"""Does a training step ever wait for its data? Clips a second of each stage, and the share of time a step waits, by number of workers.

    python -m benchmarks.data_loading                                              made clips, Ogg/Opus files of 2 to 12 seconds
    python -m benchmarks.data_loading --data ../shared/speech/de_kerstin/train.parquet --language de

Decoding, features (with augmentation) and both together are timed on one thread. Then LoRA of rank 32 on a Whisper of tiny's sizes
(random weights, fp32, whole 30-second windows) is trained for some steps, fed from memory and from a stream that decodes on the way, by 0,
1 and 2 worker processes. The first batch, for which workers have to start, is counted apart. Minutes on two cores.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks._measure import RESULTS, provenance, synchronize, table, use_threads, write_results

if TYPE_CHECKING:
    from transformers import WhisperProcessor

    from whisper_moe.data import Clips, Collator

RATE = 16_000  # Hz
STAGES = ("decode", "features", "features_augmented", "decode_and_features")


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    data: Path | None = None
    """A parquet file or folder of clips. Default: clips are made."""
    language: str = "en"
    """Of the clips; decides the prompt only."""
    num_clips: int = 200
    """Clips that are loaded."""
    batch_size: int = 8
    steps: int = 6
    """Training steps of each arm, without the first."""
    workers: tuple[int, ...] = (0, 1, 2)
    threads: int = 1
    """Of torch in the training process; workers have one each."""
    device: str = "cpu"
    results: Path = RESULTS
    """Folder for the JSON."""


# ---- what is loaded --------------------------------------------------------------------------------------------------------


def make_clips(folder: Path, number: int, seed: int = 0) -> Path:
    """A table of Ogg/Opus files of noise that swells as syllables do: as long and as hard to decode as speech."""
    import soundfile

    rng, lines = np.random.default_rng(seed), ["file_name,text"]
    for at in range(number):
        length = int(rng.uniform(2, 12) * RATE)
        swell = 0.5 - 0.5 * np.cos(2 * np.pi * 3 * np.arange(length) / RATE)
        noise = (0.1 * swell * rng.standard_normal(length)).astype(np.float32)
        soundfile.write(folder / f"{at}.ogg", noise, RATE, format="OGG", subtype="OPUS")
        lines.append(f"{at}.ogg,{'the quick brown fox jumps over the lazy dog ' * 2}")
    (folder / "train.csv").write_text("\n".join(lines), "utf-8")
    return folder / "train.csv"


def tiny_processor() -> WhisperProcessor:
    """Whisper's features of 30 seconds, with the pocket's tokenizer: its ids are all within a published vocabulary."""
    from transformers import WhisperFeatureExtractor, WhisperProcessor

    from whisper_moe.pocket import MODEL

    return WhisperProcessor(WhisperFeatureExtractor(), WhisperProcessor.from_pretrained(str(MODEL)).tokenizer)


# ---- stages ----------------------------------------------------------------------------------------------------------------


def time_stages(
    source: Path, clips: Clips, collator: Callable[[bool], Collator], batch_size: int, language: str
) -> dict[str, dict[str, float]]:
    """Stage -> clips and seconds of sound a second, on one thread."""
    from whisper_moe.data import ClipStream, Filters, TrainingView
    from whisper_moe.sources import open_rows

    view = TrainingView(clips)
    groups = [range(start, min(start + batch_size, len(clips))) for start in range(0, len(clips), batch_size)]

    def stream() -> Iterator[dict[str, Any]]:
        return islice(ClipStream(open_rows(source, split="train"), Filters(language), num_threads=1, read_ahead=1), len(clips))

    def collate(items: Any, augment: bool) -> None:
        collated = collator(augment)
        batch: list[Any] = []
        for item in items:
            batch.append(item)
            if len(batch) == batch_size:
                collated(batch)
                batch.clear()

    stages: dict[str, Callable[[], object]] = {
        "decode": lambda: sum(1 for _ in stream()),
        "features": lambda: collate((view[0, row] for rows in groups for row in rows), False),
        "features_augmented": lambda: collate((view[0, row] for rows in groups for row in rows), True),
        "decode_and_features": lambda: collate(stream(), True),
    }
    found = {}
    for name, stage in stages.items():
        started = time.perf_counter(), time.process_time()
        stage()
        wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
        found[name] = {"clips_per_s": len(clips) / wall, "clips_per_cpu_s": len(clips) / cpu, "times_real_time": clips.hours * 3600 / wall}
    return found


# ---- training --------------------------------------------------------------------------------------------------------------


def tiny_step(processor: WhisperProcessor, device: str) -> Callable[[dict[str, Any]], None]:
    """A training step of LoRA on a Whisper of tiny's sizes: forward, loss, backward, optimizer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 384, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536, "encoder_attention_heads": 6, "decoder_attention_heads": 6}
    tokenizer = processor.tokenizer
    end = tokenizer.eos_token_id
    start = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    config = WhisperConfig(**sizes, encoder_layers=4, decoder_layers=4, pad_token_id=end, eos_token_id=end, decoder_start_token_id=start)
    lora = LoraConfig(r=32, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "fc1", "fc2"])
    model = get_peft_model(WhisperForConditionalGeneration(config), lora).to(device)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], 1e-4)

    def step(batch: dict[str, Any]) -> None:
        loss = model(**{name: tensor.to(device) for name, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def waiting(batches: Iterator[dict[str, Any]], step: Callable[[dict[str, Any]], None], steps: int, device: str) -> dict[str, float]:
    """How long each step waits for its batch, and how long it takes. The first batch is told apart."""
    started = time.perf_counter()
    batch = next(batches)
    first = time.perf_counter() - started
    waits, took = [], []
    for _ in range(steps):
        started = time.perf_counter()
        step(batch)
        synchronize(device)
        stepped = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - stepped)
        took.append(stepped - started)
    share = sum(waits) / (sum(waits) + sum(took))
    return {"first_batch_s": first, "wait_s": statistics.median(waits), "step_s": statistics.median(took), "share_waited": share}


def endless(loader: Any, source: Any) -> Iterator[dict[str, Any]]:
    """Epoch after epoch."""
    epoch = 0
    while True:
        if hasattr(source, "set_epoch"):
            source.set_epoch(epoch)
        yield from loader
        epoch += 1


def measure(settings: Settings) -> dict[str, Any]:
    """All figures."""
    from whisper_moe.data import Collator, EpochOrder, Filters, TrainingView, batches, load_clips, stream_clips

    use_threads(settings.threads)
    processor = tiny_processor()
    with tempfile.TemporaryDirectory() as folder:
        source = make_clips(Path(folder), settings.num_clips) if settings.data is None else settings.data
        clips = load_clips(source, split="train", language=settings.language, limit=settings.num_clips)

        def collator(augment: bool) -> Collator:
            return Collator(processor, settings.language, augment=augment)

        stages = time_stages(source, clips, collator, settings.batch_size, settings.language)
        step = tiny_step(processor, settings.device)
        view, stream = TrainingView(clips), stream_clips(source, split="train", filters=Filters(settings.language))
        step(collator(True)([view[0, row] for row in range(settings.batch_size)]))  # the first one allocates
        training = {}
        for workers in settings.workers:
            order = EpochOrder([clip.duration_s for clip in clips.clips], settings.batch_size, 0)
            loaders: dict[str, tuple[Any, Any]] = {
                "memory": (batches(view, collator(True), settings.batch_size, num_workers=workers, sampler=order, drop_last=True), order),
                "stream": (batches(stream, collator(True), settings.batch_size, num_workers=workers, drop_last=True), stream),
            }
            for name, (loader, epochs) in loaders.items():
                training[f"{name}, {workers} workers"] = waiting(endless(loader, epochs), step, settings.steps, settings.device)
    return {
        "what": "data loading beside a training step",
        "clips": {"number": len(clips), "hours": clips.hours, "name": "made" if settings.data is None else clips.name},
        "batch_size": settings.batch_size,
        "steps": settings.steps,
        "stages": stages,
        "training": training,
        **provenance(settings.device),
    }


def tables(results: dict[str, Any]) -> str:
    """The figures for a terminal."""
    stages = [
        [name, f"{row['clips_per_s']:,.0f}", f"{row['clips_per_cpu_s']:,.0f}", f"{row['times_real_time']:,.0f}"]
        for name, row in results["stages"].items()
    ]
    training = [
        [name, f"{row['step_s']:.2f}", f"{1000 * row['wait_s']:.1f}", f"{row['share_waited']:.2%}", f"{row['first_batch_s']:.2f}"]
        for name, row in results["training"].items()
    ]
    return "\n\n".join(
        [
            table(["one thread", "clips/s", "clips/CPU s", "times real time"], stages),
            table([f"batch of {results['batch_size']}", "step s", "wait ms", "share waited", "first batch s"], training),
        ]
    )


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    results = measure(settings)
    print(tables(results))
    print(write_results(settings.results, "data-loading", "tiny", results))


if __name__ == "__main__":
    main()
