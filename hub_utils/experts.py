"""Experts of a LoRA-MoE that lie on the Hub: `whisper_moe` names them, this file has them here, checked like every other adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import HfApi

from .adapter_files import AdapterError
from .fetch import fetch_adapter
from .naming import Pinned, is_hub_id


def fetch_experts(
    experts: Mapping[str, str],
    base_model: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    api: HfApi | None = None,
) -> dict[str, Path]:
    """Fetch the experts that a mixture names. Give this function to `whisper_moe.fetch_experts_with`.

    Args:
        experts: Name of an expert -> `"owner/name@sha"`, with `/subfolder` behind it in a repository of many. The commit is not optional: a
            mixture was made with certain files, and a branch moves.
        base_model: Hub id of the base model that they must be made for, if it is known.
        token: For private and gated repositories, as in `fetch_adapter`.
        cache_dir: Where to keep adapters, as in `fetch_adapter`.
        api: The client to use, as in `fetch_adapter`.

    Returns:
        Name of the expert -> its folder.

    Raises:
        AdapterError: One names no commit, cannot be had, or is not trusted. The message names the expert.
    """
    pinned = {name: _pinned(name, source) for name, source in experts.items()}  # all of them before the first is fetched
    folders = {}
    for name, source in pinned.items():
        try:
            found = fetch_adapter(
                source.repo_id, source.sha, subfolder=source.subfolder, base_model=base_model, token=token, cache_dir=cache_dir, api=api
            )
        except AdapterError as error:
            raise AdapterError(f"Expert {name!r}: {error}") from error
        folders[name] = found.path
    return folders


def _pinned(name: str, source: str) -> Pinned:
    try:
        return Pinned.parse(source)
    except ValueError:
        repo_id = source.partition("@")[0]
        example = f"{repo_id}@<40 hex digits>" if is_hub_id(repo_id) else "owner/name@<40 hex digits>"
        raise AdapterError(
            f"Expert {name!r}: {source!r} is not pinned to a commit, and what it stands for may change. Say {example}; the commit is on "
            f"the repository's page, and `whisper-moe adapters add` prints it."
        ) from None
