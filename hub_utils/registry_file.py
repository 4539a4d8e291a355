"""The file that says which adapter speaks for which language: the map that goes before any search of the Hub.

    {"format": 1, "adapters": {"cy": "alice/whisper-small-s2lora-cy@<40 hex digits>", "qug": "./adapters/qug"}}

A repository is pinned to one commit, so that what was looked at once is what is used ever after; a path is meant from the file's own
folder. Domain adapters stand beside the language's own: `"en/child"`. People may edit it; what is wrong in it is named by its key.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.utils import WeakFileLock

from ._hub import ask
from .adapter_files import LANGUAGE_FILE, MAX_JSON_BYTES, AdapterError, parse_json, read_file, short
from .find import FoundAdapter, describe
from .naming import PINNED, Pinned, is_hub_id

FORMAT = 1
MAX_FILE_BYTES = 1024 * 1024

_KEY = re.compile(r"(?P<language>[a-z]{2,3}(-[A-Za-z0-9]{2,8})*)(/(?P<domain>[a-z0-9]+(-[a-z0-9]+)*))?")


def default_registry() -> Path:
    """Where the registry is kept: `$WHISPER_MOE_REGISTRY`, else `whisper-moe/adapters.json` in the user's folder for settings."""
    if told := os.environ.get("WHISPER_MOE_REGISTRY"):
        return Path(told)
    settings = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(settings) / "whisper-moe" / "adapters.json"


# ---- one entry ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegistryEntry:
    """Who speaks for a language.

    Args:
        language: The language.
        domain: Kind of speech ("child"); None for the language in general.
        source: A pinned repository, or a folder.
    """

    language: str
    domain: str | None
    source: Pinned | Path

    @property
    def key(self) -> str:
        """How the file calls it: `"cy"`, `"en/child"`."""
        return self.language if self.domain is None else f"{self.language}/{self.domain}"


# ---- the file ----------------------------------------------------------------------------------------------------------


class RegistryFile:
    """A registry file: read when asked, changed under a lock, replaced as a whole.

    Args:
        path: The file; it need not exist yet. By default `default_registry()`.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = default_registry() if path is None else Path(path)

    @property
    def _file(self) -> Path:
        """The file itself, where `path` is a link to it."""
        return self.path.resolve()

    def entries(self) -> list[RegistryEntry]:
        """What the file says, by key. Empty if there is none.

        Raises:
            ValueError: The file is broken; the message names the entry.
        """
        return [self._entry(key, text) for key, text in sorted(self._read().items())]

    def get(self, language: str, domain: str | None = None) -> RegistryEntry | None:
        """The entry for a language, None if there is none."""
        return next((entry for entry in self.entries() if (entry.language, entry.domain) == (language, domain)), None)

    def add(self, entry: RegistryEntry, *, replace: bool = False) -> None:
        """Write an entry down.

        Raises:
            ValueError: There is another one for that language, and `replace` was not said.
        """
        if _KEY.fullmatch(entry.key) is None:
            raise ValueError(f"{entry.key!r} is no key of a registry: a language code ('cy'), or one with a domain ('en/child').")
        with self._changing() as rows:
            text = self._text(entry.source)
            if rows.get(entry.key, text) != text and not replace:
                raise ValueError(f"{entry.key} is spoken for by {rows[entry.key]}. Remove that first, or say replace=True (--replace).")
            rows[entry.key] = text

    def remove(self, key: str) -> RegistryEntry:
        """Take an entry out, and return it. Nothing is deleted but the line."""
        with self._changing() as rows:
            if key not in rows:
                raise ValueError(f"The registry {self.path} has no {key!r}. It has: {', '.join(sorted(rows)) or 'nothing yet'}.")
            return self._entry(key, rows.pop(key))

    def _entry(self, key: str, text: Any) -> RegistryEntry:
        named = _KEY.fullmatch(key)
        if named is None:
            raise ValueError(f"{self.path}: {key!r} is no language code ('cy') and no code with a domain ('en/child').")
        if not isinstance(text, str) or not text:
            raise ValueError(f"{self.path}: {key} is {text!r}; expected owner/name@commit, or a path that begins with './', '/' or '~'.")
        if text.startswith((".", "/", "~")) or re.match(r"[A-Za-z]:[\\/]", text):
            return RegistryEntry(named["language"], named["domain"], self._file.parent / Path(text).expanduser())
        try:
            return RegistryEntry(named["language"], named["domain"], Pinned.parse(text))
        except ValueError as error:
            raise ValueError(f"{self.path}: {key}: {error} A path begins with './', '/' or '~'.") from None

    def _text(self, source: Pinned | Path) -> str:
        """A path below the file's folder is written from there, so that the two can move together."""
        if isinstance(source, Pinned):
            return str(source)
        path, here = Path(os.path.abspath(source)), self._file.parent
        return f"./{path.relative_to(here).as_posix()}" if path.is_relative_to(here) and path != here else str(path)

    def _read(self) -> dict[str, Any]:
        if not self._file.exists():
            return {}
        content = parse_json(read_file(self._file, MAX_FILE_BYTES, "The registry"), self.path.name, "The registry")
        if content.get("format") != FORMAT or not isinstance(content.get("adapters"), dict):
            raise ValueError(f'{self.path} is no registry: expected {{"format": {FORMAT}, "adapters": {{...}}}}.')
        rows: dict[str, Any] = content["adapters"]
        return rows

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Any]]:
        """The rows to change; written when the block ends well. Other processes wait, and no reader sees half a file."""
        path = self._file
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path.with_name(f".{path.name}.lock"), timeout=30):
            rows = self._read()
            yield rows
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
            try:
                with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                    json.dump({"format": FORMAT, "adapters": rows}, file, indent=2, sort_keys=True, ensure_ascii=False)
                    file.write("\n")
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise


# ---- entries from sources ----------------------------------------------------------------------------------------------


def entry_of(
    source: str | Path, *, revision: str | None = None, subfolder: str | None = None, token: str | None = None, api: HfApi | None = None
) -> RegistryEntry:
    """The entry for a source: what the adapter says of itself, and for a repository the commit that it is at now.

    Args:
        source: A folder, `owner/name`, or `owner/name@revision`. A text that could be both is refused.
        revision: Branch, tag or commit of the repository; by default its newest state.
        subfolder: Which adapter of a repository of many languages.
        token: By default the one that was logged in with.
        api: The client to use, in place of one made from `token`.

    Raises:
        ValueError: There is no adapter, or it does not say its language.
        HubError: The Hub refused, or could not be reached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        if isinstance(source, str) and is_hub_id(source):  # a folder that happens to be here must not pass for a repository, nor hide one
            raise ValueError(f"{source!r} is a folder here and may be a repository too. Say ./{source} for the folder, {source}@main else.")
        if revision is not None or subfolder is not None:
            raise ValueError(f"{source} is a folder; revision and subfolder are for repositories.")
        return _entry_of_folder(folder)
    repo_id, _, named = str(source).partition("@")
    if not is_hub_id(repo_id):
        raise ValueError(f"{str(source)!r} is neither a folder nor a repository of the Hub (owner/name).")
    if named and "/" in named and PINNED.fullmatch(str(source)):
        pinned = Pinned.parse(str(source))
        named, subfolder = pinned.sha, pinned.subfolder if subfolder is None else subfolder
    return _entry_of_repository(repo_id, named or revision, subfolder, HfApi(token=token) if api is None else api)


def _entry_of_folder(folder: Path) -> RegistryEntry:
    label = f"The adapter in {folder}"
    try:
        said = parse_json(read_file(folder / LANGUAGE_FILE, MAX_JSON_BYTES, label), LANGUAGE_FILE, label)
    except AdapterError as error:
        raise ValueError(f"{error} `whisper-moe train` writes {LANGUAGE_FILE}.") from None
    return _checked(said.get("language"), said.get("domain"), Path(os.path.abspath(folder)))


def _entry_of_repository(repo_id: str, revision: str | None, subfolder: str | None, api: HfApi) -> RegistryEntry:
    return _pin(_describe(repo_id, revision, subfolder, api))


def _describe(repo_id: str, revision: str | None, subfolder: str | None, api: HfApi) -> FoundAdapter:
    """What a repository's card says of its one adapter, or of the one in that subfolder."""
    info = ask(lambda: api.model_info(repo_id, revision=revision), repo_id)
    if info.id != repo_id:
        raise ValueError(f"{repo_id} is called {short(info.id)} now. If that is the same owner, add it under that name.")
    found = [adapter for adapter in describe(info) if subfolder is None or adapter.subfolder == subfolder]
    if not found:
        raise ValueError(f"{repo_id} has no card of a language adapter" + ("." if subfolder is None else f" for the folder {subfolder!r}."))
    if len(found) > 1:
        raise ValueError(f"{repo_id} holds {len(found)} adapters: {', '.join(str(a.subfolder) for a in found)}. Name the subfolder.")
    return found[0]


def _pin(found: FoundAdapter) -> RegistryEntry:
    return _checked(found.language, found.domain, Pinned(str(found.repo_id), str(found.sha), found.subfolder))


def _checked(language: Any, domain: Any, source: Pinned | Path) -> RegistryEntry:
    if not isinstance(language, str) or not isinstance(domain, (str, type(None))):
        raise ValueError(f"{source} does not say its language.")
    entry = RegistryEntry(language, domain, source)
    if _KEY.fullmatch(entry.key) is None:
        raise ValueError(f"{source} says it is for {entry.key!r}; expected a language code ('cy'), or one with a domain ('en/child').")
    return entry


# ---- newer commits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """What an update found for one entry. `old` and `new` are commits; `problem` says why the entry stayed as it was."""

    key: str
    old: str
    new: str
    problem: str | None = None


def update_registry(
    registry: RegistryFile, keys: list[str] | None = None, *, token: str | None = None, api: HfApi | None = None, write: bool = True
) -> list[Update]:
    """Pin the repositories of a registry to their newest commits. Folders are left alone.

    An entry stays as it is, and its `Update` says why, where the repository is gone, now says another language or base, or no longer
    has the pinned commit in its history: then its owner may have changed, and what is there now was never looked at.

    Args:
        registry: The file.
        keys: Which entries; by default all.
        token: By default the one that was logged in with.
        api: The client to use, in place of one made from `token`.
        write: False: only look.

    Raises:
        ValueError: There is no such entry.
    """
    entries = {entry.key: entry for entry in registry.entries()}
    if unknown := [key for key in keys or () if key not in entries]:
        raise ValueError(f"The registry {registry.path} has no {unknown[0]!r}. It has: {', '.join(entries) or 'nothing yet'}.")
    api = HfApi(token=token) if api is None else api
    updates = []
    for key, entry in entries.items():
        if (keys is not None and key not in keys) or not isinstance(entry.source, Pinned):
            continue
        update = _look(entry, entry.source, api)
        updates.append(update)
        if write and update.problem is None and update.new != update.old:
            source = Pinned(entry.source.repo_id, update.new, entry.source.subfolder)
            registry.add(RegistryEntry(entry.language, entry.domain, source), replace=True)
    return updates


def _look(entry: RegistryEntry, pinned: Pinned, api: HfApi) -> Update:
    try:
        now = _describe(pinned.repo_id, None, pinned.subfolder, api)
        if now.sha != pinned.sha:
            _check_same_adapter(entry, pinned, now, api)
    except (ValueError, OSError) as error:
        return Update(entry.key, pinned.sha, pinned.sha, str(error))
    return Update(entry.key, pinned.sha, str(now.sha))


def _check_same_adapter(entry: RegistryEntry, pinned: Pinned, now: FoundAdapter, api: HfApi) -> None:
    history = ask(lambda: api.list_repo_commits(pinned.repo_id), pinned.repo_id)
    if pinned.sha not in {commit.commit_id for commit in history}:
        raise ValueError(
            f"{pinned.repo_id} no longer has the pinned commit in its history: it was rewritten, or somebody else has the name now. "
            "Look at it, then remove the entry and add it again."
        )
    before = _describe(pinned.repo_id, pinned.sha, pinned.subfolder, api)
    if (_pin(now).key, now.base_model) != (entry.key, before.base_model):
        raise ValueError(
            f"{pinned.repo_id} is for {_pin(now).key} on {now.base_model} now, no longer for {entry.key} on {before.base_model}. "
            "Look for another adapter."
        )
