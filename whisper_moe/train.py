"""Teach a frozen Whisper a language: clips in, a folder with a measured adapter out.

The main path is `train_language_adapter`; the loop under it is Transformers' `Seq2SeqTrainer`. Any PEFT method will do, and
none is imported here: what a method needs beyond gradients (parameter groups, a penalty, a step of its own) comes in as
arguments. The base model that is passed in is borrowed: it leaves as it came, weights untouched, also after an error.
"""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights, set_peft_model_state_dict
from torch.nn import functional
from transformers import (
    PrinterCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    set_seed,
)
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from whisper_moe.base_signature import base_signature
from whisper_moe.data import (
    IGNORED,
    Clips,
    Collator,
    EpochOrder,
    TrainingView,
    extract_features,
    fit_for_training,
    load_clips,
)
from whisper_moe.evaluate import Scores, autocast, evaluate_clips, uses_bf16
from whisper_moe.languages import LanguagePosterior, language_code, language_name, language_posterior, language_tokens
from whisper_moe.pocket import MODEL as POCKET_FOLDER
from whisper_moe.registry import BASE, LanguageAdapter

POCKET_ID = "peft-s2lora/pocket-whisper"
"""The name under which adapters of the shipped pocket know their base."""

FORMAT = 1  # of language_adapter.json


# ---- what a run is told ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainSettings:
    """How one adapter is trained. The defaults suit a published Whisper; a small model wants a larger learning rate."""

    num_epochs: float = 10.0
    max_steps: int | None = None
    """Optimizer steps; overrides `num_epochs`."""
    batch_size: int = 16
    gradient_accumulation: int = 1
    """Batches per optimizer step."""
    learning_rate: float = 1e-4
    warmup_share: float = 0.1
    """Share of the steps in which the learning rate rises; it falls linearly to zero afterwards."""
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    augment: bool = True
    """Change speed, level and noise of the recordings, and mask parts of the features (SpecAugment)."""
    crop_share: float = 0.0
    """Share of batches whose window is cut behind the longest clip instead of filled up with silence. Saves most of the
    time when clips are much shorter than the window; below 1, since the adapter will meet whole windows."""
    num_checkpoints: int = 8
    """How often to save a checkpoint, and to measure on the dev set if there is one."""
    eval_batch_size: int = 16
    normalizer: str = "mark-preserving"
    precision: str = "auto"
    """`bf16`, `fp32`, or `auto`: bf16 where the machine is faster with it."""
    num_workers: int = 1
    """Processes that prepare batches."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("num_epochs", "batch_size", "gradient_accumulation", "learning_rate", "num_checkpoints", "eval_batch_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it has to be above 0.")
        if self.max_steps is not None and self.max_steps <= 0:
            raise ValueError(f"max_steps is {self.max_steps}; it has to be above 0, or None to count epochs.")
        for name in ("warmup_share", "label_smoothing", "crop_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share, from 0 to 1.")
        uses_bf16("cpu", self.precision)  # refuses what it does not know


@dataclass(frozen=True)
class CardNotes:
    """What only the person who trains knows, for the adapter's card."""

    train_data: str | None = None
    """The data, whose they are, and where they are from."""
    license: str | None = None
    """Of the adapter, as the data allow it; an identifier of the Hub such as `cc-by-4.0`."""
    command: str | None = None
    """The command line that makes this adapter again."""
    limits: str | None = None
    """What the adapter must not be relied on for, in plain words."""


def default_peft_config() -> LoraConfig:
    """LoRA as LoRA-Whisper (Song et al. 2024) is read here: rank 32 on attention and feed-forward weights of both halves."""
    return LoraConfig(r=32, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "fc1", "fc2"])


# ---- the main path -----------------------------------------------------------------------------------------------------------


def train_language_adapter(
    base: str | Path | tuple[WhisperForConditionalGeneration, WhisperProcessor],
    data: Clips | str | Path,
    *,
    language: str,
    out: str | Path,
    peft_config: PeftConfig | None = None,
    name: str | None = None,
    domain: str | None = None,
    carrier: str | None = None,
    base_id: str | None = None,
    eval_data: Clips | str | Path | None = None,
    dev_data: Clips | str | Path | None = None,
    start_from: str | Path | None = None,
    settings: TrainSettings | None = None,
    notes: CardNotes | None = None,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    optimizer_parameter_groups: Callable[[PeftModel, float], list[dict[str, Any]]] | None = None,
    extra_loss: Callable[[PeftModel], torch.Tensor] | None = None,
    **overrides: Any,
) -> LanguageAdapter:
    """Train, measure and save an adapter for one language.

    Args:
        base: a Whisper: a folder, an id of the Hub, or `(model, processor)`, which come back as they were.
        data: training clips, or where they are (see `load_clips`; of a folder, its `train` split).
        language: Whisper's code, or ISO 639-3 where Whisper has none (`qug`).
        out: folder for the adapter. Checkpoints lie in `out/checkpoints` until the run is complete.
        peft_config: any PEFT method; by default `default_peft_config()`, or that of `start_from`.
        name: what the registry calls the adapter; by default the language, with the domain.
        domain: for an adapter that serves one kind of speech (`child`) and is chosen by name only.
        carrier: the language token to prompt with; by default the language's own. A language without one is carried by the
            token that the base hears most in it, unless you name another.
        base_id: the public name of the base, written into the adapter's config; needed when `base` is a folder or a model.
        eval_data: clips that are transcribed before and after; of a folder, its `test` split.
        dev_data: clips that decide which checkpoint is kept (by CER); of a folder, its `dev` split. Without: the last.
        start_from: folder of an adapter whose weights are the start.
        settings: see `TrainSettings`; its fields may also be given by name: `train_language_adapter(..., num_epochs=3)`.
        notes: what the card shall say about data, licence and limits.
        resume: go on from the last checkpoint in `out`, if there is one.
        progress: show progress bars.
        callbacks, optimizer_parameter_groups, extra_loss: for PEFT methods that need more than gradients: callbacks of the
            Trainer, `(model, learning rate) -> parameter groups` of the optimizer, and `model -> scalar` added to every step's loss.

    Returns:
        The adapter as the registry loads it, with its error rates before and after.
    """
    settings = _with_overrides(settings, overrides)
    notes = CardNotes() if notes is None else notes
    language, out = language_code(language), Path(out)
    name = _adapter_name(name, language, domain)
    checkpoints = _checkpoint_folder(out, resume)
    model, processor, base_id = _open_base(base, base_id)
    set_seed(settings.seed)

    clips = _open_clips(data, "train", language)
    carrier, heard = _choose_carrier(model, processor, clips, language, carrier, settings)
    prompt_language = language if carrier is None else carrier
    clips = fit_for_training(clips, processor, model.config.max_target_positions, prompt_language)
    if not len(clips):
        raise ValueError(f"No clip is left to train on; {clips}.")
    dev_clips = None if dev_data is None else _open_clips(dev_data, "dev", language)
    eval_clips = dev_clips if eval_data is None else _open_clips(eval_data, "test", language)
    _say(progress, f"training data: {clips}")

    def measure(measured: Any) -> Scores | None:
        if eval_clips is None:
            return None
        evaluation = evaluate_clips(
            measured,
            processor,
            eval_clips,
            prompt_language=prompt_language,
            language=language,
            normalizer=settings.normalizer,
            batch_size=settings.eval_batch_size,
            precision=settings.precision,
            progress=progress,
        )
        return evaluation.scores

    signature = base_signature(model)
    before = measure(model)
    _say(progress, f"before: {before}")
    with _adapter_on(model, _start_config(peft_config, start_from), start_from) as adapted:
        trainer = _AdapterTrainer(
            adapted,
            processor,
            clips,
            dev_clips,
            language,
            prompt_language,
            settings,
            checkpoints,
            callbacks=callbacks,
            optimizer_parameter_groups=optimizer_parameter_groups,
            extra_loss=extra_loss,
            progress=progress,
        )
        started = time.monotonic()
        trainer.train(resume_from_checkpoint=_last_checkpoint(checkpoints) if resume else None)
        minutes = (time.monotonic() - started) / 60
        after = measure(adapted)
        _say(progress, f"after: {after}")
        num_parameters = sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)  # a callback may have pruned some
        _save_weights(adapted, out, base_id)
        peft_type = str(getattr(adapted.peft_config["default"].peft_type, "value", adapted.peft_config["default"].peft_type))

    row = {
        "format": FORMAT,
        "name": name,
        "language": language,
        "domain": domain,
        "carrier": carrier,
        "base_model": base_id,
        "base_signature": signature,
        "num_parameters": num_parameters,
        "train_data": clips.name if notes.train_data is None else notes.train_data,
        "metrics": _metrics(eval_clips, settings.normalizer, before, after),
        "training": trainer.summary() | {"minutes": round(minutes, 1)} | heard | {"start": _start_name(start_from)} | _said(notes),
    }
    _write_text(out / "language_adapter.json", json.dumps(row, indent=2, ensure_ascii=False) + "\n")
    _write_text(out / "README.md", _card(row, peft_type, notes))
    shutil.rmtree(checkpoints, ignore_errors=True)  # ours, and of no use once the adapter is whole
    return LanguageAdapter.load(out)


def _with_overrides(settings: TrainSettings | None, overrides: dict[str, Any]) -> TrainSettings:
    known = TrainSettings.__dataclass_fields__
    if unknown := sorted(set(overrides) - set(known)):
        raise TypeError(f"Unknown setting {', '.join(unknown)}. Known: {', '.join(known)}.")
    return replace(TrainSettings() if settings is None else settings, **overrides)


def _adapter_name(name: str | None, language: str, domain: str | None) -> str:
    if name is None:
        name = language if domain is None else f"{language}-{domain}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == BASE:
        raise ValueError(f"{name!r} cannot be an adapter's name. Use letters, digits, '-', '_' and '.'; {BASE!r} means the base alone.")
    return name


def _checkpoint_folder(out: Path, resume: bool) -> Path:
    """Where the run saves itself. Checkpoints of an earlier run are gone on from, or refused, never mixed with new ones."""
    checkpoints = out / "checkpoints"
    last = _last_checkpoint(checkpoints)
    if last is not None and not resume:
        raise ValueError(
            f"{checkpoints} holds an unfinished run ({last.name}). Go on with resume=True, or delete that folder to start anew."
        )
    checkpoints.mkdir(parents=True, exist_ok=True)
    return checkpoints


def _last_checkpoint(checkpoints: Path) -> Path | None:
    """The latest checkpoint that was written to its end: the Trainer writes its state file last."""
    for folder in sorted(checkpoints.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        try:
            json.loads((folder / "trainer_state.json").read_text("utf-8"))
        except (OSError, ValueError):
            continue
        return folder
    return None


def _open_base(base: Any, base_id: str | None) -> tuple[WhisperForConditionalGeneration, WhisperProcessor, str]:
    """The model in single precision (or as it was passed in), its processor, and its public name."""
    if isinstance(base, tuple):
        model, processor = base
        if isinstance(model, PeftModel):
            raise ValueError("The base is already wrapped by PEFT. Pass the Whisper itself: `model.unload()` or `model.get_base_model()`.")
        return model, processor, _public_id(getattr(model, "name_or_path", ""), base_id)
    model = WhisperForConditionalGeneration.from_pretrained(str(base), dtype=torch.float32)
    return model, WhisperProcessor.from_pretrained(str(base)), _public_id(str(base), base_id)


def _public_id(source: str, base_id: str | None) -> str:
    """The name others know the base by; a path of this machine means nothing to them."""
    if base_id is not None:
        return base_id
    if source and Path(source).resolve() == POCKET_FOLDER.resolve():
        return POCKET_ID
    if source and not Path(source).exists() and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return source
    raise ValueError(
        f"The base ({source or 'a model in memory'}) has no public name to write into the adapter. "
        "Pass base_id=..., for instance 'openai/whisper-small'."
    )


def _open_clips(data: Clips | str | Path, split: str, language: str) -> Clips:
    if isinstance(data, Clips):
        return data
    return load_clips(data, split=split, language=language)  # a single file has no splits and is taken whole


def _choose_carrier(
    model: Any, processor: WhisperProcessor, clips: Clips, language: str, carrier: str | None, settings: TrainSettings
) -> tuple[str | None, dict[str, Any]]:
    """The language token that stands in for a language without one, and what was heard if that decided it."""
    tokens = language_tokens(model)
    if not tokens:
        raise ValueError("This Whisper is an English-only checkpoint without language tokens. Use its multilingual sibling.")
    if carrier is not None:
        carrier = language_code(carrier)
        if carrier not in tokens:
            raise ValueError(f"The carrier {carrier!r} has no token in this Whisper. Choose among: {', '.join(sorted(tokens))}.")
        return (None if carrier == language else carrier), {}
    if language in tokens:
        return None, {}
    shares = _heard_in(model, processor, clips, settings).top(5)
    best = next(iter(shares))
    return best, {"carrier_chosen": "heard in the training clips: " + ", ".join(f"{code} {share:.0%}" for code, share in shares.items())}


def _heard_in(model: Any, processor: WhisperProcessor, clips: Clips, settings: TrainSettings, num_clips: int = 64) -> LanguagePosterior:
    """The base's language posterior averaged over some clips, drawn by the seed."""
    generator = torch.Generator().manual_seed(settings.seed)
    rows = torch.randperm(len(clips), generator=generator)[:num_clips].tolist()
    posteriors: list[LanguagePosterior] = []
    for start in range(0, len(rows), settings.eval_batch_size):
        waves = [clips[row]["audio"] for row in rows[start : start + settings.eval_batch_size]]
        posteriors += language_posterior(model, extract_features(processor, waves))
    return LanguagePosterior.mean(posteriors, [1.0] * len(posteriors))


# ---- the adapter on its base -------------------------------------------------------------------------------------------------


def _start_config(peft_config: PeftConfig | None, start_from: str | Path | None) -> PeftConfig:
    if peft_config is not None:
        config = copy.deepcopy(peft_config)
    elif start_from is not None:
        config = PeftConfig.from_pretrained(str(start_from))
    else:
        config = default_peft_config()
    if config.task_type is not None:
        raise ValueError(f"task_type is {config.task_type!r}; leave it out: PEFT has none for Whisper (SEQ_2_SEQ_LM looks for input_ids).")
    config.base_model_name_or_path, config.inference_mode = None, False
    return config


@contextmanager
def _adapter_on(model: Any, config: PeftConfig, start_from: str | Path | None) -> Iterator[PeftModel]:
    """The base with a fresh adapter, frozen but for it. Afterwards the base is as it was: weights, flags, mode and place."""
    required = {name: weight.requires_grad for name, weight in model.named_parameters()}
    was_training, use_cache, device = model.training, model.config.use_cache, model.device
    adapted = None
    try:
        adapted = get_peft_model(model, config)
        if start_from is not None:
            _copy_weights(adapted, Path(start_from))
        yield adapted
    finally:
        if adapted is not None:
            adapted.unload()
        model.to(device)
        for name, weight in model.named_parameters():
            weight.requires_grad_(required[name])
        model.train(was_training)
        model.config.use_cache = use_cache


def _copy_weights(adapted: PeftModel, folder: Path) -> None:
    """Start from another adapter of the same method, rank and targets."""
    mismatch = f"The adapter in {folder} does not fit this one: rank, targets or method differ. Leave peft_config out to take over its own."
    try:
        loaded = set_peft_model_state_dict(adapted, load_peft_weights(str(folder), device="cpu"))
    except RuntimeError as error:
        raise ValueError(f"{mismatch} {error}") from error
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    if loaded.unexpected_keys or trained & set(loaded.missing_keys):
        raise ValueError(mismatch)


def _save_weights(adapted: PeftModel, out: Path, base_id: str) -> None:
    adapted.peft_config["default"].base_model_name_or_path = base_id
    # Without save_embedding_layers=False, PEFT asks the Hub whether the base's vocabulary has grown.
    adapted.save_pretrained(str(out), save_embedding_layers=False)


# ---- the loop ----------------------------------------------------------------------------------------------------------------


class _AdapterTrainer(Seq2SeqTrainer):
    """Transformers' loop with our order of clips, our loss over cropped windows, and WER and CER as its evaluation."""

    optimizer: Any  # set by the Trainer, which the type checker does not see
    control: Any

    def __init__(
        self,
        adapted: PeftModel,
        processor: WhisperProcessor,
        clips: Clips,
        dev_clips: Clips | None,
        language: str,
        prompt_language: str,
        settings: TrainSettings,
        checkpoints: Path,
        *,
        callbacks: Sequence[TrainerCallback],
        optimizer_parameter_groups: Callable[[PeftModel, float], list[dict[str, Any]]] | None,
        extra_loss: Callable[[PeftModel], torch.Tensor] | None,
        progress: bool,
    ) -> None:
        self.processor, self.clips, self.dev_clips, self.settings = processor, clips, dev_clips, settings
        self.language, self.prompt_language = language, prompt_language
        self.optimizer_parameter_groups, self.extra_loss = optimizer_parameter_groups, extra_loss
        super().__init__(
            model=adapted,
            args=_training_arguments(settings, checkpoints, len(clips), dev_clips is not None, progress),
            train_dataset=TrainingView(clips),
            eval_dataset=dev_clips,
            data_collator=Collator(processor, prompt_language, settings.augment, settings.crop_share, settings.seed),
            callbacks=list(callbacks),
        )
        if not progress:
            self.remove_callback(PrinterCallback)
        # `compute_loss` returns the mean over a batch; the Trainer divides it by the batches of a step.
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = False, False

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        return EpochOrder([clip.duration_s for clip in self.clips.clips], self.settings.batch_size, self.settings.seed)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.optimizer_parameter_groups is not None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(self.optimizer_parameter_groups(self.model, self.args.learning_rate), **options)
        return super().create_optimizer(model)

    def compute_loss(self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, **_: Any) -> Any:
        config = self.model.config
        features, labels = inputs["input_features"].to(self.model.dtype), inputs["labels"]
        speech: dict[str, Any] = {"input_features": features}
        if features.shape[-1] < self.processor.feature_extractor.nb_max_frames:
            with autocast(features.device.type, self.settings.precision):
                speech = {"encoder_outputs": (_encode_cropped(self.model, features),)}
        decoder_inputs = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        outputs = model(**speech, decoder_input_ids=decoder_inputs, use_cache=False)
        loss = functional.cross_entropy(
            outputs.logits.float().flatten(0, 1),  # (batch * tokens, vocabulary)
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.settings.label_smoothing,
        )
        if self.extra_loss is not None:
            loss = loss + self.extra_loss(self.model)
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        assert self.dev_clips is not None, "the Trainer evaluates only when there is a dev set"
        scores = evaluate_clips(
            self.model,
            self.processor,
            self.dev_clips,
            prompt_language=self.prompt_language,
            language=self.language,
            normalizer=self.settings.normalizer,
            batch_size=self.settings.eval_batch_size,
            precision=self.settings.precision,
        ).scores
        metrics = {f"{metric_key_prefix}_wer": scores.wer, f"{metric_key_prefix}_cer": scores.cer}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint's weights: the adapter alone, and no question to the Hub (see `_save_weights`)."""
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False, is_main_process=self.args.should_save)

    def summary(self) -> dict[str, Any]:
        """What the run was, in plain values for `language_adapter.json`."""
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        facts: dict[str, Any] = {"clips": len(self.clips), "hours": round(self.clips.hours, 2)}
        facts |= {"left_out": self.clips.report.reasons or "none", "steps": self.state.global_step}
        facts |= {"last_loss": round(losses[-1], 4) if losses else None}
        if self.dev_clips is not None:
            facts |= {"kept_step": self.state.best_global_step, "dev_cer": self.state.best_metric}
        recorded = asdict(self.settings)
        for name in ("num_workers", "eval_batch_size", "num_checkpoints", "normalizer", "max_steps"):
            recorded.pop(name)
        recorded["num_epochs"] = round(self.state.epoch or 0.0, 2)
        return facts | recorded


def _training_arguments(
    settings: TrainSettings, checkpoints: Path, num_clips: int, has_dev: bool, progress: bool
) -> Seq2SeqTrainingArguments:
    per_epoch = math.ceil(math.ceil(num_clips / settings.batch_size) / settings.gradient_accumulation)
    num_steps = settings.max_steps or math.ceil(per_epoch * settings.num_epochs)
    every = max(1, math.ceil(num_steps / settings.num_checkpoints))
    on_gpu = torch.cuda.is_available()
    best: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "cer", "greater_is_better": False}
    return Seq2SeqTrainingArguments(
        output_dir=str(checkpoints),
        max_steps=num_steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        warmup_steps=math.ceil(settings.warmup_share * num_steps),
        weight_decay=settings.weight_decay,
        bf16=uses_bf16("cuda" if on_gpu else "cpu", settings.precision),
        use_cpu=not on_gpu,
        logging_steps=max(1, every // 2),
        save_steps=every,
        save_total_limit=2,
        eval_strategy="steps" if has_dev else "no",
        eval_steps=every,
        seed=settings.seed,
        dataloader_num_workers=settings.num_workers,
        dataloader_persistent_workers=settings.num_workers > 0,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        disable_tqdm=not progress,
        **(best if has_dev else {}),
    )


def _encode_cropped(adapted: PeftModel, features: torch.Tensor) -> torch.Tensor:
    """Whisper's encoder on less than a window. (batch, n_mels, frames) -> (batch, frames / 2, d_model)

    `WhisperEncoder.forward` refuses anything but whole windows; the arithmetic is the same.
    """
    encoder = adapted.get_base_model().get_encoder()
    hidden = functional.gelu(encoder.conv2(functional.gelu(encoder.conv1(features)))).transpose(1, 2)
    hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
    hidden = functional.dropout(hidden, encoder.dropout, encoder.training)
    for layer in encoder.layers:
        hidden = layer(hidden, None)
    return encoder.layer_norm(hidden)


# ---- what is written beside the weights --------------------------------------------------------------------------------------


def _metrics(clips: Clips | None, normalizer: str, before: Scores | None, after: Scores | None) -> dict[str, Any]:
    if clips is None or before is None or after is None:
        return {}
    rows = {when: {"wer": s.wer, "cer": s.cer, "clips": s.num_clips} for when, s in (("before", before), ("after", after))}
    return {"test_set": clips.name, "normalizer": normalizer, **rows}


def _start_name(start_from: str | Path | None) -> str:
    return "fresh" if start_from is None else f"the adapter {Path(start_from).name}"


def _said(notes: CardNotes) -> dict[str, str]:
    said = {"license": notes.license, "command": notes.command}
    return {key: text for key, text in said.items() if text is not None}


def _card(row: dict[str, Any], peft_type: str, notes: CardNotes) -> str:
    """A README for the folder, from what the run recorded. Strings of the header are quoted: YAML reads a bare `no` as false."""
    header: dict[str, Any] = {
        "language": [row["language"]],
        "license": notes.license,
        "library_name": "peft",
        "pipeline_tag": "automatic-speech-recognition",
        "base_model": row["base_model"],
        "tags": ["whisper", "language-adapter", peft_type.lower()],
        "metrics": ["wer", "cer"],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items() if value is not None), "---", ""]
    spoken = language_name(row["language"]) + (f", {row['domain']} speech" if row["domain"] else "")
    lines += [f"# {row['name']}: {spoken} for {row['base_model']}", ""]
    lines += [f"A {peft_type} adapter of {row['num_parameters']:,} parameters; the base model stays as it is.", ""]
    if row["carrier"]:
        lines += [f"Whisper has no token for {spoken}; prompt with `{row['carrier']}`.", ""]
    lines += [*_score_table(row["metrics"]), "", "## Data", "", row["train_data"], ""]
    if notes.command:
        lines += ["## How it was made", "", "```", notes.command, "```", ""]
    limits = [notes.limits] if notes.limits else []
    limits.append("The figures above, if any, are of one test set; other voices, rooms and subjects will give others.")
    lines += ["## Limits", "", *limits, ""]
    return "\n".join(lines)


def _score_table(metrics: dict[str, Any]) -> list[str]:
    if not metrics:
        return ["Error rates were not measured."]
    lines = [f"On {metrics['test_set']}, text normalised by `{metrics['normalizer']}`:", ""]
    lines += ["| | WER | CER | clips |", "|---|---:|---:|---:|"]
    for label, key in (("base model", "before"), ("with this adapter", "after")):
        scores = metrics[key]
        lines.append(f"| {label} | {scores['wer']:.1%} | {scores['cer']:.1%} | {scores['clips']:,} |")
    return lines


def _write_text(path: Path, text: str) -> None:
    """Replace a file in one step: a run that dies here leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(text, "utf-8")
    unfinished.replace(path)


def _say(progress: bool, line: str) -> None:
    if progress:
        print(line, flush=True)
