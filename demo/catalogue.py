"""The adapters of a running page: those that are here, those that are named for later, and the way from the Hub for one more.

What a visitor fetches was found by a search on this page, among owners whom the page's owner named (anybody's for who sits at this
machine). It goes through the checks of `hub_utils`, is put on the model once, and then speaks for its language. Requests of others go on
meanwhile. `is_own` says of a visitor that the browser runs on this machine (visitors.py); without it a visitor is a stranger, who sees
nothing that is private to the page's owner. No Gradio, no HTML.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_moe import LanguageAdapter, language_name
from whisper_moe.languages import language_code
from whisper_moe.registry import check_gates, files_key, printable, short_source

if TYPE_CHECKING:
    from hub_utils import FoundAdapter
    from whisper_moe import Transcriber

_log = logging.getLogger(__name__)

_MOST_OFFERED = 1000  # findings that are remembered; the oldest are forgotten, and of one search the worst
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_PATH = re.compile(r"(?<![\w.:/@\\-])(?:~|[A-Za-z]:)?[/\\](?:[^\s/\\'\"]+[/\\])+(?P<last>[^\s/\\'\":;,()]*)")  # of a machine; no address


@dataclass(frozen=True)
class Fetching:
    """What visitors may have fetched from the Hub.

    Args:
        allowed: Whether they may at all.
        base_model: The base's id on the Hub, by which adapters are looked for; None if it has none.
        owners: Users and organisations whose adapters may be looked for.
        collections: Collections that may be looked into.
        any_owner: Whether somebody at this machine may name other owners.
        only_here: Whether only somebody at this machine may have any fetched.
        max_adapters: How many may be fetched while the page runs.
        max_mb: How many megabytes they may have together.
    """

    allowed: bool = False
    base_model: str | None = None
    owners: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()
    any_owner: bool = False
    only_here: bool = False
    max_adapters: int = 20
    max_mb: float = 500

    def of_visitor(self, is_own: bool) -> Fetching:
        """What this visitor may: somebody at this machine, or a stranger."""
        return self if is_own else replace(self, allowed=self.allowed and not self.only_here, any_owner=False)


@dataclass(frozen=True)
class Findings:
    """What a search found.

    Args:
        adapters: The best first.
        problems: Where could not be looked, and why, in sentences for people.
    """

    adapters: tuple[FoundAdapter, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Offer:
    """An adapter of the Hub that could be fetched, and what a person should know before it is.

    Args:
        found: What its card says of it.
        num_bytes: Size of its files.
        taken_by: Name of the adapter that speaks for its language already; None if it can be added.
    """

    found: FoundAdapter
    num_bytes: int
    taken_by: str | None = None

    @property
    def author(self) -> str:
        """Whose repository it is."""
        return str(self.found.repo_id).split("/")[0]


class Catalogue:
    """The adapters of one page. May be asked from many threads; fetches one adapter at a time.

    Args:
        transcriber: What adapters are added to.
        fetching: What visitors may have fetched.
        problems: What could not be had when the page started.
        api: The Hub client to use. Its token is not used for strangers.
        cache_dir: Where fetched adapters are kept.
    """

    def __init__(
        self,
        transcriber: Transcriber,
        fetching: Fetching = Fetching(),
        *,
        problems: tuple[str, ...] = (),
        api: Any = None,
        cache_dir: Path | None = None,
    ) -> None:
        self.transcriber, self.fetching, self.problems = transcriber, fetching, problems
        self._client, self._cache_dir = api, cache_dir
        self._origins: dict[str, bool] = {}  # by an adapter's files: whether the Hub's hashes were compared with them
        self._offered: dict[str, FoundAdapter] = {}  # by source
        self._offering, self._fetching = threading.Lock(), threading.Lock()
        self._num_fetched, self._bytes_fetched = 0, 0

    def is_from_hub(self, adapter: LanguageAdapter) -> bool:
        """Whether the files of an adapter were compared with the Hub's hashes, and are still the same."""
        from hub_utils import cached_origin

        try:
            key = files_key(adapter)
        except ValueError:  # they are gone
            return False
        if key not in self._origins:  # once: hashes of large files take long
            self._origins[key] = cached_origin(adapter.path, self._cache_dir) is not None
        return self._origins[key]

    def _where(self, is_own: bool) -> dict[str, Any]:
        """The client and the cache for a visitor. What the owner's token opens is not for strangers."""
        from hub_utils._hub import client_for_strangers

        return {"api": self._client if is_own else client_for_strangers(self._client), "cache_dir": self._cache_dir}

    # ---- what is named, not here yet -------------------------------------------------------------------------------------

    def fetch_expected(self, key: str, *, is_own: bool = False) -> LanguageAdapter:
        """Fetch an adapter that the page's owner named, now rather than when its language is first heard."""
        self._check_allowed(is_own)
        if key not in {source.key for source in self.transcriber.registry.expected}:
            raise ValueError("This adapter is here already, or was never named. Look at the list again.")
        with _in_plain_words():
            return self.transcriber.registry[key]

    # ---- finding ---------------------------------------------------------------------------------------------------------

    def search(self, language: str, owner: str = "", *, is_own: bool = False) -> Findings:
        """Adapters for a language on this base, the best first. `owner`: whose; empty: those whom the page's owner named."""
        from hub_utils import check_reachable, rank_adapters

        self._check_allowed(is_own)
        base_model = self.fetching.base_model
        if base_model is None:
            raise ValueError(
                "The base model is a folder, so nobody knows which adapters are for it. Start the page with --base-model NAME."
            )
        if not language.strip():
            raise ValueError("Say which language: a name such as Breton, or a code such as br.")
        code, owners, collections = language_code(language[:100]), *self._places(owner.strip(), self.fetching.of_visitor(is_own))
        places: list[dict[str, Any]] = [*({"namespaces": [each]} for each in owners), *({"collection": slug} for slug in collections)]
        api = self._where(is_own)["api"]
        with _in_plain_words():
            check_reachable(api)
            found, problems = _look_at(places, base_model, code, api)
            best = rank_adapters(found)[:_MOST_OFFERED]
        with self._offering:
            # The newest search first, and its best: what no longer fits is at the end.
            offered = {each.source: each for each in best} | self._offered | {each.source: each for each in best}
            self._offered = dict(list(offered.items())[:_MOST_OFFERED])
        return Findings(tuple(best), tuple(problems))

    @staticmethod
    def _places(owner: str, allowed: Fetching) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Owners and collections to look at."""
        if owner and allowed.any_owner and not _OWNER.fullmatch(owner):
            raise ValueError(f"{printable(owner[:100])!r} is no name of a user or an organisation on the Hub.")
        if owner and not (allowed.any_owner or owner in allowed.owners):
            known = ", ".join(allowed.owners) or "none"
            raise ValueError(f"Adapters of {owner[:100]!r} are not looked for here. Owners that this page trusts: {known}.")
        if owner:
            return (owner,), ()
        if not (allowed.owners or allowed.collections):
            raise ValueError("Say whose adapters: the name of a user or an organisation on the Hub. All of the Hub is never searched.")
        return allowed.owners, allowed.collections

    def offer(self, source: str, *, is_own: bool = False) -> Offer:
        """What a person should know of a finding before it is fetched: size, and who speaks for its language now."""
        from hub_utils import check_reachable
        from hub_utils.fetch import size_of

        self._check_allowed(is_own)
        found = self._offered.get(source)
        if found is None:
            raise ValueError("This adapter was not found by a search here, or long ago. Search again.")
        api = self._where(is_own)["api"]
        with _in_plain_words():
            check_reachable(api)
            num_bytes = size_of(str(found.repo_id), str(found.sha), found.subfolder, api=api)
        return Offer(found, num_bytes, self._taken_by(found))

    def _taken_by(self, found: FoundAdapter) -> str | None:
        return self.transcriber.registry.speaker(language_code(found.language), found.domain)

    # ---- fetching --------------------------------------------------------------------------------------------------------

    def fetch(
        self, source: str, on_progress: Callable[[float, str], None] = lambda share, what: None, *, is_own: bool = False
    ) -> LanguageAdapter:
        """Fetch a finding, look it over, and add it. If anything is wrong with it, nothing changes.

        Raises:
            ValueError: It may not be fetched, cannot be had, is not trusted or does not fit. In words for the visitor.
        """
        offer = self.offer(source, is_own=is_own)
        with self._fetching, _in_plain_words(self._folder_of(offer), offer.found.source):
            self._check_room(offer)
            on_progress(0.0, "Fetching")
            folder = self._fetch_files(offer, on_progress, is_own)
            on_progress(0.9, "Checking")
            adapter = self._add(offer, folder)
            self._num_fetched += 1  # only now: whatever went wrong before, the next one has its place
            return adapter

    def _folder_of(self, offer: Offer) -> Path:
        """Where its files are, or will be."""
        from hub_utils.fetch import cache_folder

        found = offer.found
        name = str(found.sha) if found.subfolder is None else f"{found.sha}--{found.subfolder}"
        return cache_folder(self._cache_dir) / str(found.repo_id).replace("/", "--") / name

    def _check_allowed(self, is_own: bool) -> None:
        if not self.fetching.of_visitor(is_own).allowed:
            raise ValueError("Visitors may not fetch adapters on this page. Its owner can: --allow-fetch.")

    def _check_room(self, offer: Offer) -> None:
        found, taken_by = offer.found, self._taken_by(offer.found)  # again: another visitor may have been quicker
        if taken_by is not None:
            raise ValueError(
                f"{language_name(language_code(found.language))} has an adapter here already: {taken_by}. To have this one in its place, "
                f"start the page with --adapters {found.source}"
            )
        if self._num_fetched >= self.fetching.max_adapters:
            raise ValueError(f"{self.fetching.max_adapters} adapters have been fetched here, and no more may be. Its owner can add others.")
        if offer.num_bytes > self._bytes_left():
            raise ValueError(
                f"It has {offer.num_bytes / 1e6:,.1f} MB, and {self._bytes_left() / 1e6:,.1f} MB may still be fetched on this page. "
                "Choose a smaller one."
            )

    def _bytes_left(self) -> int:
        return max(int(self.fetching.max_mb * 1e6) - self._bytes_fetched, 0)

    def _fetch_files(self, offer: Offer, on_progress: Callable[[float, str], None], is_own: bool) -> Path:
        """The adapter's folder in the cache, with its pool beside it. What came over the network counts, whatever becomes of it."""
        from hub_utils import Pinned, RegistryEntry, fetch_entry

        found, seen = offer.found, [0]

        def report(done: int, total: int) -> None:
            if done < seen[-1]:
                seen.append(0)  # the pool's turn
            seen[-1] = done
            on_progress(0.9 * done / max(total, 1), "Fetching")

        entry = RegistryEntry(found.language, found.domain, Pinned(str(found.repo_id), str(found.sha), found.subfolder))
        try:
            allowed: dict[str, Any] = {"base_model": self.fetching.base_model, "max_bytes": self._bytes_left()}
            return fetch_entry(entry, **allowed, progress=report, **self._where(is_own))
        finally:
            self._bytes_fetched += sum(seen)

    def _add(self, offer: Offer, folder: Path) -> LanguageAdapter:
        adapter = LanguageAdapter.load(folder)
        found = offer.found
        if (adapter.language, adapter.domain) != (language_code(found.language), found.domain):
            raise ValueError(f"Its card says that it writes {found.language!r}, its files say {adapter.language!r}. It is not used.")
        check_gates(adapter)
        self.transcriber.check_fit(adapter)
        self.transcriber.load(adapter)  # on the model once, between two batches: what cannot be used is found out now
        usual = adapter.language if adapter.domain is None else f"{adapter.language}/{adapter.domain}"
        source = short_source(found.source)
        # What an adapter calls itself is its maker's choice: it could be the name of another one.
        adapter = replace(adapter, name=adapter.name if adapter.name == usual else source, source=source)
        return self.transcriber.registry.add_if_free(adapter)  # another way than this page's may have been quicker


def _look_at(places: list[dict[str, Any]], base_model: str, language: str, api: Any) -> tuple[list[FoundAdapter], list[str]]:
    """What is found in these places, and the problems with others. Raises `HubError` if there is nothing but problems."""
    from hub_utils import HubError, find_adapters

    found: list[FoundAdapter] = []
    problems: list[HubError] = []
    for place in places:
        try:
            found += find_adapters(base_model, language, api=api, **place)
        except HubError as error:  # noqa: PERF203 - one place that cannot be looked at does not end the others
            problems.append(error)
    if len(problems) == len(places):
        raise problems[0]
    return found, [_without_paths(str(error)) for error in problems]


@contextmanager
def _in_plain_words(folder: Path | None = None, source: str = "") -> Iterator[None]:
    """Whatever goes wrong inside becomes a `ValueError` for the visitor. What was not foreseen is for the log, not for the page."""
    from hub_utils import HubError

    try:
        yield
    except (ValueError, HubError) as error:
        message = str(error)
        if folder is not None:
            message = message.replace(f"in {folder}", source).replace(str(folder), source)
        raise ValueError(_without_paths(message)) from None
    except Exception as error:
        _log.exception("An adapter of the Hub could not be had")
        what = "It could not be kept on this machine" if isinstance(error, OSError) else "Something went wrong here"
        raise ValueError(f"{what}, and nothing was changed. The page's owner finds the reason in the log.") from None


def _without_paths(message: str) -> str:
    """A message on one line; of a path on this machine its last part is left."""
    return printable(_PATH.sub(lambda found: found["last"] or "a folder", message))
