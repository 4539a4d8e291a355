"""Training that leaves the encoder alone, on states computed once; and many languages in one batch beside one language after another.

    python -m benchmarks.training                      both parts at whisper-tiny's sizes, ten minutes on one core
    python -m benchmarks.training --part many --live   also with the encoder in every step

Random weights of the published sizes, fp32, one thread, AdamW. Part `cached`: a step on two recordings of 30 seconds with 64 tokens each,
from full fine-tuning down to a decoder's adapter on cached states, which are read from files in every step. Part `many`: time per clip of
eight languages, one recording each, LoRA on the decoder and cached states. Everything is timed in one process, round by round.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

from benchmarks._measure import RESULTS, provenance, summary, table, time_rounds, use_threads, write_results
from benchmarks.s2lora import ALL_LINEAR, CLOCKS, MODELS, RANK, Sizes, adapted, whisper

if TYPE_CHECKING:
    import torch
    from torch import nn

CACHED_ARMS = ("full", "lora", "lora_decoder", "lora_cached", "s2_cached", "rows_cached")
MANY_ARMS = ("mixed", "mixed_pool", "batch_of_one_language", "one_after_another")
ROUNDS = {"cached": 7, "many": 7}


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    part: Literal["cached", "many", "all"] = "all"
    model: Literal["tiny", "small"] = "tiny"
    """Whose sizes."""
    rounds: int | None = None
    """Times every arm is measured."""
    languages: int = 8
    """Of the second part; a row of the batch each."""
    live: bool = False
    """In the second part, also LoRA on encoder and decoder, with the encoder in every step."""
    threads: int = 1
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the time that this process had the processor, for a machine that does other things besides."""
    out: Path = RESULTS
    """Folder for the JSON."""


# ---- the states of some recordings -------------------------------------------------------------------------------------


class Recordings:
    """Noise of a window's length, its features, labels, and its encoder states as the cache keeps them."""

    def __init__(self, sizes: Sizes, base: nn.Module, count: int, folder: Path) -> None:
        import numpy as np
        import torch
        from transformers import WhisperFeatureExtractor

        from whisper_moe.data import Clip, Clips, extract_features
        from whisper_moe.encoder_states import StatesView, cache_encoder_states

        extractor = WhisperFeatureExtractor(chunk_length=sizes.frames // 100)
        processor: Any = SimpleNamespace(feature_extractor=extractor)
        rng = np.random.default_rng(0)
        clips = Clips([Clip(rng.integers(-9000, 9000, extractor.n_samples, np.int16), "noise") for _ in range(count)], "noise")
        self.features = extract_features(processor, [clips[row]["audio"] for row in range(count)])  # (count, n_mels, frames)
        self.view = StatesView(clips, cache_encoder_states(base, processor, clips, folder, precision="fp32", batch_size=1))
        self.labels = torch.randint(2, sizes.vocab_size, (count, sizes.labels), generator=torch.Generator().manual_seed(2))

    def states(self, rows: Sequence[int]) -> torch.Tensor:
        """(rows, positions, d_model), read from the files."""
        import torch

        return torch.stack([self.view[0, row]["states"] for row in rows]).float()


# ---- one adapter -------------------------------------------------------------------------------------------------------


class Step:
    """One arm with a model of its own: full fine-tuning, or PEFT's adapter, live or on cached states. A call is a training step."""

    def __init__(self, arm: str, base: nn.Module, recordings: Recordings, rows: Sequence[int]) -> None:
        import torch
        from peft import LoraConfig

        from peft_s2lora import S2LoraConfig, s2lora_param_groups
        from whisper_moe.layouts import decoder_only

        in_decoder = decoder_only(base, ALL_LINEAR)
        makers: dict[str, Callable[[], Any]] = {
            "full": lambda: None,
            "lora": lambda: LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ALL_LINEAR),
            "lora_decoder": lambda: LoraConfig(r=RANK, lora_alpha=RANK, target_modules=in_decoder),
            "lora_cached": lambda: LoraConfig(r=RANK, lora_alpha=RANK, target_modules=in_decoder),
            "s2_cached": lambda: S2LoraConfig(r=RANK, target_modules=in_decoder),
        }
        config = makers[arm]()
        self.model: Any = base if config is None else adapted(base, config)
        self.model.train()
        trained = [weight for weight in self.model.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(s2lora_param_groups(self.model, lr=1e-4) if arm == "s2_cached" else trained, lr=1e-4)
        self.recordings, self.rows, self.cached = recordings, list(rows), arm.endswith("_cached")

    def __call__(self) -> float:
        """The loss of the step."""
        loss = self.backward(self.rows)
        self.update()
        return loss

    def backward(self, rows: Sequence[int]) -> float:
        heard: dict[str, Any] = {"input_features": self.recordings.features[list(rows)]}
        if self.cached:
            heard = {"encoder_outputs": (self.recordings.states(rows),)}
        loss = self.model(**heard, labels=self.recordings.labels[list(rows)], use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def one_by_one(self) -> float:
        """A step on each recording by itself: what languages cost that are trained one after another. The sum of the losses."""
        total = 0.0
        for row in self.rows:
            total += self.backward([row])
            self.update()
        return total


# ---- many adapters -----------------------------------------------------------------------------------------------------


class ManyStep:
    """Arms of `whisper-moe train-many`: row i of the batch trains adapter `languages[i]`. A call is a training step."""

    def __init__(
        self, base: nn.Module, recordings: Recordings, languages: Sequence[int], *, pool: bool = False, live: bool = False
    ) -> None:
        import torch

        from whisper_moe.row_training import AdaptedWeight, LoraVectors, PoolVectors, RowAdapters, Vectors

        place = "model." if live else "model.decoder."
        layers: dict[str, Any] = {name: layer for name, layer in base.named_modules() if name.startswith(place)}
        weights = [
            AdaptedWeight(name, layer.out_features, layer.in_features, RANK, 1.0)
            for name, layer in layers.items()
            if name.rpartition(".")[2] in ALL_LINEAR
        ]
        vectors: Vectors = LoraVectors(weights)
        if pool:
            generator = torch.Generator().manual_seed(4)
            shapes = {(weight.d_out, weight.d_in) for weight in weights}
            pairs = {
                shape: (torch.randn(RANK, shape[1], generator=generator), torch.randn(shape[0], RANK, generator=generator) / shape[1])
                for shape in sorted(shapes)
            }
            vectors = PoolVectors(weights, {weight.name: pairs[weight.d_out, weight.d_in] for weight in weights})
        count = max(languages) + 1
        self.adapters = RowAdapters(base, vectors, [vectors.initial(torch.Generator().manual_seed(which)) for which in range(count)])
        self.optimizer = torch.optim.AdamW(self.adapters.parameters, lr=1e-4)
        self.model: Any = base
        self.recordings, self.languages, self.live = recordings, list(languages), live

    def __call__(self) -> float:
        """The sum of the languages' losses."""
        from transformers.models.whisper.modeling_whisper import shift_tokens_right

        from whisper_moe.row_training import token_losses

        rows = range(len(self.languages))
        labels, config = self.recordings.labels[list(rows)], self.model.config
        heard: dict[str, Any] = {"input_features": self.recordings.features[list(rows)]}
        if not self.live:
            heard = {"encoder_outputs": (self.recordings.states(rows),)}
        share = len(set(self.languages)) / labels.numel()  # every language has as many tokens
        with self.adapters.attached(), self.adapters.rows(self.languages):
            inputs = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
            hidden = self.model.model(**heard, decoder_input_ids=inputs, use_cache=False).last_hidden_state
            loss = share * token_losses(hidden.flatten(0, 1), self.model.proj_out.weight, labels.flatten()).sum()
            loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


# ---- the parts ---------------------------------------------------------------------------------------------------------


def measure_cached(sizes: Sizes, rounds: int, *, threads: int = 1, clock: str = "wall") -> dict[str, Any]:
    """Time of a training step of every arm, and its ratio to full fine-tuning and to LoRA everywhere."""
    use_threads(threads)
    base = whisper(sizes)
    with tempfile.TemporaryDirectory() as folder:
        recordings = Recordings(sizes, base, sizes.batch_size, Path(folder))
        rows = range(sizes.batch_size)
        arms: dict[str, Callable[[], object]] = {
            arm: Step(arm, copy.deepcopy(base), recordings, rows) for arm in CACHED_ARMS if arm != "rows_cached"
        }
        arms["rows_cached"] = ManyStep(copy.deepcopy(base), recordings, [0] * sizes.batch_size)
        seconds = time_rounds({"step": arms}, rounds, clock=CLOCKS[clock], progress=True)
        state_bytes = recordings.view.states.plan.clip_bytes
    return {"summary": summary(seconds["step"], ("full", "lora")), "seconds": seconds, "cache_bytes_per_clip": state_bytes}


def measure_many(sizes: Sizes, languages: int, rounds: int, *, live: bool = False, threads: int = 1, clock: str = "wall") -> dict[str, Any]:
    """Time per clip of a batch with a row of each language, and its ratio to the languages one after another."""
    use_threads(threads)
    base = whisper(sizes)
    everybody = list(range(languages))
    with tempfile.TemporaryDirectory() as folder:
        recordings = Recordings(sizes, base, languages, Path(folder))
        stages: dict[str, dict[str, Callable[[], object]]] = {
            "cached": {
                "mixed": ManyStep(copy.deepcopy(base), recordings, everybody),
                "mixed_pool": ManyStep(copy.deepcopy(base), recordings, everybody, pool=True),
                "batch_of_one_language": Step("lora_cached", copy.deepcopy(base), recordings, everybody),
                "one_after_another": Step("lora_cached", copy.deepcopy(base), recordings, everybody).one_by_one,
            }
        }
        if live:
            stages["live"] = {
                "mixed": ManyStep(copy.deepcopy(base), recordings, everybody, live=True),
                "batch_of_one_language": Step("lora", copy.deepcopy(base), recordings, everybody),
                "one_after_another": Step("lora", copy.deepcopy(base), recordings, everybody).one_by_one,
            }
        seconds = time_rounds(stages, rounds, clock=CLOCKS[clock], progress=True)
    per_clip = {stage: {arm: [took / languages for took in rounds] for arm, rounds in arms.items()} for stage, arms in seconds.items()}
    rows = {stage: summary(arms, ("one_after_another", "batch_of_one_language")) for stage, arms in per_clip.items()}
    return {"summary": rows, "seconds": per_clip}


# ---- tables ------------------------------------------------------------------------------------------------------------


def cached_table(results: dict[str, Any]) -> str:
    """A line for each arm."""
    lines = [[arm, f"{row['seconds']:.3f}", _ratio(row["to_full"]), _ratio(row["to_lora"])] for arm, row in results["summary"].items()]
    return table(["training step", "s", "to full (lowest - highest)", "to lora (lowest - highest)"], lines)


def many_table(results: dict[str, Any]) -> str:
    """A line for each arm of each stage."""
    lines = [
        [f"{stage} {arm}", f"{row['seconds']:.3f}", _ratio(row["to_one_after_another"]), _ratio(row["to_batch_of_one_language"])]
        for stage, arms in results["summary"].items()
        for arm, row in arms.items()
    ]
    return table(["a clip in training", "s", "to one after another", "to a batch of one language"], lines)


def _ratio(row: dict[str, float]) -> str:
    return f"{row['median']:.3f} ({row['lowest']:.3f} - {row['highest']:.3f})"


# ---- the run -----------------------------------------------------------------------------------------------------------


def run_part(part: str, settings: Settings) -> Path:
    """Measure one part, print its table and write its file."""
    sizes = MODELS[settings.model]
    rounds = ROUNDS[part] if settings.rounds is None else settings.rounds
    options: dict[str, Any] = {"threads": settings.threads, "clock": settings.clock}
    if part == "cached":
        results, as_text = measure_cached(sizes, rounds, **options), cached_table
    else:
        results, as_text = measure_many(sizes, settings.languages, rounds, live=settings.live, **options), many_table
        sizes = replace(sizes, batch_size=settings.languages)
    header = provenance() | {"part": part, "model": {"name": settings.model, **vars(sizes)}, "rounds": rounds, "clock": settings.clock}
    path = write_results(settings.out, f"training-{part}", settings.model, header | results)
    print(f"\nwhisper-{settings.model} sizes, {rounds} rounds, {settings.threads} thread(s)\n{as_text(results)}\n{path}\n", flush=True)
    return path


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    for part in ("cached", "many"):
        if settings.part in (part, "all"):
            run_part(part, settings)


if __name__ == "__main__":
    main()
