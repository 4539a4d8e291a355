"""What the first tab shows, step by step: the answer does not wait for the comparison, and a visitor's newest click wins. No browser."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
from test_demo_handlers import FakeTranscriber

from whisper_moe import Segment

pytest.importorskip("gradio", reason="to run it: pip install peft-s2lora[demo]")
from demo import heatmap
from demo.stops import Stops
from demo.transcribe_tab import _answer

CONTROLS = ("auto", "auto", [], 0.5, False, False)


class Slow(FakeTranscriber):
    """Writes one segment, and the rest once it is let go on."""

    mixture = False  # whether a mixture writes

    def __init__(self) -> None:
        super().__init__()
        self.go_on, self.began = threading.Event(), threading.Event()

    def transcribe(self, audio, **keywords):
        keywords["on_progress"](0.2, "Writing, 0 of 2 parts done")
        keywords["on_segments"]([Segment(0.0, 2.0, "Bore da.")])
        self.began.set()
        self.go_on.wait(10)
        keywords["on_progress"](0.6, "Writing, 1 of 2 parts done")
        written = super().transcribe(audio, **keywords)
        if self.mixture:
            written = replace(written, adapter_info={"name": "cy", "peft_type": "LORAMOE"})
        return replace(written, adapter=None) if keywords["adapter"] == "none" else written


@pytest.fixture
def page(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    gr = SimpleNamespace(update=lambda **values: values)
    return SimpleNamespace(gr=gr, transcriber=Slow(), limits=SimpleNamespace(max_duration_s=600))


def test_the_answer_is_shown_before_the_base_model_begins_and_then_beside_its_text(page):
    steps = _answer(page, Stops(), "visitor", None, "a.wav", *CONTROLS, True)
    growing = next(step for step in steps if "wm-partial" in step["text"])
    assert "Bore da." in growing["text"]
    page.transcriber.go_on.set()
    answer = next(step for step in steps if step.get("decision"))
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
    *_, last = _answer(page, Stops(), "visitor", None, "a.wav", *CONTROLS, False)
    assert (last["stop"], page.transcriber.asked["adapter"]) == ({"visible": False}, None)


def test_stop_keeps_the_text_so_far_and_only_that_visitor_is_stopped(page):
    visitors = Stops()
    mine, theirs = (_answer(page, visitors, name, None, "a.wav", *CONTROLS, False) for name in ("me", "them"))
    for steps in (mine, theirs):
        next(step for step in steps if "wm-partial" in step["text"])
    visitors.stop("me")
    last = list(mine)[-1]
    assert "Bore da." in last["text"]
    assert "Stopped" in last["text"]
    assert last["stop"] == {"visible": False}
    page.transcriber.go_on.set()
    assert "decision" in list(theirs)[-1]
    assert not visitors._working


def test_a_visitors_newer_request_ends_the_earlier_one_without_a_word(page):
    visitors = Stops()
    earlier = _answer(page, visitors, "me", None, "a.wav", *CONTROLS, False)
    next(step for step in earlier if "wm-partial" in step["text"])
    newer = _answer(page, visitors, "me", None, "b.wav", *CONTROLS, False)
    next(newer)
    assert list(earlier) == []
    page.transcriber.go_on.set()
    assert "decision" in list(newer)[-1]
    assert page.transcriber.asked["audio"] == "b.wav"


def test_a_request_that_a_newer_one_has_replaced_says_nothing_more_in_any_of_its_steps(page):
    """Whatever it would say next: the text it has, Stop, the base model's text, a fault of its recording."""
    page.transcriber.go_on.set()
    answer = list(_answer(page, Stops(), "me", None, "a.wav", *CONTROLS, True))
    for shown in range(1, len(answer)):
        visitors = Stops()
        steps = _answer(page, visitors, "me", visitors.announce("me"), "a.wav", *CONTROLS, True)
        for _ in range(shown):
            next(steps)
        visitors.announce("me")
        assert list(steps) == [], f"after step {shown}"

    visitors = Stops()
    bad = _answer(page, visitors, "me", None, None, *CONTROLS, True)  # no recording
    next(bad)
    visitors.announce("me")
    assert list(bad) == []


def test_the_newer_request_clears_away_what_an_earlier_one_said_last(page):
    first = next(_answer(page, Stops(), "me", None, "a.wav", *CONTROLS, True))
    assert "Waiting for the model" in first["text"]
    assert (first["decision"], first["stop"], first["row"]) == ("", {"visible": True}, {"visible": False})


def test_stop_reaches_a_request_that_still_waits_for_its_turn_and_not_the_one_after_it(page):
    visitors = Stops()
    ticket = visitors.announce("me")
    assert not visitors.stop("me"), "nothing is at work that would say so"
    (last,) = _answer(page, visitors, "me", ticket, "a.wav", *CONTROLS, True)
    assert "Stopped before anything was written" in last["text"]
    assert last["stop"] == {"visible": False}
    assert not page.transcriber.began.is_set()
    page.transcriber.go_on.set()
    steps = list(_answer(page, visitors, "me", visitors.announce("me"), "a.wav", *CONTROLS, False))
    assert "decision" in steps[-1]


def test_the_comparison_and_the_picture_give_signs_of_life_so_that_they_can_be_ended(page, monkeypatch):
    """A server can end a generator only between two of its steps."""
    monkeypatch.setattr("demo.follow.ALIVE_S", 0.0)
    drawn = threading.Event()
    monkeypatch.setattr(heatmap, "figure_html_for", lambda *_: str(drawn.wait(10)))
    page.transcriber.mixture = True
    page.transcriber.go_on.set()
    steps = _answer(page, Stops(), "me", None, "a.wav", *CONTROLS, True)
    next(step for step in steps if step.get("decision"))
    page.transcriber.go_on.clear()  # the base model is at work, and will not end
    assert [next(steps) for _ in range(4)] == [{"stop": {}}] * 4
    page.transcriber.go_on.set()
    next(step for step in steps if "as_json" in step)
    assert next(steps) == {"stop": {}}
    drawn.set()
    assert list(steps)[-1] == {"heat": "True", "helpers": {"visible": True}}


def test_when_the_visitor_leaves_during_the_comparison_the_base_model_ends(page, monkeypatch):
    monkeypatch.setattr("demo.follow.ALIVE_S", 0.0)
    visitors = Stops()
    page.transcriber.go_on.set()
    steps = _answer(page, visitors, "me", None, "a.wav", *CONTROLS, True)
    next(step for step in steps if step.get("decision"))
    page.transcriber.go_on.clear()
    page.transcriber.asked = None
    next(steps)
    steps.close()
    page.transcriber.go_on.set()
    [thread.join(5) for thread in threading.enumerate() if thread.name == "followed"]
    assert page.transcriber.asked is None, "it wrote on"
    assert not visitors._working
