"""Many languages in one run: one frozen base, an adapter for each language, batches in which every row trains its own.

What a language learns is what it would have learnt alone from the same rows: its loss is the mean over its own tokens, its gradient is
clipped and its optimizer state kept by itself, and a step without it does not move it. `row_training.py` has the products, `train.py` the
way to a single adapter, whose parts are used here. The base model is borrowed: it leaves as it came, also after an error.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from whisper_moe.adapter_files import Sharing, factors_hash, read_adapter, s2_coefficients, s2_factors
from whisper_moe.base_signature import base_signature, check_base
from whisper_moe.cropped_encoder import encode_cropped
from whisper_moe.data import IGNORED, ClipKey, Clips, Collator, fit_for_training, label_ids
from whisper_moe.encoder_states import EncoderStates, cache_encoder_states, padded_labels
from whisper_moe.evaluate import Scores, autocast, evaluate_clips
from whisper_moe.languages import language_code
from whisper_moe.registry import LanguageAdapter
from whisper_moe.row_training import AdaptedWeight, LoraVectors, PoolVectors, RowAdapters, Vectors, token_losses
from whisper_moe.train import (
    FORMAT,
    _adapter_name,
    _choose_carrier,
    _metrics,
    _open_base,
    _open_clips,
    _said,
    default_peft_config,
)
from whisper_moe.train_record import check_same_run, plain, save_adapter, sync_folder, write_record, write_text
from whisper_moe.train_settings import CardNotes, TrainSettings
from whisper_moe.trainer import InterruptStop

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

_PREFIX = "base_model.model."  # of PEFT's names in a file
_LORA_FIELDS = {  # what may differ from LoraConfig's defaults: the rest changes the arithmetic or what is saved
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "inference_mode", "peft_type", "auto_mapping", "peft_version", "revision"),
}
_NOT_OF_THE_RUN = ("num_workers", "eval_batch_size")  # settings that may change when a run is resumed


# ---- what a run is told ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ManySettings(TrainSettings):
    """How the adapters are trained. `batch_size` counts the rows of all languages together, `num_epochs` the passes over all clips
    together: at temperature 1 each language's clips pass that often, at others small languages pass more often than large ones."""

    temperature: float = 1.0
    """Evens out the languages' shares of a batch, which are in proportion to clips ** (1 / temperature): 1 as many rows as there are clips,
    5 nearly even, `inf` the same for each language."""
    max_grad_norm: float = 1.0
    """Each language's gradient is clipped to this length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("temperature", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be above 0.")
        alone = {"patience": None, "gradient_checkpointing": False, "log_to": "none"}
        if used := [name for name, unused in alone.items() if getattr(self, name) != unused]:
            raise ValueError(f"{', '.join(used)} cannot be used when many languages are trained together. Leave it out.")


@dataclass(frozen=True)
class LanguageData:
    """A language of the run and where its clips are."""

    language: str
    """Whisper's code, or ISO 639-3 where Whisper has none."""
    data: Clips | str | Path
    """Training clips, or where they are (of a folder, its `train` split)."""
    dev_data: Clips | str | Path | None = None
    """Clips that decide which checkpoint of this language is kept."""
    eval_data: Clips | str | Path | None = None
    """Clips that are transcribed before and after; by default the dev clips."""
    carrier: str | None = None
    """The language token to prompt with, for a language without one."""
    weight: float = 1.0
    """Multiplies the language's share of the batches."""
    name: str | None = None
    """What the registry calls the adapter; by default the language."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"The weight of {self.language!r} is {self.weight}; it has to be above 0. Leave out a language that is not wanted."
            )


# ---- the main path -----------------------------------------------------------------------------------------------------


def train_many_languages(
    base: str | Path | tuple[WhisperForConditionalGeneration, WhisperProcessor],
    languages: Sequence[LanguageData] | Mapping[str, Clips | str | Path],
    *,
    out: str | Path,
    peft_config: LoraConfig | None = None,
    pool: str | Path | None = None,
    base_id: str | None = None,
    settings: ManySettings | None = None,
    cache_folder: str | Path | None = None,
    notes: CardNotes | None = None,
    resume: bool = False,
    progress: bool = True,
    render_card: Callable[[Path], str] | None = None,
    **overrides: Any,
) -> list[LanguageAdapter]:
    """Train, measure and save one adapter for each language, all in one run.

    Args:
        base: a Whisper: a folder, an id of the Hub, or `(model, processor)`, which come back as they were.
        languages: what to train; a mapping from language to training data will do.
        out: folder; each adapter gets one of its own in it. Checkpoints lie in `out/checkpoints` until the run is complete.
        peft_config: the LoRA of every language; by default that of `train_language_adapter`. Plain LoRA only: no dropout, no biases.
        pool: folder of an S2-LoRA adapter whose A and B all languages use, frozen; each language trains coefficients alone. Then
            `peft_config` may only say `target_modules`, among those of the pool, for instance the decoder's.
        base_id: the public name of the base, written into the adapters' configs; needed when `base` is a folder or a model.
        settings: see `ManySettings`; its fields may also be given by name.
        cache_folder: where cached encoder states lie; by default `out/encoder_states`, deleted when the run is complete.
        notes: what the cards shall say about data, licence and limits.
        resume: go on from the last checkpoint in `out`, if there is one.
        progress: say what happens.
        render_card: `folder -> README.md`; by default a short note.

    Returns:
        The adapters in the order of the languages, with their error rates before and after.

    Raises:
        ValueError: Something cannot work; nothing has been trained.
        OSError: A file could not be written. The last checkpoint is whole.
        KeyboardInterrupt: Ctrl-C, after the step under way was finished and saved; `resume=True` goes on from there.
    """
    changed = (ManySettings() if settings is None else settings).with_changes(overrides)
    assert isinstance(changed, ManySettings)
    settings = changed
    notes, out = CardNotes() if notes is None else notes, Path(out)
    checkpoints, own_cache = out / "checkpoints", out / "encoder_states"
    if (last := _last_checkpoint(checkpoints)) is not None and not resume:
        raise ValueError(
            f"{checkpoints} holds an unfinished run ({last.name}). Go on with resume=True, or delete that folder to start anew."
        )
    model, processor, base_id = _open_base(base, base_id)
    with _borrowed(model):
        tasks = _open_tasks(_as_list(languages), model, processor, settings)
        weights = _weights(model, processor, peft_config, pool)
        states = _cached(model, processor, tasks, weights, settings, own_cache if cache_folder is None else Path(cache_folder), progress)
        for task in tasks:
            _say(progress, f"{task.name}: {task.clips}")
        run = _Run(model, processor, tasks, weights, settings, checkpoints, states, progress)
        run.train(last)
        adapters = [run.save(task, out, base_id, notes, render_card) for task in tasks]
    shutil.rmtree(checkpoints, ignore_errors=True)  # ours, and of no use once the adapters are whole
    if cache_folder is None:
        shutil.rmtree(own_cache, ignore_errors=True)
    return adapters


# ---- languages ---------------------------------------------------------------------------------------------------------


@dataclass
class _Task:
    """A language as the run sees it."""

    name: str
    language: str
    carrier: str | None
    heard: dict[str, Any]
    weight: float
    clips: Clips
    dev_clips: Clips | None
    eval_clips: Clips | None
    best: torch.Tensor | None = None
    """The numbers that were best on the dev set so far."""
    best_rate: float | None = None
    best_step: int | None = None
    before: dict[str, Any] | None = None
    """The base's scores on the test clips."""
    rates: list[dict[str, Any]] = field(default_factory=list)
    """What the dev set said at each checkpoint."""

    @property
    def prompt_language(self) -> str:
        return self.language if self.carrier is None else self.carrier


def _as_list(languages: Sequence[LanguageData] | Mapping[str, Any]) -> list[LanguageData]:
    if isinstance(languages, Mapping):
        return [LanguageData(language, data) for language, data in languages.items()]
    return list(languages)


def _open_tasks(languages: list[LanguageData], model: Any, processor: WhisperProcessor, settings: ManySettings) -> list[_Task]:
    names = Counter(_adapter_name(each.name, language_code(each.language), None) for each in languages)
    if not names:
        raise ValueError("There is no language to train. Give one or more: {'cy': 'data/welsh', 'br': 'data/breton'}.")
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise ValueError(f"Two adapters would be called {', '.join(twice)}. Give each a name of its own: LanguageData(..., name=...).")
    if used := [name for name in names if name in ("checkpoints", "encoder_states")]:
        raise ValueError(f"{used[0]!r} is a folder of the run itself; give that adapter another name.")
    tasks = []
    for each, name in zip(languages, names, strict=True):
        language = language_code(each.language)
        clips = _open_clips(each.data, "train", language)
        carrier, heard = _choose_carrier(model, processor, clips, language, each.carrier, settings)
        clips = fit_for_training(clips, processor, model.config.max_target_positions, language if carrier is None else carrier)
        if not len(clips):
            raise ValueError(f"No clip of {name} is left to train on; {clips}.")
        dev = None if each.dev_data is None else _open_clips(each.dev_data, "dev", language)
        test = dev if each.eval_data is None else _open_clips(each.eval_data, "test", language)
        tasks.append(_Task(name, language, carrier, heard, each.weight, clips, dev, test))
    return tasks


# ---- what is adapted ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Adapted:
    """How the adapters of the run look, and the configuration that PEFT reads them by."""

    vectors: Vectors
    config: dict[str, Any]
    peft_type: str


def _weights(model: Any, processor: WhisperProcessor, peft_config: LoraConfig | None, pool: str | Path | None) -> _Adapted:
    return (
        _lora(model, default_peft_config() if peft_config is None else peft_config) if pool is None else _pooled(model, pool, peft_config)
    )


def _lora(model: Any, config: LoraConfig) -> _Adapted:
    """The weights that PEFT would adapt, with its ranks and scalings: asked of PEFT itself, on a model without numbers."""
    from peft.tuners.lora import LoraLayer

    if not isinstance(config, LoraConfig) or type(config) is not LoraConfig:
        raise ValueError(f"peft_config is a {type(config).__name__}; many languages together train plain LoRA, or coefficients of a pool=.")
    default = LoraConfig()
    other = [name for name, value in vars(config).items() if name not in _LORA_FIELDS and value != getattr(default, name, None)]
    if config.init_lora_weights not in (True, "gaussian"):
        other.append("init_lora_weights")
    if other:
        raise ValueError(
            f"{', '.join(f'{name}={getattr(config, name)!r}' for name in sorted(other))}: many languages together train plain LoRA. "
            "Leave it out, or train these languages one after another (train_language_adapter)."
        )
    with torch.device("meta"):
        skeleton = get_peft_model(type(model)(model.config), copy.deepcopy(config))
    weights = []
    for name, module in skeleton.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            _check_linear(model, name)
            weights.append(AdaptedWeight(name, module.out_features, module.in_features, module.r["default"], module.scaling["default"]))
    chosen = skeleton.peft_config["default"]
    chosen.inference_mode = True
    return _Adapted(LoraVectors(weights, config.init_lora_weights), _plain(chosen.to_dict()), "LORA")


def _pooled(model: Any, folder: str | Path, peft_config: LoraConfig | None) -> _Adapted:
    """The weights of a pool, or those of them that `target_modules` names."""
    from peft.tuners.tuners_utils import check_target_module_exists

    files = read_adapter(folder)
    if files.method != "S2LORA" or files.is_pooled:
        raise ValueError(f"{files.label} is no pool: a pool is an S2-LoRA adapter with A and B of its own (S2LoraConfig without pool=).")
    if (signature := files.card.get("base_signature")) is not None:
        check_base(signature, model)
    sizes = {name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    factors, sharing, scaling = s2_factors(files, sizes), Sharing.of(files.config), 1.0
    targets = None if peft_config is None else peft_config.target_modules
    weights, of_weight = [], {}
    for name in sorted(s2_coefficients(files)):
        if targets is not None and not check_target_module_exists(peft_config, name):
            continue
        _check_linear(model, name)
        d_out, d_in = sizes[name]
        A, B = factors[sharing.key(name, d_out, d_in)]
        weights.append(AdaptedWeight(name, d_out, d_in, len(A), scaling))
        of_weight[name] = A[:, :d_in], B[:d_out]
    if not weights:
        raise ValueError(
            f"target_modules={targets!r} names no weight of the pool, which adapts {', '.join(sorted(s2_coefficients(files))[:3])}, ..."
        )
    # A pooled adapter's own scaling is 1, whatever the pool's is: alpha equals r.
    config = dict(files.config) | {"pool": Path(folder).name, "pool_hash": factors_hash(factors), "s2lora_alpha": files.config["r"]}
    config |= {"inference_mode": True, "sparsity_weight": 0.0, "bias": "none", "modules_to_save": None, "trainable_token_indices": None}
    if targets is not None:
        config["target_modules"] = targets
    return _Adapted(PoolVectors(weights, of_weight), _plain(config), "S2LORA")


def _check_linear(model: Any, name: str) -> None:
    layer = model.get_submodule(name)
    if type(layer) is not nn.Linear or not name.startswith("model."):
        raise ValueError(
            f"{name} is a {type(layer).__name__}; many languages together adapt plain linear layers of encoder and decoder. Exclude it."
        )


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as JSON has it."""
    return {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in config.items()}


# ---- who is in which batch ---------------------------------------------------------------------------------------------


Row = tuple[int, ClipKey]  # (which language, (its pass, the clip))


class LanguageOrder:
    """The rows of every step: each language has its share of them, and its clips come round in a new order in each pass.

    A language's rows are spread evenly over the steps (what is owed to it is carried over), so a language with a small share is in every
    n-th step and not by chance in three at once. All of it follows from the seed, so that a resumed run draws what an undisturbed one does.

    Args:
        sizes: clips of each language.
        rows: of a step.
        temperature, weights: shares are in proportion to weight * size ** (1 / temperature).
    """

    def __init__(
        self, sizes: Sequence[int], rows: int, *, temperature: float = 1.0, weights: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        self.sizes, self.rows, self.seed = list(sizes), rows, seed
        raw = np.array([1.0] * len(sizes) if weights is None else list(weights)) * np.array(sizes, float) ** (1 / temperature)
        self.shares = raw / raw.sum()

    def steps(self, first: int, end: int) -> Iterator[list[Row]]:
        """The rows of steps `first` to before `end`; rows of one language lie together."""
        owed = np.zeros(len(self.sizes))
        drawn = [0] * len(self.sizes)
        orders: dict[tuple[int, int], list[int]] = {}
        for step in range(end):
            owed += self.shares * self.rows
            counts = np.floor(owed + 1e-9).astype(int).clip(0)
            for _ in range(self.rows - counts.sum()):
                counts[np.argmax(owed - counts)] += 1
            while counts.sum() > self.rows:  # carried over from several languages at once
                counts[np.argmin(np.where(counts > 0, owed - counts, np.inf))] -= 1
            owed -= counts
            rows: list[Row] = []
            for language, count in enumerate(counts.tolist()):
                for number in range(drawn[language], drawn[language] + count):
                    turn, at = divmod(number, self.sizes[language])
                    if (language, turn) not in orders:
                        orders.pop((language, turn - 1), None)
                        orders[language, turn] = (
                            np.random.default_rng((self.seed, language, turn)).permutation(self.sizes[language]).tolist()
                        )
                    rows.append((language, (turn, orders[language, turn][at])))
                drawn[language] += count
            if step >= first:
                yield rows


class _Batches:
    """The keys of every batch, for a DataLoader: the rows of a step, cut into as many batches as gradients are accumulated over."""

    def __init__(self, order: LanguageOrder, first: int, end: int, batch_size: int) -> None:
        self.order, self.first, self.end, self.batch_size = order, first, end, batch_size

    def __iter__(self) -> Iterator[list[Row]]:
        for rows in self.order.steps(self.first, self.end):
            for start in range(0, len(rows), self.batch_size):
                yield rows[start : start + self.batch_size]


class _ManyView(Dataset):
    """Clips of all languages by `Row`; with encoder states in place of sound, where they are cached."""

    def __init__(self, tasks: Sequence[_Task], states: Sequence[EncoderStates] | None) -> None:
        self.clips, self.states = [task.clips for task in tasks], states

    def __getitem__(self, row: Row) -> dict[str, Any]:
        language, key = row
        if self.states is None:
            return self.clips[language][key[1]] | {"row": row, "key": key}
        return {"states": self.states[language][key[1]], "text": self.clips[language].clips[key[1]].text, "row": row}


@dataclass
class _ManyCollator:
    """Items of a `_ManyView` -> `{"input_features" | "encoder_states", "labels", "languages"}`; a row's prompt is its language's."""

    processor: WhisperProcessor
    prompt_languages: list[str]
    sound: Collator

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        languages = [item["row"][0] for item in items]
        labels = [label_ids(self.processor, item["text"], self.prompt_languages[at]) for at, item in zip(languages, items, strict=True)]
        if "states" in items[0]:
            heard = {"encoder_states": torch.stack([item["states"] for item in items])}
        else:
            # Augmentation is drawn from the key; without the language in it, equally many clips of two languages would draw alike.
            heard = {"input_features": self.sound([{**item, "key": (item["row"][0], *item["key"])} for item in items])["input_features"]}
        return heard | {"labels": padded_labels(labels), "languages": torch.tensor(languages)}


# ---- encoder states ----------------------------------------------------------------------------------------------------


def _cached(
    model: Any, processor: WhisperProcessor, tasks: list[_Task], adapted: _Adapted, settings: ManySettings, folder: Path, progress: bool
) -> list[EncoderStates] | None:
    """The encoder states of every language's clips, if they are wanted."""
    if not settings.cache_encoder_states:
        return None
    in_encoder = [weight.name for weight in adapted.vectors.weights if not weight.name.startswith("model.decoder.")]
    if in_encoder:
        raise ValueError(
            f"cache_encoder_states: the adapter touches the encoder ({in_encoder[0]}), whose states then change while it is trained. "
            "Adapt the decoder alone (target_modules=decoder_only(model); on the command line --part decoder), or leave the cache."
        )
    together = Clips([clip for task in tasks for clip in task.clips.clips], "all languages")
    options: dict[str, Any] = {"precision": settings.precision, "storage": settings.storage, "crop": settings.crop_states}
    states = cache_encoder_states(model, processor, together, folder, batch_size=settings.eval_batch_size, progress=progress, **options)
    return [
        states.part(slice(end - len(task.clips), end)) for task, end in zip(tasks, np.cumsum([len(t.clips) for t in tasks]), strict=True)
    ]


# ---- the loop ----------------------------------------------------------------------------------------------------------


class _Run:
    """The loop over steps: what is trained, measured at checkpoints, and saved."""

    def __init__(
        self,
        model: Any,
        processor: WhisperProcessor,
        tasks: list[_Task],
        adapted: _Adapted,
        settings: ManySettings,
        checkpoints: Path,
        states: list[EncoderStates] | None,
        progress: bool,
    ) -> None:
        self.model, self.processor, self.tasks, self.adapted, self.settings = model, processor, tasks, adapted, settings
        self.checkpoints, self.states, self.progress = checkpoints, states, progress
        rows = settings.batch_size * settings.gradient_accumulation
        sizes = [len(task.clips) for task in tasks]
        self.order = LanguageOrder(
            sizes, rows, temperature=settings.temperature, weights=[task.weight for task in tasks], seed=settings.seed
        )
        self.num_steps = settings.max_steps or math.ceil(sum(sizes) * settings.num_epochs / rows)
        self.every = max(1, math.ceil(self.num_steps / settings.num_checkpoints))
        initial = [adapted.vectors.initial(torch.Generator().manual_seed(settings.seed + at)) for at in range(len(tasks))]
        self.adapters = RowAdapters(model, adapted.vectors, initial)
        # One group and one state for each language; a language that is in no row of a step has no gradient and is passed over.
        self.optimizer = torch.optim.AdamW(self.adapters.parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
        self.described = self._fingerprint()
        self.step = 0
        self.seen = [0] * len(tasks)
        """Rows of each language so far."""
        self.losses: list[dict[str, Any]] = []
        self.seconds = 0.0

    def train(self, last: Path | None) -> None:
        """From the beginning, or a checkpoint, to the last step."""
        if last is not None:
            self._load(last)
        with self.adapters.attached():
            self._measure_before()
            loader = self._loader()
            self.model.train()
            interrupt = InterruptStop(lambda line: _say(self.progress, line))
            with interrupt.listening():
                for batches in _in_steps(loader, self.settings.batch_size, self.order.rows):
                    started = time.monotonic()
                    self._step(batches)
                    self.seconds += time.monotonic() - started
                    self.step += 1
                    if self.step % self.every == 0 or self.step == self.num_steps:
                        self._measure()
                        self._save_checkpoint()
                    if interrupt.asked:
                        self._save_checkpoint()
                        raise KeyboardInterrupt

    def _loader(self) -> DataLoader:
        settings = self.settings
        sound = Collator(self.processor, self.tasks[0].prompt_language, settings.augment, settings.crop_share, settings.seed)
        collator = _ManyCollator(self.processor, [task.prompt_language for task in self.tasks], sound)
        batches: Any = _Batches(self.order, self.step, self.num_steps, settings.batch_size)
        ahead: dict[str, Any] = {"prefetch_factor": 4} if settings.num_workers else {}
        view = _ManyView(self.tasks, self.states)
        return DataLoader(
            view, batch_sampler=batches, collate_fn=collator, num_workers=settings.num_workers, worker_init_fn=_leave_ctrl_c, **ahead
        )

    def _step(self, batches: list[dict[str, torch.Tensor]]) -> None:
        settings, device = self.settings, self.model.device
        num_tokens = torch.zeros(len(self.tasks), dtype=torch.int64)
        for batch in batches:
            num_tokens.index_add_(0, batch["languages"], (batch["labels"] != IGNORED).sum(1))
        losses = torch.zeros(len(self.tasks), dtype=torch.float64)
        for batch in batches:
            languages = batch["languages"].tolist()
            with self.adapters.rows(languages):
                per_token, rows = self.token_losses(batch)
                of_token = batch["languages"][rows]  # (tokens,)
                # The mean over the language's tokens in the whole step: what the language alone would have.
                shares = (1 / num_tokens[of_token]).to(device, per_token.dtype)
                (per_token * shares).sum().backward()
            losses.index_add_(0, of_token, (per_token.detach() * shares).double().cpu())
            for language in languages:
                self.seen[language] += 1
        for vector in self.adapters.parameters:
            if vector.grad is not None:
                nn.utils.clip_grad_norm_([vector], settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * _warmup_then_linear(self.step, self.num_steps, settings.warmup_share)
        self.optimizer.step()
        self.optimizer.zero_grad()
        present = num_tokens.nonzero()[:, 0].tolist()
        self.losses.append({self.tasks[at].name: float(losses[at]) for at in present})

    def token_losses(self, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-entropy of every label token of a batch, (tokens,), and the row of each of them."""
        config, device = self.model.config, self.model.device
        labels = batch["labels"].to(device)
        decoder_inputs = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        with autocast(device.type, self.settings.precision):
            hidden = self.model.model(**self._heard(batch), decoder_input_ids=decoder_inputs, use_cache=False).last_hidden_state
            is_label = labels != IGNORED
            losses = token_losses(hidden[is_label], self.model.proj_out.weight, labels[is_label], self.settings.label_smoothing)
        return losses, is_label.nonzero()[:, 0].cpu()

    def _heard(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """What the decoder listens to: features to encode, features shorter than the window, or states encoded before."""
        device, dtype = self.model.device, self.model.dtype
        if "encoder_states" in batch:  # (batch, positions, d_model)
            return {"encoder_outputs": (batch["encoder_states"].to(device, dtype),)}
        features = batch["input_features"].to(device, dtype)  # (batch, n_mels, frames)
        if features.shape[-1] == self.processor.feature_extractor.nb_max_frames:
            return {"input_features": features}
        return {"encoder_outputs": (encode_cropped(self.model, features),)}

    # -- measuring

    def _measure_before(self) -> None:
        for task in self.tasks:
            if task.eval_clips is not None and task.before is None:
                task.before = self._scores(task, task.eval_clips).to_dict()
                _say(self.progress, f"{task.name} before: {Scores(**task.before)}")

    def _measure(self) -> None:
        """The dev sets at a checkpoint; each language keeps its own best."""
        metric = self.settings.best_metric
        for task, vector, seen in zip(self.tasks, self.adapters.parameters, self.seen, strict=True):
            if task.dev_clips is None or not seen:
                continue
            with self.adapters.all_rows(vector):
                scores = self._scores(task, task.dev_clips)
            rate = getattr(scores, metric)
            task.rates.append({"step": self.step, "wer": scores.wer, "cer": scores.cer})
            _say(self.progress, f"step {self.step} of {self.num_steps}, {task.name}: {scores}")
            if task.best_rate is None or rate < task.best_rate:
                task.best, task.best_rate, task.best_step = vector.detach().clone(), rate, self.step
        self.model.train()

    def _scores(self, task: _Task, clips: Clips) -> Scores:
        return evaluate_clips(
            self.model,
            self.processor,
            clips,
            prompt_language=task.prompt_language,
            language=task.language,
            normalizer=self.settings.normalizer,
            batch_size=self.settings.eval_batch_size,
            precision=self.settings.precision,
        ).scores

    # -- checkpoints

    def _fingerprint(self) -> dict[str, Any]:
        """What a run must have in common with the one it goes on from."""
        languages = {
            task.name: {
                "language": task.language,
                "prompt": task.prompt_language,
                "weight": task.weight,
                "clips": task.clips.digest(),
                "dev": None if task.dev_clips is None else task.dev_clips.digest(),
                "test": None if task.eval_clips is None else task.eval_clips.digest(),
            }
            for task in self.tasks
        }
        found: dict[str, Any] = plain(
            {
                "base": base_signature(self.model),
                "settings": {name: value for name, value in asdict(self.settings).items() if name not in _NOT_OF_THE_RUN},
                "order": list(languages),
                "languages": languages,
                "method": {name: value for name, value in self.adapted.config.items() if name != "pool"},  # a name; its hash is there too
                "weights": [[weight.name, weight.rank, weight.scaling] for weight in self.adapted.vectors.weights],
            }
        )
        return found

    def _save_checkpoint(self) -> None:
        from safetensors.torch import save_file

        tensors: dict[str, torch.Tensor] = {}
        for at, (task, vector) in enumerate(zip(self.tasks, self.adapters.parameters, strict=True)):
            tensors[f"{at}.vector"] = vector.detach()
            for name, value in self.optimizer.state.get(vector, {}).items():
                tensors[f"{at}.optimizer.{name}"] = value
            if task.best is not None:
                tensors[f"{at}.best"] = task.best
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "seen": self.seen,
            "losses": self.losses,
            "run": self.described,
            "languages": [
                {"best_rate": task.best_rate, "best_step": task.best_step, "before": task.before, "rates": task.rates}
                for task in self.tasks
            ],
        }
        folder = self.checkpoints / f"step-{self.step}"
        unfinished = self.checkpoints / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, unfinished / "tensors.safetensors")
            write_text(unfinished / "state.json", json.dumps(state))
            sync_folder(unfinished)
            shutil.rmtree(folder, ignore_errors=True)
            unfinished.rename(folder)
        except Exception as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise OSError(
                f"The checkpoint of step {self.step} could not be written to {self.checkpoints}: {error}. Earlier ones are whole. Make "
                "room on that disk and run the same command with --resume (resume=True)."
            ) from error
        for old in _checkpoints(self.checkpoints)[2:]:
            shutil.rmtree(old, ignore_errors=True)

    def _load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        state, tensors = json.loads((folder / "state.json").read_text("utf-8")), load_file(folder / "tensors.safetensors")
        check_same_run(state["run"], self.described, self.checkpoints)
        self.step, self.seconds, self.seen, self.losses = state["step"], state["seconds"], state["seen"], state["losses"]
        for at, (task, vector, row) in enumerate(zip(self.tasks, self.adapters.parameters, state["languages"], strict=True)):
            task.best_rate, task.best_step, task.before, task.rates = (row[name] for name in ("best_rate", "best_step", "before", "rates"))
            if f"{at}.best" in tensors:
                task.best = tensors[f"{at}.best"].to(vector.device)
            vector.data.copy_(tensors[f"{at}.vector"])
            prefix = f"{at}.optimizer."
            found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            if found:
                self.optimizer.state[vector] = {name: v if name == "step" else v.to(vector.device) for name, v in found.items()}
        _say(self.progress, f"going on after step {self.step}")

    # -- saving

    def save(self, task: _Task, out: Path, base_id: str, notes: CardNotes, render_card: Callable[[Path], str] | None) -> LanguageAdapter:
        """A language's adapter as PEFT has it, with its record: the best on the dev set, or the last."""
        at = self.tasks.index(task)
        vector = self.adapters.parameters[at].detach() if task.best is None else task.best
        after = None
        if task.eval_clips is not None:
            with self.adapters.attached(), self.adapters.all_rows(vector):
                after = self._scores(task, task.eval_clips)
            _say(self.progress, f"{task.name} after: {after}")
        folder = out / task.name
        save_adapter(lambda target: self._write(target, vector, base_id), folder, self.checkpoints / "finished")
        before = None if task.before is None else Scores(**task.before)
        row = {
            "format": FORMAT,
            "name": task.name,
            "language": task.language,
            "domain": None,
            "carrier": task.carrier,
            "base_model": base_id,
            "base_signature": base_signature(self.model),
            "num_parameters": vector.numel(),
            "train_data": task.clips.name if notes.train_data is None else notes.train_data,
            "metrics": _metrics(task.eval_clips, self.settings.normalizer, before, after),
            "training": self._summary(task, at) | task.heard | _said(notes),
        }
        write_record(folder, row, notes, render_card)
        return LanguageAdapter.load(folder)

    def _write(self, folder: Path, vector: torch.Tensor, base_id: str) -> None:
        from safetensors.torch import save_file

        tensors = self.adapted.vectors.tensors(vector.detach().cpu())
        save_file({_PREFIX + name: tensor for name, tensor in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
        config = self.adapted.config | {"base_model_name_or_path": base_id}
        write_text(folder / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")

    def _summary(self, task: _Task, at: int) -> dict[str, Any]:
        losses = [step[task.name] for step in self.losses if task.name in step]
        facts: dict[str, Any] = {"clips": len(task.clips), "hours": round(task.clips.hours, 2)}
        facts |= {"left_out": task.clips.report.reasons or "none", "steps": self.step, "steps_with_it": len(losses)}
        facts |= {"passes": round(self.seen[at] / len(task.clips), 2), "last_loss": round(losses[-1], 4) if losses else None}
        if task.dev_clips is not None:
            facts |= {"kept_step": task.best_step, f"dev_{self.settings.best_metric}": task.best_rate}
        facts |= {
            "together_with": [other.name for other in self.tasks if other is not task],
            "share_of_rows": round(float(self.order.shares[at]), 4),
        }
        facts["minutes"] = round(self.seconds / 60, 1)
        recorded = asdict(self.settings)
        for name in (*_NOT_OF_THE_RUN, "num_checkpoints", "normalizer", "max_steps", "log_to", "gradient_checkpointing", "num_epochs"):
            recorded.pop(name)
        return facts | {name: _json_number(value) for name, value in recorded.items() if value is not None}


def _leave_ctrl_c(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; the main one decides what is done about it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _in_steps(loader: DataLoader, batch_size: int, rows: int) -> Iterator[list[dict[str, torch.Tensor]]]:
    """The batches of each step."""
    per_step, waiting = -(-rows // batch_size), []
    for batch in loader:
        waiting.append(batch)
        if len(waiting) == per_step:
            yield waiting
            waiting = []


def _warmup_then_linear(step: int, num_steps: int, warmup_share: float) -> float:
    """The learning rate's factor at a step, counted from 0: that of transformers' linear schedule."""
    warmup = math.ceil(warmup_share * num_steps)
    if step < warmup:
        return step / max(1, warmup)
    return max(0.0, (num_steps - step) / max(1, num_steps - warmup))


def _checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, the latest first: they get their names when they are complete."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True)


def _last_checkpoint(folder: Path) -> Path | None:
    return next(iter(_checkpoints(folder)), None)


@contextmanager
def _borrowed(model: Any) -> Iterator[None]:
    """The base where it is trained; afterwards where and as it was."""
    was_training, use_cache, device = model.training, model.config.use_cache, model.device
    try:
        model.to("cuda" if torch.cuda.is_available() else device)
        yield
    finally:
        model.to(device)
        model.train(was_training)
        model.config.use_cache = use_cache


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, flush=True)
