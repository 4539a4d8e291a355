"""Which adapter speaks for which language, and the switch that puts it on the base model and takes it off again.

An adapter is a folder: PEFT's own two files and `language_adapter.json`, which says the language, the base it was made for and
how well it did. `AdapterRegistry` chooses and always says why; an adapter that lies elsewhere is fetched when it is first needed.
`AdapterSwitch` is the only place where adapters touch a model, and what puts them there is given to it: `load_folder`, or a stricter one
for adapters of strangers. Importing this file loads neither torch nor PEFT.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias

from whisper_moe.base_signature import WrongBaseError, check_base, check_signature
from whisper_moe.languages import LanguagePosterior, is_whisper_language, language_code, language_name

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

CONFIG_FILE, WEIGHTS_FILE, LANGUAGE_FILE = "adapter_config.json", "adapter_model.safetensors", "language_adapter.json"
_FETCHED_FILE = "fetched.json"  # beside what hub_utils has fetched: repository, commit and hashes
MERGED_FILE = "merged_adapters.json"  # beside folders that serve several languages: who speaks for which (growth.py)
BASE = "none"  # said instead of an adapter's name: the base model alone
_FORMAT = 1
_RETRY_S = 60.0  # a source that failed is not asked again before: every recording would wait for it
_LONGEST_NAME = 200  # an adapter may come from anywhere, and its name is printed


# ---- one adapter -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LanguageAdapter:
    """What is known of an adapter before it is loaded.

    Args:
        name: What it is called; unique in a registry.
        path: Its folder.
        language: The language it writes; Whisper's code, ISO 639-3 where Whisper has none.
        domain: Kind of speech it is for ("child"); None for the language in general. Domain adapters are chosen by name only.
        carrier: Whisper's language whose token stands in for a language that has none; None if it has its own.
        peft_type: PEFT's name of the method.
        base: Name of the base model it was made for.
        base_signature: Fingerprint of that base (`whisper_moe.base_signature`); None if it was not taken.
        num_parameters: Trained numbers.
        num_bytes: Size of the weights on disk.
        metrics: Error rates before and after, with the test set and the normalizer.
        source: Where it came from, for people: "owner/name@4f0c1aa", "shipped with the pocket", or its folder's name; None if nobody said.
            Words, on which no trust is built: `hub_utils.cached_origin` compares files.
    """

    name: str
    path: Path
    language: str
    domain: str | None
    carrier: str | None
    peft_type: str
    base: str
    base_signature: dict[str, Any] | None
    num_parameters: int
    num_bytes: int
    metrics: dict[str, Any]
    source: str | None = None

    @property
    def prompt_language(self) -> str:
        """The language whose token opens the decoder's prompt."""
        return self.language if self.carrier is None else self.carrier

    @property
    def touches_encoder(self) -> bool:
        """Whether it changes what the encoder answers; if not, a recording is encoded once. Read from the weights' file."""
        from whisper_moe.layouts import touches_encoder

        return touches_encoder(self.path)

    @classmethod
    def load(cls, folder: str | Path) -> LanguageAdapter:
        """Read an adapter's folder. Its weights stay on disk."""
        path = Path(folder)
        if not path.is_dir():
            raise ValueError(f"There is no adapter folder {str(path)!r}.")
        missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE, LANGUAGE_FILE) if not (path / name).is_file()]
        if missing:
            raise ValueError(f"{str(path)!r} is no language adapter: it lacks {', '.join(missing)}. `whisper-moe train` writes them.")
        row = _read_json(path / LANGUAGE_FILE)
        if row.get("format") != _FORMAT:
            raise ValueError(f"{path / LANGUAGE_FILE} has format {row.get('format')!r}; this version reads {_FORMAT}. Update the package.")
        try:
            return cls(
                name=_checked_name(row["name"]),
                path=path,
                language=language_code(row["language"]),
                domain=None if row.get("domain") is None else _checked_text(row["domain"], "domain"),
                carrier=_checked_carrier(row["language"], row.get("carrier")),
                peft_type=_checked_text(_read_json(path / CONFIG_FILE)["peft_type"], "peft_type"),
                base=_checked_text(row["base_model"], "base_model"),
                base_signature=row.get("base_signature"),
                num_parameters=_checked_count(row["num_parameters"]),
                num_bytes=(path / WEIGHTS_FILE).stat().st_size,
                metrics=_checked_metrics(row.get("metrics")),
                source=_source_of(path),
            )
        except KeyError as error:
            raise ValueError(f"The adapter in {str(path)!r} does not say its {error.args[0]!r}.") from None


def _merged_adapters(path: Path, folders: Iterable[Path]) -> list[LanguageAdapter]:
    """The adapters of a folder in which one may serve several languages: the same files under each language's name."""
    loaded = {folder.name: LanguageAdapter.load(folder) for folder in folders}
    named = []
    for row in _read_json(path / MERGED_FILE).get("adapters", []):
        if row.get("folder") not in loaded:
            raise ValueError(f"{path / MERGED_FILE} names {row.get('folder')!r}, which is no adapter beside it. Merge the adapters again.")
        name, language, carrier = _checked_name(row["name"]), row["language"], row.get("carrier")
        named.append(
            replace(loaded[row["folder"]], name=name, language=language_code(language), carrier=_checked_carrier(language, carrier))
        )
    return named + [adapter for adapter in loaded.values() if adapter.domain is not None]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        row = json.loads(path.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(row, dict):
        raise ValueError(f"{path} holds a {type(row).__name__}; expected an object.")
    return row


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip() or name == BASE:
        raise ValueError(f"An adapter cannot be called {name!r}; {BASE!r} means the base model alone.")
    return _checked_text(name, "name")


def _checked_text(text: Any, field: str) -> str:
    """A line that may be shown to people: what a stranger's file says could else steer a terminal."""
    if not isinstance(text, str) or not text.isprintable() or len(text) > _LONGEST_NAME:
        raise ValueError(f"{LANGUAGE_FILE}: {field} is {repr(text)[:100]}; expected one line of at most {_LONGEST_NAME} letters.")
    return text


_SHIPPED = "shipped with the pocket"
_PINNED = re.compile(
    r"(?P<repo>[A-Za-z0-9._-]{1,96}/[A-Za-z0-9._-]{1,96})@(?P<sha>[0-9a-f]{7})[0-9a-f]{33}(?P<subfolder>(/[A-Za-z0-9._-]{1,96})*)"
)


def short_source(where: str) -> str:
    """What to call a source to people: a repository with the beginning of its commit, or the last part of a path of this machine."""
    pinned = _PINNED.fullmatch(where)
    if pinned is not None:
        return f"{pinned['repo']}@{pinned['sha']}{pinned['subfolder']}"
    name = printable(Path(where).name or "a folder of this machine")[:_LONGEST_NAME]
    return f"a folder called {name!r}" if _SHIPPED in name.casefold() else name  # it is not that, or nobody would ask for its folder's name


def _source_of(folder: Path) -> str:
    """Where the adapter of a folder came from, as far as the folder shows.

    What was fetched from the Hub lies in a folder of its commit, with a note; one that says another place than the folder's name is not
    repeated. Anybody can write such a note and name a folder after it, so it is said whose word this is.
    """
    from whisper_moe.pocket import ADAPTERS

    folder = folder.resolve()
    if folder.parent == ADAPTERS.resolve():
        return _SHIPPED
    try:
        note = _read_json(folder / _FETCHED_FILE)
        repo, sha, subfolder = str(note.get("repo_id")), str(note.get("sha")), note.get("subfolder")
        place = sha if subfolder is None else f"{sha}--{str(subfolder).replace('/', '--')}"
        if (folder.parent.name, folder.name) == (repo.replace("/", "--"), place):
            return short_source(f"{repo}@{sha}" + ("" if subfolder is None else f"/{subfolder}")) + ", as its folder says"
    except ValueError:
        pass
    return short_source(str(folder))


def printable(message: str) -> str:
    """A message on one line without what could steer a terminal or turn its text around: it may quote a stranger's file."""
    return "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))


def _checked_count(count: Any) -> int:
    if not isinstance(count, int) or isinstance(count, bool) or count < 0:
        raise ValueError(f"{LANGUAGE_FILE}: num_parameters is {repr(count)[:100]}; expected a whole number.")
    return count


def _checked_metrics(metrics: Any) -> dict[str, Any]:
    """Figures before and after; null where a run measured nothing."""
    metrics = {} if metrics is None else metrics
    if not isinstance(metrics, dict):
        raise ValueError(f"{LANGUAGE_FILE}: metrics is {repr(metrics)[:100]}; expected an object.")
    for name in ("before", "after"):
        rates = metrics.get(name)
        if rates is not None and not (isinstance(rates, dict) and all(_is_figure(rate, rates.get(rate, 0)) for rate in _MOST)):
            raise ValueError(
                f"{LANGUAGE_FILE}: metrics.{name} is {repr(rates)[:100]}; expected wer, cer and clips as numbers: rates from 0 to "
                f"{_MOST['wer']} (1 is 100 %), and whole clips."
            )
    for name in ("test_set", "normalizer"):
        if metrics.get(name) is not None:
            _checked_text(metrics[name], f"metrics.{name}")
    return {name: value for name, value in metrics.items() if value is not None}


_MOST = {"wer": 100, "cer": 100, "clips": 999_999_999}  # a figure beyond is none, and could break whoever formats it


def _is_figure(name: str, value: Any) -> bool:
    """Whether it can be a rate, or a number of clips. NaN compares as false."""
    kinds = int if name == "clips" else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value <= _MOST[name]


def _checked_carrier(language: str, carrier: str | None) -> str | None:
    if carrier is not None and not is_whisper_language(language_code(carrier)):
        raise ValueError(f"The carrier {carrier!r} has no token in Whisper either. Choose one of Whisper's languages.")
    if carrier is None and not is_whisper_language(language_code(language)):
        raise ValueError(f"Whisper has no token for {language!r}: the adapter needs a carrier, one of Whisper's languages.")
    return None if carrier is None else language_code(carrier)


# ---- choosing ----------------------------------------------------------------------------------------------------------

Fallback: TypeAlias = Literal["asked-for-base", "below-threshold", "no-adapter", "not-needed", "no-speech"]
"""Why no adapter writes: the base model was asked for; the language was too uncertain; there is none, or it cannot be had; the base model
writes this language itself; there is nothing to write."""


@dataclass(frozen=True)
class Decision:
    """Who writes, and why.

    Args:
        language: The language that is spoken, as far as is known.
        prompt_language: The language whose token opens the prompt.
        probability: Of the language, where it was detected.
        adapter: The adapter to use; None for the base model alone.
        reason: One plain sentence.
        warning: What the reader should be told besides; None if nothing.
        scores: Where the language was uncertain and two were written: the mean log probability per token of each one's text.
        fallback: Why no adapter writes; None if one does.
    """

    language: str
    prompt_language: str
    probability: float | None
    adapter: LanguageAdapter | None
    reason: str
    warning: str | None = None
    scores: Mapping[str, float] | None = None
    fallback: Fallback | None = None


@dataclass(frozen=True)
class AdapterSource:
    """An adapter that is not here yet: it is fetched when its language is first heard, or its key first asked for.

    Args:
        language: The language it writes.
        domain: Kind of speech; None for the language in general.
        where: What to call the place in messages ("owner/name@sha").
        fetch: Returns the adapter's folder; raises `ValueError` or `OSError` if it cannot be had or is not to be trusted.
    """

    language: str
    domain: str | None
    where: str
    fetch: Callable[[], str | Path]

    @property
    def key(self) -> str:
        """The name it can be asked for by: `"cy"`, `"en/child"`."""
        return _key(self)

    @property
    def source(self) -> str:
        """The place in few words, for people who are not at this machine."""
        return short_source(self.where)


@dataclass(frozen=True)
class _Arrival:
    """What a source gave: the name it goes by here, and the adapters that made room for it."""

    source: AdapterSource
    name: str
    displaced: dict[str, LanguageAdapter]


def _without(rows: Mapping[str, Any], gone: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in rows.items() if key not in gone}


def _key(adapter: LanguageAdapter | AdapterSource) -> str:
    return adapter.language if adapter.domain is None else f"{adapter.language}/{adapter.domain}"


def _is_key_of_another(name: str, source: AdapterSource) -> bool:
    """Whether a fetched adapter calls itself as another language, or another kind of speech, is asked for: "fr", "en/child"."""
    code = name.partition("/")[0]
    return name != source.key and language_name(code) != code  # has a name: any three letters could be a code


def check_gates(adapter: LanguageAdapter) -> None:
    """Refuse a mixture whose gates come from the caller with every call: nobody gives any when a recording is written."""
    config = _read_json(adapter.path / CONFIG_FILE)
    if adapter.peft_type == "LORAMOE" and config.get("router") == "language" and config.get("prior") is None:
        raise ValueError(
            "It is a mixture with router='language' and no prior, so that its gates must be given with every call. Give its configuration "
            "a prior, or train it with another router."
        )


class AdapterRegistry:
    """The adapters at hand, by name, and those that can be fetched, by language. Holds no weights.

    May be asked and changed from several threads. A thread waits for a download only if it needs that very adapter. A process that was
    forked while others used it calls `renew_locks` first.
    """

    def __init__(self, adapters: Iterable[str | Path | LanguageAdapter] = ()) -> None:
        self._adapters: dict[str, LanguageAdapter] = {}
        self._sources: dict[str, AdapterSource] = {}  # not fetched yet
        self._fetched: dict[str, _Arrival] = {}  # by the source's key
        self._failed: dict[str, tuple[float, str]] = {}  # key of a source -> when it failed, and why
        # Readers hold no lock: what they may be going through is never changed, a changed copy takes its place.
        self._changing = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}  # by key: who waits for one language does not hold up the others
        for adapter in adapters:
            self.add(adapter)

    @classmethod
    def from_folder(cls, path: str | Path) -> AdapterRegistry:
        """Every adapter in the sub-folders of `path`, or the one that `path` itself is."""
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"There is no folder {str(path)!r} to look for adapters in.")
        if (path / CONFIG_FILE).is_file():
            return cls([path])
        folders = sorted(folder for folder in path.iterdir() if (folder / CONFIG_FILE).is_file())
        return cls(folders if not (path / MERGED_FILE).is_file() else _merged_adapters(path, folders))

    def add(self, adapter: str | Path | LanguageAdapter) -> LanguageAdapter:
        """Add an adapter or the folder of one."""
        adapter = adapter if isinstance(adapter, LanguageAdapter) else LanguageAdapter.load(adapter)
        with self._changing:
            if adapter.name in self._adapters:
                raise ValueError(f"There is an adapter {adapter.name!r} already, in {self._adapters[adapter.name].path}. Remove it first.")
            self._adapters = self._adapters | {adapter.name: adapter}
        return adapter

    def add_if_free(self, adapter: LanguageAdapter) -> LanguageAdapter:
        """Add an adapter for a language that has none, here or expected. If its name is taken, it goes by its source.

        Returns:
            The adapter under the name that it has here.

        Raises:
            ValueError: Another one speaks for its language, or its source is a name here, too. No path of this machine is named.
        """
        with self._changing:
            taken_by = self._speaker(adapter.language, adapter.domain)
            if taken_by is not None:
                raise ValueError(f"{language_name(adapter.language)} has an adapter here already: {taken_by}.")
            names = self._adapters.keys() | self._sources.keys() | self._fetched.keys()
            if adapter.name in names:
                adapter = replace(adapter, name=adapter.source or _key(adapter))
            if adapter.name in names:
                raise ValueError(f"There is an adapter {adapter.name!r} here already. Remove it first.")
            self._adapters = self._adapters | {adapter.name: adapter}
        return adapter

    def speaker(self, language: str, domain: str | None = None) -> str | None:
        """Name of the adapter that speaks for a language, or will when it is fetched; None if there is none."""
        with self._changing:
            return self._speaker(language, domain)

    def _speaker(self, language: str, domain: str | None) -> str | None:
        here = [name for name, each in self._adapters.items() if (each.language, each.domain) == (language, domain)]
        expected = [key for key, each in self._sources.items() if (each.language, each.domain) == (language, domain)]
        return next(iter(here + expected), None)

    def renew_locks(self) -> None:
        """Have locks that nobody holds. For a fork: threads that held some are not in it, and would hold them for ever."""
        self._changing = threading.Lock()
        self._fetching = {key: threading.Lock() for key in self._fetching}

    def expect(self, language: str, fetch: Callable[[], str | Path], *, where: str, domain: str | None = None) -> AdapterSource:
        """Name an adapter that is to be fetched when it is needed. It then goes before those at hand for the same language and domain.

        Arguments are those of `AdapterSource`. If it cannot be had, those at hand are used, and the decision carries a warning.
        """
        source = AdapterSource(language_code(language), domain, where, fetch)
        with self._changing:
            if source.key in self._sources or source.key in self._fetched:
                raise ValueError(f"There is a source for {source.key!r} already. One language, one adapter.")
            self._fetching[source.key] = threading.Lock()
            self._sources = self._sources | {source.key: source}
        return source

    @property
    def expected(self) -> list[AdapterSource]:
        """The adapters that have not been fetched yet."""
        return list(self._sources.values())

    def remove(self, name: str) -> None:
        """Forget an adapter; its files stay."""
        gone = self[name].name
        with self._changing:
            self._adapters = _without(self._adapters, [gone])

    def __getitem__(self, name: str) -> LanguageAdapter:
        if name in self._sources:
            problem = self._fetch(name, patient=True)
            if problem is not None:
                raise ValueError(problem)
        arrived = self._fetched.get(name)
        adapter = self._adapters.get(name if arrived is None else arrived.name)
        if adapter is None:
            raise ValueError(f"There is no adapter {name!r}. Known: {self._known_names()}. For the base model alone say {BASE!r}.")
        return adapter

    def __iter__(self) -> Iterator[LanguageAdapter]:
        return iter(self._adapters.values())

    def __len__(self) -> int:
        return len(self._adapters)

    def languages(self) -> list[str]:
        """The languages that adapters write, domain adapters left out."""
        return sorted({each.language for each in (*self, *self.expected) if each.domain is None})

    def for_language(self, code: str) -> LanguageAdapter | None:
        """The adapter that writes a language in general, fetched if it is not here yet; None if there is none."""
        self._fetch(code)
        found = [adapter for adapter in self if adapter.language == code and adapter.domain is None]
        if len(found) > 1:
            names = ", ".join(repr(adapter.name) for adapter in found)
            raise ValueError(f"{len(found)} adapters write {language_name(code)}: {names}. Choose one by its name, or remove the others.")
        return found[0] if found else None

    def _fetch(self, key: str, *, patient: bool = False) -> str | None:
        """Have a source's adapter here. Returns why it could not be had. What failed a moment ago is tried again only if `patient`."""
        if key not in self._sources:
            return None
        with self._fetching[key]:
            source = self._sources.get(key)  # again: another thread may have been quicker
            if source is None:
                return None
            failed_at, problem = self._failed.get(key, (-_RETRY_S, ""))
            if not patient and time.monotonic() - failed_at < _RETRY_S:
                return problem
            try:
                adapter = LanguageAdapter.load(source.fetch())
                check_gates(adapter)
                self._arrived(source, adapter)
            except (ValueError, OSError) as error:
                return self._note_failure(source, error)
            return None

    def _note_failure(self, source: AdapterSource, error: Exception) -> str:
        problem = printable(f"The adapter for {language_name(source.language)} ({source.where}) cannot be used: {error}")
        self._failed[source.key] = time.monotonic(), problem
        return problem

    def _arrived(self, source: AdapterSource, adapter: LanguageAdapter) -> None:
        if (adapter.language, adapter.domain) != (source.language, source.domain):
            spoken = adapter.language if adapter.domain is None else f"{adapter.language}/{adapter.domain}"
            raise ValueError(f"It writes {spoken!r}, and is named for {source.key!r}. Correct the registry.")
        with self._changing:
            displaced = {n: each for n, each in self._adapters.items() if (each.language, each.domain) == (source.language, source.domain)}
            others = _without(self._adapters, displaced)
            keys = (self._sources.keys() | self._fetched.keys()) - {source.key}
            is_taken = adapter.name in others or adapter.name in keys or _is_key_of_another(adapter.name, source)
            name = source.where if is_taken else adapter.name
            self._adapters = others | {name: replace(adapter, name=name, source=source.source)}  # whoever fetched it knows
            self._fetched = self._fetched | {source.key: _Arrival(source, name, displaced)}
            self._failed.pop(source.key, None)
            self._sources = _without(self._sources, [source.key])  # last: whoever finds no source looks among the fetched

    def withdraw(self, adapter: LanguageAdapter, error: Exception) -> str | None:
        """Undo the arrival of a fetched adapter that cannot be put on the model: whom it displaced is back, and so is its source.

        Returns:
            Why it cannot be used, as later decisions will say; None if this adapter was not fetched.
        """
        key = _key(adapter)
        with self._changing:
            arrival = self._fetched.get(key)
            if arrival is None:  # another thread may have withdrawn it a moment ago; or it is at hand
                is_withdrawn = key in self._sources and key in self._failed and adapter not in self._adapters.values()
                return self._failed[key][1] if is_withdrawn else None
            if arrival.name != adapter.name:
                return None
            problem = self._note_failure(arrival.source, error)
            self._sources = self._sources | {key: arrival.source}
            self._fetched = _without(self._fetched, [key])
            self._adapters = arrival.displaced | _without(self._adapters, [arrival.name])
            return problem

    def _problem(self, language: str) -> str | None:
        """Why the adapter that is named for a language could not be had."""
        failed = self._failed.get(language)
        return None if failed is None else failed[1]

    def check(self, language: str | None, adapter: str | None) -> None:
        """Raise `ValueError` if nobody could write what is asked for. Needs no sound, so it comes before any work."""
        if adapter is not None and adapter != BASE:
            chosen = self[adapter]
            if language is not None and language != chosen.language:
                raise ValueError(
                    f"The adapter {chosen.name!r} writes {language_name(chosen.language)}, not {language_name(language)}. "
                    "Give the language or the adapter, not both."
                )
            return
        if language is None or is_whisper_language(language):
            return
        if adapter == BASE or self.for_language(language) is None:
            raise ValueError(
                self._problem(language)
                or f"Whisper has no token for {language_name(language)} ({language!r}), and no adapter writes it. "
                f"Adapters: {self._known_names()}. Train one with `whisper-moe train`."
            )

    def choose(
        self,
        posterior: LanguagePosterior | None,
        *,
        language: str | None = None,
        adapter: str | None = None,
        threshold: float = 0.5,
        written: Collection[str] | None = None,
    ) -> Decision:
        """Decide who writes a recording.

        Args:
            posterior: What was heard; None if a language or an adapter is given.
            language: The language, known beforehand: nothing is guessed.
            adapter: The name of an adapter to use whatever is heard, or "none" for the base model.
            threshold: Below this probability the language counts as uncertain and the base model writes.
            written: Languages the base model is known to write. None: not known, then any language of Whisper may be.
        """
        self.check(language, adapter)
        if adapter is not None and adapter != BASE:
            return self._named(self[adapter], posterior)
        if language is None and posterior is None:
            raise ValueError("Nothing to choose by: give what was heard, a language or an adapter.")
        if language is None:
            assert posterior is not None
            return self._heard(posterior, adapter, threshold, written)
        return self._told(language, posterior, adapter, written)

    def _named(self, adapter: LanguageAdapter, posterior: LanguagePosterior | None) -> Decision:
        probability = None if posterior is None else posterior.probabilities.get(adapter.language)
        reason = f"You asked for the adapter {adapter.name!r}, which writes {language_name(adapter.language)}."
        return Decision(adapter.language, adapter.prompt_language, probability, adapter, reason)

    def _told(self, language: str, posterior: LanguagePosterior | None, adapter: str | None, written: Collection[str] | None) -> Decision:
        name = language_name(language)
        probability = None if posterior is None else posterior.probabilities.get(language)
        if adapter == BASE:
            reason = f"You said it is {name}, and asked for the base model."
            return Decision(language, language, probability, None, reason, fallback="asked-for-base")
        found = self.for_language(language)
        if found is not None:
            reason = f"You said it is {name}; the adapter {found.name!r} writes it."
            return Decision(language, found.prompt_language, probability, found, reason, self._problem(language))
        if written is not None and language in written:
            reason, problem = f"You said it is {name}; the base model writes it itself.", self._problem(language)
            return Decision(language, language, probability, None, reason, problem, fallback=_without_adapter(problem))
        reason = f"You said it is {name}; no adapter writes it, so the base model does."
        return Decision(language, language, probability, None, reason, self._no_adapter(language, written), fallback="no-adapter")

    def _heard(self, posterior: LanguagePosterior, adapter: str | None, threshold: float, written: Collection[str] | None) -> Decision:
        language, probability = posterior.best
        name, percent = language_name(language), f"{probability:.0%}"
        if probability < threshold:
            guesses = ", ".join(f"{language_name(code)} {p:.0%}" for code, p in posterior.top(3).items())
            return Decision(
                language,
                language,
                probability,
                None,
                f"{name} is only the best guess ({percent}, the threshold is {threshold:.0%}), so the base model writes.",
                f"The language is uncertain: {guesses}. If you know it, say so.",
                fallback="asked-for-base" if adapter == BASE else "below-threshold",
            )
        if adapter == BASE:
            reason = f"{name} was heard ({percent}); you asked for the base model."
            return Decision(language, language, probability, None, reason, fallback="asked-for-base")
        found = self.for_language(language)
        if found is not None:
            reason = f"{name} was heard ({percent}); the adapter {found.name!r} writes it."
            return Decision(language, found.prompt_language, probability, found, reason, self._problem(language))
        if written is not None and language not in written:
            reason = f"{name} was heard ({percent}); no adapter writes it, so the base model does."
            return Decision(language, language, probability, None, reason, self._no_adapter(language, written), fallback="no-adapter")
        reason, problem = f"{name} was heard ({percent}); the base model writes it itself.", self._problem(language)
        return Decision(language, language, probability, None, reason, problem, fallback=_without_adapter(problem))

    def _no_adapter(self, language: str, written: Collection[str] | None) -> str:
        name = language_name(language)
        trained = "" if written is None else f" The base model hears {name} but never learnt to write it: expect nonsense."
        why = self._problem(language) or f"No adapter for {name} ({language!r}). Adapters: {self._known_names()}."
        return f"{why}{trained}"

    def _known_names(self) -> str:
        known = [f"{adapter.name} ({language_name(adapter.language)})" for adapter in self]
        known += [f"{source.key} ({language_name(source.language)}, not fetched yet)" for source in self.expected]
        return ", ".join(known) or "none yet"


def _without_adapter(problem: str | None) -> Fallback:
    """Why the base model writes a language that it knows. `problem`: why the adapter that is named for it could not be had."""
    return "not-needed" if problem is None else "no-adapter"


# ---- switching ---------------------------------------------------------------------------------------------------------

BaseCheck = Callable[[Mapping[str, Any], Any], None]
"""Takes a base model's signature, as an adapter carries it, and the model; raises `ValueError` if they do not belong together."""


class LoadAdapter(Protocol):
    """Puts the adapter of a folder on a model, frozen: `load_folder` here, `hub_utils.load_adapter` for adapters of strangers."""

    def __call__(
        self, model: Any, folder: str | Path, adapter_name: str = ..., *, base_model: str | None = ..., check_base: BaseCheck | None = ...
    ) -> PeftModel:
        """`model` is the bare base, or the `PeftModel` that an earlier call returned. Raises `ValueError` for what does not fit."""


# Methods whose adapters share nothing, so that several may stay attached side by side. VeRA, RandLoRA and VB-LoRA share tensors
# between adapters and accept a second one that does not fit; whatever is not listed here is attached alone.
_SIDE_BY_SIDE = frozenset({"LORA", "S2LORA"})
# PEFT initialises an adapter before it loads its weights. These initialisations touch the adapter alone; others (PiSSA, OLoRA,
# CorDA, LoftQ, LoRA-GA) subtract it from the base weights, for good.
_HARMLESS_INITS = frozenset({"gaussian", "orthogonal", "eva"})


class AdapterSwitch:
    """Puts adapters on a base model and takes them off: `with switch.active(adapter): ...`.

    Outside the context the model is the base, and its weights are the same bytes throughout. Adapters stay attached, switched
    off, so that coming back to one costs little, and no more than `max_adapters` of them: the one unused for longest goes first. If one
    cannot be attached, the model is as it was before. Not thread-safe: the caller holds a lock.

    Args:
        model: The bare base model.
        load: What attaches an adapter; by default `load_folder`, which takes any PEFT method and is for adapters of your own.
        max_adapters: How many may be attached at once.
    """

    def __init__(self, model: nn.Module, load: LoadAdapter | None = None, *, max_adapters: int = 8) -> None:
        from peft import PeftModel

        if isinstance(model, PeftModel):
            raise ValueError("AdapterSwitch wants the bare base model; got a PeftModel. Give it `model.unload()`.")
        if not isinstance(max_adapters, int) or max_adapters < 1:
            raise ValueError(f"max_adapters must be a whole number from 1 up, got {max_adapters!r}.")
        self.model, self.max_adapters = model, max_adapters
        self._load: LoadAdapter = load_folder if load is None else load
        self._bare = [(module, dict(module._modules), module.training) for module in model.modules()]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        self._peft: PeftModel | None = None
        self._attached: OrderedDict[str, str] = (
            OrderedDict()
        )  # key of the adapter's files -> its name inside PEFT, the last used at the end
        self._num_loads = 0
        self._active: LanguageAdapter | None = None

    @contextmanager
    def active(self, adapter: LanguageAdapter | None) -> Iterator[nn.Module]:
        """The model with the adapter at work (None: the base alone); afterwards what was active before."""
        previous = self._active
        try:
            self._activate(adapter)
            yield self.model
        finally:
            self._activate(previous)

    @property
    def config(self) -> PeftConfig | None:
        """The configuration of the adapter at work; None for the base alone."""
        if self._active is None or self._peft is None:
            return None
        return self._peft.peft_config[self._attached[files_key(self._active)]]

    def unload(self) -> nn.Module:
        """Take every adapter off and return the base, as it was given."""
        from peft.tuners.tuners_utils import BaseTuner

        if self._peft is not None and isinstance(self._peft.base_model, BaseTuner):
            self._peft.base_model.unload()  # hooks that a method put on the model go with it
        for module, children, training in self._bare:
            module._modules.clear()
            module._modules.update(children)
            module.training = training
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)
        vars(self.model).pop("peft_config", None)  # PEFT leaves it on the model, and would add to it
        self._peft, self._active = None, None
        self._attached.clear()
        return self.model

    def _activate(self, adapter: LanguageAdapter | None) -> None:
        self._enable(False)  # first, so that a failure leaves the base at work
        self._active = None
        if adapter is not None:
            name = self._attach(adapter)
            assert self._peft is not None
            self._enable(True)
            self._peft.set_adapter(name, inference_mode=True)
            self._active = adapter

    def _enable(self, enabled: bool) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        if self._peft is not None:
            for module in self.model.modules():
                if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
                    module.enable_adapters(enabled)

    def _attach(self, adapter: LanguageAdapter) -> str:
        """Attach the adapter unless it is there already. Returns its name inside PEFT."""
        key = files_key(adapter)
        if key not in self._attached:
            if self._peft is not None and not _side_by_side(adapter, self._peft):
                self.unload()
            # Not the adapter's own name: PEFT reads meaning into names ("lo" is part of "lora_", a dot breaks module paths).
            name = f"language{self._num_loads}"
            before = _Modules(self.model if self._peft is None else self._peft)
            try:
                self._peft = self._load(self.model if self._peft is None else self._peft, adapter.path, name, check_base=_fit_of(adapter))
            except BaseException:
                before.restore()
                raise
            self._num_loads += 1
            self._attached[key] = name
        self._attached.move_to_end(key)
        self._evict(self._attached[key])
        return self._attached[key]

    def _evict(self, newest: str) -> None:
        assert self._peft is not None
        pools = {getattr(config, "pool", None) for config in self._peft.peft_config.values()}  # whose A and B others use
        for key in [key for key, name in self._attached.items() if name != newest and name not in pools]:
            if len(self._attached) <= self.max_adapters:
                return
            self._peft.set_adapter(newest, inference_mode=True)  # PEFT chooses another one when the active one goes
            self._peft.delete_adapter(self._attached.pop(key))


class _Modules:
    """A model's modules as they are now, to be put back if attaching fails. Weights are not copied: nothing writes to them.

    Everything PEFT changes hangs on modules: children, parameters, hooks, plain attributes and the dicts and lists among them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [(vars(module), dict(vars(module))) for module in model.modules()]
        containers = {id(value): value for _, attributes in self._modules for value in attributes.values()}
        self._containers = [(value, value.copy()) for value in containers.values() if isinstance(value, (dict, list, set))]
        self._trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back. The containers stay the same objects, because handles of hooks refer to them."""
        for attributes, saved in self._modules:
            attributes.clear()
            attributes.update(saved)
        for container, values in self._containers:
            container.clear()
            if isinstance(container, list):
                container.extend(values)
            else:
                container.update(values)
        for parameter, requires_grad in self._trainable:
            parameter.requires_grad_(requires_grad)


def files_key(adapter: LanguageAdapter) -> str:
    """Changes when the adapter is trained anew in the same folder."""
    try:
        stats = [(adapter.path / name).stat() for name in (WEIGHTS_FILE, CONFIG_FILE)]
    except OSError as error:
        raise ValueError(f"The files of the adapter {adapter.name!r} are gone: {error}.") from None
    return " ".join([str(adapter.path.resolve()), *(f"{stat.st_mtime_ns} {stat.st_size}" for stat in stats)])


def _side_by_side(adapter: LanguageAdapter, attached: PeftModel) -> bool:
    """Whether the adapter may join those that are attached."""
    config = _read_json(adapter.path / CONFIG_FILE)
    kinds = {str(getattr(each.peft_type, "value", each.peft_type)) for each in attached.peft_config.values()} | {config.get("peft_type")}
    whole = [config.get("modules_to_save"), *(getattr(each, "modules_to_save", None) for each in attached.peft_config.values())]
    return len(kinds) == 1 and kinds <= _SIDE_BY_SIDE and not any(whole)


def check_fit(adapter: LanguageAdapter, model: nn.Module, signature: Mapping[str, Any] | None = None) -> None:
    """Raise `WrongBaseError` if the adapter is known to have been made for another base.

    Args:
        adapter: The adapter.
        model: The base at hand.
        signature: The base's own, if it was taken before: the model's modules are then left alone.
    """
    if adapter.base_signature is not None:
        _fit_of(adapter, signature)(adapter.base_signature, model)


def _fit_of(adapter: LanguageAdapter, ours: Mapping[str, Any] | None = None) -> BaseCheck:
    """`check_base`, with the names of adapter and base in its message."""

    def check(signature: Mapping[str, Any], model: Any) -> None:
        try:
            check_base(dict(signature), model) if ours is None else check_signature(dict(signature), ours)
        except WrongBaseError as error:
            name = Path(str(getattr(model.config, "_name_or_path", "") or "this model")).name
            raise WrongBaseError(
                printable(f"The adapter {adapter.name!r} was made for {adapter.base!r}, not for {name!r}. {error}")
            ) from None
        except Exception as error:  # it may be a stranger's, and anything
            raise WrongBaseError(
                printable(
                    f"The adapter {adapter.name!r} carries a fingerprint of its base that cannot be read ({type(error).__name__}: "
                    f"{error}). Ask its makers to publish it again."
                )
            ) from error

    return check


# ---- loading, by default -----------------------------------------------------------------------------------------------


def load_folder(
    model: Any, folder: str | Path, adapter_name: str = "default", *, base_model: str | None = None, check_base: BaseCheck | None = None
) -> PeftModel:
    """Put an adapter of your own on a model: any PEFT method, as long as it leaves the base's weights alone.

    For adapters of others, `hub_utils.load_adapter` does the same and trusts nothing. On failure the model may be half changed;
    `AdapterSwitch` puts it back.

    Args:
        model: The base model, changed in place, or the `PeftModel` that an earlier call returned.
        folder: The adapter's folder.
        adapter_name: What it is called in the model.
        base_model: Not looked at; the signature says more than a name.
        check_base: Compares the signature that the adapter carries with the model.

    Raises:
        ValueError: It would change the base, holds values that are not numbers, or does not fit.
    """
    from peft import PeftModel

    folder = Path(folder)
    if check_base is not None and (folder / LANGUAGE_FILE).is_file():
        signature = _read_json(folder / LANGUAGE_FILE).get("base_signature")
        if signature is not None:
            check_base(signature, model)
    config = check_folder(folder, model)
    try:
        if not isinstance(model, PeftModel):
            model = PeftModel(model, config, adapter_name, autocast_adapter_dtype=False)
        else:
            model.add_adapter(adapter_name, config, autocast_adapter_dtype=False)
        device = str(next(model.parameters()).device)
        # Adapter weights keep the base's precision: a mixed product would be computed in the higher one, at twice the cost.
        result = model.load_adapter(str(folder), adapter_name, torch_device=device, autocast_adapter_dtype=False)
        if result.missing_keys or result.unexpected_keys:
            raise ValueError(
                f"{len(result.missing_keys)} of its weights are missing and {len(result.unexpected_keys)} have no place "
                f"(for instance {(result.missing_keys + result.unexpected_keys)[0]!r})."
            )
    except Exception as error:
        raise ValueError(f"The adapter in {str(folder)!r} does not fit this model: {error}") from error
    return model


def check_folder(folder: Path, model: Any) -> PeftConfig:
    """The PEFT config of an adapter of your own, if it leaves the base's weights alone and holds numbers only.

    Raises:
        ValueError: It does not, or its method is unknown.
    """
    from peft import PeftModel

    config = _checked_config(folder)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_weights(folder, config, {name.replace(".base_layer.", ".") for name in base.state_dict()})  # tied ones under each name
    return config


def _checked_config(folder: Path) -> PeftConfig:
    """The PEFT config of an adapter, refused if attaching it could change the base."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    peft_type = _read_json(folder / CONFIG_FILE).get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"The adapter in {str(folder)!r} has peft_type {peft_type!r}, which PEFT does not know. "
            "If it is 'S2LORA', `import peft_s2lora` first; else install the package that brings the method."
        )
    config = PeftConfig.from_pretrained(str(folder))
    init = getattr(config, "init_lora_weights", True)
    if isinstance(init, str) and init not in _HARMLESS_INITS:
        raise ValueError(
            f"The adapter in {str(folder)!r} was initialised with {init!r}, which changes the base weights. Save it as a plain LoRA: "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`."
        )
    config.inference_mode = True
    return config


def _check_weights(folder: Path, config: PeftConfig, base: Collection[str]) -> None:
    """Refuse weights that would land in the base (PEFT loads whatever matches a name) and values that are not numbers."""
    from safetensors import SafetensorError, safe_open

    own = tuple(f"{module}." for module in getattr(config, "modules_to_save", None) or ())
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118, a handle is no dict
                name = key.removeprefix("base_model.model.")
                copied = any(f".{module}" in f".{name}" for module in own)
                if ".base_layer." in key or (name in base and not copied):
                    raise ValueError(f"The adapter in {str(folder)!r} would overwrite the base weight {name!r}; it is not used.")
                if not file.get_tensor(key).isfinite().all():
                    raise ValueError(f"The adapter in {str(folder)!r} holds values that are not numbers, in {key!r}; it is not used.")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The weights of the adapter in {str(folder)!r} cannot be read: {error}.") from error
