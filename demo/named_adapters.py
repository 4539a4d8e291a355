"""What `--adapters` may name: folders, registry files, and repositories, owners and collections of the Hub.

What needs no network is there when the page starts. What the Hub does not give is said, and the page starts with the rest. What a name
stood for is remembered beside the adapters that were fetched, so that the next start needs no network for them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from hub_utils import FoundAdapter, HubError, RegistryEntry
    from whisper_moe import Transcriber


_log = logging.getLogger(__name__)

PATIENCE_S = 10.0  # for the Hub's first answer, twice: the start is asked once, and what it finds is there as long as the page is
Kind = Literal["folder", "registry", "repository", "owner", "collection"]


@dataclass(frozen=True)
class NamedAdapters:
    """The names of a command line with their kinds, in its order. What they mean is in the help of `whisper-moe-demo`."""

    names: tuple[tuple[Kind, str], ...] = ()

    @classmethod
    def sort(cls, names: Sequence[str]) -> NamedAdapters:
        """What is on this machine is a folder or a registry file; a repository is owner/name, with @commit or /subfolder behind it."""
        return cls(tuple(map(_kind, names)))

    def of(self, kind: Kind) -> list[str]:
        """The names of one kind."""
        return [name for each, name in self.names if each == kind]

    @property
    def on_hub(self) -> list[tuple[Kind, str]]:
        """Those that the Hub itself must be asked about; what a registry names is fetched later."""
        return [(kind, name) for kind, name in self.names if kind in ("repository", "owner", "collection")]


def _kind(name: str) -> tuple[Kind, str]:
    path = Path(name).expanduser()
    if path.is_dir():
        return "folder", str(path)
    if path.is_file() or name.endswith(".json"):
        return "registry", str(path)
    for kind in ("owner", "collection"):
        if name.startswith(f"{kind}:"):
            return kind, name.partition(":")[2]
    looks_remote = "/" in name.strip("/") and not name.startswith((".", "/", "~"))
    return ("repository", name) if looks_remote else ("folder", name)


def add_named(
    transcriber: Transcriber, named: NamedAdapters, base_model: str | None, *, api: Any = None, cache_dir: Path | None = None
) -> list[str]:
    """Have a transcriber know what is named on the Hub: single adapters are fetched now, others when their language is first heard.

    Args:
        transcriber: Its registry learns of them. Whoever is named first speaks for a language.
        named: The names; folders and registries are not looked at.
        base_model: The base's id on the Hub; None if it has none.
        api: The Hub client to use.
        cache_dir: Where fetched adapters are kept.

    Returns:
        What could not be had, and why, in sentences for people.
    """
    problems: list[str] = []
    hub = _Hub(api, cache_dir)
    for kind, name in named.on_hub:
        entries = _entries_of(kind, name, base_model, hub, problems)
        is_wanted_now = kind == "repository" and len(entries) == 1
        _expect(transcriber, entries, base_model, problems, is_wanted_now, {"api": api, "cache_dir": cache_dir})
    return problems


@dataclass
class _Hub:
    """The Hub, and whether it answers: asked at the first name, the answer holds for all."""

    api: Any
    cache_dir: Path | None
    _answers: list[HubError | None] = field(default_factory=list)

    @property
    def problem(self) -> HubError | None:
        """Why it cannot be asked; None if it can."""
        from hub_utils import HubError, check_reachable

        if not self._answers:
            try:
                check_reachable(self.api, patience_s=PATIENCE_S, attempts=2)
                self._answers.append(None)
            except HubError as error:
                self._answers.append(error)
        return self._answers[0]


def _entries_of(kind: Kind, name: str, base_model: str | None, hub: _Hub, problems: list[str]) -> list[RegistryEntry]:
    from hub_utils import HubError
    from hub_utils._hub import is_passing
    from hub_utils.remembered import recall, remember

    title = name if kind == "repository" else f"{kind}:{name}"
    try:
        if kind != "repository" and base_model is None:
            raise ValueError(
                "The base model is a folder, so nobody knows which adapters are for it. Say its name on the Hub: --base-model."
            )
        try:
            if hub.problem is not None:
                raise hub.problem
            entries = _asked(kind, name, base_model, hub.api, problems)
        except HubError as error:
            if hub.problem is None and not is_passing(error.__cause__):
                raise  # it has answered: no such repository, no access
            entries = recall(title, base_model, hub.cache_dir)
            _log.warning("%s Taken for %s is what was there when it was last asked: %d adapters.", error, title, len(entries))
            return entries or _in_cache(kind, name, base_model, hub, error)
        remember(title, base_model, entries, hub.cache_dir)
        return entries
    except (ValueError, OSError) as error:
        problems.append(f"{title}: {error}")
        return []


def _asked(kind: Kind, name: str, base_model: str | None, api: Any, problems: list[str]) -> list[RegistryEntry]:
    if kind == "repository":
        return [_entry(each) for each in _listed(*_parts(name), base_model, api)]
    where: dict[str, Any] = {"namespaces": [name]} if kind == "owner" else {"collection": name}
    assert base_model is not None, "checked by whoever asks"
    return _of_many(f"{kind}:{name}", base_model, api, problems, where)


def _in_cache(kind: Kind, name: str, base_model: str | None, hub: _Hub, error: HubError) -> list[RegistryEntry]:
    """What the cache has of a repository that was fetched by other means, and never asked about by this name."""
    from hub_utils import AdapterError, fetch_adapter

    if kind != "repository":
        raise error
    repo_id, revision, subfolder = _parts(name)
    where = {"api": hub.api, "cache_dir": hub.cache_dir}
    try:
        return [_entry_of_folder(fetch_adapter(repo_id, revision, subfolder=subfolder, base_model=base_model, timeout_s=5, **where))]
    except AdapterError as problem:
        raise ValueError(str(problem)) from None


def _expect(
    transcriber: Transcriber, entries: list[RegistryEntry], base_model: str | None, problems: list[str], now: bool, where: dict[str, Any]
) -> None:
    from whisper_moe.cli_hub import expect_entries

    try:
        expected = expect_entries(transcriber, entries, base_model, folders_first=True, **where)
        for source in expected if now else ():
            transcriber.registry[source.key]  # fetches it
    except ValueError as error:
        problems.append(str(error))


# ---- one name --------------------------------------------------------------------------------------------------------------


def _parts(name: str) -> tuple[str, str | None, str | None]:
    """owner/name, owner/name@revision, owner/name/subfolder, owner/name@commit/subfolder."""
    from hub_utils import Pinned
    from hub_utils.naming import PINNED, is_hub_id

    if PINNED.fullmatch(name):
        pinned = Pinned.parse(name)
        return pinned.repo_id, pinned.sha, pinned.subfolder
    place, _, revision = name.partition("@")
    repo_id, subfolder = "/".join(place.split("/")[:2]), "/".join(place.split("/")[2:])
    if not is_hub_id(repo_id):
        raise ValueError("There is no such folder here, and it is no repository of the Hub (owner/name).")
    return repo_id, revision or None, subfolder or None


def _listed(repo_id: str, revision: str | None, subfolder: str | None, base_model: str | None, api: Any) -> list[FoundAdapter]:
    """What a repository's card lists that is for this base."""
    from hub_utils import adapters_in

    found = adapters_in(repo_id, revision, api=api)
    if not found:
        raise ValueError("Its card names no language adapter. If it is one, add it with its folder: download it first.")
    fitting = [each for each in found if base_model is None or each.base_model == base_model]
    if not fitting:
        raise ValueError(f"It is for {found[0].base_model}, and the base here is {base_model}. Start the page with that base: --model.")
    wanted = [each for each in fitting if subfolder is None or each.subfolder == subfolder]
    if not wanted:
        folders = ", ".join(str(each.subfolder) for each in fitting)
        raise ValueError(f"It has no adapter in the folder {subfolder!r}. It has: {folders}.")
    return wanted


def _of_many(name: str, base_model: str, api: Any, problems: list[str], where: dict[str, Any]) -> list[RegistryEntry]:
    """The best adapter of an owner or a collection for each language. Where several are equally good, none is taken, and that is said."""
    from hub_utils import find_all_adapters, pick_adapter

    entries = []
    found = find_all_adapters(base_model, api=api, **where)
    if not found:
        problems.append(f"{name}: nothing there is a language adapter for {base_model}.")
    for group in found.values():
        try:
            entries.append(_entry(pick_adapter(group)))
        except ValueError as error:  # noqa: PERF203 - one that cannot be chosen does not end the others
            problems.append(f"{name}: {error}")
    return entries


def _entry(found: FoundAdapter) -> RegistryEntry:
    from hub_utils import Pinned, RegistryEntry

    return RegistryEntry(found.language, found.domain, Pinned(str(found.repo_id), str(found.sha), found.subfolder))


def _entry_of_folder(fetched: Any) -> RegistryEntry:
    from hub_utils import Pinned, RegistryEntry
    from whisper_moe import LanguageAdapter

    adapter = LanguageAdapter.load(fetched.path)
    return RegistryEntry(adapter.language, adapter.domain, Pinned(fetched.repo_id, fetched.sha, fetched.subfolder))
