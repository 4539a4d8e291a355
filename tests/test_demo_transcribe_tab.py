"""What the first tab shows, step by step: the answer does not wait for the comparison, and a visitor's newest click wins. No browser."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_demo_handlers import FakeTranscriber

from whisper_moe import Segment

pytest.importorskip("gradio", reason="to run it: pip install peft-s2lora[demo]")
from demo.transcribe_tab import _answer, _Visitors

CONTROLS = ("auto", "auto", [], 0.5, False, False)


class Slow(FakeTranscriber):
    """Writes one segment, and the rest once it is let go on."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = threading.Event()

    def transcribe(self, audio, **keywords):
        keywords["on_progress"](0.2, "Writing, 0 of 2 parts done")
        keywords["on_segments"]([Segment(0.0, 2.0, "Bore da.")])
        self.go_on.wait(10)
        keywords["on_progress"](0.6, "Writing, 1 of 2 parts done")
        written = super().transcribe(audio, **keywords)
        return replace(written, adapter=None) if keywords["adapter"] == "none" else written


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    gr = SimpleNamespace(update=lambda **values: values)
    return SimpleNamespace(gr=gr, transcriber=Slow(), limits=SimpleNamespace(max_duration_s=600))


def test_the_answer_is_shown_before_the_base_model_begins_and_then_beside_its_text(page):
    steps = _answer(page, _Visitors(), "visitor", "a.wav", *CONTROLS, True)
    growing = next(step for step in steps if "wm-partial" in step["text"])
    assert "Bore da." in growing["text"]
    page.transcriber.go_on.set()
    answer = next(step for step in steps if "decision" in step)
    assert page.transcriber.asked["adapter"] is None, "the base model has not begun"
    assert "It is writing" in answer["text"]
    assert answer["txt"]["value"].endswith("a.txt")
    last = list(steps)[-1]
    assert page.transcriber.asked["adapter"] == "none"
    assert "Both wrote the same" in last["text"]
    assert last["as_json"]["base"]["text"] == "Bore da."
    assert last["stop"] == {"visible": False}


def test_without_the_comparison_the_base_model_is_not_asked(page):
    page.transcriber.go_on.set()
    *_, last = _answer(page, _Visitors(), "visitor", "a.wav", *CONTROLS, False)
    assert (last["stop"], page.transcriber.asked["adapter"]) == ({"visible": False}, None)


def test_stop_keeps_the_text_so_far_and_only_that_visitor_is_stopped(page):
    visitors = _Visitors()
    mine, theirs = (_answer(page, visitors, name, "a.wav", *CONTROLS, False) for name in ("me", "them"))
    for steps in (mine, theirs):
        next(step for step in steps if "wm-partial" in step["text"])
    visitors.stops.stop("me")
    last = list(mine)[-1]
    assert "Bore da." in last["text"]
    assert "Stopped" in last["text"]
    assert last["stop"] == {"visible": False}
    page.transcriber.go_on.set()
    assert "decision" in list(theirs)[-1]
    assert visitors.newest == {}


def test_a_visitors_newer_request_ends_the_earlier_one_without_a_word(page):
    visitors = _Visitors()
    earlier = _answer(page, visitors, "me", "a.wav", *CONTROLS, False)
    next(step for step in earlier if "wm-partial" in step["text"])
    newer = _answer(page, visitors, "me", "b.wav", *CONTROLS, False)
    next(newer)
    assert list(earlier) == []
    page.transcriber.go_on.set()
    assert "decision" in list(newer)[-1]
    assert page.transcriber.asked["audio"] == "b.wav"
