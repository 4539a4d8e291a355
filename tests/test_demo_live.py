"""Live transcription and the picture of a mixture's gates: the logic with a clock and a transcriber of the test's own, then the real ones.

The truth for a live text is its pieces, each written alone; for how sound is cut, the same sound given in one go.
"""

from __future__ import annotations

import base64
import copy
import itertools
import json
import threading
import time
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pysubs2
import pytest
import soxr
from browser import (
    DESKTOP,
    EXAMPLES,
    PHONE,
    READABLE,
    ROWS,
    Window,
    answer,
    character_errors,
    click_example,
    save_picture,
    serious_findings,
    served,
)
from conftest import silence, tone
from hypothesis import example, given, settings
from hypothesis import strategies as st

from demo import heatmap, live_tab, views_live
from demo.live import MOST_AT_A_TIME_S, MOST_BEHIND_S, Live, LivePiece, LiveSession, LiveSessions
from demo.pieces import LONGEST_S, Pieces
from whisper_moe import Transcript, load_audio
from whisper_moe.audio import SAMPLE_RATE
from whisper_moe.explain import explain
from whisper_moe.gate_map import GateMap

WINDOW_S = 10.0
CALL_S = 0.2  # what the fake transcriber takes, by the fake clock
LANGUAGES = {200: "en", 300: "de", 400: "cy"}  # the fake transcriber hears the language in the pitch


def transcript(text: str, probabilities: dict[str, float], language: str | None, duration_s: float) -> Transcript:
    return Transcript(
        text=text,
        segments=(),
        language=language,
        language_name="" if language is None else language,
        probability=probabilities.get(language),
        probabilities=probabilities,
        no_speech=0.0,
        adapter="cy" if language == "cy" else None,
        adapter_info=None,
        reason="",
        warnings=(),
        duration_s=duration_s,
        model="fake",
        elapsed_s=CALL_S,
    )


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class FakeTranscriber:
    """Writes the pitch and the length of a sound; the pitch is the language, `doubt` what goes to English instead."""

    window_s = WINDOW_S

    def __init__(self, clock: Clock | None = None, call_s: float = CALL_S, doubt: float = 0.01) -> None:
        self.clock, self.call_s, self.doubt = clock or Clock(), call_s, doubt
        self.calls: list[tuple[float, str | None]] = []

    def transcribe(self, samples, *, language, on_progress):
        on_progress(0.0, "at work")
        self.clock.now += self.call_s
        self.calls.append((len(samples) / SAMPLE_RATE, language))
        spectrum = np.abs(np.fft.rfft(samples))
        pitch = round(float(spectrum.argmax()) * SAMPLE_RATE / len(samples) / 100) * 100
        if spectrum.max() < 1 or pitch not in LANGUAGES:
            return transcript("", {}, None, len(samples) / SAMPLE_RATE)
        heard = LANGUAGES[pitch]
        probabilities = {"en": 1.0} if heard == "en" else {heard: 1 - self.doubt, "en": self.doubt}
        written = language or max(probabilities, key=probabilities.__getitem__)
        text = f"{written} {pitch} for {len(samples) / SAMPLE_RATE:.1f}"
        return transcript(text, {} if language else probabilities, written, len(samples) / SAMPLE_RATE)


def speech(*parts: tuple[int, float]) -> np.ndarray:
    """Tones (pitch, seconds), 0 for silence."""
    return np.concatenate([silence(seconds) if pitch == 0 else tone(pitch, seconds) for pitch, seconds in parts])


def listen(session: LiveSession, clock: Clock, samples: np.ndarray, chunk_s: float = 0.5) -> list[Live]:
    """Give sound as fast as it is spoken to a session that works whenever the clock says it has the time. What was to be seen, by turns."""
    seen, step = [], round(chunk_s * SAMPLE_RATE)
    now = clock.now  # when the sound is there; the clock may be ahead of it, when the machine was slower
    for start in range(0, len(samples), step):
        now += chunk_s
        session.hear(SAMPLE_RATE, samples[start : start + step])
        clock.now = max(clock.now, now) if clock.now <= now else clock.now
        while clock.now <= now and session.work():
            pass
        seen.append(session.look())
    return seen


def work_off(session: LiveSession) -> Live:
    session.finish()
    while session.work():
        pass
    return session.look()


# ---- cutting -----------------------------------------------------------------------------------------------------------

SOUND = speech(
    (0, 0.7), (200, 2.3), (0, 0.9), (300, 0.4), (0, 0.6), (300, 1.9), (0, 3.0), (400, 8.0), (0, 0.25), (400, 7.0), (0, 1.0), (200, 0.3)
)


def cut(pieces: Pieces, chunks, rate=SAMPLE_RATE):
    return [piece for chunk in chunks for piece in pieces.add(rate, chunk)] + pieces.finish()


@given(st.lists(st.integers(1, 40_000), min_size=1, max_size=30))
@example([1600] * 450)
@settings(max_examples=10, deadline=None)
def test_how_the_sound_is_chopped_makes_no_difference(sizes):
    # a short word is over when nothing follows for a while: the next one comes just then
    sound = np.concatenate([SOUND, speech((0, 1.6), (300, 2.0), (0, 1.6), (200, 0.4), (0, 1.65), (300, 1.5), (0, 2.0))])
    places = [0, *itertools.accumulate(sizes)]
    chunks = [sound[a:b] for a, b in itertools.pairwise([p for p in places if p < len(sound)] + [len(sound)])]
    found, expected = cut(Pieces(WINDOW_S), chunks), cut(Pieces(WINDOW_S), [sound])
    assert [(piece.start_s, piece.end_s) for piece in found] == [(piece.start_s, piece.end_s) for piece in expected]
    assert all(np.array_equal(a.samples, b.samples) for a, b in zip(found, expected, strict=True))


def test_pieces_are_in_order_hold_all_that_was_said_and_fit_the_window():
    found = cut(Pieces(WINDOW_S), np.array_split(SOUND, 60))
    assert all(0 < piece.duration_s <= WINDOW_S for piece in found)
    assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(found))
    taken = np.zeros(len(SOUND), bool)
    for piece in found:
        place = slice(round(piece.start_s * SAMPLE_RATE), round(piece.end_s * SAMPLE_RATE))
        assert np.array_equal(piece.samples, SOUND[place])
        taken[place] = True
    assert np.abs(SOUND[~taken]).max() < 0.02, "a loud sample was lost"
    # the first sentence; the short word with the one that follows soon; a long one in two, where it is quiet; the last word
    assert len(found) == 5


def test_sound_of_another_rate_in_two_channels_and_integers_gives_the_same_pieces():
    expected = cut(Pieces(WINDOW_S), [SOUND])
    at_48k = soxr.resample(SOUND, SAMPLE_RATE, 48_000)
    stereo = (np.stack([at_48k, at_48k], axis=1) * 32767).astype(np.int16)
    found = cut(Pieces(WINDOW_S), np.array_split(stereo, 77), 48_000)
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.start_s == pytest.approx(theirs.start_s, abs=0.05)
        assert ours.end_s == pytest.approx(theirs.end_s, abs=0.05)


def test_a_piece_is_given_soon_after_its_end_and_not_before():
    pieces = Pieces(WINDOW_S)
    sound = speech((0, 0.5), (200, 2.0), (0, 2.0))
    given_at = next(n * 0.1 for n in range(45) if pieces.add(SAMPLE_RATE, sound[n * 1600 : (n + 1) * 1600]))
    assert 2.5 + 0.4 <= given_at <= 2.5 + 1.0


def test_hours_of_silence_and_of_speech_are_not_kept():
    pieces = Pieces(WINDOW_S)
    for part in (silence(60), tone(200, 60), silence(60)):
        for chunk in np.array_split(part, 60):
            pieces.add(SAMPLE_RATE, chunk)
            assert len(pieces._sound) <= (10 + LONGEST_S + 2) * SAMPLE_RATE
    assert pieces.total_s == pytest.approx(180)


def test_what_is_no_sound_is_refused():
    pieces = Pieces(WINDOW_S)
    with pytest.raises(ValueError, match="sample rate of 12 Hz"):
        pieces.add(12, tone(200))
    with pytest.raises(ValueError, match="not numbers"):
        pieces.add(SAMPLE_RATE, np.array([np.nan, 1], np.float32))
    assert pieces.add(SAMPLE_RATE, np.zeros(0, np.int16)) == []
    assert pieces.total_s == 0


# ---- a session ---------------------------------------------------------------------------------------------------------


def test_a_finished_piece_is_written_once_and_a_preview_comes_before_it():
    clock = Clock()
    transcriber = FakeTranscriber(clock)
    session = LiveSession(transcriber, clock=clock)
    seen = listen(session, clock, speech((0, 0.5), (200, 4.0), (0, 1.0), (300, 3.0), (0, 1.0)))
    assert [live.preview.language for live in seen if live.preview] != []
    first = next(n for n, live in enumerate(seen) if live.pieces)
    assert any(live.preview for live in seen[:first]), "nothing was to be seen while the first sentence was spoken"
    assert all(a.pieces == b.pieces[: len(a.pieces)] for a, b in itertools.pairwise(seen)), "what was written has changed"
    end = work_off(session)
    assert [(piece.language, piece.text.split()[1]) for piece in end.pieces] == [("en", "200"), ("de", "300")]
    assert end.preview is None
    assert (end.is_listening, end.is_working) == (False, False)


@pytest.mark.parametrize(("seconds", "expected"), [(1.0, "en"), (6.0, "cy")])
def test_a_change_of_language_needs_evidence(seconds, expected):
    clock = Clock()
    transcriber = FakeTranscriber(clock, doubt=0.2)  # 80 % Welsh: not enough for one short piece among English ones
    session = LiveSession(transcriber, clock=clock)
    listen(session, clock, speech((200, 3.0), (0, 1.0), (400, seconds), (0, 1.7), (400, seconds), (0, 1.7)))
    end = work_off(session)
    assert [piece.language for piece in end.pieces][-1] == expected
    assert end.pieces[-1].text.startswith(expected), "it was not written in the language that it is said to be"


def test_a_given_language_is_not_detected():
    clock = Clock()
    transcriber = FakeTranscriber(clock)
    session = LiveSession(transcriber, clock=clock)
    session.hear(SAMPLE_RATE, speech((300, 2.0), (0, 1.0)), "cy")
    end = work_off(session)
    assert {language for _, language in transcriber.calls} == {"cy"}
    assert (end.pieces[0].language, end.pieces[0].probability, end.pieces[0].adapter) == ("cy", None, "cy")


def test_a_slow_machine_drops_previews_first_and_then_says_how_far_behind_it_is():
    sentences = speech(*[(200, 2.5), (0, 1.0)] * 8)
    previews, delays = {}, {}
    for call_s in (0.1, 2.5, 6.0):
        clock = Clock()
        transcriber = FakeTranscriber(clock, call_s)
        session = LiveSession(transcriber, clock=clock)
        seen = listen(session, clock, sentences)
        previews[call_s] = sum(length < 2.5 for length, _ in transcriber.calls)
        delays[call_s] = max(live.behind_s for live in seen)
        assert len(work_off(session).pieces) == 8, "everything is written in the end"
        assert session.look().behind_s == 0
    assert previews[0.1] >= 8 > previews[2.5] >= previews[6.0]
    assert delays[0.1] == delays[2.5] == 0
    assert delays[6.0] > 8, "six seconds for a sentence of three and a half: it falls behind by more than two a sentence"


def test_previews_take_half_of_the_time_at_most():
    clock = Clock()
    transcriber = FakeTranscriber(clock, call_s=0.8)
    listen(LiveSession(transcriber, clock=clock), clock, tone(200, 9.5), chunk_s=0.1)
    assert 3 <= len(transcriber.calls) <= 0.5 * 9.5 / 0.8 + 1


def test_sound_that_nobody_can_write_in_time_is_not_piled_up():
    clock = Clock()
    session = LiveSession(FakeTranscriber(clock), clock=clock, max_duration_s=3600)
    for _ in range(80):
        session.hear(SAMPLE_RATE, speech((200, 3.0), (0, 1.0)))
    seen = session.look()
    assert not seen.is_listening
    assert seen.heard_s < MOST_BEHIND_S * 2
    assert "seconds behind" in seen.notes[0]
    end = work_off(session)
    assert sum(piece.end_s - piece.start_s for piece in end.pieces) > MOST_BEHIND_S * 0.9, "what was taken is written"


def test_a_session_has_a_longest_duration():
    clock = Clock()
    session = LiveSession(FakeTranscriber(clock), clock=clock, max_duration_s=60)
    seen = listen(session, clock, speech(*[(200, 2.5), (0, 1.0)] * 30))
    assert seen[-1].heard_s <= 61
    assert seen[-1].notes == ("Recording stopped: 1 minutes is the most that is taken. Clear begins anew.",)


def test_of_more_sound_than_there_is_room_for_only_that_much_is_taken():
    session = LiveSession(FakeTranscriber(), clock=Clock(), max_duration_s=10)
    session.hear(48_000, np.tile(tone(200, 1.0), 7 * 3))
    session.hear(48_000, np.tile(tone(200, 1.0), 7 * 3))
    seen = session.look()
    assert seen.heard_s == pytest.approx(10, abs=0.05), "the resampler holds a little back"
    assert not seen.is_listening
    assert "is the most that is taken" in seen.notes[0]


@pytest.mark.parametrize(("rate", "seconds"), [(1_000, 1), (7_999, 1), (192_001, 1), (16_000, MOST_AT_A_TIME_S + 1)])
def test_what_no_microphone_sends_is_refused_before_it_costs_anything(rate, seconds, monkeypatch):
    monkeypatch.setattr(Pieces, "add", lambda *_: pytest.fail("it was worked on"))
    sessions = LiveSessions(FakeTranscriber())
    for hear in (lambda *sound: sessions.hear("a", *sound), LiveSession(FakeTranscriber()).hear):
        with pytest.raises(ValueError, match=r"sample rate|too much sound"):
            hear(rate, np.zeros(round(rate * seconds), np.int16))
    assert len(sessions) == 0


def test_a_minute_of_sound_at_a_time_is_taken_whole():
    session = LiveSession(FakeTranscriber(), clock=Clock())
    session.hear(SAMPLE_RATE, silence(MOST_AT_A_TIME_S))
    assert session.look().heard_s == MOST_AT_A_TIME_S


def test_no_sound_does_not_begin_the_listening():
    session = LiveSession(FakeTranscriber(), clock=Clock())
    session.hear(SAMPLE_RATE, np.zeros(0, np.int16))
    assert not session.look().is_listening
    assert session.is_over


def test_a_microphone_whose_sound_is_long_on_its_way_is_not_taken_for_gone():
    clock = Clock()
    transcriber = FakeTranscriber(clock)
    session = LiveSession(transcriber, clock=clock)
    listen(session, clock, speech((200, 2.0)))
    for _ in range(10):
        clock.now += 1
        session.still_on()
        session.work()
    assert session.look().is_listening
    listen(session, clock, tone(200, 1.0))
    end = work_off(session)
    assert [piece.end_s - piece.start_s for piece in end.pieces] == [pytest.approx(3.0, abs=0.3)], "the sentence was cut"


def test_a_microphone_that_goes_away_ends_the_listening_and_one_that_comes_back_goes_on():
    clock = Clock()
    session = LiveSession(FakeTranscriber(clock), clock=clock)
    listen(session, clock, speech((200, 2.0)))
    assert session.look().is_listening
    clock.now += 4
    while session.work():
        pass
    assert [piece.text for piece in session.look().pieces] == ["en 200 for 2.0"]
    assert session.is_over
    listen(session, clock, speech((0, 0.5), (300, 2.0)))
    assert [piece.language for piece in work_off(session).pieces] == ["en", "de"]


def test_noise_and_silence_write_nothing():
    clock = Clock()
    session = LiveSession(FakeTranscriber(clock), clock=clock)
    listen(session, clock, np.concatenate([silence(3.0), tone(700, 2.0), silence(1.0)]))
    end = work_off(session)
    assert (end.pieces, end.preview, end.notes) == ((), None, ())
    with pytest.raises(ValueError, match="Nothing was written"):
        session.transcript()


def test_a_piece_that_cannot_be_written_is_said_and_the_next_one_is_written():
    class Refuses(FakeTranscriber):
        def transcribe(self, samples, **options):
            if not self.calls:
                self.calls.append((0, None))
                raise ValueError("The adapter 'cy' is gone.")
            return super().transcribe(samples, **options)

    session = LiveSession(Refuses(), clock=Clock())
    session.hear(SAMPLE_RATE, speech((200, 2.0), (0, 1.0), (300, 2.0)))
    end = work_off(session)
    assert [piece.language for piece in end.pieces] == ["de"]
    assert end.notes == ("A piece could not be written: The adapter 'cy' is gone.",)


def test_the_whole_is_a_transcript_with_a_segment_for_each_piece():
    clock = Clock()
    session = LiveSession(FakeTranscriber(clock), clock=clock)
    listen(session, clock, speech((400, 4.0), (0, 1.0), (200, 2.0), (0, 1.0)))
    pieces = work_off(session).pieces
    found = session.transcript()
    assert found.text == " ".join(piece.text for piece in pieces)
    assert [(s.start_s, s.end_s, s.language, s.adapter) for s in found.segments] == [
        (round(p.start_s, 2), round(p.end_s, 2), p.language, p.adapter) for p in pieces
    ]
    assert (found.language, found.adapter) == ("cy", "cy")
    assert found.probability == pytest.approx(0.99)
    assert "Welsh 4." in found.reason
    assert "English 2." in found.reason
    assert found.duration_s == 8.0


class UnsureOfShort(FakeTranscriber):
    """Hears Welsh, short pieces with less than it takes for the adapter; long ones the surer, the longer they are."""

    def transcribe(self, samples, **options):
        seconds = len(samples) / SAMPLE_RATE
        found = super().transcribe(samples, **options)
        if not found.probabilities:
            return found
        share = 0.4 if seconds < 2 else 0.6 if seconds < 4 else 0.9
        row = {"cy": share, "de": (1 - share) / 2, "en": (1 - share) / 2}
        info = {"name": "cy", "peft_type": "S2LORA"}
        base = {"adapter": None, "adapter_info": None, "fallback": "below-threshold"}
        adapter = {"adapter": "cy", "adapter_info": info, "fallback": None}
        return replace(
            found, language="cy", language_name="Welsh", probability=share, probabilities=row, **(base if seconds < 2 else adapter)
        )


@pytest.mark.parametrize("order", [(5.0, 3.0, 1.2), (1.2, 3.0, 5.0), (5.0, 1.2, 3.0)])
def test_the_decision_about_the_whole_is_that_of_most_seconds(order):
    session = LiveSession(UnsureOfShort(), clock=Clock())
    session.hear(SAMPLE_RATE, speech(*[part for seconds in order for part in ((400, seconds), (0, 2.0))]))
    pieces = work_off(session).pieces
    assert sorted((piece.adapter or "", piece.probability) for piece in pieces) == [("", 0.4), ("cy", 0.6), ("cy", 0.9)]
    found = session.transcript()
    lengths = {piece.probability: piece.end_s - piece.start_s for piece in pieces}
    mean = (0.6 * lengths[0.6] + 0.9 * lengths[0.9]) / (lengths[0.6] + lengths[0.9])
    assert (found.adapter, found.fallback, found.adapter_info["name"]) == ("cy", None, "cy")
    assert found.probability == pytest.approx(mean)
    assert found.probabilities == {"cy": pytest.approx(mean), **dict.fromkeys(("de", "en"), pytest.approx((1 - mean) / 2))}
    said = explain(found).sentence
    assert f"Welsh {100 * mean:.0f} %" in said
    assert "adapter cy" in said
    assert "too unsure" not in said


def test_an_unsure_whole_says_that_the_base_wrote_and_why():
    session = LiveSession(UnsureOfShort(), clock=Clock())
    session.hear(SAMPLE_RATE, speech(*[(400, 1.2), (0, 2.0)] * 4, (400, 2.5)))
    work_off(session)
    found = session.transcript()
    assert (found.adapter, found.adapter_info, found.probability) == (None, None, pytest.approx(0.4))
    assert "too unsure for an adapter" in explain(found).sentence


# ---- all sessions ------------------------------------------------------------------------------------------------------


class Waits(FakeTranscriber):
    """Answers when it is let to, and looks up whether it is still wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.let_go = threading.Event(), threading.Event()

    def transcribe(self, samples, **options):
        self.begun.set()
        while not self.let_go.wait(0.01):
            options["on_progress"](0.5, "still at it")
        return super().transcribe(samples, **options)


def until(condition, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_visitor_has_a_session_that_works_by_itself():
    sessions = LiveSessions(FakeTranscriber())
    sessions.hear("a", SAMPLE_RATE, speech((200, 2.0), (0, 1.0)))
    sessions.hear("b", SAMPLE_RATE, speech((300, 2.0), (0, 1.0)))
    for key, language in (("a", "en"), ("b", "de")):
        session = sessions.get(key)
        session.finish()
        until(lambda session=session: session.is_over)
        assert [piece.language for piece in session.look().pieces] == [language]
    assert sessions.get("c") is None


def test_clear_ends_work_that_is_under_way_and_forgets_what_was_said():
    transcriber = Waits()
    sessions = LiveSessions(transcriber)
    session = sessions.hear("a", SAMPLE_RATE, speech((200, 2.0), (0, 1.0)))
    assert transcriber.begun.wait(10)
    sessions.forget("a")
    until(lambda: session.is_over)
    assert transcriber.calls == []
    assert sessions.get("a") is None
    assert len(sessions) == 0


def test_one_visitor_too_many_is_refused_until_another_has_stopped():
    transcriber = Waits()
    sessions = LiveSessions(transcriber, at_once=2)
    for key in "ab":
        sessions.hear(key, SAMPLE_RATE, speech((200, 2.0), (0, 1.0)))
    with pytest.raises(ValueError, match="2 people are speaking"):
        sessions.hear("c", SAMPLE_RATE, tone(200))
    sessions.hear("a", SAMPLE_RATE, tone(200))  # who speaks already may go on
    transcriber.let_go.set()
    first = sessions.get("a")
    first.finish()
    until(lambda: first.is_over)
    sessions.hear("c", SAMPLE_RATE, tone(200))
    for key in "abc":
        sessions.forget(key)


def test_sessions_that_nobody_uses_are_forgotten():
    clock = Clock()
    sessions = LiveSessions(FakeTranscriber(clock), clock=clock, kept=3)
    for key in "abcd":  # one more than are kept
        sessions.hear(key, SAMPLE_RATE, silence(0.1)).finish()
    assert len(sessions) == 3
    assert sessions.get("a") is None
    clock.now += 3600
    sessions.hear("e", SAMPLE_RATE, silence(0.1)).finish()
    assert len(sessions) == 1


def test_a_session_is_forgotten_when_somebody_looks_for_it_too_late():
    clock = Clock()
    sessions = LiveSessions(FakeTranscriber(clock), clock=clock)
    sessions.hear("a", SAMPLE_RATE, silence(0.1)).finish()
    clock.now += 3600
    assert sessions.get("a") is None
    assert len(sessions) == 0


def test_what_the_last_visitor_said_is_forgotten_with_nobody_there():
    clock = Clock()
    sessions = LiveSessions(FakeTranscriber(clock), clock=clock, sweep_every_s=0.01)
    for _ in range(2):  # whoever comes after an empty time is watched over again
        sessions.hear("a", SAMPLE_RATE, silence(0.1)).finish()
        time.sleep(0.05)
        assert len(sessions) == 1
        clock.now += 3600
        until(lambda: len(sessions) == 0)
        until(lambda: not any(thread.name == "live sweeper" for thread in threading.enumerate() if thread is sessions._sweeper))


class Stuck:
    """Has the sound of a certain length take as long as the test likes."""

    def __init__(self, monkeypatch, length: int) -> None:
        self.num_inside, self.let_go = 0, threading.Event()
        add = Pieces.add

        def slow(pieces, rate, samples):
            if len(samples) == length:
                self.num_inside += 1
                assert self.let_go.wait(10)
            return add(pieces, rate, samples)

        monkeypatch.setattr(Pieces, "add", slow)


def test_a_visitor_whose_sound_takes_long_holds_nobody_else_up(monkeypatch):
    stuck = Stuck(monkeypatch, 777)
    sessions = LiveSessions(FakeTranscriber(), kept=2)
    sessions.hear("slow", SAMPLE_RATE, silence(0.1))
    threads = [threading.Thread(target=sessions.hear, args=("slow", SAMPLE_RATE, np.zeros(777, np.float32))) for _ in range(2)]
    for thread in threads:
        thread.start()
    until(lambda: stuck.num_inside)
    time.sleep(0.05)  # the second one waits for the first
    threads.append(threading.Thread(target=sessions.forget, args=("slow",)))
    threads[-1].start()
    others_are_served = threading.Event()

    def others():
        for key in "bcd":
            sessions.hear(key, SAMPLE_RATE, silence(0.1)).finish()
            sessions.get(key)
        others_are_served.set()

    threading.Thread(target=others).start()
    in_time = others_are_served.wait(2)
    stuck.let_go.set()
    for thread in threads:
        thread.join(10)
    assert in_time, "they had to wait"


def test_who_comes_at_the_same_time_does_not_get_past_the_limit(monkeypatch):
    stuck = Stuck(monkeypatch, 777)
    sessions = LiveSessions(FakeTranscriber(), at_once=2)
    sound = np.zeros(777, np.float32)
    threads = [threading.Thread(target=sessions.hear, args=(key, SAMPLE_RATE, sound)) for key in "ab"]
    for thread in threads:
        thread.start()
    until(lambda: stuck.num_inside == 2)
    with pytest.raises(ValueError, match="2 people are speaking"):
        sessions.hear("c", SAMPLE_RATE, sound)
    stuck.let_go.set()
    for thread in threads:
        thread.join(10)
    assert len(sessions) == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_crash_is_said_and_does_not_end_the_session():
    class Crashes(FakeTranscriber):
        def transcribe(self, samples, **options):
            self.calls.append((0, None))
            if len(self.calls) == 1:
                raise RuntimeError("out of memory")
            return super().transcribe(samples, **options)

    sessions = LiveSessions(Crashes())
    session = sessions.hear("a", SAMPLE_RATE, speech((200, 2.0), (0, 1.0)))
    until(lambda: session.look().notes)
    session.hear(SAMPLE_RATE, speech((300, 2.0), (0, 1.0)))
    session.finish()
    until(lambda: sessions.get("a").is_over)  # looking at it gets the work going again
    assert "a piece of what you said is missing" in session.look().notes[0]
    assert [piece.language for piece in session.look().pieces] == ["de"]


# ---- on the page -------------------------------------------------------------------------------------------------------

PIECE = LivePiece(1.0, 3.5, "<b>Bore da</b>", "cy", 0.98, "cy")


def test_what_was_said_is_shown_as_words_and_not_as_html():
    shown = views_live.live(Live(pieces=(PIECE,), preview=replace(PIECE, text="a <i>", adapter="<x>"), heard_s=4.0, is_listening=True))
    assert "&lt;b&gt;Bore da&lt;/b&gt;" in shown
    assert "a &lt;i&gt;" in shown
    assert "&lt;x&gt;" in shown
    assert "Welsh 98\u00a0%" in shown
    assert "now in Welsh" in shown
    assert "still being said" in shown
    assert 'lang="cy"' in shown
    assert 'dir="auto"' in shown


@pytest.mark.parametrize(
    ("seen", "said"),
    [
        (None, "Press Record and speak"),
        (Live(is_listening=True, heard_s=0.5), "I am listening"),
        (Live(heard_s=3.0), "No speech was heard"),
        (Live(pieces=(PIECE,), heard_s=9.0, behind_s=12.2, is_listening=True), "12 seconds behind"),
        (Live(pieces=(PIECE,), heard_s=9.0, is_working=True), "Writing the rest"),
        (Live(pieces=(PIECE,), heard_s=9.0), "Done"),
        (Live(notes=("Too <long>.",)), "Too &lt;long&gt;."),
    ],
)
def test_the_page_says_how_it_stands(seen, said):
    assert said in views_live.live(seen)


KEY = "0123456789abcdef" * 2


def sent(samples: np.ndarray, **more) -> dict:
    sound = base64.b64encode((samples * 32767).astype("<i2").tobytes()).decode()
    return {"key": KEY, "rate": SAMPLE_RATE, "sound": sound, "language": "auto"} | more


def test_what_the_recorder_sends_is_heard_and_written():
    server = live_tab.LiveServer(LiveSessions(FakeTranscriber()))
    hear, still_on, finish, clear = server.functions()
    assert still_on({"key": KEY}) == {}, "nobody has spoken yet"
    sound = speech((200, 2.0), (0, 1.0), (300, 2.0))
    for chunk in np.array_split(sound, 7):
        assert "Listening" in hear(sent(chunk))["html"]
    until(lambda: finish({"key": KEY})["over"])
    answer = finish({"key": KEY})["html"]
    assert "en 200" in answer
    assert "de 300" in answer
    assert server.session(KEY).look().heard_s == len(sound) / SAMPLE_RATE, "some of the sound was lost"
    assert "de 300" in still_on({"key": KEY})["html"]
    assert clear({"key": KEY})["html"] == views_live.live(None)
    assert finish({"key": KEY}) == {"html": views_live.live(None), "over": True}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"key": "me"}, "not known here"),
        ({"key": None}, "not known here"),
        ({"rate": "fast"}, "sample rate"),
        ({"rate": float("nan")}, "sample rate"),
        ({"rate": 3}, "sample rate of 3 Hz"),
        ({"sound": "no sound!"}, "no sound"),
        ({"sound": "AA=="}, "no sound"),
        ({"sound": None}, "too much sound at a time, or none"),
        ({"sound": ""}, "too much sound at a time, or none"),
        ({"sound": "A" * (4 * 61 * 16000 * 2 // 3)}, "too much sound"),
        ({"language": ["cy"]}, "language"),
    ],
    ids=["name", "no key", "word", "nan", "rate", "letters", "half a sample", "nothing", "empty", "too much", "list"],
)
def test_what_no_recorder_would_send_is_refused_in_words(wrong, said):
    server = live_tab.LiveServer(LiveSessions(FakeTranscriber()))
    answer = server.functions()[0](sent(tone(200, 0.1)) | wrong)
    assert said in answer["problem"]


@pytest.mark.parametrize("wrong", [{"key": "me"}, {"key": 5}, {}, "x", None, [1]], ids=repr)
def test_every_call_of_a_stranger_is_answered_in_words(wrong):
    for function in live_tab.LiveServer(LiveSessions(FakeTranscriber())).functions():
        assert "not known here" in function(wrong)["problem"], function.__name__


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\u05e9\u05dc\u05d5\u05dd, world", True),
        ("12. \u0645\u0631\u062d\u0628\u0627", True),
        ("Hello, \u05e9\u05dc\u05d5\u05dd", False),
        ("... 5!", False),
        ("", False),
    ],
)
def test_the_whole_text_runs_as_its_first_letter_does(text, expected):
    assert live_tab.runs_to_the_left(text) == expected


# ---- the picture of the gates ------------------------------------------------------------------------------------------


def over_time(num_steps: int = 30, experts: tuple[str, ...] = ("cy", "qug")) -> GateMap:
    """Steps of 0.1 s from 0.5 s on, with a gap of a second in the middle; the first expert fades into the second."""
    starts = 0.5 + 0.1 * np.arange(num_steps)
    starts[num_steps // 2 :] += 1.0
    share = np.linspace(1, 0, num_steps)
    return GateMap(experts, np.stack([starts, starts + 0.1], axis=1), np.stack([share, 1 - share], axis=1), True)


def picture(html: str) -> ElementTree.Element:
    begin, end = html.index("<svg"), html.index("</svg>") + len("</svg>")
    return ElementTree.fromstring(html[begin:end])


def test_every_cell_of_the_picture_is_a_gate_at_its_time():
    found = over_time()
    svg = picture(heatmap.figure_html(found))
    cells = [cell for cell in svg.iter("rect") if "fill-opacity" in cell.attrib]
    assert len(cells) == 2 * 30
    order = sorted(found.experts, key=lambda expert: -found.shares[expert])
    for cell in cells:
        x, y, opacity = (float(cell.get(key)) for key in ("x", "y", "fill-opacity"))
        step = int(np.abs(found.times_s[:, 0] - 0.5 - x).argmin())
        assert opacity == pytest.approx(found.weights[step, found.experts.index(order[int(y)])], abs=0.006)
    assert float(svg.get("viewBox").split()[2]) == pytest.approx(4.0)


def test_a_long_recording_is_drawn_in_few_cells_whose_means_are_those_of_the_gates():
    found = over_time(6000)
    times, weights = heatmap._coarser(found.times_s, found.weights, heatmap.MOST_COLUMNS)
    assert len(times) <= heatmap.MOST_COLUMNS
    assert times[0, 0] == found.times_s[0, 0]
    assert times[-1, 1] == found.times_s[-1, 1]
    for (start, end), mean in zip(times, weights, strict=True):
        own = (found.times_s[:, 0] >= start - 1e-6) & (found.times_s[:, 1] <= end + 1e-6)
        assert mean == pytest.approx(found.weights[own].mean(axis=0))
    html = heatmap.figure_html(found)
    assert html.count("<rect") <= 2 * heatmap.MOST_COLUMNS + 3
    assert html.count("<tr>") <= heatmap.MOST_ROWS + 3


def test_the_picture_can_be_read_without_seeing_it():
    html = heatmap.figure_html(over_time(30, ("cy", "<x>")))
    svg = picture(html)
    assert svg.get("role") == "img"
    assert svg.find("title").text == "Who helped, and when"
    assert "Welsh (cy) 50\u00a0%" in svg.find("desc").text
    assert "The same as a table" in html
    assert "<x>" not in html
    assert "&lt;x&gt;" in html
    assert "time runs from left to right" in html
    steady = GateMap(("cy",), np.array([[0.0, 2.0]]), np.array([[1.0]]), False)
    assert "once per stretch of speech" in heatmap.figure_html(steady)


# ---- the real model ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pocket():
    from whisper_moe import Transcriber

    return Transcriber.from_pretrained()


@pytest.mark.pocket
@pytest.mark.parametrize(("rate", "seed"), [(16_000, 0), (44_100, 1), (48_000, 2)])
def test_the_live_text_of_real_recordings_is_that_of_its_pieces_alone(pocket, rate, seed):
    names = [("english.wav", "en"), ("welsh.ogg", "cy"), ("german.ogg", "de")]
    sound = np.concatenate([np.concatenate([load_audio(EXAMPLES / name), silence(0.8)]) for name, _ in names])
    sound = sound if rate == SAMPLE_RATE else soxr.resample(sound, SAMPLE_RATE, rate)
    sound = (np.clip(sound, -1, 1) * 32767).astype(np.int16)
    sizes = np.random.default_rng(seed).integers(rate // 50, rate, 200)
    chunks = [chunk for chunk in np.split(sound, np.cumsum(sizes)) if len(chunk)]
    session = LiveSession(pocket)
    for chunk in chunks:
        session.hear(rate, chunk)
        while session.work():
            pass
    end = work_off(session)
    alone = [pocket.transcribe(piece.samples) for piece in cut(Pieces(pocket.window_s), chunks, rate)]
    assert [(piece.text, piece.language, piece.adapter) for piece in end.pieces] == [
        (each.text, each.language, each.adapter) for each in alone
    ]
    assert [piece.language for piece in end.pieces] == [language for _, language in names]
    said = {row["file"]: row["text"] for row in ROWS.values()}
    for piece, (name, _) in zip(end.pieces, names, strict=True):
        assert character_errors(said[name], piece.text) <= READABLE, piece.text


# ---- the page in a browser ---------------------------------------------------------------------------------------------


def open_live(page):
    page.get_by_role("tab", name="Live").click()
    page.locator("#live-recorder").get_by_role("button", name="Record").wait_for()


def press(page, name: str) -> None:
    page.locator("#live-recorder").get_by_role("button", name=name, exact=True).click()


def download(page, kind: str) -> str:
    with page.expect_download() as started:
        page.locator(f"#live-{kind}").click()
    return started.value.path().read_text("utf-8")


@pytest.mark.e2e
@pytest.mark.pocket
def test_words_appear_while_somebody_speaks_and_stay(new_page):
    """The fake microphone says one English sentence again and again."""
    page = new_page
    open_live(page)
    press(page, "Record")
    page.locator(".wm-live-preview p").wait_for()  # grey, before the sentence is over
    page.locator(".wm-live-said").nth(1).wait_for()
    assert page.locator("#live-recorder").get_by_role("button", name="Stop").is_visible(), "it was still recording"
    assert "now in English" in page.locator(".wm-live-state").inner_text()
    press(page, "Stop")
    page.locator(".wm-live-off", has_text="Done").wait_for()
    chips = [chip.inner_text().split("\n")[0] for chip in page.locator(".wm-live-said .wm-live-chip").all()]
    assert len(chips) >= 2
    assert all(chip.startswith("English") for chip in chips)
    first = page.locator(".wm-live-said p").first.inner_text()
    assert character_errors(ROWS["English"]["text"], first) <= READABLE, first
    whole = page.locator("#live-text textarea")
    whole.wait_for()
    said = " ".join(line.inner_text() for line in page.locator(".wm-live-said p").all())
    assert whole.input_value() == said
    assert download(page, "txt").strip() == said
    assert len(pysubs2.SSAFile.from_string(download(page, "srt")).events) >= len(chips)
    assert download(page, "vtt").startswith("WEBVTT")
    assert [part["language"] for part in json.loads(download(page, "json"))["segments"]] == ["en"] * len(chips)

    press(page, "Record")  # it goes on where it was
    page.locator(".wm-live-said").nth(len(chips)).wait_for()
    press(page, "Stop")
    page.locator(".wm-live-off", has_text="Done").wait_for()
    page.get_by_role("button", name="Clear", exact=True).locator("visible=true").click()
    page.get_by_text("Press Record and speak").wait_for()
    whole.wait_for(state="hidden")


KEEP_THE_STREAM = """() => {
    const ask = navigator.mediaDevices.getUserMedia.bind(navigator.mediaDevices);
    navigator.mediaDevices.getUserMedia = async (wanted) => (window.heldStream = await ask(wanted));
}"""
SLOW_UPLINK = """() => {
    const send = window.fetch;
    window.sentSounds = [];
    window.fetch = async (address, options) => {
        if (String(address).includes("component_server") && String(options?.body).includes("live_hear")) {
            const { rate, sound } = JSON.parse(options.body).data;
            window.sentSounds.push([rate, (sound.length * 3) / 4 / 2 / rate]);
            await new Promise((done) => setTimeout(done, 3600));
        }
        return send(address, options);
    };
}"""


@pytest.mark.e2e
@pytest.mark.pocket
def test_the_microphone_is_let_go_when_it_fails_or_goes_and_a_slow_line_cuts_nothing(new_page):
    page = new_page
    open_live(page)
    page.evaluate(KEEP_THE_STREAM)
    page.evaluate(
        "() => { window.addModule = AudioWorklet.prototype.addModule;"
        " AudioWorklet.prototype.addModule = async () => { throw Error('no'); }; }"
    )
    press(page, "Record")
    page.locator(".wm-live-trouble", has_text="could not be used: no").wait_for()
    assert page.evaluate("heldStream.getTracks().map((track) => track.readyState)") == ["ended"]
    page.evaluate("() => { AudioWorklet.prototype.addModule = window.addModule; }")

    page.evaluate(SLOW_UPLINK)
    press(page, "Record")
    page.locator(".wm-live-preview p").wait_for()  # of the second request, which was long on its way
    page.wait_for_function("window.sentSounds.length > 2")
    assert "Listening" in page.locator(".wm-live-state").inner_text()
    rates, lengths = zip(*page.evaluate("window.sentSounds"), strict=True)
    assert set(rates) == {SAMPLE_RATE}
    assert 3 < max(lengths) <= 15, "what gathers meanwhile goes out in one, up to a limit"

    page.evaluate("heldStream.getTracks().forEach((track) => { track.stop(); track.dispatchEvent(new Event('ended')); })")
    page.locator(".wm-live-trouble", has_text="The microphone is gone").wait_for()
    page.locator(".wm-live-off", has_text="Done").wait_for()
    first = page.locator(".wm-live-said p").first.inner_text()
    assert character_errors(ROWS["English"]["text"], first) <= READABLE, f"the sentence was cut: {first}"
    page.locator("#live-recorder").get_by_role("button", name="Record", exact=True).wait_for()


@pytest.mark.e2e
@pytest.mark.pocket
@pytest.mark.parametrize(("size", "scheme"), [(DESKTOP, "light"), (PHONE, "dark")], ids=["desktop", "phone_dark"])
def test_the_live_page_fits_the_screen_works_by_keyboard_and_can_be_read(open_page, size, scheme, request):
    page = open_page(size, scheme)
    open_live(page)
    page.locator("#live-recorder button").focus()
    page.keyboard.press("Space")
    page.locator(".wm-live-said").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "it scrolls sideways"
    page.locator(".wm-live-preview").wait_for()
    save_picture(page, f"demo_live_{request.node.callspec.id}", whole=False, part="#live-recorder")
    page.keyboard.press("Space")
    page.locator("#live-text textarea").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"], "it scrolls sideways"
    assert serious_findings(page) == []


# ---- who helped, and when ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture(tmp_path_factory, pocket):
    """A Welsh mixture of the two languages that come with the pocket. Its routers are random: who helps when means nothing here."""
    import torch
    from peft import get_peft_model

    from whisper_moe import LoraMoeConfig
    from whisper_moe.pocket import ADAPTERS

    folder = tmp_path_factory.mktemp("mixtures") / "cy-mix"
    config = LoraMoeConfig(experts={name: str(ADAPTERS / name) for name in ("cy", "qug")}, router="token", new_expert=False)
    pocket.engine.unload()
    model = get_peft_model(copy.deepcopy(pocket.model), config)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "router_weight" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    row = json.loads((ADAPTERS / "cy" / "language_adapter.json").read_text())
    (folder / "language_adapter.json").write_text(json.dumps(row | {"name": "cy-mix", "metrics": {}}))
    return folder


@pytest.mark.pocket
def test_the_map_of_a_mixture_that_wrote_is_drawn_and_of_others_none(pocket, mixture):
    from whisper_moe import Transcriber

    recording = EXAMPLES / "welsh.ogg"
    assert heatmap.figure_html_for(pocket, recording, pocket.transcribe(recording)) is None, "the adapter cy is no mixture"
    pocket.engine.unload()
    transcriber = Transcriber(pocket.model, pocket.processor)
    transcriber.add_adapter(mixture)
    written = transcriber.transcribe(recording)
    assert written.adapter == "cy-mix"
    html = heatmap.figure_html_for(transcriber, recording, written)
    shares = transcriber.gate_map(recording, "cy-mix").shares
    assert min(shares.values()) > 0.05
    for name, code in (("Welsh", "cy"), ("Kichwa", "qug")):
        assert f"{name} ({code}) {100 * shares[code]:.0f}\u00a0%" in picture(html).find("desc").text
    transcriber.engine.unload()


@pytest.mark.e2e
@pytest.mark.pocket
def test_the_page_shows_who_helped_when(tmp_path_factory, browser, mixture):
    folder = tmp_path_factory.mktemp("demo_mixture")
    with served(folder, "--adapters", str(mixture.parent)) as url:
        window = Window(browser, url, DESKTOP, "light")
        page = window.page
        click_example(page, "Welsh")
        assert "cy-mix" in answer(page)["writer"]
        page.get_by_role("button", name="Who helped, and when").click()
        svg = page.locator(".wm-map svg")
        svg.wait_for()
        assert "Welsh (cy)" in svg.locator("desc").text_content()
        assert svg.locator("rect").count() > 20
        page.get_by_text("The same as a table").click()
        assert page.locator(".wm-map-table tbody tr").count() > 5
        assert serious_findings(page) == []
        page.get_by_text("The same as a table").click()
        save_picture(page, "demo_heatmap", whole=False, part="#helpers")
        page.emulate_media(color_scheme="dark")
        page.set_viewport_size(PHONE)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], "it scrolls sideways"
        save_picture(page, "demo_heatmap_phone", whole=False, part="#helpers")
        window.context.close()
        window.check()
        assert list((folder / "uploads").glob("answer-*")), "that none is left would say nothing"
    assert not [path for path in (folder / "uploads").iterdir() if path.is_dir() and not any(path.iterdir())], (
        "empty folders outlive the page"
    )
