"""Every adapter of a registry on this machine, for work without a network; and whether what lies there is still what was fetched."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi

from .adapter_files import CONFIG_FILE, LANGUAGE_FILE, MAX_WEIGHTS_BYTES, WEIGHTS_FILE, AdapterError, read_adapter
from .fetch import FetchedAdapter, cached_adapters, fetch_adapter, find_cached, pool_of
from .naming import Pinned
from .registry_file import RegistryEntry, RegistryFile
from .trust import check_config


@dataclass(frozen=True)
class Mirrored:
    """What became of one entry.

    Args:
        key: The entry, `"cy"` or `"en/child"`.
        path: The adapter's folder; None if it is not here.
        num_bytes: Size of its files; 0 if it is not here.
        downloaded: Whether it came over the network just now.
        problem: Why it is not here, or must not be used; None if all is well.
    """

    key: str
    path: Path | None
    num_bytes: int = 0
    downloaded: bool = False
    problem: str | None = None


def fetch_entry(
    entry: RegistryEntry,
    *,
    base_model: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    api: HfApi | None = None,
    max_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """The folder of a registry's adapter, fetched if it is not here yet, with the pool it needs. A folder is held to the same rules.

    Arguments are those of `fetch_adapter`; `max_bytes` bounds the weights of adapter and pool together. What the registry names was chosen
    by its owner; a pool that the adapter names is fetched only if it belongs to the same owner on the Hub.

    Raises:
        AdapterError: It cannot be had, is not trusted, or its pool cannot be had.
    """
    if isinstance(entry.source, Path):
        _folder(entry, entry.source)
        return entry.source
    where: dict[str, Any] = {"base_model": base_model, "token": token, "cache_dir": cache_dir, "api": api}
    most = MAX_WEIGHTS_BYTES if max_bytes is None else max_bytes
    found = fetch_adapter(
        entry.source.repo_id,
        entry.source.sha,
        subfolder=entry.source.subfolder,
        language=entry.language,
        max_weights_bytes=most,
        progress=progress,
        **where,
    )
    left = MAX_WEIGHTS_BYTES if max_bytes is None else max(most - found.num_bytes, 0)
    _fetch_pool(found, where | {"max_weights_bytes": left, "progress": progress})
    return found.path


def _fetch_pool(adapter: FetchedAdapter, where: dict[str, Any]) -> FetchedAdapter | None:
    """The pool of an adapter, in the cache afterwards; None if it has none."""
    pool = pool_of(adapter)
    if pool is None:
        return None
    found = find_cached(pool, where["cache_dir"])
    if found is not None:
        return found
    if pool.repo_id.split("/")[0] != adapter.repo_id.split("/")[0]:
        raise AdapterError(
            f"The adapter {adapter.repo_id}@{adapter.sha} uses the pool {pool}, which belongs to somebody else. If you trust them, fetch "
            f"it once: fetch_adapter({pool.repo_id!r}, {pool.sha!r}, subfolder={pool.subfolder!r})."
        )
    return fetch_adapter(pool.repo_id, pool.sha, subfolder=pool.subfolder, **where)


def mirror_adapters(
    registry: RegistryFile,
    keys: Collection[str] | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    api: HfApi | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Mirrored]:
    """Fetch every adapter that a registry names. One that cannot be had does not stop the others.

    Args:
        registry: The file.
        keys: Which entries; by default all.
        token: For private and gated repositories, as in `fetch_adapter`.
        cache_dir: Where to keep adapters, as in `fetch_adapter`.
        api: The client to use, as in `fetch_adapter`.
        progress: Called with an entry's key, its bytes that are there and its bytes in all.

    Raises:
        ValueError: There is no such entry, or the registry is broken.
    """

    def fetch(entry: RegistryEntry, pinned: Pinned) -> Mirrored:
        report = None if progress is None else lambda done, total: progress(entry.key, done, total)
        where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "api": api}
        found = fetch_adapter(pinned.repo_id, pinned.sha, subfolder=pinned.subfolder, language=entry.language, progress=report, **where)
        if progress is not None:
            progress(entry.key, found.num_bytes, found.num_bytes)
        _fetch_pool(found, where)
        return _here(entry, found)

    return [_judged(entry, fetch) for entry in _wanted(registry, keys)]


def verify_mirror(registry: RegistryFile, keys: Collection[str] | None = None, *, cache_dir: str | Path | None = None) -> list[Mirrored]:
    """Look, without a network, whether every adapter that a registry names is here, byte for byte as it was fetched.

    Arguments and errors are those of `mirror_adapters`, which also mends what this finds.
    """
    cached = {(found.repo_id, found.sha, found.subfolder): found for found in cached_adapters(cache_dir)}

    def look(entry: RegistryEntry, pinned: Pinned) -> Mirrored:
        found = cached.get((pinned.repo_id, pinned.sha, pinned.subfolder))
        if found is None:
            raise AdapterError(f"{pinned} is not in the cache, or damaged. Fetch it with `whisper-moe adapters fetch`.")
        pool = pool_of(found)
        if pool is not None and find_cached(pool, cache_dir) is None:
            raise AdapterError(f"Its pool {pool} is not in the cache, or damaged. Fetch it with `whisper-moe adapters fetch`.")
        return _here(entry, found)

    return [_judged(entry, look) for entry in _wanted(registry, keys)]


def _wanted(registry: RegistryFile, keys: Collection[str] | None) -> list[RegistryEntry]:
    entries = {entry.key: entry for entry in registry.entries()}
    if unknown := [key for key in keys or () if key not in entries]:
        raise ValueError(f"The registry {registry.path} has no {unknown[0]!r}. It has: {', '.join(entries) or 'nothing yet'}.")
    return [entry for key, entry in entries.items() if keys is None or key in keys]


def _judged(entry: RegistryEntry, of_repository: Callable[[RegistryEntry, Pinned], Mirrored]) -> Mirrored:
    try:
        return _folder(entry, entry.source) if isinstance(entry.source, Path) else of_repository(entry, entry.source)
    except AdapterError as error:
        return Mirrored(entry.key, None, problem=str(error))


def _here(entry: RegistryEntry, found: FetchedAdapter) -> Mirrored:
    return Mirrored(entry.key, found.path, found.num_bytes, downloaded=not found.from_cache)


def _folder(entry: RegistryEntry, path: Path) -> Mirrored:
    """A folder of this machine needs no fetching, and is held to the same rules."""
    files = read_adapter(path)
    check_config(files.config, files.label)
    said = (files.language or {}).get("language")
    if said != entry.language:
        raise AdapterError(f"{files.label} writes {said!r}, the registry says {entry.language!r}. Correct the entry.")
    names = (CONFIG_FILE, LANGUAGE_FILE, WEIGHTS_FILE)
    return Mirrored(entry.key, path, sum((path / name).stat().st_size for name in names))
