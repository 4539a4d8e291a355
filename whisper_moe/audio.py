"""Sound of any common format, rate and length -> mono samples at 16 kHz, and the windows of it that hold speech.

The one door for audio: what is empty, damaged or no sound at all is refused here with a message for the person who sent it.
Numpy arrays out; knows no model and no languages.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import soundfile

SAMPLE_RATE = 16000  # Hz, what every Whisper hears

Source: TypeAlias = "str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | tuple[int, np.ndarray] | np.ndarray"

_BLOCK_S = 10  # decoded at a time, so that a long file costs its 16 kHz samples and little more
_MAX_CHANNELS = 64
_LOWEST_RATE, _HIGHEST_RATE = 1_000, 1_000_000  # Hz
_LARGEST_SAMPLE = 65_536.0  # samples of about -1 to 1 are expected; beyond this the numbers are not sound

# FFmpeg's names of the containers that PyAV may open. Playlists (HLS, concat) are left out: they can name other files and
# addresses, and a recording is often an upload by a stranger.
_CONTAINERS = (
    *("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "aac", "ac3", "amr", "asf", "avi", "caf", "flv", "mpeg", "mpegts"),
    *("mp3", "ogg", "flac", "wav", "w64", "aiff", "au", "wv", "tta", "ape"),
)


class AudioError(ValueError):
    """The recording cannot be used. The message is meant for the person who gave it."""


# ---- reading -----------------------------------------------------------------------------------------------------------


def load_audio(source: Source, *, max_duration_s: float | None = None) -> np.ndarray:
    """Read a recording.

    Args:
        source: A path, the bytes of a file, a file object, `(rate, array)` as Gradio gives it, or an array at 16 kHz. Arrays are
            `(samples,)` or `(samples, channels)`; integers are scaled by the range of their type.
        max_duration_s: Refuse what is longer. None: no limit.

    Returns:
        `(samples,)` float32, mono, 16 kHz. Values beyond 1 are kept.

    Raises:
        AudioError: Empty, too long, damaged, or not sound.
    """
    if isinstance(source, np.ndarray):
        samples = _from_array(SAMPLE_RATE, source, max_duration_s)
    elif isinstance(source, tuple):
        samples = _from_pair(source, max_duration_s)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        samples = _from_file(io.BytesIO(source), max_duration_s)
    elif isinstance(source, (str, os.PathLike)):
        with _open(Path(source)) as file:
            samples = _from_file(file, max_duration_s)
    elif hasattr(source, "read"):
        seekable = hasattr(source, "seekable") and source.seekable()
        samples = _from_file(source if seekable else io.BytesIO(source.read()), max_duration_s)
    else:
        raise AudioError(
            f"A recording is a path, bytes, a file object, (rate, array) or an array at {SAMPLE_RATE} Hz; got {type(source).__name__}."
        )
    if len(samples) == 0:
        raise AudioError("The recording is empty: it holds no samples.")
    return samples


def _open(path: Path) -> IO[bytes]:
    """Open a file, with the reasons why it cannot be opened in plain words."""
    try:
        return open(path, "rb")
    except FileNotFoundError:
        raise AudioError(f"There is no file {str(path)!r}.") from None
    except IsADirectoryError:
        raise AudioError(f"{str(path)!r} is a folder. Give the recordings in it one by one.") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise AudioError(f"{str(path)!r} cannot be opened: {error}.") from None


def _from_pair(pair: tuple[Any, ...], max_duration_s: float | None) -> np.ndarray:
    if len(pair) != 2 or not isinstance(pair[0], (int, float, np.integer, np.floating)) or not isinstance(pair[1], np.ndarray):
        raise AudioError(f"A pair is (rate in Hz, array); got {tuple(type(part).__name__ for part in pair)}.")
    return _from_array(float(pair[0]), pair[1], max_duration_s)


def _from_array(rate: float, array: np.ndarray, max_duration_s: float | None) -> np.ndarray:
    """An array of any usual number type -> (samples,) at 16 kHz."""
    _check_rate(rate)
    if array.ndim not in (1, 2) or (array.ndim == 2 and not 1 <= array.shape[1] <= _MAX_CHANNELS):
        raise AudioError(f"An array of sound is (samples,) or (samples, channels); got shape {array.shape}.")
    _check_duration(len(array) / rate, max_duration_s)
    collected = _Resampler(rate)
    block = round(_BLOCK_S * rate)
    for start in range(0, len(array), block):
        collected.add(_as_float(array[start : start + block]))
    return collected.finish()


def _as_float(array: np.ndarray) -> np.ndarray:
    """Integers -> float32 between -1 and 1; floats stay as they are."""
    if array.dtype == np.uint8:  # 8-bit sound is unsigned, silence is 128
        return (array.astype(np.float32) - 128) / 128
    if array.dtype in (np.int8, np.int16, np.int32):
        return array.astype(np.float32) / -float(np.iinfo(array.dtype).min)
    if np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite and is refused as such
            return array.astype(np.float32, copy=False)
    raise AudioError(f"Sound is an array of int16, int32 or float32; got {array.dtype}. Convert it, for instance with .astype('float32').")


def _from_file(file: IO[bytes], max_duration_s: float | None) -> np.ndarray:
    """soundfile reads wav, flac, mp3, ogg and opus; PyAV what it does not know (m4a, mp4, webm ...)."""
    import soundfile

    start = file.tell()
    if not file.read(1):
        raise AudioError("The recording is empty: the file holds no bytes.")
    file.seek(start)
    try:
        opened = soundfile.SoundFile(file)
    except (soundfile.SoundFileError, TypeError):  # TypeError: the name ends in .raw, whose format cannot be known
        file.seek(start)
        return _read_with_pyav(file, max_duration_s)
    with opened:
        return _read_with_soundfile(opened, max_duration_s)


def _read_with_soundfile(opened: soundfile.SoundFile, max_duration_s: float | None) -> np.ndarray:
    import soundfile

    rate = opened.samplerate
    _check_rate(rate)
    if opened.channels > _MAX_CHANNELS:
        raise AudioError(f"The recording has {opened.channels} channels; at most {_MAX_CHANNELS} can be mixed.")
    collected, read_s = _Resampler(rate), 0.0
    while True:
        try:
            block = opened.read(_BLOCK_S * rate, dtype="float32", always_2d=True)  # (samples, channels)
        except soundfile.SoundFileError as error:
            raise AudioError(f"The recording is damaged: it can be read only up to {read_s:.1f} s ({error}).") from None
        if len(block) == 0:
            return collected.finish()
        read_s += len(block) / rate
        # The length in the header is not trusted: streams carry none, damaged files a wrong one.
        _check_duration(read_s, max_duration_s)
        collected.add(block)


def _read_with_pyav(file: IO[bytes], max_duration_s: float | None) -> np.ndarray:
    import av

    collected, read_s = None, 0.0
    try:
        with av.open(file, mode="r", options={"format_whitelist": ",".join(_CONTAINERS)}, metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise AudioError("There is no sound in this file: it has pictures or other data only.")
            for rate, block in _pyav_blocks(container):
                if collected is None:
                    _check_rate(rate)
                    collected = _Resampler(rate)
                read_s += len(block) / rate
                _check_duration(read_s, max_duration_s)
                collected.add(block)
    except AudioError:
        raise
    except (av.error.FFmpegError, ValueError, EOFError) as error:
        if collected is None:
            raise AudioError("This is not a recording that can be read: the file is damaged, or of a kind that holds no sound.") from error
        raise AudioError(f"The recording is damaged: it can be read only up to {read_s:.1f} s.") from error
    if collected is None:
        raise AudioError("The recording is empty: its sound track holds no samples.")
    return collected.finish()


def _pyav_blocks(container: Any) -> Iterator[tuple[int, np.ndarray]]:
    """(rate, (samples, channels) float32) of the first sound track, a frame at a time."""
    import av

    converter = av.AudioResampler(format="fltp")  # number format only: rate and channels are ours, the same for every source
    for frame in container.decode(audio=0):
        for converted in converter.resample(frame):
            yield converted.sample_rate, converted.to_ndarray().T


class _Resampler:
    """Collects blocks of any rate and channel count as mono samples at 16 kHz."""

    def __init__(self, rate: float) -> None:
        import soxr

        self._stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, num_channels=1, dtype="float32")
        self._bytes = bytearray()  # grows in place, so that the whole recording is never held twice

    def add(self, block: np.ndarray) -> None:
        """Mix and append (samples,) or (samples, channels)."""
        mono = block if block.ndim == 1 else block.mean(axis=1, dtype=np.float32)
        if not np.isfinite(mono).all():
            raise AudioError("The recording holds values that are not numbers (NaN or infinite).")
        if np.abs(mono).max(initial=0.0) > _LARGEST_SAMPLE:
            raise AudioError(f"The recording holds values up to {np.abs(mono).max():.1e}; expected about -1 to 1. Scale it first.")
        self._append(mono if self._stream is None else self._stream.resample_chunk(np.ascontiguousarray(mono)))

    def finish(self) -> np.ndarray:
        """(samples,) float32."""
        if self._stream is not None:
            self._append(self._stream.resample_chunk(np.zeros(0, np.float32), last=True))
        return np.frombuffer(self._bytes, np.float32)

    def _append(self, samples: np.ndarray) -> None:
        self._bytes += np.ascontiguousarray(samples, np.float32).data.cast("B") if len(samples) else b""


def _check_rate(rate: float) -> None:
    if not _LOWEST_RATE <= rate <= _HIGHEST_RATE:
        raise AudioError(f"A sample rate of {rate:g} Hz cannot be speech; expected {_LOWEST_RATE} to {_HIGHEST_RATE} Hz.")


def _check_duration(duration_s: float, max_duration_s: float | None) -> None:
    if max_duration_s is not None and duration_s > max_duration_s:
        raise AudioError(f"The recording is longer than {_in_words(max_duration_s)}, the most that is taken here. Cut it into parts.")


def _in_words(duration_s: float) -> str:
    for unit_s, unit in ((3600, "hours"), (60, "minutes")):
        if duration_s >= 2 * unit_s:
            return f"{duration_s / unit_s:g} {unit}"
    return f"{duration_s:g} seconds"


# ---- finding the speech ------------------------------------------------------------------------------------------------

_FRAME = SAMPLE_RATE // 50  # samples: 20 ms, one period of mains hum, so that hum is steady
_FRAMES_PER_S = SAMPLE_RATE // _FRAME
_QUIETEST_DB = -80.0  # levels are clipped here: digital silence is as quiet as a quiet room
_SILENCE_DB = -70.0  # below it, nothing is speech
_BELOW_LOUD_DB = 40.0  # speech is within this of the loudest second of the recording
_ABOVE_FLOOR_DB = (4.0, 12.0)  # ... and above the noise around it, by more where noise and speech lie further apart
_FLOOR_REACH_S = 15  # the noise floor is taken from this long on both sides
_SHORTEST_S = 0.06  # of speech; a click is shorter
_PAD_S = 0.2  # kept on both sides of speech: soft onsets and endings
_PAUSE_S = 1.0  # a shorter pause does not end a window


@dataclass(frozen=True)
class Span:
    """A stretch of a recording, in seconds from its start."""

    start_s: float
    end_s: float


def find_windows(samples: np.ndarray, window_s: float, pause_s: float = _PAUSE_S) -> list[Span]:
    """The parts of a recording that may hold speech, each no longer than the model's window.

    Judged by energy alone, against the noise floor around each moment: when in doubt a part is kept, and the model's own
    no-speech probability decides. Neighbours less than a pause apart share a window; what is longer is cut where it is
    quietest. Silence gives an empty list.

    Args:
        samples: `(samples,)` at 16 kHz.
        window_s: The length of the model's window.
        pause_s: A pause this long ends a window; at least 0.4, because 0.2 s around speech are kept.
    """
    if pause_s < 2 * _PAD_S:
        raise ValueError(f"pause_s is at least {2 * _PAD_S:g} s; got {pause_s:g}.")
    if len(samples) == 0:
        return []
    levels = _levels(samples)  # (frames,) in dB
    speech = _runs(levels > _thresholds(levels), _seconds_to_frames(_SHORTEST_S))
    window = int(window_s * _FRAMES_PER_S + 1e-6)
    assert window > 1, f"a window of {window_s} s is no window"
    duration_s = len(samples) / SAMPLE_RATE
    smooth = np.convolve(levels, np.full(9, 1 / 9), mode="same") if len(levels) >= 9 else levels
    return [
        Span(start / _FRAMES_PER_S, min(end / _FRAMES_PER_S, duration_s))
        for phrase in _joined(speech, len(levels), pause_s)
        for start, end in _cut(*phrase, window, smooth)
    ]


def _seconds_to_frames(duration_s: float) -> int:
    return round(duration_s * _FRAMES_PER_S)


def _levels(samples: np.ndarray) -> np.ndarray:
    """Level of every 20 ms in dB of full scale, a constant offset left out. (samples,) -> (frames,)"""
    whole = len(samples) // _FRAME
    frames = samples[: whole * _FRAME].reshape(whole, _FRAME)
    power = np.einsum("ij,ij->i", frames, frames, dtype=np.float64) / _FRAME - frames.mean(axis=1, dtype=np.float64) ** 2
    rest = samples[whole * _FRAME :]
    if len(rest):
        power = np.append(power, rest.var(dtype=np.float64))
    return np.maximum(10 * np.log10(np.maximum(power, 1e-20)), _QUIETEST_DB)


def _thresholds(levels: np.ndarray) -> np.ndarray:
    """The level above which each frame counts as speech. (frames,) -> (frames,)"""
    second_loudest = min(_FRAMES_PER_S, len(levels) // 20)  # the loudest second, or 5 % of a short recording
    loud = np.partition(levels, -1 - second_loudest)[-1 - second_loudest]
    # A steady sound (hum, a held note, noise alone) has no floor below it: then the floor lies 10 dB under the sound, and all is kept.
    floor = np.minimum(_noise_floor(levels), loud - 10)
    margin = np.clip(0.3 * (loud - floor), *_ABOVE_FLOOR_DB)
    return np.maximum.reduce([floor + margin, np.full_like(floor, loud - _BELOW_LOUD_DB), np.full_like(floor, _SILENCE_DB)])


def _noise_floor(levels: np.ndarray) -> np.ndarray:
    """Low percentile of the levels within reach of each second, spread over its frames. (frames,) -> (frames,)"""
    seconds = -(-len(levels) // _FRAMES_PER_S)
    padded = np.pad(levels, (0, seconds * _FRAMES_PER_S - len(levels)), mode="edge")
    quiet = np.percentile(padded.reshape(seconds, _FRAMES_PER_S), 10, axis=1)  # (seconds,)
    around = np.pad(quiet, _FLOOR_REACH_S, mode="reflect" if seconds > 1 else "edge")
    floor = np.percentile(np.lib.stride_tricks.sliding_window_view(around, 2 * _FLOOR_REACH_S + 1), 10, axis=1)
    return np.repeat(floor, _FRAMES_PER_S)[: len(levels)]


def _runs(mask: np.ndarray, shortest: int) -> np.ndarray:
    """Start and end of the runs of True that are long enough. (frames,) -> (runs, 2)"""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    runs = edges.reshape(-1, 2)
    return runs[runs[:, 1] - runs[:, 0] >= shortest]


def _joined(runs: np.ndarray, num_frames: int, pause_s: float) -> Iterator[tuple[int, int]]:
    """Padded runs with a short pause between them, as one."""
    if len(runs) == 0:
        return
    pad = _seconds_to_frames(_PAD_S)
    starts, ends = np.maximum(runs[:, 0] - pad, 0), np.minimum(runs[:, 1] + pad, num_frames)
    breaks = np.flatnonzero(runs[1:, 0] - runs[:-1, 1] >= _seconds_to_frames(pause_s))
    yield from zip(starts[np.append(0, breaks + 1)].tolist(), ends[np.append(breaks, -1)].tolist(), strict=True)


def _cut(start: int, end: int, window: int, levels: np.ndarray) -> Iterator[tuple[int, int]]:
    """Pieces of a stretch, each at most a window long: cut at the quietest place of the window's second half."""
    while end - start > window:
        # The rest after the last cut keeps an eighth of a window: a shred of a word has too little context.
        latest = start + min(window, end - start - window // 8)
        earliest = start + window // 2
        candidates = levels[earliest:latest][::-1]  # backwards, so that the latest of equally quiet places wins
        middle = latest - 1 - int(candidates.argmin())
        yield start, middle
        start = middle
    yield start, end
