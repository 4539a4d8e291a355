"""What a name on the Hub stood for when it was last asked about: a repository, an owner, a collection. For a start without a network.

Lies beside the adapters in the cache, a small file for each name and base. It only says which commits to look for; the adapters
themselves are checked as ever.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from pathlib import Path

from .adapter_files import MAX_JSON_BYTES, AdapterError, parse_json, read_file
from .fetch import cache_folder
from .naming import Pinned
from .registry_file import RegistryEntry

logger = logging.getLogger(__name__)

_FORMAT = 1


def remember(name: str, base_model: str | None, entries: Iterable[RegistryEntry], cache_dir: str | Path | None = None) -> None:
    """Write down what a name stands for now. If it cannot be written, that is said in the log.

    Args:
        name: As it was given: "owner/name", "owner:NAME", "collection:OWNER/SLUG".
        base_model: The base it was asked for.
        entries: The adapters, each pinned to a commit.
        cache_dir: The cache, as for `fetch_adapter`.
    """
    rows = [{"language": each.language, "domain": each.domain, "source": str(each.source)} for each in entries]
    path = _file(name, base_model, cache_dir)
    part = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"format": _FORMAT, "name": name, "base_model": base_model, "adapters": rows}), "utf-8")
        part.replace(path)
    except OSError as error:
        logger.warning("What %s stands for could not be remembered: %s.", name, error)


def recall(name: str, base_model: str | None, cache_dir: str | Path | None = None) -> list[RegistryEntry]:
    """What a name stood for when it was last asked about; nothing if it never was, or what was written is damaged."""
    path = _file(name, base_model, cache_dir)
    if not path.is_file():
        return []
    try:
        row = parse_json(read_file(path, MAX_JSON_BYTES, "The cache"), path.name, "The cache")
        if (row.get("format"), row.get("name"), row.get("base_model")) != (_FORMAT, name, base_model):
            return []
        return [_entry(each["language"], each["domain"], each["source"]) for each in row["adapters"]]
    except (AdapterError, ValueError, KeyError, TypeError) as error:
        logger.warning("What was remembered of %s cannot be read and is not used: %s.", name, error)
        return []


def _entry(language: object, domain: object, source: object) -> RegistryEntry:
    if not isinstance(language, str) or not isinstance(domain, (str, type(None))) or not isinstance(source, str):
        raise ValueError("an adapter without language or source")
    return RegistryEntry(language, domain, Pinned.parse(source))


def _file(name: str, base_model: str | None, cache_dir: str | Path | None) -> Path:
    key = hashlib.sha256(json.dumps([name, base_model]).encode()).hexdigest()[:32]
    return cache_folder(cache_dir) / ".named" / f"{key}.json"
