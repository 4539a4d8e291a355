"""S2-LoRA beside full fine-tuning and PEFT's own tuners: time and memory of a training step, time of unmerged inference.

    python -m benchmarks.s2lora                              both parts: training at whisper-tiny's sizes, inference at whisper-small's
    python -m benchmarks.s2lora --part train --model small   minutes a round, and some 12 GB of memory

Random weights of the published sizes, fp32, one thread. Training: a step is forward, loss, backward, optimizer on two recordings of 30
seconds; all six linear types are adapted. Inference: one recording, 100 tokens, greedy. Everything is timed in one process, round by
round; the memory of a training arm is measured in a process of its own. Ten minutes on one core that does nothing else.
"""

from __future__ import annotations

import copy
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks._measure import (
    RESULTS,
    Arms,
    Seconds,
    count_operators,
    in_new_process,
    peak_bytes,
    peak_resident_bytes,
    provenance,
    summary,
    table,
    time_rounds,
    use_threads,
    write_results,
)

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig
    from torch import nn
    from transformers import WhisperForConditionalGeneration

ATTENTION = ["q_proj", "k_proj", "v_proj", "out_proj"]
ALL_LINEAR = [*ATTENTION, "fc1", "fc2"]
RANK = 32
TRAIN_ARMS = ("full", "lora", "s2lora", "s2lora_sparse", "vera", "adalora")
INFERENCE_ARMS = ("base", "merged", "s2lora", "s2lora_all", "lora", "lora_all")
ROUNDS = {("train", "tiny"): 6, ("train", "small"): 2, ("inference", "tiny"): 15, ("inference", "small"): 3}
STAGES = ("encoder", "first_call", "token_step", "window")
STEPS_AT_ONCE = 11  # token steps of one arm before it is the next one's turn
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Sizes:
    """A Whisper's dimensions, and how much it is given."""

    d_model: int
    layers: int
    """Of the encoder, and of the decoder."""
    heads: int
    ffn_dim: int
    vocab_size: int = 51_865
    frames: int = 3_000
    """Mel frames of a window: 30 seconds."""
    positions: int = 448
    batch_size: int = 2
    """Recordings of a training step."""
    labels: int = 64
    """Tokens of each of them."""
    prompt: int = 4
    """Tokens of the decoder's first call in inference."""
    tokens: int = 100
    """Tokens written in inference; the first call gives the first."""


MODELS = {
    "tiny": Sizes(d_model=384, layers=4, heads=6, ffn_dim=1536),
    "small": Sizes(d_model=768, layers=12, heads=12, ffn_dim=3072),
}


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    part: Literal["train", "inference", "all"] = "all"
    model: Literal["tiny", "small"] | None = None
    """Whose sizes; left out, tiny for training and small for inference."""
    rounds: int | None = None
    """Times every arm is measured; left out, as many as fit ten minutes on one core."""
    arms: tuple[str, ...] = ()
    """Only these, and what they are compared with."""
    threads: int = 1
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the time that this process had the processor, to try something out while the machine is busy. No figures for publication."""
    out: Path = RESULTS
    """Folder for the JSON."""

    def __post_init__(self) -> None:
        for arm in self.arms:
            _known(arm, tuple(dict.fromkeys(TRAIN_ARMS + INFERENCE_ARMS)))


# ---- models ------------------------------------------------------------------------------------------------------------


def whisper(sizes: Sizes, seed: int = 0) -> WhisperForConditionalGeneration:
    """A Whisper with random weights."""
    import torch
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(seed)
    config = WhisperConfig(
        vocab_size=sizes.vocab_size,
        d_model=sizes.d_model,
        encoder_layers=sizes.layers,
        decoder_layers=sizes.layers,
        encoder_attention_heads=sizes.heads,
        decoder_attention_heads=sizes.heads,
        encoder_ffn_dim=sizes.ffn_dim,
        decoder_ffn_dim=sizes.ffn_dim,
        max_source_positions=sizes.frames // 2,
        max_target_positions=sizes.positions,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=1,
        attn_implementation="sdpa",
    )
    return WhisperForConditionalGeneration(config)


def adapted(base: nn.Module, config: PeftConfig) -> Any:
    """The base with an adapter, as PEFT makes it."""
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what PEFT and transformers say to each other
        return get_peft_model(base, config)


def features(batch_size: int, frames: int) -> torch.Tensor:  # (batch, n_mels, frames)
    import torch

    return torch.randn(batch_size, 80, frames, generator=torch.Generator().manual_seed(1))


def train_config(arm: str) -> PeftConfig | None:
    """The adapter of a training arm; None for full fine-tuning."""
    from peft import AdaLoraConfig, LoraConfig, VeraConfig

    from peft_s2lora import S2LoraConfig

    makers: dict[str, Callable[[], PeftConfig | None]] = {
        "full": lambda: None,
        "lora": lambda: LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ALL_LINEAR),
        "s2lora": lambda: S2LoraConfig(r=RANK, target_modules=ALL_LINEAR),
        "s2lora_sparse": lambda: S2LoraConfig(r=RANK, target_modules=ALL_LINEAR, sparsity_weight=0.2),
        "vera": lambda: VeraConfig(r=256, target_modules=ALL_LINEAR),
        # The rank it starts with, and computes with to the end: what it gives up is masked, not removed.
        "adalora": lambda: AdaLoraConfig(init_r=RANK, target_r=RANK // 2, total_step=10_000, target_modules=ALL_LINEAR),
    }
    return makers[_known(arm, TRAIN_ARMS)]()


def inference_config(arm: str) -> PeftConfig | None:
    """The adapter of an inference arm, away from zero; None for the base."""
    from peft import LoraConfig

    from peft_s2lora import S2LoraConfig

    targets = ALL_LINEAR if _known(arm, INFERENCE_ARMS).endswith("_all") else ATTENTION
    if arm == "base":
        return None
    if arm.startswith("lora"):
        return LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets, init_lora_weights=False)
    return S2LoraConfig(r=RANK, target_modules=targets, init_weights=False)


def _known(arm: str, arms: tuple[str, ...]) -> str:
    if arm not in arms:
        raise ValueError(f"No arm {arm!r} here. Known: {', '.join(arms)}.")
    return arm


def chosen_arms(part: str, wanted: tuple[str, ...]) -> list[str]:
    """The arms of a part, or those of them that are wanted and the ones that the ratios need."""
    every, needed = (TRAIN_ARMS, ("full", "lora")) if part == "train" else (INFERENCE_ARMS, ("base",))
    if wanted and not set(wanted) & set(every):
        return []
    return [arm for arm in every if not wanted or arm in wanted or arm in needed]


# ---- training ----------------------------------------------------------------------------------------------------------


class Trainer:
    """One arm of the training part: a model, what it trains, and a step of it."""

    def __init__(self, arm: str, sizes: Sizes, base: nn.Module) -> None:
        import torch

        from peft_s2lora import s2lora_param_groups

        config = train_config(arm)
        self.arm = arm
        self.model: Any = base if config is None else adapted(base, config)
        self.model.train()
        if arm.startswith("s2lora"):
            self.optimizer = torch.optim.AdamW(s2lora_param_groups(self.model, lr=1e-4))
        else:
            self.optimizer = torch.optim.AdamW([weight for weight in self.model.parameters() if weight.requires_grad], lr=1e-4)
        self.features = features(sizes.batch_size, sizes.frames)
        generator = torch.Generator().manual_seed(2)
        self.labels = torch.randint(2, sizes.vocab_size, (sizes.batch_size, sizes.labels), generator=generator)
        self.steps = 0

    def step(self) -> float:
        """Forward, loss, backward, optimizer; with what the method asks for around them. Returns the loss."""
        loss = self.backward()
        self.update()
        return loss

    def backward(self) -> float:
        called = self.model.base_model if self.arm == "adalora" else self.model  # its orthogonality term lives there
        loss = called(input_features=self.features, labels=self.labels, use_cache=False).loss
        loss.backward()
        return float(loss.detach())

    def update(self) -> None:
        self.optimizer.step()
        if self.arm == "s2lora_sparse":
            self.model.proximal_step(self.optimizer)
        if self.arm == "adalora":
            self.model.base_model.update_and_allocate(self.steps)
        self.optimizer.zero_grad()
        self.steps += 1

    def trainable(self) -> int:
        if self.arm == "full":
            return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)
        return int(self.model.get_nb_trainable_parameters()[0])

    def file_bytes(self) -> int:
        """Of the file with the weights that training made; for full fine-tuning that of all weights, each once."""
        if self.arm == "full":
            return sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder, save_embedding_layers=False)
            return sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))


def train_memory(arm: str, sizes: Sizes, threads: int) -> dict[str, int | None]:
    """Peaks beyond the loaded base: of making the adapter and taking two steps (the second has the optimizer's state from the start),
    and `backward` without the optimizer, of making the adapter and one forward and backward.

    Meant for a process of its own. The resident peak is taken first: the profiler's records would count in it.
    """
    use_threads(threads)
    small = replace(sizes, d_model=32, layers=1, heads=2, ffn_dim=64, vocab_size=64)
    _two_steps(arm, small, whisper(small))  # touches the code that the measured steps run, which is resident memory too
    base = whisper(sizes)
    resident = peak_resident_bytes(lambda: _two_steps(arm, sizes, base))
    base = whisper(sizes)
    peak = peak_bytes(lambda: _two_steps(arm, sizes, base))
    base = whisper(sizes)
    backward = peak_bytes(lambda: Trainer(arm, sizes, base).backward())
    return {"peak_bytes": peak, "backward_peak_bytes": backward, "peak_resident_bytes": resident}


def _two_steps(arm: str, sizes: Sizes, base: nn.Module) -> None:
    trainer = Trainer(arm, sizes, base)
    trainer.step()
    trainer.step()


def measure_training(
    sizes: Sizes,
    arms: list[str],
    rounds: int,
    *,
    threads: int = 1,
    clock: str = "wall",
    apart: Callable[..., dict[str, int | None]] = in_new_process,
) -> dict[str, Any]:
    """Time, memory, trainable numbers and file size of every arm, and their ratios to full fine-tuning and to LoRA.

    `apart(function, *args)` runs the measurement of an arm's memory.
    """
    use_threads(threads)
    memory: dict[str, Any] = {}
    for arm in arms:
        memory[arm] = apart(train_memory, arm, sizes, threads)
        print(f"memory of {arm}: {memory[arm]['peak_bytes'] / 2**20:,.0f} MiB", flush=True)
    base = whisper(sizes)
    trainers = {arm: Trainer(arm, sizes, copy.deepcopy(base)) for arm in arms}
    counts = {arm: {"trainable": trainer.trainable(), "file_bytes": trainer.file_bytes()} for arm, trainer in trainers.items()}
    steps = {"step": {arm: trainer.step for arm, trainer in trainers.items()}}
    seconds = time_rounds(steps, rounds, clock=CLOCKS[clock], progress=True)
    rows = summary(seconds["step"], ("full", "lora"))
    for arm, row in rows.items():
        row |= counts[arm] | memory[arm]
        for peak in ("peak_bytes", "backward_peak_bytes"):
            row |= {f"{peak}_to_{reference}": memory[arm][peak] / memory[reference][peak] for reference in ("full", "lora")}
    return {"summary": rows, "seconds": seconds}


def train_table(results: dict[str, Any]) -> str:
    """A line for each arm."""
    header = ["training step", "s", "to full", "to lora", "peak MiB", "to full", "backward MiB", "to full"]
    header += ["resident MiB", "trainable", "file MB"]
    lines = []
    for arm, row in results["summary"].items():
        resident = row["peak_resident_bytes"]
        lines.append(
            [
                arm,
                f"{row['seconds']:.3f}",
                f"{row['to_full']['median']:.3f}",
                f"{row['to_lora']['median']:.3f}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                f"{row['peak_bytes_to_full']:.3f}",
                f"{row['backward_peak_bytes'] / 2**20:,.0f}",
                f"{row['backward_peak_bytes_to_full']:.3f}",
                "-" if resident is None else f"{resident / 2**20:,.0f}",
                f"{row['trainable']:,}",
                f"{row['file_bytes'] / 1e6:,.2f}",
            ]
        )
    return table(header, lines)


# ---- inference ---------------------------------------------------------------------------------------------------------


class Reader:
    """One arm of the inference part: reads a window stage by stage, each stage going on from what the one before left."""

    def __init__(self, arm: str, sizes: Sizes, base: nn.Module) -> None:
        import torch

        config = inference_config(arm)
        if config is not None:
            torch.manual_seed(3)
            model = adapted(base, config)
            base = model.merge_and_unload() if arm == "merged" else model.get_base_model()
        self.model: Any = base.eval()
        self.sizes = sizes
        self.features = features(1, sizes.frames)
        self.prompt = torch.arange(1, 1 + sizes.prompt)[None]  # (1, prompt)

    def encode(self) -> None:
        self.encoded = self.model.get_encoder()(self.features)

    def call_first(self) -> None:
        """The prompt; fills the cache, also with the keys and values of the encoder's states."""
        self.cache: Any = None
        self._decode(self.prompt)

    def step(self) -> None:
        """One more token, the one that seemed likeliest."""
        self._decode(self.token)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def count_operators(self) -> dict[str, int]:
        calls = {"encoder": self.encode, "first_call": self.call_first, "token_step": self.step}
        return {stage: count_operators(call) for stage, call in calls.items()}

    def _decode(self, ids: torch.Tensor) -> None:  # (1, tokens)
        output = self.model(encoder_outputs=self.encoded, decoder_input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        self.token = output.logits[:, -1:].argmax(-1)  # (1, 1)


def measure_inference(sizes: Sizes, arms: list[str], rounds: int, *, threads: int = 1, clock: str = "wall") -> dict[str, Any]:
    """Time and operators of every arm at each stage, and the ratios to the base. The window is the sum of its stages.

    The arms take turns after every few tokens. `token_step` is the mean over all steps of a window.
    """
    import torch

    use_threads(threads)
    base = whisper(sizes)
    readers = {arm: Reader(arm, sizes, copy.deepcopy(base)) for arm in arms}
    stages: dict[str, Arms] = {
        "encoder": {arm: reader.encode for arm, reader in readers.items()},
        "first_call": {arm: reader.call_first for arm, reader in readers.items()},
    }
    for number, count in enumerate(step_blocks(sizes.tokens)):
        stages[f"steps_{number}"] = {arm: partial(reader.steps, count) for arm, reader in readers.items()}
    with torch.no_grad():
        operators = {arm: reader.count_operators() for arm, reader in readers.items()}  # warms up as well
        measured = time_rounds(stages, rounds, warmups=0, clock=CLOCKS[clock], progress=True)
    seconds = by_stage(measured, sizes.tokens)
    return {"summary": {stage: summary(seconds[stage], ("base",)) for stage in STAGES}, "operators": operators, "seconds": seconds}


def step_blocks(tokens: int) -> list[int]:
    """How many token steps an arm takes at each of its turns; all but the first token, which the first call gave."""
    return [min(STEPS_AT_ONCE, tokens - start) for start in range(1, tokens, STEPS_AT_ONCE)]


def by_stage(measured: Seconds, tokens: int) -> Seconds:
    """Seconds of the four stages from what was measured, whose token steps are in blocks."""
    blocks = [arms for stage, arms in measured.items() if stage.startswith("steps_")]
    seconds: Seconds = {stage: measured[stage] for stage in ("encoder", "first_call")}
    seconds["token_step"] = {arm: [total / (tokens - 1) for total in _round_sums(blocks, arm)] for arm in measured["encoder"]}
    seconds["window"] = {arm: _round_sums(list(measured.values()), arm) for arm in measured["encoder"]}
    return seconds


def _round_sums(stages: list[dict[str, list[float]]], arm: str) -> list[float]:
    return [sum(parts) for parts in zip(*(arms[arm] for arms in stages), strict=True)]


def inference_table(results: dict[str, Any]) -> str:
    """A line for each arm, two figures for each stage: milliseconds, and the ratio to the base."""
    header = ["inference", *(column for stage in STAGES for column in (f"{stage.replace('_', ' ')} ms", "to base")), "operators a step"]
    lines = []
    for arm, operators in results["operators"].items():
        rows = [results["summary"][stage][arm] for stage in STAGES]
        figures = [text for row in rows for text in (f"{row['seconds'] * 1000:,.1f}", f"{row['to_base']['median']:.3f}")]
        lines.append([arm, *figures, f"{operators['token_step']}"])
    return table(header, lines)


# ---- the run -----------------------------------------------------------------------------------------------------------


def run_part(part: str, model: str, arms: list[str], settings: Settings) -> Path:
    """Measure one part, print its table and write its file."""
    sizes = MODELS[model]
    rounds = ROUNDS[part, model] if settings.rounds is None else settings.rounds
    measure: Callable[..., dict[str, Any]] = measure_training if part == "train" else measure_inference
    as_table = train_table if part == "train" else inference_table
    results = measure(sizes, arms, rounds, threads=settings.threads, clock=settings.clock)
    header = provenance() | {"part": part, "model": {"name": model, **vars(sizes)}, "rounds": rounds, "clock": settings.clock}
    path = write_results(settings.out, f"s2lora-{part}", model, header | results)
    print(f"\nwhisper-{model} sizes, {rounds} rounds, {settings.threads} thread(s)\n{as_table(results)}\n{path}\n", flush=True)
    return path


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    for part, model in (("train", "tiny"), ("inference", "small")):
        arms = chosen_arms(part, settings.arms)
        if settings.part in (part, "all") and arms:
            run_part(part, settings.model or model, arms, settings)


if __name__ == "__main__":
    main()
