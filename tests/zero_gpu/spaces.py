"""Stands in for the package `spaces` on ZeroGPU, as far as a generator function under `spaces.GPU` can tell.

Like it: the function runs in a fork of this process, a call at a time in each; an idle fork is used again; arguments and results are
pickled; closing the generator early stops the function at its next result; an exception ends the call with the name of its class only;
whose quota a call takes is asked of the context it is made in.
Unlike it: there is no GPU, and nobody is asked for one.
"""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

decorated: list[tuple[Callable[..., Any], int | None]] = []  # functions and their durations
pids: list[int] = []  # of the fork of every call
visitor: ContextVar[str | None] = ContextVar("visitor", default=None)  # there: Gradio's request, whose headers name the visitor
visitors: list[str | None] = []  # of every call
_fork = multiprocessing.get_context("fork")
_processes: list[Any] = []


def end_all() -> None:
    """End every fork. They hold on to whatever this process had open: a browser driver waits for ever for the end of its input."""
    for process in _processes:
        process.kill()
        process.join()
    _processes.clear()


class _Worker:
    def __init__(self, task: Callable[..., Iterator[Any]]) -> None:
        self.arguments, self.results, self.stop = _fork.SimpleQueue(), _fork.SimpleQueue(), _fork.Event()
        self.process = _fork.Process(target=self._serve, args=(task,), daemon=True)
        self.process.start()
        _processes.append(self.process)
        print(f"ZeroGPU stand-in: process {self.process.pid}, forked from {os.getpid()}", file=sys.stderr, flush=True)

    def _serve(self, task: Callable[..., Iterator[Any]]) -> None:
        while True:
            args, options = self.arguments.get()
            self.stop.clear()
            results = task(*args, **options)
            try:
                for result in results:
                    if self.stop.is_set():
                        results.close()
                        break
                    self.results.put(("result", result))
                self.results.put(("end", None))
            except Exception as error:
                self.results.put(("error", type(error).__name__))


def GPU(task: Callable[..., Any] | None = None, *, duration: int | None = None, size: str | None = None) -> Callable[..., Any]:
    if task is None:
        return functools.partial(GPU, duration=duration, size=size)
    assert inspect.isgeneratorfunction(task), "this stand-in runs generator functions only"
    decorated.append((task, duration))
    idle: list[_Worker] = []

    @functools.wraps(task)
    def handler(*args: Any, **options: Any) -> Iterator[Any]:
        worker = idle.pop() if idle else _Worker(task)
        pids.append(worker.process.pid)
        visitors.append(visitor.get())
        worker.arguments.put((args, options))
        is_wanted = True
        while True:
            kind, value = worker.results.get()
            if kind == "end":
                idle.append(worker)
                return
            if kind == "error":
                raise RuntimeError(f"ZeroGPU worker error: {value}")
            if is_wanted:
                try:
                    yield value
                except GeneratorExit:
                    worker.stop.set()
                    is_wanted = False

    return handler
