"""The one place that runs the model: what many callers want of it, put together into batches. Windows and adapters in, tokens out.

    engine.hear(features)       what the base model hears in some windows: its encoder states and the language posterior
    engine.write(rows)          what is said in some windows, each written by its own adapter

Both may be called from any number of threads. There is no thread of the engine's own: who comes while the model is idle runs the oldest
job, together with every waiting job that fits into the same batch with it, until the own one is done. So a single caller never waits, and
the more callers there are, the fuller the batches. A batch that fails is run again job by job, and only the job at fault fails.

Adapters lie side by side in a `LanguageTable`, so that rows of one batch may have different ones. Those that no table can hold (DoRA, say)
are put on the model by an `AdapterSwitch`, one at a time, and share a batch with nobody else. Knows no recordings and no decisions.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import Context, copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from whisper_moe.base_signature import base_signature
from whisper_moe.languages import LanguagePosterior, adapters_off, language_posterior, language_tokens
from whisper_moe.registry import AdapterSwitch, LanguageAdapter, LoadAdapter, check_fit, check_folder, files_key

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutput

    from whisper_moe.language_table import LanguageTable

NO_SPEECH = 0.6  # above this probability of the no-speech token a window counts as noise; Whisper's own figure
MAX_ROWS = 32  # of a batch; whisper-large takes a quarter of a gigabyte for each in half precision
_TIMES_PASSED = 4  # how often others may go first because they fill a batch better
_POSITIONS_AT_ONCE = 1024  # of the encoder, on a CPU: the states in its layers stay in the caches


class CheckAdapter(Protocol):
    """Looks over the files of an adapter, and raises `ValueError`; says where the pool lies that the adapter needs, if it needs one."""

    def __call__(self, folder: Path, model: Any) -> Path | None: ...


class UnusableError(Exception):
    """An adapter cannot be put on the model; `error` says why."""

    def __init__(self, adapter: LanguageAdapter, error: ValueError) -> None:
        super().__init__(str(error))
        self.adapter, self.error = adapter, error


@dataclass(frozen=True)
class Heard:
    """One window as the base hears it.

    Args:
        states: (1, positions, d_model) the encoder's; None if nobody speaks there, or if they were not asked for.
        posterior: Its languages.
    """

    states: torch.Tensor | None
    posterior: LanguagePosterior


@dataclass(frozen=True)
class Row:
    """One window that is to be written.

    Args:
        features: (n_mels, frames), on any device.
        language: Of the token in the prompt.
        limit: The most tokens.
        states: The base's encoder states of the window, (1, positions, d_model), if they are known.
        drop_noise: Whether to write nothing if the base hears nobody speak.
    """

    features: torch.Tensor
    language: str
    limit: int
    states: torch.Tensor | None = None
    drop_noise: bool = False


@dataclass(frozen=True)
class Written:
    """What was written for a row.

    Args:
        tokens: Those after the prompt; None if it was dropped as noise.
        log_probability: The sum over them and the end, if it was asked for.
        num_scored: How many that are.
    """

    tokens: list[int] | None
    log_probability: float = 0.0
    num_scored: int = 0


# ---- jobs --------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class _Job:
    """What one caller waits for.

    Args:
        numbers: Of its windows among those that the caller gave.
    """

    numbers: Sequence[int]
    times_passed: int = 0
    context: Context = field(default_factory=copy_context)  # of the caller: who fetches experts, for instance
    error: BaseException | None = None
    is_done: bool = False

    @property
    def size(self) -> int:
        return len(self.numbers)

    def halves(self) -> list[Any]:
        """The same job in two parts."""
        middle = self.size // 2
        return [self.part(slice(None, middle)), self.part(slice(middle, None))]

    def part(self, own: slice) -> Any:
        """The job for some of its windows."""
        raise AssertionError("of a job of one kind or the other")


@dataclass(eq=False)
class _Hear(_Job):
    features: Sequence[Any] = ()  # of each window, (n_mels, frames)
    allowed: Collection[str] | None = None
    num_kept: int = 0
    result: list[Heard] = field(default_factory=list)

    @property
    def key(self) -> object:
        return "hear", self.features[0].shape[-1]

    def part(self, own: slice) -> _Hear:
        return replace(self, numbers=self.numbers[own], features=self.features[own], result=[])


@dataclass(eq=False)
class _Write(_Job):
    rows: Sequence[Row] = ()
    adapter: LanguageAdapter | None = None
    num_beams: int = 1
    is_scored: bool = False
    alone: str | None = None  # files of an adapter that no table holds
    result: list[Written] = field(default_factory=list)

    @property
    def key(self) -> object:
        """Jobs with the same one may share a batch. With beams the limit decides what is found; greedily it only cuts."""
        limit = max(row.limit for row in self.rows) if self.num_beams > 1 else None
        return "write", self.rows[0].features.shape[-1], self.num_beams, self.is_scored, self.alone, limit

    def part(self, own: slice) -> _Write:
        return replace(self, numbers=self.numbers[own], rows=self.rows[own], result=[])


class Engine:
    """Runs a model for many callers.

    Args:
        model: The bare base model, in evaluation mode. It belongs to the engine: nobody else may run or change it.
        load: What puts an adapter on the model that no table can hold, as for `AdapterSwitch`.
        check: What looks an adapter over before it enters the table. Without it, and with a `load` of your own, no adapter does: `load`
            may be all that stands between a stranger's files and the model.
        max_rows: Of a batch. Halved when the device's memory is not enough.
        max_adapters: How many adapters the table holds; the one unused for longest goes first.
        graphs: Whether greedy decoding on CUDA replays recorded graphs.
    """

    def __init__(
        self,
        model: WhisperForConditionalGeneration,
        load: LoadAdapter | None = None,
        check: CheckAdapter | None = None,
        *,
        max_rows: int = MAX_ROWS,
        max_adapters: int = 64,
        graphs: bool = False,
    ) -> None:
        from whisper_moe.fast_decoding import GreedyDecoder

        if max_rows < 1 or max_adapters < 1:
            raise ValueError(f"max_rows and max_adapters are at least 1; got {max_rows} and {max_adapters}.")
        self.model, self.max_rows = model, max_rows
        self.num_batches = self.num_rows = 0  # run so far
        self.generate_options: dict[str, Any] = {}  # for the model's `generate`, every time
        self._adapters = _Adapters(model, load, check, max_adapters)
        self._greedy = GreedyDecoder(model, graphs=graphs)
        self._changed = threading.Condition()
        self._waiting: deque[_Hear | _Write] = deque()
        self._worker: int | None = None  # the thread that runs the model now
        self._num_reserving = 0  # who wants it for their own purposes

    # ---- for callers ---------------------------------------------------------------------------------------------------

    def hear(self, features: Sequence[torch.Tensor], *, allowed: Collection[str] | None = None, num_kept: int = 0) -> list[Heard]:
        """What the base model hears, with adapters off.

        Args:
            features: Of each window, (n_mels, frames). Fewer frames than a window has only for a model that was trained on such.
            allowed: Languages to choose among; None: all that the model has tokens for.
            num_kept: Of how many windows to keep the encoder's states: the first in which somebody speaks.
        """
        jobs: list[_Hear] = []
        for numbers in by_frames(features, self.max_rows):
            kept = min(num_kept - sum(job.num_kept for job in jobs), len(numbers))
            jobs.append(_Hear(numbers, features=[features[number] for number in numbers], allowed=allowed, num_kept=kept))
        return self._run(jobs)

    def write(self, rows: Sequence[Row], adapter: LanguageAdapter | None, *, num_beams: int = 1, is_scored: bool = False) -> list[Written]:
        """What is said in some windows.

        Args:
            rows: The windows.
            adapter: Who writes them; None: the base model.
            num_beams: Beams of the search; 1 is greedy.
            is_scored: Whether to say how likely the texts are: one more pass of the decoder.

        Raises:
            UnusableError: The adapter cannot be put on the model.
        """
        numbers = by_frames([row.features for row in rows], self.max_rows)
        options: dict[str, Any] = {"adapter": adapter, "num_beams": num_beams, "is_scored": is_scored}
        return self._run([_Write(n, rows=[rows[number] for number in n], **options) for n in numbers])

    def check(self, adapter: LanguageAdapter) -> None:
        """Put an adapter on the model, to know that it can be. Raises `UnusableError`."""
        with self.exclusive():
            if self._adapters.table_holds(adapter):
                return
            with self._adapters.enter(adapter):
                pass

    def unload(self) -> None:
        """Take everything off the model: it is the bare base again, until the next adapter is used."""
        with self.exclusive():
            self._adapters.unload()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """The model for one caller's own purposes, after the batch that is running. Inside, nothing may be asked of the engine."""
        try:
            with self._changed:
                self._check_free()
                self._num_reserving += 1
                try:
                    while self._worker is not None:
                        self._changed.wait()
                    self._worker = threading.get_ident()
                finally:
                    self._num_reserving -= 1
            yield
        finally:
            self._leave()

    @contextmanager
    def table(self, adapter: LanguageAdapter) -> Iterator[tuple[LanguageTable, str] | None]:
        """The table and the adapter's name in it, for one caller's own purposes; None if no table can hold it. Raises `UnusableError`."""
        with self.exclusive():
            yield (self._adapters.ready_table(), files_key(adapter)) if self._adapters.table_holds(adapter) else None

    # ---- who runs what, and when ---------------------------------------------------------------------------------------

    def _run(self, jobs: Sequence[Any]) -> list[Any]:
        """Have the jobs of one caller done, by whoever gets to them. Returns their results, in the order of the caller's windows."""
        while not _all_done(jobs):
            try:
                with self._changed:
                    self._check_free()
                    self._waiting.extend(job for job in jobs if job not in self._waiting and not job.is_done)
                    while (self._worker is not None or self._num_reserving) and not _all_done(jobs):
                        self._changed.wait()
                    if not _all_done(jobs):
                        self._worker = threading.get_ident()
                while not _all_done(jobs) and not self._num_reserving:
                    self._run_batch(jobs)
            finally:  # interrupted, too: nobody wants the answer any more
                self._leave(jobs)
        for job in jobs:
            if job.error is not None:
                raise job.error
        found = {number: each for job in jobs for number, each in zip(job.numbers, job.result, strict=True)}
        return [found[number] for number in sorted(found)]

    def _check_free(self) -> None:
        if self._worker == threading.get_ident():
            raise RuntimeError("The engine was asked for something by the thread that has it for itself: leave engine.exclusive() first.")

    def _leave(self, jobs: Sequence[Any] = ()) -> None:
        """Be the worker no more, if this thread is, and take back what of its jobs is not done."""
        with self._changed:
            for job in jobs:
                if job in self._waiting:
                    self._waiting.remove(job)
            if self._worker == threading.get_ident():
                self._worker = None
                self._changed.notify_all()

    def _run_batch(self, own: Sequence[Any]) -> None:
        """Run the oldest job and those that fit in with it. Called by one thread at a time."""
        jobs: list[Any] = []
        try:
            with self._changed:
                self._take(jobs)
            self._run_together(jobs)
        except BaseException:  # interrupted: the others are not to suffer, and will be run by one of themselves
            with self._changed:
                self._waiting.extendleft(job for job in reversed(jobs) if job not in own and not job.is_done and job not in self._waiting)
            raise
        with self._changed:
            self._changed.notify_all()

    def _take(self, taken: list[Any]) -> None:
        """Take the jobs that fill a batch best, in their order. None is passed over again and again: then the oldest is due."""
        kinds: dict[object, list[Any]] = {}
        for job in self._waiting:
            if isinstance(job, _Write):
                job.alone = self._adapters.switched(job.adapter)
            kinds.setdefault(job.key, []).append(job)
        fullest = max(kinds.values(), key=lambda jobs: min(self.max_rows, sum(job.size for job in jobs)))  # the older one of two
        oldest = self._waiting[0]
        jobs = kinds[oldest.key] if oldest.times_passed >= _TIMES_PASSED else fullest
        num_rows = 0
        for job in jobs:
            if not taken or num_rows + job.size <= self.max_rows:
                taken.append(job)
                num_rows += job.size
                self._waiting.remove(job)
        for job in self._waiting:
            job.times_passed += 1

    def _run_together(self, jobs: list[Any]) -> None:
        """Answer jobs of one kind. What goes wrong is the answer of the job at fault."""
        jobs = [job for job in jobs if self._is_ready(job)]
        if len({job.key for job in jobs}) > 1:  # an adapter turned out to be none for the table
            for job in jobs:
                self._run_together([job])
            return
        if not jobs:
            return
        error = self._answer(jobs)
        if error is None:
            return
        # Only here, not where the error is caught: it holds on to everything that the batch had in memory.
        is_too_large = _is_out_of_memory(error)
        if is_too_large:
            self.max_rows = max(1, min(self.max_rows, sum(job.size for job in jobs)) // 2)
        if len(jobs) > 1:
            del error
            for job in jobs:
                self._run_together([job])
        elif is_too_large and jobs[0].size > 1:
            del error
            self._run_in_parts(jobs[0])
        else:
            jobs[0].error, jobs[0].is_done = error, True

    def _answer(self, jobs: Sequence[Any]) -> Exception | None:
        """Run one batch. Returns what went wrong; then nobody has an answer."""
        try:
            answers = self._hear_all(jobs) if isinstance(jobs[0], _Hear) else self._write_all(jobs)
        except Exception as error:
            return error.with_traceback(None) if _is_out_of_memory(error) else error
        for job, answer in zip(jobs, answers, strict=True):
            job.result, job.is_done = answer, True
        self.num_batches, self.num_rows = self.num_batches + 1, self.num_rows + sum(job.size for job in jobs)
        return None

    def _run_in_parts(self, job: Any) -> None:
        """Answer a job that is too large for the device's memory."""
        parts = job.halves()
        for part in parts:
            self._run_together([part])
        job.error = next((part.error for part in parts if part.error is not None), None)
        job.result = [each for part in parts for each in part.result]
        job.is_done = True

    def _is_ready(self, job: Any) -> bool:
        """Whether the job's adapter can be used; if not, that is its answer."""
        if isinstance(job, _Write) and job.adapter is not None and job.alone is None:
            try:
                if not job.context.run(self._adapters.table_holds, job.adapter):
                    job.alone = files_key(job.adapter)
            except Exception as error:
                job.error, job.is_done = error, True
                return False
        return True

    # ---- hearing -------------------------------------------------------------------------------------------------------

    def _hear_all(self, jobs: Sequence[_Hear]) -> list[list[Heard]]:
        """The answers of several jobs: one pass of the encoder, and one decoder step for all that may hear the same languages."""
        import torch

        with adapters_off(self.model):
            states = torch.cat([self._encode(part) for part in self._parts(torch.stack([each for job in jobs for each in job.features]))])
        answers: list[list[Heard]] = [[] for _ in jobs]
        starts = _starts([job.size for job in jobs])
        groups: dict[frozenset[str] | None, list[int]] = {}
        for number, job in enumerate(jobs):
            groups.setdefault(None if job.allowed is None else frozenset(job.allowed), []).append(number)
        for numbers in groups.values():
            own = [row for number in numbers for row in range(starts[number], starts[number] + jobs[number].size)]
            theirs = states if len(own) == len(states) else states[own]
            posteriors = iter(language_posterior(self.model, None, encoder_outputs=_output(theirs), allowed=jobs[numbers[0]].allowed))
            for number in numbers:
                num_free = jobs[number].num_kept
                for row in range(starts[number], starts[number] + jobs[number].size):
                    posterior = next(posteriors)
                    is_kept = num_free > 0 and not is_noise(posterior)  # noise is not written
                    num_free -= is_kept
                    kept = states[row : row + 1].clone() if is_kept else None  # a copy, or the whole batch would be kept
                    answers[number].append(Heard(kept, posterior))
        return answers

    def _encode(self, features: torch.Tensor) -> torch.Tensor:
        """Encoder states (windows, positions, d_model) under whatever is at work."""
        import torch

        from whisper_moe.cropped_encoder import encode
        from whisper_moe.fast_products import fast_products

        with torch.no_grad(), fast_products(self.model.device):
            return encode(self.model, features.to(self.model.device, self.model.dtype))

    def _parts(self, windows: Any, num_frames: int | None = None) -> list[Any]:
        """Windows in the portions that are best encoded at once: on a CPU those whose states its caches hold."""
        if self.model.device.type != "cpu":
            return [windows]
        size = max(1, _POSITIONS_AT_ONCE // ((windows.shape[-1] if num_frames is None else num_frames) // 2))
        return [windows[start : start + size] for start in range(0, len(windows), size)]

    def _listen(self, rows: Sequence[Row]) -> list[LanguagePosterior]:
        """What the base hears in some windows, of all languages."""
        import torch

        states = {number: row.states for number, row in enumerate(rows) if row.states is not None}
        new = [number for number in range(len(rows)) if number not in states]
        with adapters_off(self.model):
            for part in self._parts(new, rows[0].features.shape[-1]):
                encoded = self._encode(torch.stack([rows[number].features for number in part]))
                states |= {number: encoded[place : place + 1] for place, number in enumerate(part)}
        return language_posterior(self.model, None, encoder_outputs=_output(torch.cat([states[number] for number in range(len(rows))])))

    # ---- writing -------------------------------------------------------------------------------------------------------

    def _write_all(self, jobs: Sequence[_Write]) -> list[list[Written]]:
        """The answers of several jobs, from one batch."""
        rows = [row for job in jobs for row in job.rows]
        writers = [job.adapter for job in jobs for _ in job.rows]
        if jobs[0].alone is not None:
            assert writers[0] is not None
            with jobs[0].context.run(self._adapters.enter, writers[0]):
                written = self._write_rows(rows, writers, jobs[0], in_table=False)
        else:
            written = self._write_rows(rows, writers, jobs[0], in_table=True)
        return [written[start : start + job.size] for start, job in zip(_starts([job.size for job in jobs]), jobs, strict=True)]

    def _write_rows(self, rows: Sequence[Row], writers: Sequence[LanguageAdapter | None], job: _Write, *, in_table: bool) -> list[Written]:
        """Encode what has to be, leave out noise, and write the rest. `job` says how."""
        import torch

        from whisper_moe.moe_gates import use_gates

        gates = self._gates(rows, writers, in_table=in_table)

        def using(numbers: Sequence[int]) -> AbstractContextManager[None]:
            theirs = None if gates is None else [gates[number] for number in numbers]
            if not in_table:
                return nullcontext() if theirs is None else use_gates(self.model, theirs)
            if not any(writers[number] is not None for number in numbers):
                return nullcontext()
            return self._adapters.rows([writers[number] for number in numbers], theirs)

        as_base = [writer is None or not self._adapters.adapts_encoder(writer, in_table=in_table) for writer in writers]
        states = {number: row.states for number, row in enumerate(rows) if as_base[number] and row.states is not None}
        new = [number for number in range(len(rows)) if number not in states]
        noise: set[int] = set()
        if new:
            for part in self._parts(new, rows[0].features.shape[-1]):
                with using(part):
                    encoded = self._encode(torch.stack([rows[number].features for number in part]))
                states |= {number: encoded[place : place + 1] for place, number in enumerate(part)}
            noise = self._noise(rows, [number for number in new if rows[number].drop_noise], states, as_base)
        kept = [number for number in range(len(rows)) if number not in noise]
        written = [Written(None)] * len(rows)
        if not kept:
            return written
        batch = _output(torch.cat([states[number] for number in kept]))
        languages = [rows[number].language for number in kept]
        limit = max(rows[number].limit for number in kept)
        kept_gates = None if gates is None else [gates[number] for number in kept]
        tokens = (
            self._replay(batch, languages, limit, [writers[number] for number in kept], kept_gates)
            if self._may_replay(job, in_table)
            else None
        )
        with using(kept):
            tokens = self._generate(batch, languages, limit, job.num_beams) if tokens is None else tokens
            limits = [rows[number].limit for number in kept]
            scores = self._log_probabilities(batch, tokens, languages, limits) if job.is_scored else [(0.0, 0)] * len(kept)
        for place, (number, row) in enumerate(zip(kept, tokens.tolist(), strict=True)):
            written[number] = Written(row[: limits[place]], *scores[place])
        return written

    def _gates(self, rows: Sequence[Row], writers: Sequence[LanguageAdapter | None], *, in_table: bool) -> list[Any] | None:
        """Gates of the mixtures whose router is the language, which have none of their own: what the base hears in each window, whatever
        languages the caller would allow."""
        wants = partial(self._adapters.wants_gates, in_table=in_table)
        waiting = [number for number, writer in enumerate(writers) if writer is not None and wants(writer)]
        if not waiting:
            return None
        gates: list[Any] = [None] * len(rows)
        for number, posterior in zip(waiting, self._listen([rows[number] for number in waiting]), strict=True):
            gates[number] = posterior
        return gates

    def _noise(self, rows: Sequence[Row], numbers: Sequence[int], states: dict[int, Any], as_base: Sequence[bool]) -> set[int]:
        """Those of some rows in which the base hears nobody speak.

        States made with an adapter on tell the base's decoder a little else than its own would. They only raise the suspicion: a suspect
        is listened to once more with the adapter off, and speech costs nothing.
        """
        import torch

        if not numbers:
            return set()
        heard = language_posterior(self.model, None, encoder_outputs=_output(torch.cat([states[number] for number in numbers])))
        suspects = [number for number, each in zip(numbers, heard, strict=True) if is_noise(each)]
        again = [number for number in suspects if not as_base[number]]
        if not again:
            return set(suspects)
        heard = self._listen([replace(rows[number], states=None) for number in again])
        return set(suspects) - {number for number, each in zip(again, heard, strict=True) if not is_noise(each)}

    def _may_replay(self, job: _Write, in_table: bool) -> bool:
        """Whether a batch may be written by a recorded graph."""
        return self._greedy.graphs and in_table and self._is_greedy(job.num_beams)

    def _is_greedy(self, num_beams: int) -> bool:
        return num_beams == 1 and not self.generate_options and self._greedy.refusal() is None

    def _replay(
        self,
        encoded: BaseModelOutput,
        languages: Sequence[str],
        limit: int,
        writers: Sequence[LanguageAdapter | None],
        gates: list[Any] | None,
    ) -> torch.Tensor:
        """As `_generate`, each row with its adapter, from recorded graphs."""
        keys = [None if writer is None else files_key(writer) for writer in writers]
        table = self._adapters.ready_table() if any(key is not None for key in keys) else None
        return self._greedy(encoded.last_hidden_state, languages, limit, table=table, adapters=keys, gates=gates)

    def _generate(self, encoded: BaseModelOutput, languages: Sequence[str], limit: int, num_beams: int) -> torch.Tensor:
        """The tokens of each window after the prompt, (windows, tokens)."""
        from whisper_moe.fast_products import MANY_ROWS, fast_products

        if self._is_greedy(num_beams) and not self._greedy.graphs:
            with fast_products(self.model.device) if len(languages) >= MANY_ROWS else nullcontext():
                return self._greedy(encoded.last_hidden_state, languages, limit)
        prompt = {"language": list(languages), "task": "transcribe"} if language_tokens(self.model) else {}
        # `max_length`, to which Whisper's generate adds the prompt: the checkpoint sets it too, and with `max_new_tokens`
        # transformers warns of the two at every call.
        tokens: torch.Tensor = self.model.generate(
            encoder_outputs=encoded,
            attention_mask=_whole_windows(encoded),
            num_beams=num_beams,
            max_length=limit,
            return_timestamps=False,
            **prompt,
            **self.generate_options,
        )
        return tokens

    def _log_probabilities(
        self, encoded: BaseModelOutput, tokens: torch.Tensor, languages: Sequence[str], limits: Sequence[int]
    ) -> list[tuple[float, int]]:
        """Of each window's text and its end: the sum of the tokens' log probabilities, and their number. One pass of the decoder."""
        import torch

        config = self.model.generation_config
        ids = language_tokens(self.model)
        fixed = [config.task_to_id["transcribe"], config.no_timestamps_token_id]
        prompt = torch.tensor([[config.decoder_start_token_id, ids[code], *fixed] for code in languages], device=tokens.device)
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        end = ends[0]
        filling = torch.tensor([*ends, config.pad_token_id], device=tokens.device)
        ended = torch.cat([tokens, torch.full_like(tokens[:, :1], end)], 1)  # (windows, steps): `generate` takes the end off
        ended = ended.masked_fill(torch.isin(ended, filling).cumsum(1) > 0, end)  # behind a text may stand anything that fills it up
        ended = ended[:, : self.model.config.max_target_positions - prompt.shape[1]]
        with torch.no_grad():
            inputs = torch.cat([prompt, ended[:, :-1]], 1)
            logits = self.model(encoder_outputs=encoded, decoder_input_ids=inputs, use_cache=False).logits[:, prompt.shape[1] - 1 :]
        found = logits.float().log_softmax(-1).gather(-1, ended[..., None])[..., 0]  # (windows, steps)
        is_text = (ended == end).cumsum(1) - (ended == end).long() == 0  # up to the first end, which is part of it
        is_text &= torch.arange(ended.shape[1], device=tokens.device)[None] < torch.tensor(limits, device=tokens.device)[:, None]
        return list(zip((found * is_text).sum(1).tolist(), is_text.sum(1).tolist(), strict=True))


# ---- adapters on the model ---------------------------------------------------------------------------------------------


class _Adapters:
    """Adapters on a model: side by side in a table, or one at a time by the switch. Only one of the two is on the model at any moment."""

    def __init__(self, model: Any, load: LoadAdapter | None, check: CheckAdapter | None, max_adapters: int) -> None:
        self._model, self._check, self._max_adapters = model, check, max_adapters
        self._is_tabled = load is None or check is not None
        self._switch = AdapterSwitch(model, load)
        self._signature = base_signature(model)
        self._table: LanguageTable | None = None
        self._held: OrderedDict[str, None] = OrderedDict()  # keys of files in the table, those used last at the end
        self._switched: set[str] = set()  # keys of files that no table can hold

    def switched(self, adapter: LanguageAdapter | None) -> str | None:
        """The key of an adapter's files if it is known that only the switch can use it."""
        if adapter is None or (self._is_tabled and not self._switched):
            return None
        try:
            key = files_key(adapter)
        except ValueError:
            return None  # found out, and said, when it is used
        return key if not self._is_tabled or key in self._switched else None

    def table_holds(self, adapter: LanguageAdapter) -> bool:
        """See to it that the table holds an adapter. Returns whether it can. Raises `UnusableError` for one that cannot be used at all."""
        try:
            key = files_key(adapter)
            if not self._is_tabled or key in self._switched:
                return False
            if key not in self._held:
                check_fit(adapter, self._model, self._signature)
                with self._bare():
                    pool = self._look_over(adapter)
                if not self._add(adapter, key, pool):
                    return False
            self._held.move_to_end(key)
            return True
        except ValueError as error:
            raise UnusableError(adapter, error) from error

    def ready_table(self) -> LanguageTable:
        """The table, on the model."""
        from whisper_moe.language_table import LanguageTable

        if self._table is None:
            self._switch.unload()
            self._table = LanguageTable.attach(self._model)
        elif self._table.is_paused:
            self._switch.unload()
            self._table.resume()
        return self._table

    @contextmanager
    def rows(self, adapters: Sequence[LanguageAdapter | None], gates: Sequence[Any] | None) -> Iterator[None]:
        """Each row of a batch with its adapter, which the table holds."""
        keys = [None if adapter is None else files_key(adapter) for adapter in adapters]
        with self.ready_table().rows(keys, gates=gates):
            yield

    def enter(self, adapter: LanguageAdapter) -> AbstractContextManager[None]:
        """One adapter for the whole model, by the switch: it is there, and goes when the context ends. Raises `UnusableError`."""
        if self._table is not None:
            self._table.pause()
        with ExitStack() as stack:
            try:
                stack.enter_context(self._switch.active(adapter))
            except ValueError as error:
                self._switched.discard(files_key(adapter))  # it may have been a passing trouble that kept it out of the table
                raise UnusableError(adapter, error) from error
            left = stack.pop_all()
        return _leaving(left)

    def adapts_encoder(self, adapter: LanguageAdapter, *, in_table: bool) -> bool:
        """Whether the adapter changes the encoder's answer."""
        if not in_table:
            return adapter.touches_encoder
        assert self._table is not None
        return self._table.adapts_encoder(files_key(adapter))

    def wants_gates(self, adapter: LanguageAdapter, *, in_table: bool) -> bool:
        """Whether the adapter, which is ready, can only be used with gates."""
        if in_table:
            assert self._table is not None
            return self._table.wants_gates(files_key(adapter))
        config = self._switch.config
        return getattr(config, "router", None) == "language" and getattr(config, "prior", None) is None

    def unload(self) -> None:
        """The bare base again."""
        if self._table is not None:
            self._table.pause()
        self._switch.unload()

    @contextmanager
    def _bare(self) -> Iterator[None]:
        """The model without the table's layers, for a look at it."""
        if self._table is None or self._table.is_paused:
            yield
            return
        self._table.pause()
        try:
            yield
        finally:
            self._table.resume()

    def _look_over(self, adapter: LanguageAdapter) -> Path | None:
        if self._check is None:
            check_folder(adapter.path, self._model)
            return None
        return self._check(adapter.path, self._model)

    def _add(self, adapter: LanguageAdapter, key: str, pool: Path | None) -> bool:
        """Put the adapter into the table, if a table can hold it."""
        table = None
        try:
            table = self.ready_table()
            if pool is not None:
                table.add_pool(pool)
            table.add(key, adapter.path, carrier=adapter.carrier)
            if files_key(adapter) == key:
                self._held[key] = None
        except ValueError:
            self._switched.add(key)  # the switch is tried instead; if that cannot use it either, it will say why
            return False
        finally:
            if table is not None and key in table and key not in self._held:
                table.drop(key)
        if key not in self._held:
            raise ValueError(f"The files of the adapter {adapter.name!r} changed while they were read. Try again.")
        while len(self._held) > self._max_adapters:
            oldest, _ = self._held.popitem(last=False)
            table.drop(oldest)
        return True


@contextmanager
def _leaving(stack: ExitStack) -> Iterator[None]:
    """What was entered, to be left."""
    with stack:
        yield


# ---- small parts -------------------------------------------------------------------------------------------------------


def is_noise(posterior: LanguagePosterior) -> bool:
    """Whether nobody speaks, as far as the base hears."""
    return posterior.no_speech is not None and posterior.no_speech > NO_SPEECH


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    return isinstance(error, (torch.OutOfMemoryError, MemoryError))


def _all_done(jobs: Sequence[Any]) -> bool:
    return all(job.is_done for job in jobs)


def by_frames(features: Sequence[torch.Tensor], most: int) -> list[list[int]]:
    """Numbers of windows, those of the same length together, and no more than `most`."""
    groups: dict[int, list[int]] = {}
    for number, each in enumerate(features):
        groups.setdefault(each.shape[-1], []).append(number)
    return [numbers[start : start + most] for numbers in groups.values() for start in range(0, len(numbers), most)]


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where each of several stretches begins."""
    return [sum(sizes[:number]) for number in range(len(sizes))]


def _output(states: torch.Tensor) -> BaseModelOutput:
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)


def _whole_windows(encoded: BaseModelOutput) -> torch.Tensor:
    """A mask without effect, (batch, frames): Whisper listens to the silence that fills a window; `generate` warns without one."""
    states = encoded.last_hidden_state
    assert states is not None
    return states.new_ones((states.shape[0], 2 * states.shape[1])).long()
