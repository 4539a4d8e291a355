"""Teach a frozen Whisper a language: clips in, a folder with a measured adapter out.

The main path is `train_language_adapter`, which `plan_training` tells about without doing it; the loop under it is `trainer.py`, what is
written down `train_record.py`. Any PEFT method will do, and none of ours is imported here: what a method needs beyond gradients (parameter
groups, a penalty, a step of its own) comes in as arguments. The base model that is passed in is borrowed: it leaves as it came, weights
untouched, also after an error.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import Seq2SeqTrainingArguments, TrainerCallback, WhisperForConditionalGeneration, WhisperProcessor, set_seed

from whisper_moe.base_signature import base_signature, check_signature
from whisper_moe.data import Clip, Clips, ClipStream, EpochOrder, StreamMixture, extract_features, fit_for_training, load_clips
from whisper_moe.encoder_states import StatesCollator, StatesView, cache_encoder_states, check_leaves_encoder_alone
from whisper_moe.evaluate import Scores, autocast
from whisper_moe.languages import LanguagePosterior, adapters_off, language_code, language_posterior, language_tokens
from whisper_moe.pocket import MODEL as POCKET_FOLDER
from whisper_moe.registry import BASE, LanguageAdapter
from whisper_moe.similarity import language_similarity
from whisper_moe.starts import KINDS, Start, choose_start
from whisper_moe.train_record import TrainingPlan, check_same_run, plain, save_adapter, write_record, write_text
from whisper_moe.train_settings import CardNotes, TrainSettings, check_logger
from whisper_moe.trainer import (
    AdapterTrainer,
    Measure,
    ParameterGroups,
    gathered,
    in_processes,
    is_write_fault,
    last_checkpoint,
    logging_callbacks,
    num_steps,
    training_arguments,
    training_collator,
    training_view,
)

POCKET_ID = "peft-s2lora/pocket-whisper"
"""The name under which adapters of the shipped pocket know their base."""

FORMAT = 1  # of language_adapter.json
NUM_HEARD = 64  # clips that are listened to when a carrier or a start is chosen
RUN_FILE, BEFORE_FILE = "run.json", "before.json"  # among the checkpoints: which run they are of, and what the base was measured at
_MAY_CHANGE = ("num_workers", "eval_batch_size", "log_to", "gradient_checkpointing")  # settings, when a run is resumed

Data = Clips | ClipStream | StreamMixture | str | Path


def default_peft_config() -> LoraConfig:
    """LoRA as LoRA-Whisper (Song et al. 2024) is read here: rank 32 on attention and feed-forward weights of both halves."""
    return LoraConfig(r=32, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "k_proj", "v_proj", "fc1", "fc2"])


def lora_plus_groups(model: PeftModel, lr: float, *, multiplier: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Parameter groups in which every B of a LoRA learns `multiplier` times as fast as its A (LoRA+, Hayou et al. 2024)."""
    trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
    quick = [weight for name, weight in trained if any(part in name for part in ("lora_B", "lora_embedding_B", "loramoe_B."))]
    if not quick:
        raise ValueError("There is no LoRA whose B could learn faster. Leave the multiplier out for other methods.")
    chosen = {id(weight) for weight in quick}
    rest = [weight for _, weight in trained if id(weight) not in chosen]
    return [
        {"params": rest, "lr": lr, "weight_decay": weight_decay},
        {"params": quick, "lr": lr * multiplier, "weight_decay": weight_decay},
    ]


# ---- the main path -----------------------------------------------------------------------------------------------------------


def train_language_adapter(
    base: str | Path | tuple[WhisperForConditionalGeneration, WhisperProcessor],
    data: Data,
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
    start: str | Start = "cold",
    sources: Sequence[LanguageAdapter | str | Path] = (),
    pool: str | Path | None = None,
    settings: TrainSettings | None = None,
    notes: CardNotes | None = None,
    resume: bool = False,
    progress: bool = True,
    callbacks: Sequence[TrainerCallback] = (),
    optimizer_parameter_groups: ParameterGroups | None = None,
    extra_loss: Callable[[PeftModel], torch.Tensor] | None = None,
    render_card: Callable[[Path], str] | None = None,
    **overrides: Any,
) -> LanguageAdapter:
    """Train, measure and save an adapter for one language.

    Ctrl-C ends the run after the step under way: what is best so far is saved, measured and marked as stopped, and the checkpoints
    stay, so that `resume=True` can go on. A second Ctrl-C ends it at once. Under `accelerate launch`, call it in every process with
    the same arguments; a run of several processes that Ctrl-C has stopped is not measured, since the launcher kills it soon.

    Args:
        base: a Whisper: a folder, an id of the Hub, or `(model, processor)`, which come back as they were.
        data: training clips, or where they are (see `load_clips`; of a folder, its `train` split); or a stream, see `stream_clips`.
        language: Whisper's code, or ISO 639-3 where Whisper has none (`qug`).
        out: folder for the adapter. Checkpoints lie in `out/checkpoints` until the run is complete.
        peft_config: any PEFT method; by default what the start suggests: `default_peft_config()`, or its source's.
        name: what the registry calls the adapter; by default the language, with the domain.
        domain: for an adapter that serves one kind of speech (`child`) and is chosen by name only.
        carrier: the language token to prompt with; by default the language's own. A language without one is carried by the
            token that the base hears most in it, unless you name another.
        base_id: the public name of the base, written into the adapter's config; needed when `base` is a folder or a model.
        eval_data: clips that are transcribed before and after; of a folder, its `test` split. By default the dev clips.
        dev_data: clips that decide which checkpoint is kept (`best_metric`) and when to stop (`patience`); of a folder, its `dev` split.
            Without: the last.
        start: how the adapter begins: `cold`, `warm`, `stacked`, `moe`, or `auto`, see `starts.choose_start`; or what that returned.
        sources: adapters, or their folders, that the start may begin from.
        pool: folder of the pool, for an S2-LoRA adapter that shares one.
        settings: see `TrainSettings`; its fields may also be given by name: `train_language_adapter(..., num_epochs=3)`.
        notes: what the card shall say about data, licence and limits.
        resume: go on from the last checkpoint in `out`, if there is one. It must be of this very run: base, clips, settings, method,
            sources and number of processes; `num_workers`, `eval_batch_size`, `log_to` and `gradient_checkpointing` may change.
        progress: show progress bars.
        callbacks, optimizer_parameter_groups, extra_loss: for PEFT methods that need more than gradients: callbacks of the
            Trainer, `(model, learning rate) -> parameter groups` of the optimizer, and `model -> scalar` added to every step's loss.
        render_card: `folder -> README.md`, for instance `hub_utils.render_card`; by default a short note of figures and data.

    Returns:
        The adapter as the registry loads it, with its error rates before and after.

    Raises:
        ValueError: Something that was asked for makes no sense; nothing has been trained.
        OSError: The adapter or a checkpoint could not be written. The last checkpoint is whole, and so is an adapter that was in
            `out` before.
    """
    settings = (TrainSettings() if settings is None else settings).with_changes(overrides)
    notes, out = CardNotes() if notes is None else notes, Path(out)
    checkpoints, last = _checkpoint_folder(out, resume)
    run = _prepare(
        base,
        data,
        language=language,
        checkpoints=checkpoints,
        peft_config=peft_config,
        name=name,
        domain=domain,
        carrier=carrier,
        base_id=base_id,
        eval_data=eval_data,
        dev_data=dev_data,
        start=start,
        sources=sources,
        pool=pool,
        settings=settings,
        progress=progress,
    )
    with _adapter_on(run, optimizer_parameter_groups) as (adapted, groups):
        _claim(run, groups, checkpoints, last)
        before = _measured_before(run, adapted, checkpoints, resume, progress)
        trainer = AdapterTrainer(
            adapted,
            run.clips,
            *_view_and_collator(run, adapted, run.clips, checkpoints / "encoder_states", run.speaks and progress),
            run.dev_clips,
            run.measure,
            run.args,
            callbacks=[*callbacks, *logging_callbacks(settings, out / "logs")],
            optimizer_parameter_groups=optimizer_parameter_groups,
            extra_loss=extra_loss,
            progress=run.speaks and progress,
        )
        started = time.monotonic()
        trainer.run(last)
        minutes = (time.monotonic() - started) / 60
        training = trainer.summary() | {"minutes": round(minutes, 1)} | run.heard | {"start": run.start.kind} | _said(notes)
        row: dict[str, Any] = {
            "format": FORMAT,
            "name": run.name,
            "language": run.language,
            "domain": domain,
            "carrier": run.carrier,
            "base_model": run.base_id,
            "base_signature": run.signature,
            "num_parameters": _num_trained(adapted),  # a callback may have pruned some
            "train_data": run.clips.name if notes.train_data is None else notes.train_data,
            "metrics": {},
            "training": training,
            "start": run.start.record(),
        }
        if run.speaks:  # before it is measured: whatever happens to that, the work is kept
            _save(run, adapted, out, checkpoints)
            write_record(out, row, notes)  # the card waits for the figures: it would complain that there are none
        # A launcher that has passed on a Ctrl-C waits for half a minute and kills.
        in_haste = trainer.interrupt.reason is not None and in_processes()[1] > 1
        if trainer.stopped is not None:
            next_up = "It is not measured: the launcher waits for nobody." if in_haste else "It is measured now, which Ctrl-C cuts short."
            _say(run.speaks and progress, f"stopped {trainer.stopped}; saved in {out}. {next_up}")
        after = None
        if run.eval_clips is not None and not in_haste:
            after = run.measure(adapted, run.eval_clips, progress)
            _say(run.speaks and progress, f"after: {after}")

    row["metrics"] = _metrics(run.eval_clips, settings.normalizer, before, after)
    if run.speaks:
        write_record(out, row, notes, render_card)
        if trainer.stopped is None or trainer.interrupt.reason is None:
            shutil.rmtree(checkpoints, ignore_errors=True)  # ours, and of no use once the adapter is whole
    gathered(None)  # nobody reads what the first process is still writing
    return LanguageAdapter.load(out)


def plan_training(
    base: str | Path | tuple[WhisperForConditionalGeneration, WhisperProcessor],
    data: Data,
    *,
    out: str | Path,
    settings: TrainSettings | None = None,
    optimizer_parameter_groups: ParameterGroups | None = None,
    extra_loss: Callable[[PeftModel], torch.Tensor] | None = None,
    progress: bool = True,
    **options: Any,
) -> TrainingPlan:
    """What `train_language_adapter` would do with the same arguments, and about how long it would take. Writes nothing.

    Clips are read and the start is chosen as in earnest. The cost is measured, not looked up: two steps are trained, of which the second
    counts (two more where `crop_share` makes steps of two kinds), and one batch is transcribed; then the adapter is thrown away.
    """
    ignored = ("notes", "resume", "callbacks", "render_card")
    known = ("language", "peft_config", "name", "domain", "carrier", "base_id", "eval_data", "dev_data", "start", "sources", "pool")
    overrides = {key: value for key, value in options.items() if key not in (*known, *ignored)}
    settings = (TrainSettings() if settings is None else settings).with_changes(overrides)
    chosen = {key: value for key, value in options.items() if key in known}
    with tempfile.TemporaryDirectory() as folder:
        run = _prepare(base, data, checkpoints=Path(folder), settings=settings, progress=progress, **chosen)
        with _adapter_on(run, optimizer_parameter_groups) as (adapted, _):
            batch = _first_batch(run)
            trainer = AdapterTrainer(
                adapted,
                batch,
                *_view_and_collator(run, adapted, batch, Path(folder) / "encoder_states", False, part=(0, 1)),
                run.dev_clips,
                run.measure,
                run.args,
                optimizer_parameter_groups=optimizer_parameter_groups,
                extra_loss=extra_loss,
                progress=False,
            )
            trainer.create_optimizer()
            step_s = _seconds_a_batch(run, trainer, len(batch)) * settings.gradient_accumulation
            clip_s = _seconds_a_clip(run, adapted)
            return _plan(run, adapted, Path(out), step_s, clip_s)


# ---- what is checked and opened before anything is trained ---------------------------------------------------------------------


@dataclass
class _Run:
    """Everything a run needs, opened and found to fit together."""

    model: Any
    processor: WhisperProcessor
    base_id: str
    language: str
    name: str
    carrier: str | None
    heard: dict[str, Any]
    clips: Any
    dev_clips: Clips | None
    eval_clips: Clips | None
    start: Start
    settings: TrainSettings
    args: Seq2SeqTrainingArguments
    signature: dict[str, Any]
    """Of the base."""

    @property
    def prompt_language(self) -> str:
        return self.language if self.carrier is None else self.carrier

    @property
    def measure(self) -> Measure:
        return Measure(self.processor, self.prompt_language, self.language, self.settings)

    @property
    def speaks(self) -> bool:
        """Whether this is the process that writes and prints."""
        return in_processes()[0] == 0

    @property
    def num_clips(self) -> int | None:
        return len(self.clips) if isinstance(self.clips, Clips) else None


def _prepare(
    base: Any,
    data: Data,
    *,
    language: str,
    checkpoints: Path,
    settings: TrainSettings,
    peft_config: PeftConfig | None = None,
    name: str | None = None,
    domain: str | None = None,
    carrier: str | None = None,
    base_id: str | None = None,
    eval_data: Clips | str | Path | None = None,
    dev_data: Clips | str | Path | None = None,
    start: str | Start = "cold",
    sources: Sequence[LanguageAdapter | str | Path] = (),
    pool: str | Path | None = None,
    progress: bool = True,
) -> _Run:
    language, name = language_code(language), _adapter_name(name, language_code(language), domain)
    _check_request(data, dev_data, start, peft_config, settings)
    model, processor, base_id = _open_base(base, base_id)
    set_seed(settings.seed)
    clips = _open_clips(data, "train", language)
    carrier, heard = _choose_carrier(model, processor, clips, language, carrier, settings)
    clips = _fitting(clips, processor, model.config.max_target_positions, language if carrier is None else carrier)
    dev_clips = None if dev_data is None else _decoded(_open_clips(dev_data, "dev", language), "dev_data")
    eval_clips = dev_clips if eval_data is None else _decoded(_open_clips(eval_data, "test", language), "eval_data")
    chosen = _choose_start(start, sources, peft_config, pool, model, processor, clips, language, settings)
    num_clips = len(clips) if isinstance(clips, Clips) else None
    args = training_arguments(settings, checkpoints, num_clips, name=name, has_dev=dev_clips is not None, progress=progress)
    signature = base_signature(model)
    run = _Run(model, processor, base_id, language, name, carrier, heard, clips, dev_clips, eval_clips, chosen, settings, args, signature)
    args.disable_tqdm = args.disable_tqdm or not run.speaks
    _say(run.speaks and progress, f"training data: {clips if num_clips is not None else clips.name + ', a stream'}")
    _say(run.speaks and progress and chosen.kind != "cold", f"start: {chosen.kind}. {chosen.reason}")
    return run


def _check_request(data: Data, dev_data: Any, start: str | Start, peft_config: PeftConfig | None, settings: TrainSettings) -> None:
    """What can be refused before anything is opened."""
    check_logger(settings.log_to)
    if settings.patience is not None and dev_data is None:
        raise ValueError(f"patience={settings.patience} stops by the dev set, and there is none. Pass dev_data, or leave patience out.")
    if isinstance(data, (ClipStream, StreamMixture)):
        num_steps(None, settings)
        if settings.cache_encoder_states:
            raise ValueError("cache_encoder_states needs clips that are read more than once, and a stream is not. Use load_clips.")
    if isinstance(start, str) and start not in KINDS:
        raise ValueError(f"The start must be one of {', '.join(KINDS)}, got {start!r}.")
    if isinstance(start, Start) and peft_config is not None:
        raise ValueError("The start brings its configuration. Leave peft_config out, or pass it to choose_start.")
    if peft_config is not None and peft_config.task_type is not None:
        raise ValueError(
            f"task_type is {peft_config.task_type!r}; leave it out: PEFT has none for Whisper (SEQ_2_SEQ_LM looks for input_ids)."
        )


def _adapter_name(name: str | None, language: str, domain: str | None) -> str:
    if name is None:
        name = language if domain is None else f"{language}-{domain}"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name == BASE:
        raise ValueError(f"{name!r} cannot be an adapter's name. Use letters, digits, '-', '_' and '.'; {BASE!r} means the base alone.")
    return name


def _checkpoint_folder(out: Path, resume: bool) -> tuple[Path, Path | None]:
    """Where the run saves itself, and the last checkpoint there: gone on from, or refused, never mixed with new ones."""
    checkpoints = out / "checkpoints"
    last = last_checkpoint(checkpoints)
    if last is not None and not resume:
        raise ValueError(
            f"{checkpoints} holds an unfinished run ({last.name}). Go on with resume=True, or delete that folder to start anew."
        )
    return checkpoints, last


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


# ---- clips -------------------------------------------------------------------------------------------------------------------


def _open_clips(data: Data, split: str, language: str) -> Any:
    if isinstance(data, (Clips, ClipStream, StreamMixture)):
        return data
    return load_clips(data, split=split, language=language)  # a single file has no splits and is taken whole


def _decoded(clips: Any, argument: str) -> Clips:
    if not isinstance(clips, Clips):
        raise ValueError(f"{argument} is a stream, and what is measured on has to stay the same. Use load_clips(..., limit=500).")
    return clips


def _fitting(clips: Any, processor: WhisperProcessor, max_tokens: int, prompt_language: str) -> Any:
    """The clips that the model can take in."""
    if not isinstance(clips, Clips):
        return clips.fitting(processor, max_tokens, prompt_language)
    clips = fit_for_training(clips, processor, max_tokens, prompt_language)
    if not len(clips):
        raise ValueError(f"No clip is left to train on; {clips}.")
    return clips


def _some(clips: Any, seed: int, number: int = NUM_HEARD) -> Clips:
    """Clips to listen to, drawn by the seed; of a stream the first ones."""
    if isinstance(clips, Clips):
        generator = torch.Generator().manual_seed(seed)
        return Clips([clips.clips[row] for row in torch.randperm(len(clips), generator=generator)[:number].tolist()], clips.name)
    clips = clips.fresh()  # what is read here is read again in training, and counted there
    first = [
        Clip((item["audio"] * 32768).clip(-32768, 32767).astype(np.int16), item["text"], item["language"], item["speaker"])
        for item in islice(clips.read_pass(0), number)
    ]
    if not first:
        raise ValueError(f"No clip is left to train on; {clips.name}: {clips.report}.")
    return Clips(first, clips.name)


def _choose_carrier(
    model: Any, processor: WhisperProcessor, clips: Any, language: str, carrier: str | None, settings: TrainSettings
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
    shares = _heard_in(model, processor, _some(clips, settings.seed), settings.eval_batch_size).top(5)
    best = next(iter(shares))
    return best, {"carrier_chosen": "heard in the training clips: " + ", ".join(f"{code} {share:.0%}" for code, share in shares.items())}


def _heard_in(model: Any, processor: WhisperProcessor, clips: Clips, batch_size: int) -> LanguagePosterior:
    """The base's language posterior averaged over some clips."""
    posteriors: list[LanguagePosterior] = []
    for start in range(0, len(clips), batch_size):
        waves = [clips[row]["audio"] for row in range(start, min(start + batch_size, len(clips)))]
        posteriors += language_posterior(model, extract_features(processor, waves))
    return LanguagePosterior.mean(posteriors, [1.0] * len(posteriors))


def _choose_start(
    start: str | Start,
    sources: Sequence[LanguageAdapter | str | Path],
    peft_config: PeftConfig | None,
    pool: str | Path | None,
    model: Any,
    processor: WhisperProcessor,
    clips: Any,
    language: str,
    settings: TrainSettings,
) -> Start:
    """The start, checked against the base; what the clips sound like is listened to only where it matters."""
    if isinstance(start, Start):
        return start
    if start == "cold":
        if sources:
            raise ValueError(
                f"A cold start begins from nothing, and {len(sources)} sources were given. Name the start: warm, stacked, moe or auto."
            )
        return choose_start("cold", config=peft_config, model=model, pool=pool)
    similarity = None
    if sources:
        similarity = language_similarity(
            model, processor, _some(clips, settings.seed), language=language, batch_size=settings.eval_batch_size, seed=settings.seed
        )
    hours = clips.hours if isinstance(clips, Clips) else None
    return choose_start(start, sources, similarity, hours, peft_config, model=model, pool=pool)


# ---- the adapter on its base -------------------------------------------------------------------------------------------------


@contextmanager
def _adapter_on(run: _Run, parameter_groups: ParameterGroups | None) -> Iterator[tuple[PeftModel, list[dict[str, Any]]]]:
    """The base with the adapter, where it is trained, and the groups its parameters are in: asked for now, so that a refusal comes before
    anything is measured. Afterwards the base is as it was: weights, flags, mode and place."""
    model, trained_of_base = run.model, []
    required = {name: weight.requires_grad for name, weight in model.named_parameters()}
    was_training, use_cache, device = model.training, model.config.use_cache, model.device
    recomputes = {module: module.gradient_checkpointing for module in model.modules() if hasattr(module, "gradient_checkpointing")}
    adapted = None
    try:
        model.to(run.args.device)
        set_seed(run.settings.seed)  # the same first weights, whatever was drawn while the start was chosen
        own = list(model.parameters())
        adapted = run.start.attach(model)
        trained_of_base = [(weight, weight.detach().clone()) for weight in own if weight.requires_grad]  # biases, if they are to be trained
        if run.settings.cache_encoder_states:
            check_leaves_encoder_alone(adapted)
        yield adapted, [] if parameter_groups is None else parameter_groups(adapted, run.settings.learning_rate)
    finally:
        if adapted is not None:
            adapted.unload()
        for weight, before in trained_of_base:
            weight.data.copy_(before)
        for module, flag in recomputes.items():
            module.gradient_checkpointing = flag
        model.to(device)
        for name, weight in model.named_parameters():
            weight.requires_grad_(required[name])
            weight.grad = None
        model.train(was_training)
        model.config.use_cache = use_cache


def _num_trained(adapted: PeftModel) -> int:
    return sum(weight.numel() for weight in adapted.parameters() if weight.requires_grad)


def _view_and_collator(
    run: _Run, adapted: PeftModel, clips: Any, folder: Path, progress: bool, part: tuple[int, int] | None = None
) -> tuple[Any, Any]:
    """The clips as they are trained on: sound that is encoded in every step, or what the encoder has said to it once."""
    if not run.settings.cache_encoder_states:
        return training_view(clips), training_collator(run.processor, run.prompt_language, run.settings)
    options: dict[str, Any] = {"precision": run.settings.precision, "batch_size": run.settings.eval_batch_size}
    options |= {"storage": run.settings.storage, "crop": run.settings.crop_states}
    part = in_processes() if part is None else part
    states = cache_encoder_states(adapted, run.processor, clips, folder, part=part, progress=progress, **options)
    gathered(None)  # each process has computed its part
    return StatesView(clips, states), StatesCollator(run.processor, run.prompt_language)


def _described(run: _Run, groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a run must have in common with the one it goes on from: all that its weights, and which of them are kept, hang on."""
    settings = {name: value for name, value in asdict(run.settings).items() if name not in _MAY_CHANGE}
    if run.num_clips is None:
        settings["num_workers"] = run.settings.num_workers  # each reads a part of a stream of its own
    own = ("base_model_name_or_path", "peft_version", "experts", "prior", "pool")  # names of this machine, or said by the sources' hashes
    start = run.start.record()
    said: dict[str, Any] = {
        "base": run.signature,
        "language": run.language,
        "prompt": run.prompt_language,
        "settings": settings,
        "clips": run.clips.digest(),
        "dev": None if run.dev_clips is None else run.dev_clips.digest(),
        "test": None if run.eval_clips is None else run.eval_clips.digest(),
        "start": {"kind": run.start.kind, "sources": [source["sha256"] for source in start["sources"]], "pool": start.get("pool_sha256")},
        "method": {name: value for name, value in run.start.config().to_dict().items() if name not in own},
        "groups": [group | {"params": sum(weight.numel() for weight in group["params"])} for group in groups],
        "processes": in_processes()[1],
    }
    described: dict[str, Any] = plain(said)
    return described


def _claim(run: _Run, groups: Sequence[dict[str, Any]], checkpoints: Path, last: Path | None) -> None:
    """Write down which run the checkpoints will be of; or find that those there are this run's.

    Raises:
        ValueError: They are another's.
    """
    described, problem = _described(run, groups), None
    if len(set(gathered(None if last is None else last.name))) > 1:
        raise ValueError(f"Not all processes see the same in {checkpoints}. Use a folder that all of them share.")
    if last is None:
        if run.speaks:
            checkpoints.mkdir(parents=True, exist_ok=True)
            write_text(checkpoints / RUN_FILE, json.dumps(described, indent=2))
        return
    try:
        check_same_run(json.loads((checkpoints / RUN_FILE).read_text("utf-8")), described, checkpoints)
    except OSError as error:
        problem = f"Nothing says which run {last} is of ({error}). Delete {checkpoints} to start anew."
    except ValueError as error:
        problem = str(error)
    # All processes end together, whichever of them has found something.
    if problems := [each for each in gathered(problem) if each is not None]:
        raise ValueError(problems[0])


def _measured_before(run: _Run, adapted: PeftModel, checkpoints: Path, resume: bool, progress: bool) -> Scores | None:
    """The base's error rates; a resumed run has them from the first time."""
    if not resume and run.speaks:
        (checkpoints / BEFORE_FILE).unlink(missing_ok=True)
    if run.eval_clips is None:
        return None
    known = _read_before(checkpoints / BEFORE_FILE, run) if resume else None
    if known is None:
        with adapters_off(adapted):
            known = run.measure(adapted, run.eval_clips, progress)
        if run.speaks:
            checkpoints.mkdir(parents=True, exist_ok=True)
            write_text(checkpoints / BEFORE_FILE, json.dumps(_measured_on(run) | {"base": run.signature, "scores": known.to_dict()}))
    _say(run.speaks and progress, f"before: {known}")
    return known


def _measured_on(run: _Run) -> dict[str, Any]:
    assert run.eval_clips is not None
    clips = {"clips": run.eval_clips.digest(), "language": run.language, "prompt": run.prompt_language}
    return clips | {"normalizer": run.settings.normalizer, "precision": _precision(run)}


def _precision(run: _Run) -> str:
    """Of the arithmetic."""
    return "bf16" if run.args.bf16 else str(run.model.dtype).removeprefix("torch.")


def _read_before(path: Path, run: _Run) -> Scores | None:
    found: Any = None
    try:
        found = json.loads(path.read_text("utf-8"))
        scores = Scores(**found.pop("scores"))
        check_signature(found.pop("base"), run.signature)
    except (OSError, ValueError, KeyError, TypeError):  # among them WrongBaseError
        scores = None
    # What one process can read, another may not (folders are not always shared), and all must do the same.
    return scores if all(gathered(scores is not None and found == _measured_on(run))) else None


def _save(run: _Run, adapted: PeftModel, out: Path, checkpoints: Path) -> None:
    try:
        save_adapter(lambda folder: run.start.finish(adapted, folder, run.base_id), out, checkpoints / "finished")
    except Exception as error:
        if not is_write_fault(error):
            raise
        raise OSError(
            f"The trained adapter could not be written to {out}: {error}. What was there before is untouched, and the checkpoints are in "
            f"{checkpoints}. Make room on that disk, then run the same command with --resume (resume=True): nothing is trained again."
        ) from error


# ---- the plan ----------------------------------------------------------------------------------------------------------------


def _plan(run: _Run, adapted: PeftModel, out: Path, step_s: float, clip_s: float) -> TrainingPlan:
    settings, steps = run.settings, run.args.max_steps
    config = adapted.peft_config["default"]
    measured = (len(run.dev_clips) if run.dev_clips else 0) * settings.num_checkpoints + 2 * (len(run.eval_clips) if run.eval_clips else 0)
    return TrainingPlan(
        name=run.name,
        language=run.language,
        carrier=run.carrier,
        carrier_reason=run.heard.get("carrier_chosen"),
        base=run.base_id,
        out=str(out),
        clips=str(run.clips) if run.num_clips is not None else f"{run.clips.name}: a stream, {run.clips.report}",
        num_clips=run.num_clips,
        hours=round(run.clips.hours, 3) if run.num_clips is not None else None,
        dev=None if run.dev_clips is None else str(run.dev_clips),
        test=None if run.eval_clips is None else str(run.eval_clips),
        method=str(getattr(config.peft_type, "value", config.peft_type)),
        start=run.start.kind,
        start_reason=run.start.reason,
        num_parameters=_num_trained(adapted),
        num_base_parameters=sum(weight.numel() for weight in adapted.parameters()) - _num_trained(adapted),
        steps=steps,
        epochs=None if run.num_clips is None else round(steps * _clips_a_step(run) / run.num_clips, 1),
        clips_per_step=_clips_a_step(run),
        processes=in_processes()[1],
        device=str(run.args.device),
        precision=_precision(run),
        seconds_per_step=step_s,
        training_minutes=steps * step_s / 60,
        measuring_minutes=measured * clip_s / 60 / in_processes()[1],
        settings=asdict(settings),
    )


def _clips_a_step(run: _Run) -> int:
    return run.settings.batch_size * run.settings.gradient_accumulation * in_processes()[1]


def _first_batch(run: _Run) -> Clips:
    """The clips of the first batch; of a stream, some of its clips."""
    if not isinstance(run.clips, Clips):
        return _some(run.clips, run.settings.seed, run.settings.batch_size)
    order = EpochOrder([clip.duration_s for clip in run.clips.clips], run.settings.batch_size, run.settings.seed)
    return Clips([run.clips.clips[index] for _, index in islice(order, run.settings.batch_size)], run.clips.name)


def _seconds_a_batch(run: _Run, trainer: AdapterTrainer, size: int) -> float:
    """Of forward and backward, as the loop does them; cropped batches count by their share."""
    if run.settings.gradient_checkpointing:
        run.model.gradient_checkpointing_enable({"use_reentrant": False})
    share, collate = run.settings.crop_share, trainer.data_collator
    items = [trainer.train_dataset[0, index] for index in range(size)]
    kinds = [(1.0, collate)] if not share else [(share, replace(collate, crop_share=1.0)), (1 - share, replace(collate, crop_share=0.0))]
    return sum(part * _seconds_a_step(run, trainer, collator(items)) for part, collator in kinds if part)


def _seconds_a_step(run: _Run, trainer: AdapterTrainer, batch: dict[str, torch.Tensor]) -> float:
    """Of the second of two: the first one also warms up."""
    device, seconds = trainer.args.device.type, 0.0
    for _ in range(2):
        started = time.perf_counter()
        with autocast(device, run.settings.precision):
            trainer.training_step(trainer.model, dict(batch))
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    return seconds


def _seconds_a_clip(run: _Run, adapted: PeftModel) -> float:
    """Of writing down a test clip."""
    measured = run.eval_clips or run.dev_clips
    if measured is None:
        return 0.0
    few = Clips(measured.clips[: run.settings.eval_batch_size], measured.name)
    started = time.perf_counter()
    run.measure(adapted, few)
    return (time.perf_counter() - started) / len(few)


# ---- small parts -------------------------------------------------------------------------------------------------------------


def _metrics(clips: Clips | None, normalizer: str, before: Scores | None, after: Scores | None) -> dict[str, Any]:
    if clips is None or before is None or after is None:
        return {}
    rows = {when: {"wer": s.wer, "cer": s.cer, "clips": s.num_clips} for when, s in (("before", before), ("after", after))}
    return {"test_set": clips.name, "normalizer": normalizer, **rows}


def _said(notes: CardNotes) -> dict[str, str]:
    said = {"license": notes.license, "command": notes.command, "limits": notes.limits}
    return {key: text for key, text in said.items() if text is not None}


def _say(speaks: bool, line: str) -> None:
    if speaks:
        print(line, flush=True)
