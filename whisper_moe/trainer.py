"""The loop: Transformers' `Seq2SeqTrainer` with our order of clips, our loss over cropped windows, and error rates as its evaluation.

Trains whatever is trainable in a `PeftModel` over Whisper, in one process or in several started by `accelerate launch`. Knows nothing
of languages' adapters, cards or starts; `train.train_language_adapter` is the way in.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed
from torch.nn import functional
from torch.utils.data import DataLoader, IterableDataset
from transformers import PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from whisper_moe.cropped_encoder import encode_cropped
from whisper_moe.data import IGNORED, Clips, ClipStream, Collator, EndlessStream, EpochOrder, StreamMixture, TrainingView
from whisper_moe.evaluate import Scores, autocast, score, transcribe_clips, uses_bf16
from whisper_moe.train_record import sync_folder, write_text
from whisper_moe.train_settings import TrainSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import WhisperProcessor

MARKER = "whole.json"  # in a checkpoint that was written to its end, with the size of each of its files

ParameterGroups = Callable[["PeftModel", float], list[dict[str, Any]]]
"""`(model, learning rate) -> parameter groups` of the optimizer."""


# ---- several processes -------------------------------------------------------------------------------------------------


def in_processes() -> tuple[int, int]:
    """(which process this is, how many train together)"""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def gathered(mine: Any) -> list[Any]:
    """What each process has, in their order."""
    _, num_processes = in_processes()
    if num_processes == 1:
        return [mine]
    everybody: list[Any] = [None] * num_processes
    distributed.all_gather_object(everybody, mine)
    return everybody


@dataclass(frozen=True)
class Measure:
    """Error rates of whatever model is given, on one set; several processes share the work and all know the outcome."""

    processor: WhisperProcessor
    prompt_language: str
    language: str
    settings: TrainSettings

    def __call__(self, model: Any, clips: Clips, progress: bool = False) -> Scores:
        process, num_processes = in_processes()
        mine = clips if num_processes == 1 else Clips(clips.clips[process::num_processes], clips.name)
        hypotheses = [""] * len(clips)
        for at, texts in enumerate(gathered(self._transcribe(model, mine, progress and process == 0))):
            hypotheses[at::num_processes] = texts
        return score(clips.texts, hypotheses, self.settings.normalizer, language=self.language)

    def _transcribe(self, model: Any, clips: Clips, progress: bool) -> list[str]:
        if not len(clips):
            return []
        return transcribe_clips(
            model,
            self.processor,
            clips,
            prompt_language=self.prompt_language,
            batch_size=self.settings.eval_batch_size,
            precision=self.settings.precision,
            progress=progress,
        )


# ---- when to stop ------------------------------------------------------------------------------------------------------


class EarlyStop(TrainerCallback):
    """Stops when the dev set has not become better for a while. Reads the log, so a resumed run decides as the undisturbed one."""

    def __init__(self, metric: str, patience: int) -> None:
        self.metric, self.patience = f"eval_{metric}", patience
        self.reason: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._decide(state, control)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._decide(state, control)

    def _decide(self, state: Any, control: Any) -> None:
        rates = [entry[self.metric] for entry in state.log_history if self.metric in entry]
        if rates and len(rates) - 1 - rates.index(min(rates)) >= self.patience:
            control.should_training_stop = True
            said = f"{self.metric.removeprefix('eval_').upper()} on the dev set was no better in {self.patience} measurements"
            self.reason = f"early, at step {state.global_step} of {state.max_steps}: {said}"


class InterruptStop(TrainerCallback):
    """Ctrl-C ends the run after the step under way, with a checkpoint; a second one ends it at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.asked = False
        self.reason: str | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # All processes have to leave the loop at the same step, and the signal does not reach them at the same time.
        if any(gathered(self.asked)) and state.global_step < state.max_steps:
            control.should_training_stop = control.should_save = True
            self.reason = f"by Ctrl-C, at step {state.global_step} of {state.max_steps}"

    def _hear(self, *_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        self.say("stopping after this step; Ctrl-C again stops at once")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this is open, Ctrl-C is heard here. Only the main thread can listen; elsewhere nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._hear)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _start_worker(then: Callable[[int], None] | None, worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; which of them has to do something about it is the main one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if then is not None:
        then(worker)


# ---- the loop ----------------------------------------------------------------------------------------------------------


class AdapterTrainer(Seq2SeqTrainer):
    """Transformers' loop over our clips.

    Args:
        adapted: what is trained; only what requires a gradient.
        clips: to train on: decoded, or a stream of which `args.max_steps` says how much is read.
        view: the items of the clips, see `training_view`; of clips in memory by `(epoch, index)`.
        collator: items -> `{"input_features" | "encoder_states", "labels"}`.
        dev_clips: what the checkpoints are measured on; None: the last one counts.
        measure: how.
        optimizer_parameter_groups, extra_loss, callbacks: for PEFT methods that need more than gradients.
    """

    optimizer: Any  # set by the Trainer, which the type checker does not see
    control: Any

    def __init__(
        self,
        adapted: PeftModel,
        clips: Any,
        view: Any,
        collator: Any,
        dev_clips: Clips | None,
        measure: Measure,
        args: Seq2SeqTrainingArguments,
        *,
        callbacks: Sequence[TrainerCallback] = (),
        optimizer_parameter_groups: ParameterGroups | None = None,
        extra_loss: Callable[[PeftModel], torch.Tensor] | None = None,
        progress: bool = True,
    ) -> None:
        self.clips, self.dev_clips, self.measure, self.settings = clips, dev_clips, measure, measure.settings
        self.optimizer_parameter_groups, self.extra_loss = optimizer_parameter_groups, extra_loss
        self.order: EpochOrder | None = None
        self.interrupt = InterruptStop(lambda line: print(line, flush=True) if progress else None)
        self.early = None if self.settings.patience is None else EarlyStop(self.settings.best_metric, self.settings.patience)
        stops = [self.interrupt] if self.early is None else [self.early, self.interrupt]
        super().__init__(
            model=adapted,
            args=args,
            train_dataset=view,
            eval_dataset=dev_clips,
            data_collator=collator,
            callbacks=[*callbacks, *stops],
        )
        if not progress:
            self.remove_callback(PrinterCallback)
        # `compute_loss` is told how many tokens the whole step has, and the Trainer divides its answer by nothing.
        self.model_accepts_loss_kwargs, self.loss_is_scaled_for_ga = True, True

    @property
    def stopped(self) -> str | None:
        """Why the run ended before its last step; None if it did not."""
        return self.interrupt.reason or (None if self.early is None else self.early.reason)

    def run(self, resume_from: Path | None) -> None:
        """Train, from the beginning or a checkpoint.

        Raises:
            OSError: A checkpoint could not be written. The one before is whole.
            ValueError: The stream had nothing to train on.
        """
        with self.interrupt.listening():
            self.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
        if self.state.global_step == 0:
            raise ValueError(f"No clip was left to train on; {self.clips.name}: {self.clips.report}.")

    # -- data

    def _get_train_sampler(self, train_dataset: Any = None) -> EpochOrder:
        lengths = [clip.duration_s for clip in self.clips.clips]
        self.order = EpochOrder(lengths, self.settings.batch_size, self.settings.seed)
        return self.order

    def get_train_dataloader(self) -> DataLoader:
        if isinstance(self.train_dataset, IterableDataset):
            # Not prepared by accelerate, which would have each process decode everything and throw most of it away.
            self.clips.share_of(*in_processes())
            workers = self.args.dataloader_num_workers
            return DataLoader(
                self.train_dataset,
                self.settings.batch_size,
                collate_fn=self.data_collator,
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=self.args.dataloader_pin_memory,
                worker_init_fn=partial(_start_worker, None),
            )
        loader = super().get_train_dataloader()
        inner = getattr(loader, "base_dataloader", loader)
        inner.worker_init_fn = partial(_start_worker, inner.worker_init_fn)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # A run that was killed after its last step, or after it had decided to stop, has nothing left to train.
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return None
        if self.order is not None:  # behind the samplers of several processes, the Trainer does not find it when it resumes
            self.order.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    # -- one step

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.optimizer_parameter_groups is not None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = optimizer_class(self.optimizer_parameter_groups(self.model, self.args.learning_rate), **options)
        return super().create_optimizer(model)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """Label tokens of a step: of all its batches, in all processes."""
        mine = torch.zeros((), dtype=torch.int64) + sum((batch["labels"] != IGNORED).sum() for batch in batch_samples)
        total: torch.Tensor = self.accelerator.gather(mine.to(device)).sum()
        return total

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> Any:
        """A batch's part of the mean over all tokens of the step: its own sum, divided by the tokens of all."""
        config, labels = self.model.config, inputs["labels"]
        decoder_inputs = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)
        outputs = model(**self._heard(inputs), decoder_input_ids=decoder_inputs, use_cache=False)
        loss = functional.cross_entropy(
            outputs.logits.float().flatten(0, 1),  # (batch * tokens, vocabulary)
            labels.flatten(),
            ignore_index=IGNORED,
            label_smoothing=self.settings.label_smoothing,
            reduction="sum",
        )
        if num_items_in_batch is None:  # a batch by itself
            loss, parts = loss / (labels != IGNORED).sum(), 1
        else:
            # Gradients are averaged over processes afterwards, and their sum is what is wanted.
            loss, parts = loss * in_processes()[1] / num_items_in_batch, self.current_gradient_accumulation_steps
        if self.extra_loss is not None:
            loss = loss + self.extra_loss(self.model) / parts
        return (loss, outputs) if return_outputs else loss

    def _heard(self, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        """What the decoder listens to: features to encode, features shorter than the window, or states encoded before."""
        if "encoder_states" in inputs:  # (batch, positions, d_model)
            return {"encoder_outputs": (inputs["encoder_states"].to(self.model.dtype),)}
        features = inputs["input_features"].to(self.model.dtype)  # (batch, n_mels, frames)
        if features.shape[-1] == self.measure.processor.feature_extractor.nb_max_frames:
            return {"input_features": features}
        with autocast(features.device.type, self.settings.precision):
            return {"encoder_outputs": (encode_cropped(self.model, features),)}

    # -- measuring and saving

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        assert self.dev_clips is not None, "the Trainer evaluates only when there is a dev set"
        scores = self.measure(self.model, self.dev_clips)
        metrics = {f"{metric_key_prefix}_wer": scores.wer, f"{metric_key_prefix}_cer": scores.cer}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint's weights: the adapter alone. Without save_embedding_layers=False, PEFT asks the Hub about the vocabulary."""
        self.model.save_pretrained(output_dir, state_dict=state_dict, save_embedding_layers=False, is_main_process=self.args.should_save)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            if self.args.should_save:
                (folder / MARKER).unlink(missing_ok=True)  # of a folder that is written a second time
            super()._save_checkpoint(*args, **kwargs)
            gathered(None)  # each process has written its part
            if self.args.should_save:
                _mark_whole(folder)
        except Exception as error:
            if not is_write_fault(error):
                raise
            shutil.rmtree(folder, ignore_errors=True)  # half a checkpoint is none, and takes the room that is missing
            last = last_checkpoint(folder.parent)
            kept = "No earlier checkpoint is whole" if last is None else f"The checkpoint of step {_step_of(last)} is whole"
            raise OSError(
                f"The checkpoint of step {self.state.global_step} could not be written to {folder.parent}: {error}. {kept}. "
                "Make room on that disk, then run the same command with --resume (resume=True)."
            ) from error

    def summary(self) -> dict[str, Any]:
        """What the run was, in plain values for `language_adapter.json`. Of several processes each must ask."""
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        facts = _amount(self.clips) | {"steps": self.state.global_step}
        facts |= {"last_loss": round(losses[-1], 4) if losses else None}
        if self.dev_clips is not None:
            facts |= {"kept_step": self.state.best_global_step, f"dev_{self.settings.best_metric}": self.state.best_metric}
        if self.stopped is not None:
            facts["stopped"] = self.stopped
        if in_processes()[1] > 1:
            facts["processes"] = in_processes()[1]
        recorded = asdict(self.settings)
        for name in ("num_workers", "eval_batch_size", "num_checkpoints", "normalizer", "max_steps", "log_to", "gradient_checkpointing"):
            recorded.pop(name)
        recorded["num_epochs"] = round(self.state.epoch or 0.0, 2)
        if not self.settings.cache_encoder_states:
            recorded = {name: value for name, value in recorded.items() if name not in ("storage", "crop_states")}
        if isinstance(self.clips, (ClipStream, StreamMixture)):
            recorded.pop("num_epochs")  # of a stream nobody has counted
        return facts | {name: value for name, value in recorded.items() if value is not None}


# ---- checkpoints -------------------------------------------------------------------------------------------------------


def last_checkpoint(checkpoints: Path) -> Path | None:
    """The latest checkpoint of which every file is there in its full size."""
    return next((folder for folder in sorted(checkpoints.glob("checkpoint-*"), key=_step_of, reverse=True) if _is_whole(folder)), None)


def _step_of(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def _mark_whole(folder: Path) -> None:
    """Say so in the folder, once all that is in it has reached the disk."""
    sync_folder(folder)
    write_text(folder / MARKER, json.dumps(_sizes(folder)))


def _is_whole(folder: Path) -> bool:
    try:
        expected = json.loads((folder / MARKER).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return bool(expected == _sizes(folder))


def _sizes(folder: Path) -> dict[str, int]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (MARKER, f"{MARKER}.new"))
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


# ---- what the loop reads -----------------------------------------------------------------------------------------------


def training_view(clips: Any) -> Any:
    """What the loop reads: clips by epoch and index, or a stream without an end."""
    return EndlessStream(clips) if isinstance(clips, (ClipStream, StreamMixture)) else TrainingView(clips)


def training_collator(processor: WhisperProcessor, prompt_language: str, settings: TrainSettings) -> Collator:
    """Clips to batches as the settings ask for."""
    return Collator(processor, prompt_language, settings.augment, settings.crop_share, settings.seed)


def _amount(clips: Any) -> dict[str, Any]:
    """How much was trained on, and what was left out."""
    if isinstance(clips, (ClipStream, StreamMixture)):
        left_out = sum(gathered(clips.report.left_out), Counter[str]())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in left_out.most_common())
        return {"clips_read": sum(gathered(clips.num_read)), "left_out": reasons or "none"}
    return {"clips": len(clips), "hours": round(clips.hours, 2), "left_out": clips.report.reasons or "none"}


def is_write_fault(error: BaseException) -> bool:
    """Whether a file could not be written: a full disk, a quota. PyTorch and safetensors have errors of their own for it."""
    said = str(error).lower()
    return (
        isinstance(error, OSError)
        or (type(error).__name__ == "SafetensorError" and "error" in said)
        or (isinstance(error, RuntimeError) and any(words in said for words in ("file write failed", "inline_container", "failed writing")))
    )


# ---- arguments of the Trainer ------------------------------------------------------------------------------------------


def steps_per_epoch(num_clips: int, settings: TrainSettings, num_processes: int = 1) -> int:
    """Optimizer steps of one pass over the clips."""
    batches = math.ceil(math.ceil(num_clips / settings.batch_size) / num_processes)
    return math.ceil(batches / settings.gradient_accumulation)


def num_steps(num_clips: int | None, settings: TrainSettings, num_processes: int = 1) -> int:
    """Optimizer steps of a run; `num_clips` is None for a stream.

    Raises:
        ValueError: A stream, and no `max_steps`.
    """
    if settings.max_steps is not None:
        return settings.max_steps
    if num_clips is None:
        raise ValueError("The length of a stream is not known, so passes over it cannot be counted. Say how far to go: max_steps=1000.")
    return math.ceil(steps_per_epoch(num_clips, settings, num_processes) * settings.num_epochs)


def training_arguments(
    settings: TrainSettings,
    checkpoints: Path,
    num_clips: int | None,
    *,
    name: str = "adapter",
    has_dev: bool = False,
    progress: bool = True,
) -> Seq2SeqTrainingArguments:
    """The Trainer's own settings. Making them joins the other processes, where `accelerate launch` has started some."""
    on_gpu = torch.cuda.is_available()
    args = Seq2SeqTrainingArguments(
        output_dir=str(checkpoints),
        max_steps=1,  # set below, when the number of processes is known
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        bf16=uses_bf16("cuda" if on_gpu else "cpu", settings.precision),
        use_cpu=not on_gpu,
        ddp_backend="gloo" if not on_gpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        ddp_find_unused_parameters=True,  # what stands before a frozen or a cached part gets no gradient
        save_total_limit=2,
        seed=settings.seed,
        dataloader_num_workers=settings.num_workers,
        dataloader_persistent_workers=settings.num_workers > 0,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=settings.log_to if settings.log_to in ("trackio", "wandb") else "none",
        run_name=name,
        disable_tqdm=not progress,
        load_best_model_at_end=has_dev,
        metric_for_best_model=settings.best_metric,
        greater_is_better=False,
        eval_strategy="steps" if has_dev else "no",
        eval_steps=1,
        save_steps=1,
        **_checkpointing(settings),
    )
    num_processes = args.world_size
    if num_processes == 1 and args.n_gpu > 1:
        args._n_gpu = 1  # DataParallel, which the Trainer falls back to, is slower than one GPU here; `accelerate launch` uses them all
    steps = num_steps(num_clips, settings, num_processes)
    every = max(1, math.ceil(steps / settings.num_checkpoints))
    args.max_steps, args.warmup_steps = steps, math.ceil(settings.warmup_share * steps)
    args.save_steps = args.eval_steps = every
    args.logging_steps = max(1, every // 2)
    return args


def _checkpointing(settings: TrainSettings) -> dict[str, Any]:
    """Recomputed activations, under the name that this version of Transformers has for them. Reentrant ones fail on Whisper."""
    if not settings.gradient_checkpointing:
        return {}
    known = {each.name for each in fields(Seq2SeqTrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def logging_callbacks(settings: TrainSettings, folder: Path) -> list[TrainerCallback]:
    """TensorBoard writes into `folder`; the Trainer would put it among the checkpoints, which are deleted when the run is complete."""
    if settings.log_to != "tensorboard":
        return []
    from transformers.integrations import TensorBoardCallback

    board = TensorBoardCallback()
    board.logging_dir = str(folder)
    return [board]
