"""Work that is watched from another thread: what is seen of it, that Stop ends it, and that it ends when nobody looks any more."""

from __future__ import annotations

import threading

import pytest

from demo.follow import Following, TimeLeft
from demo.stops import StoppedError, Stops
from whisper_moe import Segment


def test_what_is_seen_ends_with_everything_in_order_and_the_result():
    late, early = Segment(4.0, 5.0, "late"), Segment(1.0, 2.0, "early")
    seen = threading.Event()

    def work(tell, show):
        tell(0.2, "Writing, 0 of 2 parts done")
        show([late])
        show([early, Segment(4.0, 5.0, "late, anew")])
        tell(0.9, "Writing, 1 of 2 parts done")
        seen.wait(5)
        return "done"

    following = Following(work)
    steps = []
    for step in following:
        steps.append(step)
        if step.share == 0.9:
            seen.set()
    assert following.result == "done"
    assert [segment.text for segment in steps[-1].segments] == ["early", "late, anew"]
    assert steps[-1].what == "Writing, 1 of 2 parts done"


def test_an_error_of_the_work_comes_out_where_it_is_watched():
    def work(tell, show):
        tell(0.0, "Reading")
        raise ValueError("no sound")

    with pytest.raises(ValueError, match="no sound"):
        list(Following(work))


def test_stop_is_noticed_while_the_model_is_busy_and_the_work_ends_at_its_next_sign_of_life():
    stops, busy, ended = Stops(), threading.Event(), threading.Event()

    def work(tell, show):
        tell(0.0, "Writing")
        busy.wait(10)  # a long batch
        try:
            tell(0.5, "Writing")
        finally:
            ended.set()

    with stops.run("visitor") as run:
        steps = iter(Following(work, run.check))
        assert next(steps).what == "Writing"
        stops.stop("visitor")
        with pytest.raises(StoppedError):
            next(steps)
        assert not ended.is_set(), "it waited for the model"
        busy.set()
        assert ended.wait(5)


def test_work_ends_when_the_visitor_leaves():
    go_on, outcome = threading.Event(), []

    def work(tell, show):
        tell(0.0, "Writing")
        go_on.wait(10)
        try:
            tell(0.5, "Writing")
        except StoppedError as error:
            outcome.append(error)
            raise
        outcome.append("it wrote on")

    steps = iter(Following(work))
    next(steps)
    steps.close()
    go_on.set()
    [thread.join(5) for thread in threading.enumerate() if thread.name == "followed"]
    assert isinstance(outcome[0], StoppedError)


def test_work_of_which_nothing_is_new_is_heard_of_all_the_same(monkeypatch):
    """Only between two steps can a server see that the visitor has left."""
    monkeypatch.setattr("demo.follow.ALIVE_S", 0.3)
    go_on = threading.Event()

    def work(tell, show):
        tell(0.5, "Writing")
        go_on.wait(10)

    following = Following(work)
    steps = iter(following)
    assert [(step.share, step.what) for step in (next(steps), next(steps), next(steps))] == [(0.5, "Writing")] * 3
    go_on.set()
    list(steps)
    assert following.result is None, "which is a result"


def test_a_request_is_reached_by_stop_from_the_press_on_and_by_its_own_visitor_only():
    stops = Stops()
    mine, theirs = stops.announce("me"), stops.announce("them")
    assert stops.is_busy("me")
    assert not stops.stop("me"), "it waits, and cannot say so itself"
    assert not stops.is_busy("me")
    with stops.run("them", mine) as taken:
        assert not taken.is_stopped, "another visitor's ticket is none"
    with stops.run("them", theirs) as run:
        assert run.is_replaced, "by the one before"
    with stops.run("me", mine) as run:
        assert (run.is_stopped, run.is_replaced) == (True, False)
        newer = stops.announce("me")
        assert run.is_replaced
        assert not stops.stop("me"), "the one at work has nothing to say any more"
    stops.withdraw("them", newer)
    with stops.run("me", newer) as run:
        assert run.is_stopped, "others cannot withdraw it"
        assert stops.stop("me")


def test_requests_that_never_come_are_forgotten_in_the_end():
    stops = Stops()
    first = stops.announce("me")
    for number in range(5000):
        stops.announce(f"visitor {number}")
    stops.stop("me")
    with stops.run("me", first) as run:
        assert not run.is_stopped
    assert len(stops._waiting) < 5000
    kept = stops.announce("me")
    stops.withdraw("me", kept)
    assert kept not in stops._waiting


def test_time_left_is_what_the_rest_takes_at_the_pace_of_this_kind_of_work():
    now = [0.0]
    left = TimeLeft(lambda: now[0])
    assert left.after(0.0, "Reading the recording") is None
    now[0] = 1.0
    assert left.after(0.2, "Writing, 0 of 4 parts done") is None, "reading says nothing of how fast it writes"
    now[0] = 3.0
    assert left.after(0.4, "Writing, 1 of 4 parts done") == pytest.approx(6.0)
    now[0] = 5.0
    assert left.after(0.6, "Writing, 2 of 4 parts done") == pytest.approx(4.0)
