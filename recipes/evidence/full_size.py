"""The same runs at full size: a real base, data sets of the Hub by name, a GPU; and beforehand, what that will cost.

    python -m recipes.evidence full-size recipes/paper_s2lora.yaml --dry-run     # every run, its weights, hours and price; offline
    python -m recipes.evidence full-size recipes/paper_s2lora.yaml               # goes on where it stopped

A dry run needs neither weights nor data. It *rehearses* the runs: their own code works on a Whisper with as many layers as the base, but
narrow and random, and on noise; where it would train or transcribe, it says so to a `Rehearsal` and goes on. The narrow widths stand for
those of the base, so what would be trained is counted from what was attached, whatever method attached it. Knows no methods and no parts.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil, prod
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import torch

from recipes.evidence.fitting import Schedule
from recipes.evidence.ground import GROUNDS, Data, Ground, Item, SetSource
from recipes.evidence.methods import Trained
from recipes.evidence.runs import Context, Run, Settings
from recipes.evidence.store import Store
from whisper_moe.audio import SAMPLE_RATE
from whisper_moe.data import Clip, Clips, label_ids
from whisper_moe.train_settings import did_you_mean
from whisper_moe.training_recipe import checked, parse_yaml

MEASURE_BATCH = 32
"""Clips that `measuring` transcribes at a time."""
TOKENS_A_SECOND = 4
"""Of read speech, for the price of a clip; assumed."""
PROMPT_TOKENS = 4


# ---- the recipe --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What a GPU is taken to do. All of it is assumed until somebody measures it; a recipe says where its figures come from."""

    name: str
    tflops: float
    """10^12 operations a second that remain of its peak over a whole training step in bf16."""
    step_overhead_s: float
    """Of a training step, beside the products: starting kernels, the optimizer, waiting for the batch."""
    token_s: float
    """To write one token of a batch; starting kernels again."""
    price_per_hour: float
    currency: str = "USD"


@dataclass(frozen=True)
class Size:
    """How large a set is taken to be in a dry run."""

    clips: tuple[int, ...]
    """Of its train, dev and test splits."""
    clip_s: float


@dataclass(frozen=True)
class FullSize:
    """A recipe that has been read."""

    base: str
    """A folder, or an id of the Hub."""
    frozen_encoder: bool
    whole_window: bool
    settings: Settings
    device: str
    machine: Machine
    sizes: tuple[tuple[str, Size], ...]

    def open(self) -> Ground:
        """The base, on its device. Raises `ValueError` where that is not there."""
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"The recipe asks for {self.device!r}, and torch finds no such GPU. --device cpu works, and takes very long.")
        return Ground(self.settings.ground, self.base, self.frozen_encoder, self.settings.data, self.device, self.whole_window)


_SETTINGS: dict[str, Any] = {
    "parts": tuple[str, ...],
    "only": str | None,
    "seeds": int,
    "num_steps": int,
    "batch_size": int,
    "test_clips": int,
    "threads": int,
    "rate_scale": float,
    "base_sets": tuple[str, ...],
    "new_sets": tuple[str, ...],
    "out_of_domain": tuple[str, ...],
}
_DATA: dict[str, Any] = {"work": Path, "speech": Path, "max_duration_s": float}
_OWN: dict[str, Any] = {"name": str, "base": str, "frozen_encoder": bool, "whole_window": bool, "device": str}
_REQUIRED = ("name", "base", "parts", "work", "sets", "machine")


def read_full_size(path: str | Path) -> FullSize:
    """A recipe, checked.

    Flat keys are those of `Settings` and `Data` and the base's; `sets` holds a section of `SetSource` values for each set, with `clips:
    [train, dev, test]` and `clip_s` for the dry run; `machine` holds those of `Machine`.

    Raises:
        ValueError: No such file, no YAML, an unknown or missing key, a value of another type, or a set that no section describes.
    """
    path = Path(path)
    try:
        content = parse_yaml(path.read_text("utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The recipe {path} cannot be read: {error}.") from error
    nested = ("sets", "machine")
    keys = {**_OWN, **_SETTINGS, **_DATA, **dict.fromkeys(nested)}
    flat = _section({key: value for key, value in _mapping(content, str(path)).items() if key not in nested}, keys, (), str(path))
    if missing := [key for key in _REQUIRED if key not in content]:
        raise ValueError(f"{path} lacks {', '.join(missing)}. Every full-size recipe has {', '.join(_REQUIRED)}.")
    machine = Machine(**_section(content["machine"], get_type_hints(Machine), ("name", "tflops", "price_per_hour"), f"{path}: machine"))
    sets, sizes = [], []
    for name, section in _mapping(content["sets"], f"{path}: sets").items():
        where = f"{path}: sets: {name}"
        values = _section(section, get_type_hints(SetSource) | get_type_hints(Size), ("source", "language", "clips", "clip_s"), where)
        size = Size(values.pop("clips"), values.pop("clip_s"))
        if len(size.clips) != 3 or len(values.get("ages", (0, 0))) != 2:
            raise ValueError(f"{where}: clips are three numbers (train, dev, test), and ages two (from, to).")
        sets.append((str(name), SetSource(**values)))
        sizes.append((str(name), size))
    if flat["name"] in GROUNDS or not re.fullmatch(r"\w[\w.-]*", flat["name"]):
        taken = ", ".join(GROUNDS)
        raise ValueError(f"{path}: name is {flat['name']!r}. Results are filed under it: letters, digits, . _ and -, and not {taken}.")
    settings = Settings(
        ground=flat["name"],
        data=Data(sets=tuple(sets), **{key: flat[key] for key in _DATA if key in flat}),
        **{key: flat[key] for key in _SETTINGS if key in flat},
    )
    _check_sets(settings, flat, [name for name, _ in sets], path)
    return FullSize(
        base=flat["base"],
        frozen_encoder=flat.get("frozen_encoder", False),
        whole_window=flat.get("whole_window", True),
        settings=settings,
        device=flat.get("device", "cuda"),
        machine=machine,
        sizes=tuple(sizes),
    )


def _mapping(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds a {type(content).__name__}, expected lines of `key: value`.")
    return content


def _section(content: Any, keys: Mapping[str, Any], required: Sequence[str], where: str) -> dict[str, Any]:
    """The values of a section, each of its key's type; a key that is left empty counts as not given."""
    for key in _mapping(content, where):
        if key not in keys:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(str(key), list(keys))} Known: {', '.join(keys)}.")
    if missing := [key for key in required if content.get(key) is None]:
        raise ValueError(f"{where} lacks {', '.join(missing)}.")
    return {key: checked(value, keys[key], f"{where}: {key}") for key, value in content.items() if value is not None}


def _check_sets(settings: Settings, flat: Mapping[str, Any], known: Sequence[str], path: Path) -> None:
    """Every set that the recipe names is described in it: at full size nothing falls back on synthetic speech."""
    named = {key: flat[key] for key in ("base_sets", "new_sets", "out_of_domain") if key in flat}
    if "child" in settings.parts:
        named["the part child"] = ("child", *settings.out_of_domain)
    if "languages" in settings.parts:
        named["the part languages"] = (*settings.base_sets, *settings.new_sets)
    for where, names in named.items():
        for name in names:
            if name not in known:
                raise ValueError(f"{path}: {where} wants the set {name!r}, which is not among its `sets`: {', '.join(known)}.")


# ---- sizes of bases ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BaseSize:
    """What a Whisper is made of, as far as its cost goes."""

    d_model: int
    encoder_layers: int
    decoder_layers: int
    vocab_size: int = 51865
    num_mel_bins: int = 80
    max_source_positions: int = 1500
    max_target_positions: int = 448
    feed_forward: int | None = None

    @property
    def ffn(self) -> int:
        """Four times the width, as in all of OpenAI's."""
        return 4 * self.d_model if self.feed_forward is None else self.feed_forward

    def encoder_flops(self, positions: int) -> float:
        """Operations of the encoder for one clip: two for each weight and position, and attention."""
        d, frames = self.d_model, 2 * positions
        convolutions = 2 * frames * 3 * self.num_mel_bins * d + 2 * positions * 3 * d * d
        layer = 2 * positions * (4 * d * d + 2 * d * self.ffn) + 4 * positions**2 * d
        return convolutions + self.encoder_layers * layer

    def decoder_flops(self, positions: int, tokens: float) -> float:
        """Operations of the decoder for one clip of so many tokens, the keys and values of the encoder's positions included."""
        d = self.d_model
        layer = 2 * tokens * (6 * d * d + 2 * d * self.ffn) + 4 * positions * d * d + 4 * tokens * (positions + tokens) * d
        return self.decoder_layers * layer + 2 * tokens * d * self.vocab_size


BASES = {
    "openai/whisper-tiny": BaseSize(384, 4, 4),
    "openai/whisper-base": BaseSize(512, 6, 6),
    "openai/whisper-small": BaseSize(768, 12, 12),
    "openai/whisper-medium": BaseSize(1024, 24, 24),
    "openai/whisper-large-v2": BaseSize(1280, 32, 32),
    "openai/whisper-large-v3": BaseSize(1280, 32, 32, 51866, 128),
    "openai/whisper-large-v3-turbo": BaseSize(1280, 32, 4, 51866, 128),
}
"""Written down, so that a dry run asks nobody."""


def base_size(base: str) -> BaseSize:
    """Of a folder with a `config.json`, or of one of `BASES`. Raises `ValueError` for others."""
    config = Path(base) / "config.json"
    if config.is_file():
        said = json.loads(config.read_text("utf-8"))
        names = [*BaseSize.__dataclass_fields__][:-1]
        return BaseSize(**{name: said[name] for name in names}, feed_forward=said["encoder_ffn_dim"])
    if base not in BASES:
        raise ValueError(f"The size of {base} is not known here. Known: {', '.join(BASES)}, and folders with a config.json.")
    return BASES[base]


# ---- the rehearsal -----------------------------------------------------------------------------------------------------

# Widths of the narrow Whisper. No method may have a rank or another dimension that equals one of them.
_WIDTH, _FFN, _TARGET_POSITIONS, _WINDOW_S = 46, 94, 58, 2
_SPEAKERS = 8


@dataclass(frozen=True)
class Fitted:
    """One training, at the base's size."""

    num_trained: int
    num_bytes: int
    num_steps: int
    batch_size: int


@dataclass
class Planned:
    """What a run would do."""

    key: str
    fitted: list[Fitted] = field(default_factory=list)
    clips: list[int] = field(default_factory=list)
    """Transcribed, a number for each set."""
    problem: str | None = None
    """Why it could not be rehearsed."""
    sets: list[SetKey | None] = field(default_factory=list)
    """Which ones those were; None for one that the run put together itself."""
    artifacts: list[str] = field(default_factory=list)
    """What it asked for."""
    touched: set[str] = field(default_factory=set)
    """Sets that it looked at, or at an artifact of."""


SetKey = tuple[str, str, int | None, int]
"""What `Ground.items` was asked: set, split, limit, seed."""


class Rehearsal:
    """Is told what would be trained and transcribed, and reckons it up at the base's size."""

    def __init__(self, size: BaseSize, base: Any) -> None:
        config = base.config
        self.real = {
            _WIDTH: size.d_model,
            _FFN: size.ffn,
            _TARGET_POSITIONS: size.max_target_positions,
            config.max_source_positions: size.max_source_positions,
            config.vocab_size: size.vocab_size,
        }
        assert len(self.real) == 5, "every width stands for one of the base's"
        self.num_parameters = sum(self._numbers(weight.shape) for weight in base.parameters())
        self.plan = Planned("")
        self._sets: dict[int, tuple[SetKey, Sequence[Item]]] = {}

    def _numbers(self, shape: Sequence[int]) -> int:
        """In a weight of the base for which one of this shape stands."""
        return prod(self.real.get(length, length) for length in shape)

    @contextmanager
    def noting(self, plan: Planned) -> Iterator[None]:
        """What is told meanwhile belongs to `plan`."""
        before, self.plan = self.plan, plan
        try:
            yield
        finally:
            self.plan = before

    def fitted(self, trained: Trained, schedule: Schedule) -> tuple[float, float, float]:
        """In the place of `fitting.fit`: seconds, first and last loss."""
        num_trained = sum(self._numbers(weight.shape) for group in trained.groups for weight in group["params"])
        self.plan.fitted.append(Fitted(num_trained, self._bytes(trained, num_trained), schedule.num_steps, schedule.batch_size))
        return 0.0, 0.0, 0.0

    def wrote(self, model: Any, items: Sequence[Item]) -> list[str]:
        """In the place of `measuring.write`: as if all had been heard rightly."""
        key, known = self._sets.get(id(items), (None, None))
        self.plan.sets.append(key if known is items else None)
        self.plan.clips.append(len(items))
        return [item.text for item in items]

    def looked_at(self, key: SetKey, items: Sequence[Item]) -> None:
        """These items are that set."""
        self.plan.touched.add(key[0])
        self._sets[id(items)] = key, items

    def _bytes(self, trained: Trained, num_trained: int) -> int:
        """Of the file that would be kept, in fp32 and before anything is pruned."""
        if not hasattr(trained.model, "peft_config"):
            return 4 * num_trained
        from safetensors import safe_open

        total = 0
        with tempfile.TemporaryDirectory() as folder:
            trained.model.save_pretrained(folder, save_embedding_layers=False)
            for path in Path(folder).rglob("*.safetensors"):
                with safe_open(path, framework="pt") as opened:
                    total += sum(4 * self._numbers(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
                total += 8 + int.from_bytes(path.read_bytes()[:8], "little")  # its header
        return total


class RehearsedData(Data):
    """Noise in the place of every set: a few clips, whatever is asked for."""

    def clips(self, name: str, split: str, limit: int | None = None, seed: int = 0) -> Clips:
        source = self.source(name)
        rng = np.random.default_rng(seed)
        samples = [rng.normal(0, 3000, SAMPLE_RATE // 2).astype(np.int16) for _ in range(min(4, 4 if limit is None else limit))]
        return Clips([Clip(each, "a b", source.language, str(number)) for number, each in enumerate(samples)], f"{name}/{split}")


class RehearsedGround(Ground):
    """A narrow, random base with the layers of the real one, whose sets have the sizes that the recipe says."""

    def __init__(self, recipe: FullSize) -> None:
        data = recipe.settings.data
        self.name, self.folder, self.frozen_encoder = recipe.settings.ground, recipe.base, recipe.frozen_encoder
        self.whole_window = recipe.whole_window
        self.data = RehearsedData(**{name: getattr(data, name) for name in data.__dataclass_fields__})
        self.planned_sizes = dict(recipe.sizes)
        size = base_size(recipe.base)
        self.processor = _processor(size.num_mel_bins)
        self.base = _narrow(size, self.processor)
        self.rehearsal = Rehearsal(size, self.base)
        self._sets = {}

    def items(self, name: str, split: str, limit: int | None = None, seed: int = 0) -> list[Item]:
        key = (name, split, limit, seed)
        if key not in self._sets:
            source = self.data.source(name)
            size = self.planned_sizes.get(name, Size((100, 10, 100), 5.0))
            count = size.clips[("train", "dev", "test").index(split)]
            count = count if limit is None else min(count, limit)
            prompt = source.prompt or source.language
            frames = self.processor.feature_extractor.nb_max_frames
            heard = torch.zeros(frames // 2, _WIDTH) if self.frozen_encoder else torch.zeros(frames, self.base.config.num_mel_bins)
            labels = tuple(label_ids(self.processor, "a b", prompt))
            self._sets[key] = [
                Item(heard.half(), size.clip_s, "a b", source.language, prompt, str(number % _SPEAKERS), labels) for number in range(count)
            ]
        self.rehearsal.looked_at(key, self._sets[key])
        return self._sets[key]


def _processor(num_mel_bins: int) -> Any:
    """Letters as bytes, and Whisper's special tokens in their order."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    tokenizer = WhisperTokenizer(vocab={symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
    others = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    special = ["<|endoftext|>", "<|startoftranscript|>", *(f"<|{code}|>" for code in LANGUAGES), *others]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.pad_token = "<|endoftext|>"
    return WhisperProcessor(WhisperFeatureExtractor(feature_size=num_mel_bins, chunk_length=_WINDOW_S), tokenizer)


def _narrow(size: BaseSize, processor: Any) -> Any:
    """Random weights, with what `generate` and language detection ask of a Whisper."""
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    to_id = processor.tokenizer.convert_tokens_to_ids
    end, start = to_id("<|endoftext|>"), to_id("<|startoftranscript|>")
    ends = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": start}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": _FFN, "decoder_ffn_dim": _FFN}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(processor.tokenizer),
            d_model=_WIDTH,
            encoder_layers=size.encoder_layers,
            decoder_layers=size.decoder_layers,
            num_mel_bins=size.num_mel_bins,
            max_source_positions=processor.feature_extractor.nb_max_frames // 2,
            max_target_positions=_TARGET_POSITIONS,
            suppress_tokens=[],
            begin_suppress_tokens=[],
            **ends,
            **heads,
        )
    ).eval()
    model.generation_config = GenerationConfig(
        is_multilingual=True,
        lang_to_id={f"<|{code}|>": to_id(f"<|{code}|>") for code in LANGUAGES},
        task_to_id={task: to_id(f"<|{task}|>") for task in ("transcribe", "translate")},
        no_timestamps_token_id=to_id("<|notimestamps|>"),
        max_length=_TARGET_POSITIONS,
        return_timestamps=False,
        **{name: ends[name] for name in ("pad_token_id", "eos_token_id", "decoder_start_token_id")},
    )
    return model


class RehearsedContext(Context):
    """Artifacts stand in the plan by themselves: they are made once, whoever needs them."""

    plans: dict[str, Planned]

    def artifact(self, name: str, make: Callable[[Path], None]) -> Path:
        def noted(folder: Path) -> None:
            plan = Planned(_artifact_key(name))
            with self.ground.rehearsal.noting(plan):
                make(folder)
            self.plans.setdefault(plan.key, plan)  # a stand-in may have asked for it before

        asking = self.ground.rehearsal.plan
        asking.artifacts.append(name)
        asking.touched.update(name.split("/"))
        return super().artifact(name, noted)


def _artifact_key(name: str) -> str:
    return f"artifacts/{name}"


def rehearse(recipe: FullSize, runs: Sequence[Run]) -> tuple[list[Planned], int]:
    """What the runs would do, in their order with the artifacts before who first needs them, and the number of the base's parameters.

    Of runs that differ in their seed or in the sets that they are told alone, the first is rehearsed and stands in for the others: they
    do the same on their sets, with artifacts of their own. A run that needs what is not there (recordings, say) has a `problem`.
    """
    ground = RehearsedGround(recipe)
    with tempfile.TemporaryDirectory() as work:
        ground.data = replace(ground.data, work=Path(work))
        settings = replace(recipe.settings, data=ground.data)
        context = RehearsedContext(settings, ground, Store(settings.work / "rows"))
        context.plans = {}
        first: dict[Hashable, _First] = {}
        for run in runs:
            told = _told_sets(run, dict(recipe.sizes))
            kind = _kind(run, told)
            known = first.get(kind)
            plan = None if known is None else known.standing_in(run, told, context)
            if plan is None:
                plan = _rehearsed(run, context)
                first.setdefault(kind, _First(run, told, plan))
            context.plans[plan.key] = plan
    return list(context.plans.values()), ground.rehearsal.num_parameters


def _rehearsed(run: Run, context: RehearsedContext) -> Planned:
    plan = Planned(run.key)
    with context.ground.rehearsal.noting(plan):
        try:
            context.store.path(run.key).parent.mkdir(parents=True, exist_ok=True)
            context.store.write(run.key, run.work(context))
        except (ValueError, OSError) as error:
            plan.problem = " ".join(str(error).split())
    return plan


def _told_sets(run: Run, known: Mapping[str, Any]) -> dict[str, str]:
    """Argument -> set, of those arguments of a run that name one."""
    told = run.work.keywords if isinstance(run.work, partial) else {}
    return {key: value for key, value in told.items() if isinstance(value, str) and value in known}


def _kind(run: Run, told: Mapping[str, str]) -> Hashable:
    """What a run does, whatever its seed and the sets that it is told."""
    if not isinstance(run.work, partial):
        return run.part, run.arm
    others = frozenset((key, value) for key, value in run.work.keywords.items() if key != "seed" and key not in told)
    return run.part, run.work.func, run.work.args, others, frozenset(told)


@dataclass(frozen=True)
class _First:
    """A run that has been rehearsed, for others of its kind."""

    run: Run
    told: Mapping[str, str]
    plan: Planned

    def standing_in(self, run: Run, told: Mapping[str, str], context: RehearsedContext) -> Planned | None:
        """What another one does. None where the first cannot say: it failed, put a set together itself, or uses one of the other's too."""
        renamed = {self.told[key]: told[key] for key in told if told[key] != self.told[key]}
        if renamed and (None in self.plan.sets or not self.plan.touched.isdisjoint(renamed.values())):
            return None
        if self.plan.problem is not None:
            return None if renamed else replace(self.plan, key=run.key)
        return _like(self.plan, run.key, renamed, (f"-s{self.run.seed}", f"-s{run.seed}"), context)


def _like(plan: Planned, key: str, renamed: Mapping[str, str], seeds: tuple[str, str], context: RehearsedContext) -> Planned:
    """A plan for other sets and another seed; with the artifacts that it needs then, which are planned like the first's."""

    def other(part: str) -> str:
        return part.removesuffix(seeds[0]) + seeds[1] if part.endswith(seeds[0]) else renamed.get(part, part)

    made = replace(plan, key=key, clips=[], sets=[], artifacts=["/".join(map(other, name.split("/"))) for name in plan.artifacts])
    for name, new in zip(plan.artifacts, made.artifacts, strict=True):
        if _artifact_key(new) not in context.plans:
            needed = _like(context.plans[_artifact_key(name)], _artifact_key(new), renamed, seeds, context)
            context.plans[needed.key] = needed
    with context.ground.rehearsal.noting(Planned("")):
        for asked, number in zip(plan.sets, plan.clips, strict=True):
            new_asked = None if asked is None else (renamed.get(asked[0], asked[0]), *asked[1:])
            made.sets.append(new_asked)
            made.clips.append(number if new_asked is None else len(context.ground.items(*new_asked)))
    return made


# ---- hours and money ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of a run, in hours."""

    train_h: float
    measure_h: float

    @property
    def hours(self) -> float:
        return self.train_h + self.measure_h


def cost(plan: Planned, recipe: FullSize, num_parameters: int) -> Cost:
    """Expected hours of a run.

    A training step is a pass forward and one back to the activations; full fine-tuning (more than half of the weights) also one to the
    weights. The encoder, where it is frozen, works once per clip and is not reckoned. Each operation costs what `Machine` says, plus its
    overheads. Clips are taken to be as long as those of the longest set.
    """
    size, machine = base_size(recipe.base), recipe.machine
    clip_s = max((each.clip_s for _, each in recipe.sizes), default=5.0)
    positions = size.max_source_positions if recipe.whole_window else ceil(50 * clip_s)
    tokens = PROMPT_TOKENS + TOKENS_A_SECOND * clip_s
    encoder = size.encoder_flops(positions)
    forward = size.decoder_flops(positions, tokens) + (0.0 if recipe.frozen_encoder else encoder)
    train_s = 0.0
    for fitted in plan.fitted:
        passes = 3 if 2 * fitted.num_trained > num_parameters else 2
        train_s += fitted.num_steps * (fitted.batch_size * forward * passes / (machine.tflops * 1e12) + machine.step_overhead_s)
    measure_s = 0.0
    for clips in plan.clips:
        encoded = 0.0 if recipe.frozen_encoder else clips * encoder / (machine.tflops * 1e12)
        measure_s += encoded + ceil(clips / MEASURE_BATCH) * tokens * machine.token_s
    return Cost(train_s / 3600, measure_s / 3600)


def expected(recipe: FullSize, runs: Sequence[Run]) -> str:
    """A dry run, as a table and what it comes to."""
    plans, num_parameters = rehearse(recipe, runs)
    machine, settings = recipe.machine, recipe.settings
    lines = [
        f"{recipe.base}: {num_parameters:,} parameters, encoder {'frozen' if recipe.frozen_encoder else 'trained too'}, on {machine.name}",
        f"Assumed: {machine.tflops:g} TFLOP/s sustained, {machine.step_overhead_s:g} s a step beside them, {machine.token_s:g} s a token",
        "",
        "| run | trained | of the model | bytes at most | steps | batch | clips transcribed | hours |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    total, problems = Cost(0.0, 0.0), []
    for plan in plans:
        if plan.problem is not None:
            problems.append(f"{plan.key}: {plan.problem}")
            continue
        each = cost(plan, recipe, num_parameters)
        total = Cost(total.train_h + each.train_h, total.measure_h + each.measure_h)
        last = plan.fitted[-1] if plan.fitted else None
        cells = ["", "", "", "", ""]
        if last is not None:
            share = f"{last.num_trained / num_parameters:.3%}"
            steps = sum(fitted.num_steps for fitted in plan.fitted)
            cells = [f"{last.num_trained:,}", share, f"{last.num_bytes:,}", f"{steps:,}", str(last.batch_size)]
        lines.append(f"| {plan.key} | {' | '.join(cells)} | {sum(plan.clips):,} | {each.hours:.2f} |")
    lines += [
        "",
        f"{len(plans) - len(problems)} runs: {total.train_h:.1f} hours of training and {total.measure_h:.1f} of transcribing, "
        f"about {total.hours * machine.price_per_hour:.0f} {machine.currency} at {machine.price_per_hour:g} an hour. "
        f"Downloads, decoding and the features of each process come on top. Rows go to {settings.work}.",
    ]
    if any(plan.key.startswith(_artifact_key("")) for plan in plans):
        lines += [f"{_artifact_key('')}... are made once, by who needs them first; a run whose cells are empty trains nothing beside them."]
    if problems:
        lines += ["", f"{len(problems)} runs could not be rehearsed, and are not in the sum:", *problems]
    return "\n".join(lines)
