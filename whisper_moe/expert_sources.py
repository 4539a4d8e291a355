"""Experts that are named by their place on a Hub, `owner/name@commit`: how a mixture's configuration may say so, and who fetches them.

This package knows no Hub. `fetch_experts_with` says which function does; it decides what is trusted. Loads neither torch nor PEFT.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

FetchExperts = Callable[[Mapping[str, str], "str | None"], Mapping[str, "str | Path"]]
"""Takes name of an expert -> "owner/name@commit", and the base's id if it is known; returns name -> folder, or raises `ValueError`."""

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}@[^\\]+")  # one without @ could be a folder
_PINNED = re.compile(rf"{_PART}/{_PART}@[0-9a-f]{{40}}(/{_PART})?")

_fetch: ContextVar[FetchExperts | None] = ContextVar("fetch_experts", default=None)


@contextmanager
def fetch_experts_with(fetch: FetchExperts) -> Iterator[None]:
    """Within this context, experts may be repositories of a Hub, pinned to a commit: `LoraMoeConfig(experts={"br": "owner/name@<sha>"})`.

    Holds for making such a mixture and for loading one that was saved with `save_experts="reference"`.

    Args:
        fetch: Fetches and checks them, for instance `hub_utils.fetch_experts`. It is given name -> "owner/name@commit" and the base's id,
            and returns name -> folder.
    """
    token = _fetch.set(fetch)
    try:
        yield
    finally:
        _fetch.reset(token)


def names_repository(source: str) -> bool:
    """Whether a source names a repository rather than a folder. A folder that is called so is given as "./owner/name@x"."""
    return _REPOSITORY.fullmatch(source) is not None


def fetched_experts(sources: Mapping[str, str], base: str | None) -> dict[str, Path]:
    """Name -> folder of those sources that name repositories, fetched.

    Raises:
        ValueError: Nobody was named who fetches, or one is not pinned to a commit, or it cannot be had.
    """
    wanted = {name: source for name, source in sources.items() if names_repository(source)}
    if not wanted:
        return {}
    for name, source in wanted.items():
        if _PINNED.fullmatch(source) is None:
            raise ValueError(
                f"Expert {name!r}: {source} is not pinned to a commit, and what it stands for may change. Give the 40 hex digits of the "
                f"commit: {source.partition('@')[0]}@<commit>. For a folder of that name say ./{source}."
            )
    fetch = _fetch.get()
    if fetch is None:
        name, source = next(iter(wanted.items()))
        raise ValueError(
            f"Expert {name!r}: {source} names a repository, and nobody was named who fetches and checks it. Say who: "
            "`with fetch_experts_with(hub_utils.fetch_experts): ...` (from whisper_moe), or fetch it first and give the folder."
        )
    folders = fetch(wanted, base)
    return {name: Path(folders[name]) for name in wanted}
