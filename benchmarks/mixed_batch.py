"""A batch in which every row speaks another language, beside the base model, PEFT's ways, and one language after the other.

    python -m benchmarks.mixed_batch                     8 rows, 8 languages at whisper-small's sizes; then 64 and 64 at whisper-base's
    python -m benchmarks.mixed_batch --part base --frames 3000 --rounds 2      whole windows for the 64 rows: minutes a round
    python -m benchmarks.mixed_batch --device cuda       adds arms that replay a CUDA graph

Random weights of the published sizes, fp32, one thread. Stages: encoder, the decoder's first call (prompt of 4 tokens), a token step, and
the window that they add up to (100 tokens). All arms read the same encoder states and the same cross-attention cache: time does not
depend on the values, and memory would otherwise be that of all arms together. Ratios are taken within a round.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks._measure import (
    RESULTS,
    Arms,
    Seconds,
    count_operators,
    provenance,
    summary,
    table,
    time_rounds,
    use_threads,
    write_results,
)
from benchmarks.s2lora import CLOCKS, Sizes, whisper

if TYPE_CHECKING:
    import torch
    from torch import nn

    from whisper_moe import LanguageTable

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
ARMS = ("base", "merged", "peft_one", "peft_mixed", "one_by_one", "table_lora", "table_pool")
GRAPH_ARMS = ("base_graph", "table_lora_graph", "table_pool_graph")
STAGES = ("encoder", "first_call", "token_step", "window")
STEPS_AT_ONCE = 11  # token steps of one arm before it is the next one's turn
MODELS = {
    "small": Sizes(d_model=768, layers=12, heads=12, ffn_dim=3072, batch_size=8),
    "base": Sizes(d_model=512, layers=6, heads=8, ffn_dim=2048, batch_size=64, frames=600),
}
ROUNDS = {"small": 3, "base": 5}


@dataclass(frozen=True)
class Settings:
    """What is measured."""

    part: Literal["small", "base", "all"] = "all"
    """whisper-small with 8 rows, whisper-base with 64, or both."""
    rounds: int | None = None
    """Times every arm is measured; left out, as many as fit ten minutes on one core for each part."""
    rows: int | None = None
    """Rows of the batch, each with a language of its own; left out, 8 or 64."""
    frames: int | None = None
    """Mel frames of a window; left out, 3000 for 8 rows and 600 for 64."""
    lora_rank: int = 8
    pool_rank: int = 32
    lora_targets: tuple[str, ...] = tuple(ALL_LINEAR)
    pool_targets: tuple[str, ...] = tuple(ALL_LINEAR)
    arms: tuple[str, ...] = ()
    """Only these, and the base."""
    threads: int = 1
    device: str = "cpu"
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the time that this process had the processor, to try something out while the machine is busy. No figures for publication."""
    out: Path = RESULTS
    """Folder for the JSON."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.arms) - {*ARMS, *GRAPH_ARMS})
        if unknown:
            raise ValueError(f"No arm {unknown[0]!r} here. Known: {', '.join((*ARMS, *GRAPH_ARMS))}.")


# ---- arms --------------------------------------------------------------------------------------------------------------


class Reader:
    """One arm: reads a batch stage by stage. `around` is what the languages of the batch need, once per call of a stage."""

    def __init__(self, model: nn.Module, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> None:
        self.model: Any = model.eval()
        self.around = around

    def give(self, batch: Batch) -> None:
        """What all arms read, and a cache of one's own for what one writes."""
        self.batch = batch
        self.cache, self.token = batch.cache(), batch.prompt[:, -1:]

    def encode(self) -> Any:
        with self.around():
            return self.model.get_encoder()(self.batch.features)

    def call_first(self) -> Any:
        """The prompt; fills a cache, also with the keys and values of the encoder's states."""
        with self.around():
            return self.model(encoder_outputs=self.batch.encoded, decoder_input_ids=self.batch.prompt, use_cache=True).past_key_values

    def steps(self, count: int) -> None:
        """More tokens, each time the one that seems likeliest."""
        with self.around():
            for _ in range(count):
                output = self.model(
                    encoder_outputs=self.batch.encoded, decoder_input_ids=self.token, past_key_values=self.cache, use_cache=True
                )
                self.token = output.logits[:, -1:].argmax(-1)


class OneByOne(Reader):
    """Each language by itself: as many passes as rows."""

    def __init__(self, table: LanguageTable, languages: Sequence[str]) -> None:
        super().__init__(table.model)
        self.readers = [Reader(table.model, partial(table.rows, [language])) for language in languages]

    def give(self, batch: Batch) -> None:
        for row, reader in enumerate(self.readers):
            reader.give(batch.row(row))

    def encode(self) -> None:
        for reader in self.readers:
            reader.encode()

    def call_first(self) -> None:
        for reader in self.readers:
            reader.call_first()

    def steps(self, count: int) -> None:
        for reader in self.readers:
            reader.steps(count)


class GraphReader(Reader):
    """Replays a CUDA graph: of the encoder, and of one token step at a fixed length."""

    def give(self, batch: Batch) -> None:
        super().give(batch)
        length = self.cache.self_attention_cache.get_seq_length()

        def step() -> None:
            self.cache.self_attention_cache.crop(length)
            super(GraphReader, self).steps(1)

        self._encoder, self._step = self._captured(super().encode), self._captured(step)

    @staticmethod
    def _captured(function: Callable[[], object]) -> Any:
        import torch

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        return graph

    def encode(self) -> None:
        self._encoder.replay()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self._step.replay()


@dataclass
class Batch:
    """What every arm reads: features, the base's encoder states, prompt, and the cross-attention's keys and values."""

    features: torch.Tensor  # (rows, n_mels, frames)
    prompt: torch.Tensor  # (rows, prompt)
    encoded: Any = None
    filled: Any = None  # cache after the first call

    @classmethod
    def make(cls, sizes: Sizes, device: str) -> Batch:
        import torch

        generator = torch.Generator().manual_seed(1)
        features = torch.randn(sizes.batch_size, 80, sizes.frames, generator=generator)
        return cls(features.to(device), torch.arange(1, 1 + sizes.prompt, device=device).repeat(sizes.batch_size, 1))

    def cache(self) -> Any:
        """A cache with the cross-attention filled in and shared, and what was written so far as one's own."""
        from transformers.cache_utils import EncoderDecoderCache

        return EncoderDecoderCache(copy.deepcopy(self.filled.self_attention_cache), self.filled.cross_attention_cache)

    def row(self, row: int) -> Batch:
        """One row by itself."""
        from transformers.cache_utils import DynamicCache, EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        def cut(cache: Any) -> Any:
            found = DynamicCache()
            for number, layer in enumerate(cache.layers):
                found.update(layer.keys[row : row + 1], layer.values[row : row + 1], number)
            return found

        encoded = BaseModelOutput(last_hidden_state=self.encoded.last_hidden_state[row : row + 1])
        filled = EncoderDecoderCache(cut(self.filled.self_attention_cache), cut(self.filled.cross_attention_cache))
        return Batch(self.features[row : row + 1], self.prompt[row : row + 1], encoded, filled)


def make_readers(arms: Sequence[str], sizes: Sizes, settings: Settings) -> dict[str, Reader]:
    """Every arm on a model of its own; those that leave the base weights alone share them."""
    from whisper_moe import LanguageTable

    base = whisper(sizes).to(settings.device).requires_grad_(False)
    languages = [f"x{number}" for number in range(sizes.batch_size)]
    tables: dict[str, LanguageTable] = {}

    def table_of(kind: str) -> LanguageTable:
        if kind not in tables:
            tables[kind] = LanguageTable.attach(twin(base))
            fill = fill_lora if kind == "lora" else fill_pool
            fill(tables[kind], languages, settings)
        return tables[kind]

    def graph_reader(kind: str) -> Reader:
        rows = table_of(kind).static_rows(len(languages))
        rows.set(languages)
        return GraphReader(table_of(kind).model, rows.use)

    makers: dict[str, Callable[[], Reader]] = {
        "base": lambda: Reader(twin(base)),
        "merged": lambda: Reader(merged(base, settings)),
        "peft_one": lambda: Reader(with_peft(base, ["x0"], settings).get_base_model()),
        "peft_mixed": lambda: peft_mixed(base, languages, settings),
        "one_by_one": lambda: OneByOne(table_of("lora"), languages),
        "table_lora": lambda: Reader(table_of("lora").model, partial(table_of("lora").rows, languages)),
        "table_pool": lambda: Reader(table_of("pool").model, partial(table_of("pool").rows, languages)),
        "base_graph": lambda: GraphReader(twin(base)),
        "table_lora_graph": lambda: graph_reader("lora"),
        "table_pool_graph": lambda: graph_reader("pool"),
    }
    return {arm: makers[arm]() for arm in arms}


def twin(model: nn.Module) -> nn.Module:
    """A model of the same weights, not copied, in modules of its own."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


def lora_config(settings: Settings) -> Any:
    from peft import LoraConfig

    rank = settings.lora_rank
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=list(settings.lora_targets), init_lora_weights=False)


def with_peft(base: nn.Module, languages: Sequence[str], settings: Settings) -> Any:
    from peft import get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what PEFT and transformers say to each other
        model = get_peft_model(twin(base), lora_config(settings), adapter_name=languages[0])
        for language in languages[1:]:
            model.add_adapter(language, lora_config(settings))
    return model.eval()


def peft_mixed(base: nn.Module, languages: Sequence[str], settings: Settings) -> Reader:
    model = with_peft(base, languages, settings)
    return Reader(model.get_base_model(), lambda: model.base_model._enable_peft_forward_hooks(adapter_names=list(languages)))


def merged(base: nn.Module, settings: Settings) -> nn.Module:
    model: nn.Module = with_peft(copy.deepcopy(base), ["x0"], settings).merge_and_unload()
    return model


def fill_lora(table: LanguageTable, languages: Sequence[str], settings: Settings) -> None:
    """A LoRA of its own for every language."""
    import torch

    config = {"peft_type": "LORA", "r": settings.lora_rank, "lora_alpha": settings.lora_rank}
    generator = torch.Generator().manual_seed(2)
    sizes = target_sizes(table.model, settings.lora_targets)
    for language in languages:
        tensors = {}
        for name, (d_out, d_in) in sizes.items():
            tensors[f"{name}.lora_A.weight"] = torch.randn(settings.lora_rank, d_in, generator=generator) / d_in**0.5
            tensors[f"{name}.lora_B.weight"] = 0.02 * torch.randn(d_out, settings.lora_rank, generator=generator)
        table.add(language, (config, tensors))


def fill_pool(table: LanguageTable, languages: Sequence[str], settings: Settings) -> None:
    """One pool, and coefficients of its own for every language."""
    import torch

    config = {"peft_type": "S2LORA", "r": settings.pool_rank}
    generator = torch.Generator().manual_seed(3)
    sizes = target_sizes(table.model, settings.pool_targets)
    owner = {size: name for name, size in reversed(sizes.items())}

    def coefficients() -> dict[str, torch.Tensor]:
        return {f"{name}.s2lora_coefficients": torch.randn(settings.pool_rank, generator=generator) for name in sizes}

    shared = {}
    for (d_out, d_in), name in owner.items():
        shared[f"{name}.s2lora_A"] = torch.randn(settings.pool_rank, d_in, generator=generator) / d_in**0.5
        shared[f"{name}.s2lora_B"] = 0.02 * torch.randn(d_out, settings.pool_rank, generator=generator)
    digest = table.add_pool((config, shared | coefficients()))
    for language in languages:
        table.add(language, (config | {"pool": "pool", "pool_hash": digest}, coefficients()))


def target_sizes(model: nn.Module, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Name -> (d_out, d_in) of the targets of a model with a table."""
    layers = [(name, layer) for name, layer in model.named_modules() if hasattr(layer, "base_layer")]
    return {name: (layer.out_features, layer.in_features) for name, layer in layers if name.rpartition(".")[2] in targets}


# ---- measuring ---------------------------------------------------------------------------------------------------------


def measure(sizes: Sizes, arms: Sequence[str], rounds: int, settings: Settings) -> dict[str, Any]:
    """Time and operators of every arm at each stage, and the ratios to the base. `token_step` is the mean over a window's steps."""
    import torch

    use_threads(settings.threads)
    readers = make_readers(arms, sizes, settings)
    print(f"{', '.join(readers)}: made", flush=True)
    batch = Batch.make(sizes, settings.device)
    with torch.no_grad():
        first = readers["base"]
        first.batch = batch
        batch.encoded = first.encode()
        batch.filled = first.call_first()
        for reader in readers.values():  # with it, a short warm-up
            reader.give(batch)
            reader.steps(1)
        measured = time_rounds(
            stages(readers, sizes), rounds, warmups=0, device=settings.device, clock=CLOCKS[settings.clock], progress=True
        )
        operators = {arm: count_all(reader) for arm, reader in readers.items() if arm not in GRAPH_ARMS}
    return {"summary": summaries(measured, sizes, rounds), "operators": operators, "seconds": measured}


def stages(readers: dict[str, Reader], sizes: Sizes) -> dict[str, Arms]:
    """What is timed, the token steps in blocks, so that the arms take turns after every few of them."""
    eager = {arm: reader for arm, reader in readers.items() if arm not in GRAPH_ARMS}
    found: dict[str, Arms] = {
        "encoder": {arm: reader.encode for arm, reader in readers.items()},
        "first_call": {arm: reader.call_first for arm, reader in eager.items()},
    }
    for number, start in enumerate(range(1, sizes.tokens, STEPS_AT_ONCE)):
        count = min(STEPS_AT_ONCE, sizes.tokens - start)
        found[f"steps_{number}"] = {arm: partial(reader.steps, count) for arm, reader in readers.items()}
    return found


def summaries(measured: Seconds, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """Stage -> arm -> median seconds and ratio to the base, of the stages and of the window that they add up to.

    Token steps of a round are added up over its blocks. A CUDA graph has no first call of its own: its window takes the eager one's.
    """
    blocks = [stage for stage in measured if stage.startswith("steps_")]
    per_round = len(next(iter(measured[blocks[0]].values()))) // rounds
    assert per_round == 1
    arms = list(measured["encoder"])
    steps = {arm: [sum(parts) for parts in zip(*(measured[block][arm] for block in blocks), strict=True)] for arm in arms}
    first = {arm: measured["first_call"].get(arm) or measured["first_call"][arm.removesuffix("_graph")] for arm in arms}
    windows = {arm: [sum(parts) for parts in zip(measured["encoder"][arm], first[arm], steps[arm], strict=True)] for arm in arms}
    seconds: Seconds = {
        "encoder": measured["encoder"],
        "first_call": measured["first_call"],
        "token_step": {arm: [took / (sizes.tokens - 1) for took in each] for arm, each in steps.items()},
        "window": windows,
    }
    references = ("base", "base_graph")
    return {stage: summary(seconds[stage], [each for each in references if each in seconds[stage]]) for stage in STAGES}


def count_all(reader: Reader) -> dict[str, int]:
    """Operators of the encoder and of a token step."""
    return {"encoder": count_operators(reader.encode), "token_step": count_operators(partial(reader.steps, 1))}


# ---- the run -----------------------------------------------------------------------------------------------------------


def as_table(results: dict[str, Any]) -> str:
    """A line for each arm, two figures for each stage: milliseconds, and the ratio to the base."""
    header = ["", *(column for stage in STAGES for column in (f"{stage.replace('_', ' ')} ms", "to base")), "operators a step", "to base"]
    lines = []
    for arm in results["summary"]["encoder"]:
        line = [arm]
        for stage in STAGES:
            row = results["summary"][stage].get(arm)
            line += ["-", "-"] if row is None else [f"{row['seconds'] * 1000:,.1f}", f"{row['to_base']['median']:.3f}"]
        count = results["operators"].get(arm)
        base = results["operators"]["base"]["token_step"]
        line += ["-", "-"] if count is None else [f"{count['token_step']}", f"{count['token_step'] / base:.2f}"]
        lines.append(line)
    return table(header, lines)


def run_part(part: str, settings: Settings) -> Path:
    """Measure one part, print its table and write its file."""
    sizes = MODELS[part]
    sizes = replace(sizes, batch_size=settings.rows or sizes.batch_size, frames=settings.frames or sizes.frames)
    known = ARMS if settings.device.startswith("cpu") else (*ARMS, *GRAPH_ARMS)
    arms = [arm for arm in known if not settings.arms or arm in settings.arms or arm == "base"]
    rounds = ROUNDS[part] if settings.rounds is None else settings.rounds
    results = measure(sizes, arms, rounds, settings)
    choices = {name: getattr(settings, name) for name in ("lora_rank", "pool_rank", "lora_targets", "pool_targets", "clock", "device")}
    header = provenance(settings.device) | {"model": {"name": part, **vars(sizes)}, "rounds": rounds, **choices}
    path = write_results(settings.out, "mixed-batch", part, header | results)
    print(f"\nwhisper-{part} sizes, {sizes.batch_size} rows and languages, {rounds} rounds\n{as_table(results)}\n{path}\n", flush=True)
    return path


def main() -> None:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    for part in MODELS:
        if settings.part in (part, "all"):
            run_part(part, settings)


if __name__ == "__main__":
    main()
