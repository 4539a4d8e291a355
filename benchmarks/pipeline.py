"""Transcription beside transformers' own pipeline at the same batch, and what it costs that every recording is in another language.

    python -m benchmarks.pipeline                                  whisper-tiny's sizes on one core, fp32 and bf16
    python -m benchmarks.pipeline --device cuda                    tiny, small and large-v3 on a GPU: fp16, recorded graphs
    python -m benchmarks.pipeline --smoke                          seconds, to see that it runs

Random weights of the published sizes (80 mel bands also for large-v3), scaled dot-product attention, a recording of one whole window for
each row of the batch, 100 tokens a window, greedily, from the samples to the text. Arms:

    transformers          its pipeline, greedily too (left alone it takes five beams), language given, no adapter
    transformers_static   the same with its static cache, which it compiles by itself on a GPU (GPU only)
    ours_base             ours, language given, no adapter
    ours_one_language     every recording in the same language, with its LoRA (rank 8 on all six linear types of encoder and decoder)
    ours_many_languages   every recording in a language of its own, each with its own LoRA
    ours_base_graphs, ours_one_language_graphs, ours_many_languages_graphs
                          the same with every step replayed as a CUDA graph (GPU only)

Ours are asked by as many threads as there are recordings, as a server is, and share one batch: the engine is held until all of them wait.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks._measure import RESULTS, Arms, provenance, summary, table, time_rounds, use_threads, write_results
from benchmarks.detect import RATE, base_for, processor_for, recording
from benchmarks.s2lora import ALL_LINEAR, Sizes
from benchmarks.s2lora import MODELS as S2LORA_MODELS

if TYPE_CHECKING:
    import numpy as np

    from whisper_moe import Transcriber

TOKENS, PROMPT, RANK = 100, 4, 8
LANGUAGES = ("cy", "br", "eu", "gl", "oc", "is", "mt", "mi", "sw", "yo", "sn", "so", "te", "ta", "ml", "lo")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
CPU_ARMS = ("transformers", "ours_base", "ours_one_language", "ours_many_languages")
GPU_ARMS = ("transformers_static", "ours_base_graphs", "ours_one_language_graphs", "ours_many_languages_graphs")
LARGE = Sizes(d_model=1280, layers=32, heads=20, ffn_dim=5120, vocab_size=51_866)
MODELS = {name: replace(sizes, positions=TOKENS + PROMPT) for name, sizes in {**S2LORA_MODELS, "large-v3": LARGE}.items()}


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    models: tuple[Literal["tiny", "small", "large-v3"], ...] = ()
    """Whose sizes; left out, tiny on a CPU and all three on a GPU."""
    dtypes: tuple[Literal["float32", "bfloat16", "float16"], ...] = ()
    """Left out, float32 and bfloat16 on a CPU, float16 on a GPU."""
    batch_size: int = 8
    rounds: int = 5
    device: str = "cpu"
    threads: int = 1
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the time that this process had the processor, to try something out while the machine is busy. No figures for publication."""
    smoke: bool = False
    out: Path = RESULTS
    """Folder for the JSON."""

    def __post_init__(self) -> None:
        if not 1 <= self.batch_size <= len(LANGUAGES):
            raise ValueError(f"batch_size is 1 to {len(LANGUAGES)}, as many as there are languages here; got {self.batch_size}.")


# ---- who transcribes ---------------------------------------------------------------------------------------------------


def write_adapters(folder: Path, model: Any, languages: Sequence[str], rank: int = RANK) -> list[Path]:
    """A LoRA for each language, of random weights, as PEFT saves one."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file
    from torch import nn

    sizes = {name: each.weight.shape for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    sizes = {name: size for name, size in sizes.items() if name.rpartition(".")[2] in ALL_LINEAR}
    generator = torch.Generator().manual_seed(2)
    for language in languages:
        tensors = {}
        for name, (d_out, d_in) in sizes.items():
            tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            tensors[f"base_model.model.{name}.lora_B.weight"] = 0.02 * torch.randn(d_out, rank, generator=generator)
        own = folder / language
        LoraConfig(r=rank, lora_alpha=rank, target_modules=ALL_LINEAR).save_pretrained(str(own))
        save_file(tensors, own / "adapter_model.safetensors")
        row = {"format": 1, "name": language, "language": language, "base_model": "random", "num_parameters": 0}
        (own / "language_adapter.json").write_text(json.dumps(row))
    return [folder / language for language in languages]


def pipelined(model: Any, processor: Any, batch_size: int, waves: Sequence[np.ndarray], **options: Any) -> list[str]:
    """Transformers' pipeline, all recordings in one batch."""
    from transformers import pipeline

    recognize = pipeline(
        "automatic-speech-recognition",
        model=model,
        tokenizer=processor.tokenizer,
        feature_extractor=processor.feature_extractor,
        device=model.device,
        dtype=model.dtype,
    )
    asked = {"language": "en", "task": "transcribe", "num_beams": 1, **options}  # its own default are five beams
    given = [{"raw": wave, "sampling_rate": RATE} for wave in waves]
    return [row["text"] for row in recognize(given, batch_size=batch_size, generate_kwargs=asked)]


def together(transcriber: Transcriber, waves: Sequence[np.ndarray], languages: Sequence[str], adapter: str | None) -> list[str]:
    """Ours, a thread for each recording; nothing begins before all of them wait for the model."""
    texts: list[Any] = [None] * len(waves)

    def ask(number: int) -> None:
        try:
            texts[number] = transcriber.transcribe(waves[number], language=languages[number], adapter=adapter).text
        except BaseException as error:  # told by the thread that waits
            texts[number] = error

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(waves))]
    with transcriber.engine.exclusive():
        for thread in threads:
            thread.start()
        while len(transcriber.engine._waiting) < len(waves) and not any(isinstance(text, BaseException) for text in texts):
            time.sleep(0.0005)
    for thread in threads:
        thread.join()
    for text in texts:
        if isinstance(text, BaseException):
            raise text
    return texts


# ---- measuring ---------------------------------------------------------------------------------------------------------


def measure(sizes: Sizes, dtypes: Sequence[str], settings: Settings) -> dict[str, Any]:
    """Seconds of every arm in each precision, the ratios, and how many seconds of sound each transcribes in a second."""
    import torch

    from whisper_moe import AdapterRegistry, Transcriber

    use_threads(settings.threads)
    on_gpu = not settings.device.startswith("cpu")
    processor, window_s = processor_for(sizes), sizes.frames / 100
    count, languages = settings.batch_size, LANGUAGES[: settings.batch_size]
    waves = [recording(1, window_s)[: round(window_s * RATE)] * (1 + 0.1 * number) for number in range(count)]
    found: dict[str, Any] = {"summary": {}, "seconds": {}, "seconds_of_sound": count * window_s}
    with tempfile.TemporaryDirectory() as folder:
        for dtype in dtypes:
            base = base_for(sizes, processor).to(settings.device, getattr(torch, dtype))
            registry = AdapterRegistry(write_adapters(Path(folder), base, languages))
            eager = Transcriber(base, processor, registry, max_rows=count)
            bare = base_for(sizes, processor).to(settings.device, base.dtype)
            arms: dict[str, Any] = {"transformers": partial(pipelined, bare, processor, count, waves)}
            arms |= ours("", eager, waves, languages)
            if on_gpu:
                third = base_for(sizes, processor).to(settings.device, base.dtype)
                recorded = Transcriber(third, processor, registry, max_rows=count, graphs=True)
                arms |= {"transformers_static": partial(pipelined, bare, processor, count, waves, cache_implementation="static")}
                arms |= ours("_graphs", recorded, waves, languages)
            decoders = {arm: (bare if arm.startswith("transformers") else base).get_decoder() for arm in arms}
            for arm in arms.values():  # adapters are read, kernels chosen, graphs recorded
                for _ in range(3 if on_gpu else 1):
                    arm()
            check(arms, decoders)
            timed: Arms = arms
            seconds = time_rounds(
                {dtype: timed}, settings.rounds, warmups=0, device=settings.device, clock=CLOCKS[settings.clock], progress=True
            )[dtype]
            found["seconds"][dtype] = seconds
            rows = summary(seconds, ("transformers", "ours_one_language", "ours_one_language_graphs"))
            found["summary"][dtype] = {arm: row | {"real_time_factor": count * window_s / row["seconds"]} for arm, row in rows.items()}
    return found


def ours(suffix: str, transcriber: Transcriber, waves: Sequence[np.ndarray], languages: Sequence[str]) -> dict[str, Any]:
    one = [languages[0]] * len(waves)
    return {
        f"ours_base{suffix}": partial(together, transcriber, waves, one, "none"),
        f"ours_one_language{suffix}": partial(together, transcriber, waves, one, None),
        f"ours_many_languages{suffix}": partial(together, transcriber, waves, languages, None),
    }


def check(arms: dict[str, Any], decoders: dict[str, Any]) -> None:
    """Every arm takes the same number of steps, and adapters change the text: else different work would be compared."""
    texts: dict[str, list[str]] = {}
    for arm, write in arms.items():
        seen: list[int] = []
        rows: list[int] = []

        def count(_: Any, args: tuple[Any, ...], __: Any, seen: list[int] = seen, rows: list[int] = rows) -> None:
            seen.append(args[0].shape[-1] if args[0].dim() > 1 else 1)  # positions of this call
            rows.append(args[0].shape[0])

        handle = decoders[arm].embed_tokens.register_forward_hook(count)
        try:
            texts[arm] = write()
        finally:
            handle.remove()
        if not arm.endswith("_graphs"):  # a graph calls nothing
            assert sum(seen) == PROMPT + TOKENS - 1, f"{arm}: {sum(seen)} positions, expected {PROMPT + TOKENS - 1}"
            assert set(rows) == {len(texts[arm])}, (
                f"{arm}: {sorted(set(rows))} rows at once for {len(texts[arm])} recordings: it searches with beams"
            )
    assert texts["ours_one_language"] != texts["ours_base"]
    assert texts["ours_many_languages"][0] == texts["ours_one_language"][0], "a row depends on its neighbours"


def pipeline_table(results: dict[str, Any]) -> str:
    """A line for each precision and arm."""
    lines = []
    for dtype, rows in results["summary"].items():
        for arm, row in rows.items():
            own = row.get("to_ours_one_language_graphs" if arm.endswith("_graphs") else "to_ours_one_language")
            against = row["to_transformers"]
            cells = [f"{row['seconds']:.3f}", f"{row['real_time_factor']:.1f}", f"{1 / against['median']:.2f}"]
            cells.append(f"{1 / against['highest']:.2f}-{1 / against['lowest']:.2f}")
            lines.append([f"{dtype}: {arm}", *cells, "-" if own is None or not arm.startswith("ours") else f"{own['median']:.3f}"])
    return table(["", "s", "x real time", "x transformers", "range", "to one language"], lines)


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    on_gpu = not settings.device.startswith("cpu")
    models: Sequence[str] = settings.models or (tuple(MODELS) if on_gpu else ("tiny",))
    dtypes: Sequence[str] = settings.dtypes or (("float16",) if on_gpu else ("float32", "bfloat16"))
    if settings.smoke:
        settings, models, dtypes = replace(settings, batch_size=2, rounds=1), models[:1], dtypes[:1]
    for name in models:
        sizes = replace(MODELS[name], layers=1, frames=600) if settings.smoke else MODELS[name]
        results = measure(sizes, dtypes, settings)
        header = provenance(settings.device) | {"part": "pipeline", "model": {"name": name, **vars(sizes)}}
        header |= {key: getattr(settings, key) for key in ("rounds", "batch_size", "clock", "device")}
        path = write_results(settings.out, "pipeline", name, header | results)
        print(
            f"\nwhisper-{name} sizes, {settings.batch_size} windows, {settings.rounds} rounds\n{pipeline_table(results)}\n{path}\n",
            flush=True,
        )


if __name__ == "__main__":
    main()
