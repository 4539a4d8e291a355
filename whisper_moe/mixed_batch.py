"""Writing down a batch in which every row may speak another language, recordings of any length included.

`generate_mixed` goes from window to window as Whisper does, but keeps the loop in its own hands: rows reach their end at different
times, or must be written again at a higher temperature, and then the languages of the rows that are left are handed to the table anew.
Each window is written by the model's own `generate`. A row's tokens are those that it gets alone, to numerical noise: in batches of
another size matrix products round otherwise, as they do without adapters.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from whisper_moe.language_table import Heard, LanguageTable, RowGates, RowLanguage, RowMasks
from whisper_moe.languages import adapters_off, language_name, language_posterior, language_tokens

# What the loop decides itself, or what would tie a window to text of another one.
_OURS = frozenset(
    {
        "input_features",
        "attention_mask",
        "language",
        "prompt_ids",
        "decoder_input_ids",
        "condition_on_prev_tokens",
        "do_sample",
        "num_return_sequences",
        "return_segments",
        "return_dict_in_generate",
        "return_token_timestamps",
        "force_unique_generate_call",
        "assistant_model",
        "monitor_progress",
    }
)
_THRESHOLDS = ("compression_ratio_threshold", "logprob_threshold", "no_speech_threshold")
_SECONDS_PER_TOKEN = 0.02  # of timestamp tokens, Whisper's own
_FRAMES_PER_S = 100


@dataclass(frozen=True)
class TokenSegment:
    """What is said between two timestamps.

    Args:
        start_s: Start in the recording.
        end_s: End in the recording.
        tokens: Its tokens, with its timestamps.
    """

    start_s: float
    end_s: float
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """How a window of a row was written.

    Args:
        start_s: Where it starts in the recording.
        temperature: The one at which its text was accepted.
        avg_logprob: Mean log probability of its tokens, end included; None if nobody asked for it.
        no_speech: Probability that nobody speaks; None if nobody asked for it.
        skipped: Whether it was left out because nobody speaks.
    """

    start_s: float
    temperature: float
    avg_logprob: float | None
    no_speech: float | None
    skipped: bool


@dataclass(frozen=True)
class MixedRow:
    """What was written of one row.

    Args:
        tokens: All tokens, without prompt and end of text; with timestamps if they were asked for.
        segments: The same in stretches; without timestamps one per window.
        windows: How each window was written.
        prompt_language: Code of the language whose token stood in the prompt; None for a model without language tokens.
    """

    tokens: tuple[int, ...]
    segments: tuple[TokenSegment, ...]
    windows: tuple[Window, ...]
    prompt_language: str | None


@torch.no_grad()
def generate_mixed(
    table: LanguageTable,
    input_features: torch.Tensor | None,
    languages: Sequence[RowLanguage],
    *,
    encoder_outputs: Any = None,
    gates: RowGates = None,
    masked: RowMasks = None,
    prompt_languages: Sequence[str | None] | None = None,
    attention_mask: torch.Tensor | None = None,
    task: str = "transcribe",
    return_timestamps: bool | None = None,
    num_beams: int = 1,
    temperature: float | Sequence[float] = 0.0,
    seeds: int | Sequence[int] | None = None,
    compression_ratio_threshold: float | None = None,
    logprob_threshold: float | None = None,
    no_speech_threshold: float | None = None,
    **options: Any,
) -> list[MixedRow]:
    """Write down every row of a batch in its own language, with its own adapter.

    Args:
        table: The languages, attached to the model that writes.
        input_features: (rows, mels, frames). More frames than a window holds: the row is written window by window. May be None with
            `encoder_outputs`.
        languages: For each row a language of the table, a mixture `{language: weight}`, or None for the base model.
        encoder_outputs: (rows, positions, d_model), or transformers' output with it: what the encoder has made of a single window, each
            row with its own adapter. The base model's states will do where `table.adapts_encoder(language)` is False.
        gates: For rows whose language is a LoRA-MoE, its gates, as for `LanguageTable.rows`. Router "language" without a prior, and None:
            the posterior of the base model in the row's first window; other mixtures of that row keep their router's gates.
        masked: For such rows, the experts that are left out.
        prompt_languages: For each row the language whose token stands in the prompt. None, for a row: the carrier of its adapter or else
            its language; for a row of the base model: the one that the base hears in its first window.
        attention_mask: (rows, frames), 1 for frames of the recording. Needed if rows of several windows differ in length.
        task: "transcribe" or "translate".
        return_timestamps: Whether timestamps are written. Rows longer than a window need them; that is the default there.
        num_beams: Beams at temperature 0.
        temperature: 0 chooses the most probable token (or beam), above 0 tokens are drawn. Several: the next one is tried where a
            threshold says that the text is bad; each row moves on by itself.
        seeds: For drawing: one seed per row, or a number from which they are counted. A row's draws depend on its own seed alone, not on
            the rest of the batch. None: fresh ones.
        compression_ratio_threshold: Text that compresses better than this counts as bad.
        logprob_threshold: Text whose mean log probability is lower counts as bad.
        no_speech_threshold: A window is left out if nobody speaks there with more than this probability and its text is bad by
            `logprob_threshold`, which must then be given.
        options: For the model's `generate`, window by window: `max_length`, `suppress_tokens`, ...

    Returns:
        One `MixedRow` per row.

    Raises:
        ValueError: Arguments that do not fit each other, or a language that the table or the prompt does not know. Raised before any work.

    Drawing takes the whole distribution, as openai/whisper does; transformers cuts it to the 50 most probable tokens unless told otherwise.
    Windows are written independently of the text before them.
    """
    model: Any = table.model
    states = getattr(encoder_outputs, "last_hidden_state", encoder_outputs)
    states = states[0] if isinstance(states, tuple) else states
    batch = _Batch.check(
        model, input_features, states, languages, attention_mask, return_timestamps, num_beams, temperature, seeds, options
    )
    known = language_tokens(model)
    prompts = _prompts(table, languages, prompt_languages, known)
    if no_speech_threshold is not None and logprob_threshold is None:
        raise ValueError("no_speech_threshold looks at windows that logprob_threshold finds bad: give both, for instance 0.6 and -1.0.")
    bad = _Thresholds(compression_ratio_threshold, logprob_threshold, no_speech_threshold)
    asked = _Asked(table, languages, _gates(table, batch, languages, gates, masked, known), masked)
    writer = _Writer(asked, batch, {"task": task} if known else {}, bad, dict(options))
    rows = [_Row() for _ in languages]
    with _no_thresholds_of(model):
        while active := [number for number, row in enumerate(rows) if row.seek < batch.frames[number]]:
            encoded = batch.states
            if encoded is None:
                with asked.use(active):
                    encoded = model.get_encoder()(batch.windows(active, [rows[number].seek for number in active])).last_hidden_state
            _hear(model, active, encoded, prompts, known)
            for number, written in zip(active, writer.write(active, encoded, prompts, rows), strict=True):
                rows[number].take(written, batch, batch.frames[number])
    return [row.result(prompt) for row, prompt in zip(rows, prompts, strict=True)]


# ---- what is given -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Batch:
    """The arguments, checked."""

    features: torch.Tensor | None  # (rows, mels, frames), where the model is; None if only the encoder's states are known
    states: torch.Tensor | None  # (rows, positions, d_model) the encoder's, if they came with the batch: then there is one window
    frames: list[int]  # of each row's recording
    window: int  # frames that the model hears at once
    stride: int  # frames per position of the encoder
    timestamp_begin: int
    return_timestamps: bool
    num_beams: int
    temperatures: tuple[float, ...]
    seeds: list[int]

    @classmethod
    def check(
        cls,
        model: Any,
        features: torch.Tensor | None,
        states: torch.Tensor | None,
        languages: Sequence[RowLanguage],
        mask: torch.Tensor | None,
        return_timestamps: bool | None,
        num_beams: int,
        temperature: float | Sequence[float],
        seeds: int | Sequence[int] | None,
        options: dict[str, Any],
    ) -> _Batch:
        if features is None and states is None:
            raise ValueError("There is nothing to write down: give input_features, or encoder_outputs.")
        if not len(languages) or (features is not None and (features.dim() != 3 or features.shape[0] != len(languages))):
            shape = "none" if features is None else tuple(features.shape)
            raise ValueError(f"input_features of shape {shape} came with {len(languages)} languages; give (rows, mels, frames).")
        if isinstance(languages, str):
            raise ValueError(f"languages is a list with one entry per row, got the string {languages!r}. Put it in a list.")
        taken = sorted(_OURS & options.keys())
        if taken:
            raise ValueError(f"generate_mixed decides {', '.join(taken)} itself. Drawing is chosen by temperature; a language by its row.")
        if num_beams < 1:
            raise ValueError(f"num_beams must be 1 or more, got {num_beams}.")
        temperatures = tuple(temperature) if isinstance(temperature, Sequence) else (temperature,)
        if not temperatures or any(not 0 <= each < float("inf") for each in temperatures):
            raise ValueError(f"temperature is 0 or above, or several such numbers; got {temperature!r}.")
        stride = model.model.encoder.conv1.stride[0] * model.model.encoder.conv2.stride[0]
        window = stride * model.config.max_source_positions
        num_frames = window if features is None else features.shape[2]
        is_long = num_frames > window
        if states is not None:
            expected = (len(languages), model.config.max_source_positions, model.config.d_model)
            if tuple(states.shape) != expected:
                raise ValueError(f"encoder_outputs of shape {tuple(states.shape)} came; for these rows and this model it is {expected}.")
            if is_long:
                raise ValueError(
                    f"encoder_outputs are those of a single window, {window} frames; the rows have {num_frames}. Leave them out: such "
                    "recordings are encoded window by window."
                )
        if is_long and return_timestamps is False:
            raise ValueError(
                f"The rows have {num_frames} frames and the model hears {window} at once: it finds its way by timestamps. Leave "
                "return_timestamps out, or give shorter rows."
            )
        no_timestamps = getattr(model.generation_config, "no_timestamps_token_id", None)
        wanted = is_long or bool(return_timestamps)
        if wanted and no_timestamps is None:
            raise ValueError("The model's generation_config has no no_timestamps_token_id, so it cannot write timestamps. Set it first.")
        if mask is not None and mask.shape != (len(languages), num_frames):
            raise ValueError(f"attention_mask is {tuple(mask.shape)}; the features have ({len(languages)}, {num_frames}) frames.")
        # As in transformers, a mask counts for long recordings only: in a single window the model hears the silence that fills it, too.
        frames = [num_frames] * len(languages) if mask is None or not is_long else [int(count) for count in mask.sum(1)]
        return cls(
            features=None if features is None else features.to(model.device, model.dtype),
            states=None if states is None else states.to(model.device, model.dtype),
            frames=frames,
            window=window,
            stride=stride,
            timestamp_begin=model.config.vocab_size if no_timestamps is None else no_timestamps + 1,
            return_timestamps=wanted,
            num_beams=num_beams,
            temperatures=temperatures,
            seeds=_seeds(seeds, len(languages)),
        )

    def windows(self, rows: Sequence[int], seeks: Sequence[int]) -> torch.Tensor:
        """(rows, mels, window) what comes next of each row, filled up with zeros."""
        assert self.features is not None
        cut = [self.features[row, :, seek : min(seek + self.window, self.frames[row])] for row, seek in zip(rows, seeks, strict=True)]
        return torch.stack([F.pad(each, (0, self.window - each.shape[1])) for each in cut])


@dataclass(frozen=True)
class _Asked:
    """What the rows asked for, to be handed to the table for those of them that are at work."""

    table: LanguageTable
    languages: Sequence[RowLanguage]
    gates: Sequence[Any] | None
    masked: RowMasks

    def use(self, rows: Sequence[int]) -> AbstractContextManager[None]:
        """The table's languages, for these rows."""
        gates = None if self.gates is None else [self.gates[row] for row in rows]
        masked = None if self.masked is None else [self.masked[row] for row in rows]
        return self.table.rows([self.languages[row] for row in rows], gates=gates, masked=masked)


def _seeds(seeds: int | Sequence[int] | None, rows: int) -> list[int]:
    if seeds is None:
        return torch.randint(2**31, (rows,)).tolist()
    if isinstance(seeds, int):
        return [seeds + row for row in range(rows)]
    if len(seeds) != rows:
        raise ValueError(f"{len(seeds)} seeds came for {rows} rows. Give one per row, or a single number.")
    return list(seeds)


def _prompts(
    table: LanguageTable, languages: Sequence[RowLanguage], given: Sequence[str | None] | None, known: dict[str, int]
) -> list[str | None]:
    """The language in the prompt of each row; None where the base is to hear it, or where the model has no language tokens."""
    if given is not None and len(given) != len(languages):
        raise ValueError(f"{len(given)} prompt_languages came for {len(languages)} rows. Give one per row, None for the default.")
    if not known:
        if given is not None and any(each is not None for each in given):
            raise ValueError("The model has no language tokens (it knows one language only), so there is no prompt_languages to choose.")
        return [None] * len(languages)
    prompts: list[str | None] = []
    for row, language in enumerate(languages):
        mixture = {} if language is None else {language: 1.0} if isinstance(language, str) else dict(language)
        for name in mixture:
            table.carrier(name)  # refuses one that is unknown
        prompt = given[row] if given is not None else None
        if prompt is None and mixture:
            prompt = table.carrier(max(mixture, key=lambda name: mixture[name]))
        if prompt is not None and prompt not in known:
            raise ValueError(
                f"Row {row}: the model has no token for {language_name(prompt)} ({prompt!r}), so it cannot stand in the prompt. "
                f"Give prompt_languages one of: {', '.join(sorted(known))}; or add the adapter with a carrier."
            )
        prompts.append(prompt)
    return prompts


def _gates(
    table: LanguageTable, batch: _Batch, languages: Sequence[RowLanguage], given: RowGates, masked: RowMasks, known: dict[str, int]
) -> list[Any] | None:
    """The gates of each row, with those filled in that the base model is to hear: of routers that know nothing by themselves."""
    names = [[language] if isinstance(language, str) else list(language or ()) for language in languages]
    listening = []
    for row, mixture in enumerate(names):
        waiting = [name for name in mixture if table.wants_gates(name)]
        if waiting and (given is None or (len(given) == len(languages) and given[row] is None)):
            listening.append(row)
            deaf = next((name for name in waiting if not known.keys() & set(table.experts(name))), None)
            if deaf is not None:
                raise ValueError(
                    f"Row {row}: the gates of {deaf!r} are the probabilities of its experts' languages, and the model hears none of "
                    f"{', '.join(table.experts(deaf))}. Give gates=[...] with a dict expert -> weight for that row."
                )
    if not listening:
        table.check_rows(languages, gates=given, masked=masked)
        return None if given is None else list(given)
    gates = [None] * len(languages) if given is None else list(given)
    table.check_rows(languages, gates=[Heard({}) if row in listening else each for row, each in enumerate(gates)], masked=masked)
    if batch.features is not None:
        posteriors = language_posterior(table.model, batch.windows(listening, [0] * len(listening)))
    else:
        other = next((name for row in listening for name in names[row] if table.adapts_encoder(name)), None)
        if other is not None:
            raise ValueError(
                f"The base model cannot hear the rows of {other!r}: their encoder_outputs were made with that adapter. Give input_features "
                "too, or gates."
            )
        from transformers.modeling_outputs import BaseModelOutput

        assert batch.states is not None
        posteriors = language_posterior(table.model, None, encoder_outputs=BaseModelOutput(last_hidden_state=batch.states[listening]))
    for row, posterior in zip(listening, posteriors, strict=True):
        gates[row] = Heard(posterior)
    return gates


def _hear(model: Any, rows: Sequence[int], encoded: torch.Tensor, prompts: list[str | None], known: dict[str, int]) -> None:
    """Fill in the prompts that the base is to choose. Rows without a language went through the encoder as through the base's."""
    from transformers.modeling_outputs import BaseModelOutput

    unknown = [place for place, row in enumerate(rows) if prompts[row] is None] if known else []
    if unknown:
        code_of = {token: code for code, token in known.items()}
        with adapters_off(model):  # the caller may be inside a block of the table's
            found = model.detect_language(encoder_outputs=BaseModelOutput(last_hidden_state=encoded[unknown]))
        for place, token in zip(unknown, found.tolist(), strict=True):
            prompts[rows[place]] = code_of[token]


@contextmanager
def _no_thresholds_of(model: Any) -> Iterator[None]:
    """Let the model's own configuration judge no text, for the length of a block: whether a window is written again, or left out, is
    decided here. `generate` fills in from it what a call leaves open, so it cannot be told in the call."""
    before = model.generation_config
    names = [name for name in _THRESHOLDS if getattr(before, name, None) is not None]
    if names:
        model.generation_config = copy.deepcopy(before)
        for name in names:
            setattr(model.generation_config, name, None)
    try:
        yield
    finally:
        model.generation_config = before


# ---- writing windows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Thresholds:
    """When a window's text is bad."""

    compression_ratio: float | None
    logprob: float | None
    no_speech: float | None

    def is_bad(self, tokens: Sequence[int], avg_logprob: float | None, vocab_size: int) -> bool:
        if self.compression_ratio is not None and tokens and _compression_ratio(tokens, vocab_size) > self.compression_ratio:
            return True
        return self.logprob is not None and avg_logprob is not None and avg_logprob < self.logprob

    def is_silent(self, avg_logprob: float | None, no_speech: float | None) -> bool:
        if self.no_speech is None or self.logprob is None or no_speech is None or avg_logprob is None:
            return False
        return no_speech > self.no_speech and avg_logprob < self.logprob


@dataclass(frozen=True)
class _Written:
    """A window's tokens after the prompt, without the end of text."""

    tokens: list[int]
    temperature: float
    avg_logprob: float | None
    no_speech: float | None
    skipped: bool


@dataclass(frozen=True)
class _Writer:
    """Writes windows, again where their text is bad."""

    asked: _Asked
    batch: _Batch
    prompt: dict[str, Any]
    bad: _Thresholds
    options: dict[str, Any]

    def write(
        self,
        active: Sequence[int],
        encoded: torch.Tensor,
        prompts: Sequence[str | None],
        rows: Sequence[_Row],
    ) -> list[_Written]:
        """What is said in a window of each active row, from its encoder states (active rows, positions, d_model)."""
        results: dict[int, _Written] = {}
        left = list(range(len(active)))
        no_speech: list[float | None] = [None] * len(active)
        for attempt, temperature in enumerate(self.batch.temperatures):
            numbers = [active[place] for place in left]
            seeds = [_window_seed(self.batch.seeds[number], rows[number].seek, attempt) for number in numbers]
            with self.asked.use(numbers):
                states = encoded if len(left) == len(active) else encoded[left]
                if attempt == 0 and self.bad.no_speech is not None:
                    no_speech = [*self._no_speech(states)]
                written = self._write_once(states, [prompts[number] for number in numbers], temperature, seeds)
            again = []
            for place, (tokens, avg_logprob) in zip(left, written, strict=True):
                silent = self.bad.is_silent(avg_logprob, no_speech[place])
                text = tokens[:-1] if tokens[-1:] == [self._end] else tokens
                results[place] = _Written(text, temperature, avg_logprob, no_speech[place], silent)
                if not silent and self.bad.is_bad(tokens, avg_logprob, self._model.config.vocab_size):
                    again.append(place)
            left = again
            if not left:
                break
        return [results[place] for place in range(len(active))]

    @property
    def _model(self) -> Any:
        return self.asked.table.model

    @property
    def _end(self) -> int:
        end = self._model.generation_config.eos_token_id
        return int(end[0]) if isinstance(end, (list, tuple)) else int(end)

    def _write_once(
        self, states: torch.Tensor, prompts: Sequence[str | None], temperature: float, seeds: Sequence[int]
    ) -> list[tuple[list[int], float | None]]:
        """Tokens, the end of text included, and mean log probability of each row, at one temperature."""
        from transformers import LogitsProcessorList
        from transformers.modeling_outputs import BaseModelOutput

        model = self._model
        num_beams = 1 if temperature > 0 else self.batch.num_beams
        wants_logprob = self.bad.logprob is not None
        options = dict(self.options)
        chooser = _Chooser(temperature, seeds) if temperature > 0 or (wants_logprob and num_beams == 1) else None
        if chooser is not None:
            options["logits_processor"] = LogitsProcessorList([*options.get("logits_processor", []), chooser])
        if prompts[0] is not None:
            options["language"] = [f"<|{prompt}|>" for prompt in prompts]
        output = model.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            attention_mask=states.new_ones(states.shape[0], self.batch.window).long(),  # without effect; generate warns without one
            num_beams=num_beams,
            return_timestamps=self.batch.return_timestamps,
            force_unique_generate_call=True,  # one window; going on from there is the loop's business
            return_segments=True,
            return_dict_in_generate=False,
            **self.prompt,
            **options,
        )
        # With each segment comes the whole sequence, prompt and end included; the segments are cut for the model's own loop.
        firsts = [segments[0] for segments in output["segments"]]
        begin = firsts[0]["idxs"][0]  # after the prompt
        tokens = [_until_end(first["result"][begin:].tolist(), self._end) for first in firsts]
        if not wants_logprob:
            return [(row, None) for row in tokens]
        sequences = torch.stack([first["result"] for first in firsts])
        chosen = self._logprobs(states, sequences, begin) if chooser is None else torch.stack(chooser.logprobs, 1)  # (rows, steps)
        return [(row, _mean(each[: len(row)])) for row, each in zip(tokens, chosen.tolist(), strict=True)]

    def _logprobs(self, states: torch.Tensor, sequences: torch.Tensor, begin: int) -> torch.Tensor:
        """(rows, steps) log probabilities of sequences that a beam search chose, read off in one pass."""
        from transformers.modeling_outputs import BaseModelOutput

        model = self._model
        encoded = BaseModelOutput(last_hidden_state=states)
        logits = model(encoder_outputs=encoded, decoder_input_ids=sequences[:, :-1], use_cache=False).logits[:, begin - 1 :]
        return logits.float().log_softmax(-1).gather(-1, sequences[:, begin:, None])[..., 0]

    def _no_speech(self, states: torch.Tensor) -> list[float]:
        """Probability that nobody speaks, of each row: what stands first after the start of the transcript."""
        from transformers.modeling_outputs import BaseModelOutput

        model = self._model
        config = model.generation_config
        start = torch.full((states.shape[0], 1), config.decoder_start_token_id, device=states.device)
        logits = model(encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=start, use_cache=False).logits
        return logits[:, -1].float().softmax(-1)[:, config.no_timestamps_token_id - 1].tolist()  # Whisper's order of tokens


class _Chooser:
    """Decides on tokens: the most probable one at temperature 0, else a draw. To `generate` both look like a greedy choice: the largest of
    scores plus Gumbel noise is a draw from their softmax. Each row's noise comes from its own seed, so its draws are its own.

    Called by `generate` once a step, as the last of the logits processors.
    """

    def __init__(self, temperature: float, seeds: Sequence[int]) -> None:
        self.temperature, self.seeds = temperature, seeds
        self.logprobs: list[torch.Tensor] = []  # of each step, (rows,): of the tokens that were chosen
        self._generators: list[torch.Generator] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # (rows, vocabulary) -> (rows, vocabulary)
        noisy = scores.float() / self.temperature + self._noise(scores) if self.temperature > 0 else scores.float()
        chosen = noisy.argmax(-1, keepdim=True)
        self.logprobs.append(scores.float().log_softmax(-1).gather(-1, chosen)[:, 0])
        return noisy

    def _noise(self, scores: torch.Tensor) -> torch.Tensor:
        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self.seeds]
        noise = torch.empty_like(scores, dtype=torch.float32)
        for row, generator in zip(noise, self._generators, strict=True):
            row.exponential_(generator=generator)
        return noise.log_().neg_()


# ---- rows --------------------------------------------------------------------------------------------------------------


class _Row:
    """How far a row is, and what was written of it."""

    def __init__(self) -> None:
        self.seek = 0  # frames that are done
        self.segments: list[TokenSegment] = []
        self.windows: list[Window] = []

    def take(self, written: _Written, batch: _Batch, frames: int) -> None:
        """Add a window and go on to where the next one begins."""
        num_frames = min(batch.window, frames - self.seek)
        start_s = self.seek / _FRAMES_PER_S
        self.windows.append(Window(start_s, written.temperature, written.avg_logprob, written.no_speech, written.skipped))
        if written.skipped:
            self.seek += num_frames
            return
        segments, advance = _segments(written.tokens, start_s, num_frames, batch)
        self.segments += segments
        self.seek += advance

    def result(self, prompt: str | None) -> MixedRow:
        tokens = tuple(token for segment in self.segments for token in segment.tokens)
        return MixedRow(tokens, tuple(self.segments), tuple(self.windows), prompt)


def _segments(tokens: list[int], start_s: float, num_frames: int, batch: _Batch) -> tuple[list[TokenSegment], int]:
    """The segments of a window, and by how many frames to go on.

    Two timestamps in a row are the end of a segment and the start of the next. If the text ends with such a pair, or in the middle of a
    segment, the next window begins at the last end; after a single timestamp nobody speaks any more, and the window is done.
    """
    if not batch.return_timestamps:
        return [TokenSegment(start_s, start_s + num_frames / _FRAMES_PER_S, tuple(tokens))], num_frames
    is_stamp = [token >= batch.timestamp_begin for token in tokens]

    def seconds(token: int) -> float:
        return start_s + (token - batch.timestamp_begin) * _SECONDS_PER_TOKEN

    ends = [i + 1 for i in range(len(tokens) - 1) if is_stamp[i] and is_stamp[i + 1]]
    if not ends:
        stamps = [token for token in tokens if token > batch.timestamp_begin]
        end_s = seconds(stamps[-1]) if stamps else start_s + num_frames / _FRAMES_PER_S
        return [TokenSegment(start_s, end_s, tuple(tokens))], num_frames
    ends_single = is_stamp[-2:] == [False, True]
    if ends_single:
        ends.append(len(tokens))
    segments = []
    for begin, end in zip([0, *ends], ends, strict=False):
        segments.append(TokenSegment(seconds(tokens[begin]), seconds(tokens[end - 1]), tuple(tokens[begin:end])))
    if ends_single:
        return segments, num_frames
    closing = segments[-1]
    # As in transformers the last segment keeps the timestamp that follows it: the sign that it did not end alone.
    segments[-1] = TokenSegment(closing.start_s, closing.end_s, (*closing.tokens, tokens[ends[-1]]))
    advance = (tokens[ends[-1] - 1] - batch.timestamp_begin) * batch.stride
    return segments, advance if 0 < advance <= num_frames else num_frames  # always onward, whatever the model writes


def _window_seed(seed: int, seek: int, attempt: int) -> int:
    """A seed for one window and attempt, so that draws do not depend on how long other rows were in the batch."""
    return zlib.crc32(f"{seed} {seek} {attempt}".encode())


def _until_end(tokens: list[int], end: int) -> list[int]:
    """Up to the end of text, and including it; what follows is padding."""
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(len(values), 1)


def _compression_ratio(tokens: Sequence[int], vocab_size: int) -> float:
    """How much shorter the tokens become by compression: text that repeats itself does by much. As transformers counts it."""
    width = int(math.log2(vocab_size) / 8) + 1
    raw = b"".join(token.to_bytes(width, "little") for token in tokens)
    return len(raw) / len(zlib.compress(raw))
