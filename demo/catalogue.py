"""The adapters of a running page: those that are here, those that are named for later, and the way from the Hub for one more.

What a visitor fetches was found by a search on this page, among owners whom the page's owner named (anybody's on one's own machine). It
goes through the checks of `hub_utils`, is put on the model once, and then speaks for its language. Requests of others go on meanwhile. No
Gradio, no HTML.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from whisper_moe import LanguageAdapter, language_name
from whisper_moe.languages import language_code
from whisper_moe.registry import check_gates, printable

if TYPE_CHECKING:
    from hub_utils import FoundAdapter
    from whisper_moe import Transcriber

_MOST_OFFERED = 1000  # findings that are remembered; the oldest are forgotten


@dataclass(frozen=True)
class Fetching:
    """What visitors may have fetched from the Hub.

    Args:
        allowed: Whether they may at all.
        base_model: The base's id on the Hub, by which adapters are looked for; None if it has none.
        owners: Users and organisations whose adapters may be looked for.
        collections: Collections that may be looked into.
        any_owner: Whether a visitor may name other owners: on the visitor's own machine.
        max_adapters: How many may be fetched while the page runs.
        max_mb: How many megabytes they may have together.
    """

    allowed: bool = False
    base_model: str | None = None
    owners: tuple[str, ...] = ()
    collections: tuple[str, ...] = ()
    any_owner: bool = False
    max_adapters: int = 20
    max_mb: float = 500


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
        api: The Hub client to use.
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
        self._where: dict[str, Any] = {"api": api, "cache_dir": cache_dir}
        self._offered: dict[str, FoundAdapter] = {}  # by source
        self._offering, self._fetching = threading.Lock(), threading.Lock()
        self._num_fetched, self._bytes_fetched = 0, 0

    # ---- what is named, not here yet -------------------------------------------------------------------------------------

    def fetch_expected(self, key: str) -> LanguageAdapter:
        """Fetch an adapter that the page's owner named, now rather than when its language is first heard."""
        self._check_allowed()
        if key not in {source.key for source in self.transcriber.registry.expected}:
            raise ValueError("This adapter is here already, or was never named. Look at the list again.")
        return self.transcriber.registry[key]

    # ---- finding ---------------------------------------------------------------------------------------------------------

    def search(self, language: str, owner: str = "") -> list[FoundAdapter]:
        """Adapters for a language on this base, the best first. `owner`: whose; empty: those whom the page's owner named."""
        from hub_utils import HubError, check_reachable, find_adapters

        self._check_allowed()
        base_model = self.fetching.base_model
        if base_model is None:
            raise ValueError(
                "The base model is a folder, so nobody knows which adapters are for it. Start the page with --base-model NAME."
            )
        if not language.strip():
            raise ValueError("Say which language: a name such as Breton, or a code such as br.")
        code, owners, collections = language_code(language), *self._places(owner.strip())
        places: list[dict[str, Any]] = [{"namespaces": owners}] if owners else []
        places += [{"collection": slug} for slug in collections]
        try:
            check_reachable(self._where["api"])
            found = [each for place in places for each in find_adapters(base_model, code, api=self._where["api"], **place)]
        except HubError as error:
            raise ValueError(printable(str(error))) from None
        unique = list({each.source: each for each in found}.values())
        with self._offering:
            self._offered |= {each.source: each for each in unique}
            self._offered = dict(list(self._offered.items())[-_MOST_OFFERED:])
        return unique

    def _places(self, owner: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Owners and collections to look at."""
        allowed = self.fetching
        if owner and not (allowed.any_owner or owner in allowed.owners):
            known = ", ".join(allowed.owners) or "none"
            raise ValueError(f"Adapters of {owner[:100]!r} are not looked for here. Owners that this page trusts: {known}.")
        if owner:
            return (owner,), ()
        if not (allowed.owners or allowed.collections):
            raise ValueError("Say whose adapters: the name of a user or an organisation on the Hub. All of the Hub is never searched.")
        return allowed.owners, allowed.collections

    def offer(self, source: str) -> Offer:
        """What a person should know of a finding before it is fetched: size, and who speaks for its language now."""
        from hub_utils import AdapterError, HubError, check_reachable
        from hub_utils.fetch import size_of

        self._check_allowed()
        found = self._offered.get(source)
        if found is None:
            raise ValueError("This adapter was not found by a search here, or long ago. Search again.")
        try:
            check_reachable(self._where["api"])
            num_bytes = size_of(str(found.repo_id), str(found.sha), found.subfolder, api=self._where["api"])
        except (AdapterError, HubError) as error:
            raise ValueError(printable(str(error))) from None
        return Offer(found, num_bytes, self._taken_by(found))

    def _taken_by(self, found: FoundAdapter) -> str | None:
        wanted = (language_code(found.language), found.domain)
        here = [each.name for each in self.transcriber.registry if (each.language, each.domain) == wanted]
        named = [each.key for each in self.transcriber.registry.expected if (each.language, each.domain) == wanted]
        return next(iter(here + named), None)

    # ---- fetching --------------------------------------------------------------------------------------------------------

    def fetch(self, source: str, on_progress: Callable[[float, str], None] = lambda share, what: None) -> LanguageAdapter:
        """Fetch a finding, look it over, and add it. If anything is wrong with it, nothing changes.

        Raises:
            ValueError: It may not be fetched, cannot be had, is not trusted or does not fit. In words for the visitor.
        """
        offer = self.offer(source)
        with self._fetching:
            self._check_room(offer)
            self._num_fetched += 1
            folder = None
            try:
                on_progress(0.0, "Fetching")
                folder = self._fetch_files(offer, on_progress)
                on_progress(0.9, "Checking")
                return self._add(offer, folder)
            except (ValueError, OSError) as error:
                self._num_fetched -= 1
                raise ValueError(_without_path(str(error), folder, offer.found.source)) from None

    def _check_allowed(self) -> None:
        if not self.fetching.allowed:
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

    def _fetch_files(self, offer: Offer, on_progress: Callable[[float, str], None]) -> Path:
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
            return fetch_entry(entry, base_model=self.fetching.base_model, max_bytes=self._bytes_left(), progress=report, **self._where)
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
        # What an adapter calls itself is its maker's choice: it could be the name of another one.
        return self.transcriber.add_adapter(replace(adapter, name=adapter.name if adapter.name == usual else adapter.source or usual))


def _without_path(message: str, folder: Path | None, source: str) -> str:
    """A message without the folder of this machine that it may name, on one line."""
    return printable(message if folder is None else message.replace(f"in {folder}", source).replace(str(folder), source))
