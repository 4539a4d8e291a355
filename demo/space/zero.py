"""A `Transcriber` whose model works in the processes that ZeroGPU starts: in the page's own process there is no GPU.

`spaces.GPU` runs a function in a fork of this process, one call at a time in each, and hands its arguments and results over by pickle. So
the page's process keeps the registry, the files and the visitors; the model, loaded here before anybody comes, is used in the forks only.
What a fork learns is lost with it: an adapter that it has put on the model, or the batch it shares with nobody. Forks are told which
adapters the page knows, and which were fetched.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from whisper_moe import LanguageAdapter, Transcriber

if TYPE_CHECKING:
    from whisper_moe import AdapterRegistry, LanguagePosterior, Transcript

REMOTE = {"transcribe", "detect", "gate_map", "load"}  # what needs the model


class _StoppedError(Exception):
    """Nobody waits for the answer any more."""


@dataclass(frozen=True)
class _Call:
    """What a fork is asked, and what it has to know for it.

    Args:
        name: One of `REMOTE`.
        args, options: For it; no functions among them.
        adapters: Those of the page.
        expected: Keys of those that the page has not fetched yet.
    """

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any]
    adapters: list[LanguageAdapter]
    expected: frozenset[str]


class ForkedTranscriber:
    """What the page needs of a `Transcriber`, worked out in ZeroGPU's processes. Everything else is the transcriber's own.

    Args:
        transcriber: The one to fork, on "cuda".
        gpu: `spaces.GPU`.
        seconds: How long one call may hold the GPU; the visitor's quota is asked for that much.
    """

    def __init__(self, transcriber: Transcriber, gpu: Callable[..., Any], *, seconds: int) -> None:
        def work(call: _Call) -> Iterator[tuple[str, Any]]:
            yield from _work(transcriber, call)

        self._inner = transcriber
        self._work = gpu(duration=seconds)(work)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def transcribe(
        self,
        audio: Any,
        *,
        on_progress: Callable[[float, str], None] | None = None,
        on_segments: Callable[[list], None] | None = None,
        **options: Any,
    ) -> Transcript:
        """As `Transcriber.transcribe`. What the functions raise here ends the work there."""
        heard = {"progress": on_progress, "segments": on_segments}
        transcript: Transcript = self.ask(
            "transcribe", audio, on={kind: each for kind, each in heard.items() if each is not None}, **options
        )
        return transcript

    transcribe_many = Transcriber.transcribe_many  # by `transcribe`: a call for each recording

    def detect(self, audio: Any, **options: Any) -> LanguagePosterior | None:
        """As `Transcriber.detect`."""
        heard: LanguagePosterior | None = self.ask("detect", audio, **options)
        return heard

    def gate_map(self, *args: Any, **options: Any) -> Any:
        """As `Transcriber.gate_map`."""
        return self.ask("gate_map", *args, **options)

    def load(self, adapter: LanguageAdapter) -> None:
        """As `Transcriber.load`, to know whether that can be. It stays on the model of that fork only."""
        self.ask("load", adapter)

    def ask(self, name: str, *args: Any, on: dict[str, Callable[..., None]] | None = None, **options: Any) -> Any:
        """Have a fork do one of `REMOTE`. `on`: whom to tell of progress and of segments, by these names."""
        registry, answer, heard = self._inner.registry, None, on or {}
        expected = _expected(registry)  # first: what arrives meanwhile is then told twice, not left out
        news = self._work(_Call(name, args, options, list(registry), expected))
        try:
            for kind, value in news:
                if kind == "refused":
                    raise ValueError(value)
                if kind == "answer":
                    answer, still_expected = value
                    _fetch(registry, _expected(registry) - still_expected)
                elif kind in heard:
                    heard[kind](*value)
        finally:
            news.close()  # if it ended early, the fork hears of it
        return answer


# ---- in a fork ---------------------------------------------------------------------------------------------------------


def _work(transcriber: Transcriber, call: _Call) -> Iterator[tuple[str, Any]]:
    """Answer a call: any number of ("progress", ...) and ("segments", ...), at last ("answer", ...) or ("refused", why).

    With the answer go the keys of the adapters that are still expected here. The work is done in a thread of its own, so that its news
    can be passed on while it goes on.
    """
    assert call.name in REMOTE
    transcriber.registry.renew_locks()  # the page may have been fetching when this process was forked
    news: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    is_stopped = threading.Event()

    def tell(kind: str, *value: Any) -> None:
        if is_stopped.is_set():
            raise _StoppedError
        news.put((kind, value))

    def run() -> None:
        try:
            # Here, too: a thread of this process. The one that was forked waits for ever if the page has used torch's threads before.
            _catch_up(transcriber.registry, call)
            news.put(("answer", (_do(transcriber, call, tell), _expected(transcriber.registry))))
        except ValueError as error:  # words for people; the exception itself need not survive being pickled
            news.put(("refused", str(error)))
        except Exception as error:
            news.put(("failed", error))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        kind = ""
        while kind not in ("answer", "refused"):
            kind, value = news.get()
            if kind == "failed":
                raise value
            yield kind, value
    finally:
        is_stopped.set()
        thread.join()


def _do(transcriber: Transcriber, call: _Call, tell: Callable[..., None]) -> Any:
    options = dict(call.options)
    if call.name == "transcribe":
        options |= {
            "on_progress": lambda share, what: tell("progress", share, what),
            "on_segments": lambda segments: tell("segments", segments),
        }
    return getattr(transcriber, call.name)(*call.args, **options)


def _catch_up(registry: AdapterRegistry, call: _Call) -> None:
    """Have the adapters that the page has by now, and no others. Their files are on the disk."""
    _fetch(registry, _expected(registry) - call.expected)
    theirs = {adapter.name: adapter for adapter in call.adapters}
    for adapter in list(registry):
        if theirs.get(adapter.name) == adapter:
            del theirs[adapter.name]
        else:
            registry.remove(adapter.name)
    for adapter in theirs.values():
        registry.add(adapter)


# ---- on both sides -----------------------------------------------------------------------------------------------------


def _expected(registry: AdapterRegistry) -> frozenset[str]:
    return frozenset(source.key for source in registry.expected)


def _fetch(registry: AdapterRegistry, keys: frozenset[str]) -> None:
    """Fetch what another process has fetched already: from the copy on the disk."""
    for key in keys:
        with suppress(ValueError):  # then it is still expected, and will say why when it is needed
            registry[key]
