"""What comes in as sound comes out as the same sound at 16 kHz, or is refused in plain words; and where the speech is."""

from __future__ import annotations

import io
import time
import tracemalloc
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
import soxr
from conftest import SAMPLE_RATE, noise, silence, tone
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from whisper_moe.audio import AudioError, find_windows, load_audio


def sine(frequency: float = 440, duration_s: float = 1.0, rate: int = SAMPLE_RATE, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * frequency * np.arange(round(duration_s * rate)) / rate)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, container: str, subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=container, subtype=subtype)
    return file.getvalue()


def encoded_with_pyav(samples: np.ndarray, container: str, codec: str, rate: int = 48_000) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        for start in range(0, len(samples), 960):
            frame = av.AudioFrame.from_ndarray(samples[None, start : start + 960].astype(np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, start
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


def silent_film() -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for _ in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


def loudest_frequency(samples: np.ndarray) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * SAMPLE_RATE / len(samples))


# ---- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("container", "subtype"),
    [
        ("WAV", "PCM_16"),
        ("WAV", "PCM_U8"),
        ("WAV", "FLOAT"),
        ("FLAC", None),
        ("OGG", "VORBIS"),
        ("OGG", "OPUS"),
        ("MP3", None),
        ("AIFF", None),
    ],
)
def test_formats_of_soundfile_keep_pitch_length_and_level(container: str, subtype: str | None) -> None:
    heard = load_audio(encoded(sine(duration_s=2, rate=48_000), 48_000, container, subtype))
    assert heard.dtype == np.float32
    assert len(heard) / SAMPLE_RATE == pytest.approx(2, abs=0.1)
    assert loudest_frequency(heard) == pytest.approx(440, abs=1)
    assert heard[4000:-4000].std() == pytest.approx(0.3 / np.sqrt(2), rel=0.03)


@pytest.mark.parametrize(("container", "codec"), [("mp4", "aac"), ("webm", "libopus"), ("adts", "aac"), ("matroska", "aac")])
def test_formats_that_only_pyav_reads_keep_pitch_length_and_level(container: str, codec: str) -> None:
    samples = sine(duration_s=2, rate=48_000)
    heard = load_audio(encoded_with_pyav(samples, container, codec))
    assert len(heard) / SAMPLE_RATE == pytest.approx(2, abs=0.15)
    assert loudest_frequency(heard) == pytest.approx(440, abs=1)
    assert heard[8000:-8000].std() == pytest.approx(0.3 / np.sqrt(2), rel=0.05)


def test_path_bytes_file_object_pipe_pair_and_array_are_the_same_recording(tmp_path: Path) -> None:
    wav = encoded(sine(rate=8000), 8000, "WAV", "FLOAT")
    (tmp_path / "a.wav").write_bytes(wav)
    (tmp_path / "a.raw").write_bytes(wav)  # a name that promises samples without a header

    class Pipe(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            return wav

    expected = load_audio(wav)
    sources: list[Any] = [tmp_path / "a.wav", str(tmp_path / "a.wav"), tmp_path / "a.raw", bytearray(wav), memoryview(wav)]
    sources += [io.BytesIO(wav), Pipe(), (8000, sine(rate=8000)), (np.int64(8000), sine(rate=8000))]
    for source in sources:
        assert np.array_equal(load_audio(source), expected)
    assert np.array_equal(load_audio(expected), expected)


def test_resampling_gives_the_sine_that_was_meant() -> None:
    heard = load_audio((8000, np.stack([sine(300, 2, 8000)] * 2, axis=1)))
    assert np.abs(heard - sine(300, 2))[800:-800].max() < 1e-3


def test_reading_in_blocks_equals_resampling_at_once() -> None:
    samples = noise(25)  # three blocks
    at_once = soxr.resample(samples, 44_100, SAMPLE_RATE)
    heard = load_audio((44_100, samples))
    assert len(heard) == pytest.approx(len(at_once), abs=1)
    assert np.abs(heard[: len(at_once)] - at_once[: len(heard)]).max() < 1e-4


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_channels_are_mixed_to_their_mean(channels: int) -> None:
    parts = np.stack([sine(200 + 100 * index) for index in range(channels)], axis=1)
    assert np.allclose(load_audio(parts), parts.mean(axis=1), atol=1e-6)
    assert np.allclose(load_audio(encoded(parts, SAMPLE_RATE, "WAV", "FLOAT")), parts.mean(axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "scale", "offset"),
    [(np.int8, 2**7, 0), (np.uint8, 2**7, 128), (np.int16, 2**15, 0), (np.int32, 2**31, 0), (np.float16, 1, 0), (np.float64, 1, 0)],
)
def test_number_types_mean_the_same_sound(dtype: type, scale: int, offset: int) -> None:
    wave = sine().astype(np.float64)
    array = (wave * scale + offset).astype(dtype)
    assert np.abs(load_audio(array) - wave).max() < 2 / 2**7


def test_samples_beyond_one_are_kept() -> None:
    assert load_audio(sine(level=1.7)).max() == pytest.approx(1.7, rel=0.01)


def test_the_callers_array_is_not_changed() -> None:
    array = sine()
    before = array.copy()
    load_audio(array)[:] = 0
    assert np.array_equal(array, before)


# ---- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"", "empty"),
        (io.BytesIO(), "empty"),
        (encoded(np.zeros(0, np.float32), 8000, "WAV"), "empty"),
        (np.zeros(0, np.float32), "empty"),
        (np.zeros((0, 2), np.float32), "empty"),
        (b"Dear sir, this is a letter, not a recording. " * 50, "not a recording"),
        (bytes(range(256)) * 40, "not a recording"),
        (b"\x00" * 5000, "not a recording"),
        (silent_film(), "no sound in this file"),
        (np.array([0.0, np.nan]), "not numbers"),
        (np.array([0.0, -np.inf]), "not numbers"),
        (np.array([1e300]), "not numbers"),
        (np.full(100, 1e9, np.float32), "expected about -1 to 1"),
        (np.zeros((2, 16_000), np.float32), r"got shape \(2, 16000\)"),
        (np.zeros((2, 2, 2), np.float32), r"got shape"),
        (np.zeros(100, np.int64), "got int64"),
        (np.zeros(100, complex), "got complex"),
        (np.zeros(100, bool), "got bool"),
        ((0, np.zeros(100, np.float32)), "rate of 0 Hz"),
        ((-16_000, np.zeros(100, np.float32)), "rate of -16000 Hz"),
        ((float("nan"), np.zeros(100, np.float32)), "rate of nan Hz"),
        ((16_000, [0.0, 0.1]), "got .'int', 'list'"),
        ((16_000,), "pair"),
        (None, "got NoneType"),
        (42, "got int"),
    ],
)
def test_what_is_no_recording_is_refused_in_plain_words(source: Any, words: str) -> None:
    with pytest.raises(AudioError, match=words):
        load_audio(source)


def test_paths_that_lead_nowhere_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"no file .*gone\.wav"):
        load_audio(tmp_path / "gone.wav")
    with pytest.raises(AudioError, match="is a folder"):
        load_audio(tmp_path)
    with pytest.raises(AudioError, match="cannot be opened"):
        load_audio("a\0b.wav")


def test_a_playlist_cannot_name_another_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret.ts"
    secret.write_bytes(encoded_with_pyav(tone(300, rate=48_000), "mpegts", "aac"))
    assert len(load_audio(secret)) > 0
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1,\nfile://{secret}\n#EXT-X-ENDLIST\n")
    with pytest.raises(AudioError, match="not a recording"):
        load_audio(playlist)


@pytest.mark.parametrize("container", ["WAV", "FLAC", "OGG", "MP3"])
def test_a_recording_over_the_limit_is_refused_and_one_under_it_is_not(container: str) -> None:
    recording = encoded(noise(3), SAMPLE_RATE, container)
    with pytest.raises(AudioError, match="longer than 2 seconds"):
        load_audio(recording, max_duration_s=2)
    assert len(load_audio(recording, max_duration_s=3.5)) >= 3 * SAMPLE_RATE


def test_limits_are_told_in_hours() -> None:
    with pytest.raises(AudioError, match="longer than 2 hours"):
        load_audio((1000, np.zeros(7_300_000, np.int8)), max_duration_s=7200)


def test_a_long_file_costs_little_more_than_its_samples() -> None:
    recording = encoded((tone(300, 300, rate=8000) * 32_000).astype(np.int16), 8000, "WAV", "PCM_16")
    tracemalloc.start()
    samples = load_audio(recording)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(samples) == 300 * SAMPLE_RATE
    assert peak < 1.5 * samples.nbytes + 8e6  # the 8 MB: blocks of ten seconds


FILES = {
    "wav": encoded(tone(300), SAMPLE_RATE, "WAV"),
    "flac": encoded(tone(300), SAMPLE_RATE, "FLAC"),
    "opus": encoded(tone(300), SAMPLE_RATE, "OGG", "OPUS"),
    "mp3": encoded(tone(300), SAMPLE_RATE, "MP3"),
    "m4a": encoded_with_pyav(tone(300, rate=48_000), "mp4", "aac"),
    "webm": encoded_with_pyav(tone(300, rate=48_000), "webm", "libopus"),
}


def check_is_sound(samples: np.ndarray) -> None:
    assert samples.dtype == np.float32
    assert samples.ndim == 1
    assert len(samples) > 0
    assert np.isfinite(samples).all()


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(sorted(FILES)), data=st.data())
def test_damaged_files_are_read_or_refused_never_a_crash(kind: str, data: st.DataObject) -> None:
    broken = bytearray(FILES[kind])
    for _ in range(data.draw(st.integers(0, 8))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    del broken[data.draw(st.integers(0, len(broken))) :]
    with suppress(AudioError):
        check_is_sound(load_audio(bytes(broken), max_duration_s=60))


SOUND_TYPES = [np.int8, np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64, np.bool_]


@settings(max_examples=150, deadline=None)
@given(
    array=st.sampled_from(SOUND_TYPES).flatmap(lambda dtype: arrays(dtype, array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40))),
    rate=st.one_of(st.integers(-10, 200_000), st.floats(allow_nan=True)),
)
def test_any_array_is_sound_or_is_refused(array: np.ndarray, rate: float) -> None:
    with suppress(AudioError):
        samples = load_audio((rate, array))
        check_is_sound(samples)
        assert all(0 <= span.start_s < span.end_s for span in find_windows(samples, 2.0))


# ---- windows -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "quiet",
    [silence(3), silence(3) + 0.5, noise(3, 1e-5), np.round(noise(3, 2e-5) * 2**15).astype(np.float32) / 2**15, silence(0), silence(0.01)],
    ids=["zeros", "constant offset", "faint hiss", "last bit flickering", "nothing", "ten milliseconds"],
)
def test_silence_has_no_windows(quiet: np.ndarray) -> None:
    assert find_windows(quiet, 2.0) == []


@pytest.mark.parametrize("hiss", [0.0, 0.001, 0.01], ids=["clean", "quiet room", "loud room"])
@pytest.mark.parametrize("level", [0.5, 0.05])
def test_speech_is_found_where_it_is(hiss: float, level: float) -> None:
    hiss *= 2 * level
    sound = np.concatenate([silence(3), tone(300, 1.5, level), silence(4), tone(500, 2.0, level), silence(20)])
    found = find_windows(sound + noise(len(sound) / SAMPLE_RATE, hiss), 10.0)
    assert [(span.start_s, span.end_s) for span in found] == [
        (pytest.approx(2.9, abs=0.2), pytest.approx(4.6, abs=0.2)),
        (pytest.approx(8.4, abs=0.2), pytest.approx(10.6, abs=0.2)),
    ]


def test_short_pauses_share_a_window_and_long_ones_part() -> None:
    bursts = [tone(300, 1.0), silence(0.7), tone(300, 1.0), silence(1.5), tone(300, 1.0)]
    assert len(find_windows(np.concatenate(bursts), 10.0)) == 2


def test_a_long_stretch_is_cut_in_its_pause() -> None:
    sound = np.concatenate([tone(300, 7.0), silence(0.4), tone(300, 6.0)])
    first, second = find_windows(sound, 10.0)
    assert first.end_s == second.start_s
    assert 7.0 <= first.end_s <= 7.4


def test_steady_sound_without_any_pause_is_kept_whole() -> None:
    found = find_windows(sine(duration_s=25), 10.0)
    assert found[0].start_s == 0
    assert found[-1].end_s == 25
    assert all(before.end_s == after.start_s for before, after in pairwise(found))


def test_a_click_is_no_speech() -> None:
    sound = silence(5)
    sound[30_000:30_200] = 0.9
    assert find_windows(sound, 10.0) == []


def test_a_few_words_in_a_long_silence_are_found_however_long_it_is() -> None:
    sound = np.concatenate([silence(400), tone(300, 2.0), silence(200)]) + noise(602, 0.0005)
    (span,) = find_windows(sound, 10.0)
    assert span.start_s == pytest.approx(399.8, abs=0.2)
    assert span.end_s == pytest.approx(402.2, abs=0.2)


@settings(max_examples=60, deadline=None)
@given(
    window_s=st.sampled_from([2.0, 10.0, 30.0]),
    parts=st.lists(st.tuples(st.floats(0.2, 12), st.floats(0.05, 3)), min_size=1, max_size=6),
    hiss=st.sampled_from([0.0, 0.002]),
)
def test_windows_are_in_order_fit_the_model_and_hold_all_speech(window_s: float, parts: list[tuple[float, float]], hiss: float) -> None:
    sound = np.concatenate([np.concatenate([tone(300, spoken_s), silence(pause_s)]) for spoken_s, pause_s in parts])
    duration_s = len(sound) / SAMPLE_RATE
    found = find_windows(sound + noise(duration_s, hiss)[: len(sound)], window_s)
    assert all(0 <= span.start_s < span.end_s <= duration_s for span in found)
    assert all(span.end_s - span.start_s <= window_s + 1e-6 for span in found)
    assert all(before.end_s <= after.start_s for before, after in pairwise(found))
    start_s = 0.0
    for spoken_s, pause_s in parts:
        middle = start_s + spoken_s / 2
        assert any(span.start_s <= middle <= span.end_s for span in found)
        start_s += round(spoken_s * SAMPLE_RATE) / SAMPLE_RATE + round(pause_s * SAMPLE_RATE) / SAMPLE_RATE


def test_an_hour_is_searched_in_a_moment() -> None:
    hour = np.tile(np.concatenate([tone(300, 7.0), silence(5.0)]), 300)
    started = time.process_time()
    found = find_windows(hour, 30.0)
    assert time.process_time() - started < 3
    assert len(found) == 300
