"""The commands about the Hub: `whisper-moe publish`, and `whisper-moe adapters add | remove | update | fetch | find`.

Flags in, calls of `hub_utils`, text out; and the bridge between its registry file and a `Transcriber`. Apart from `cli.py` only to keep
both short; the same rules hold: nothing is decided here, heavy libraries wait until they are needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

if TYPE_CHECKING:
    from hub_utils import RegistryEntry
    from hub_utils.trust import BaseModel
    from whisper_moe.registry import AdapterSource
    from whisper_moe.transcribe import Transcriber

SOME_FAILED = 1  # exit code

# ---- publish -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Publish:
    """Put a trained adapter on the Hugging Face Hub: weights, config and a card made from the run, in one commit."""

    folder: Positional[Path]
    """Folder of the adapter, as `whisper-moe train` writes it."""
    repo: str | None = None
    """The repository. Default: <owner>/<base>-<method>-<language>, with the domain behind it."""
    owner: str | None = None
    """User or organisation of the default repository. Default: whose token it is."""
    subfolder: str | None = None
    """Folder in a repository of many languages; needs --repo."""
    visibility: Literal["public", "private"] | None = None
    """Who sees the repository. Default: as it is; a new one is public."""
    gated: Literal["auto", "manual", "no"] | None = None
    """Whether users must ask for access. Default: as it is."""
    tag: str | None = None
    """Name of a release ("v1")."""
    base_model: str | None = None
    """The base's id on the Hub, if training knew it as a folder only."""
    pool: str | None = None
    """For an S2-LoRA that uses another adapter's A and B: where that is published (owner/name@commit)."""
    license: str | None = None
    """For the card: the Hub's name of a licence ("cc-by-4.0"). Default: what training was told."""

    def run(self) -> int:
        _quiet_client()
        from hub_utils import publish_adapter
        from whisper_moe.languages import language_name
        from whisper_moe.registry import LanguageAdapter

        published = publish_adapter(
            self.folder,
            self.repo,
            owner=self.owner,
            subfolder=self.subfolder,
            private=None if self.visibility is None else self.visibility == "private",
            gated=False if self.gated == "no" else self.gated,
            tag=self.tag,
            base_model=self.base_model,
            pool=self.pool,
            language_name=language_name(LanguageAdapter.load(self.folder).language),
            license=self.license,
        )
        print(f"{'Published' if published.changed else 'Nothing new in'} {published.source}\n{published.url}")
        return 0


# ---- adapters ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AddAdapter:
    """Write down which adapter speaks for a language: a repository, pinned to the commit it is at now, or a folder."""

    sources: Positional[tuple[str, ...]]
    """Repositories (owner/name, or owner/name@revision) or folders. The language is what the adapter says."""
    revision: str | None = None
    """Branch, tag or commit of the repository. Default: its newest state."""
    subfolder: str | None = None
    """Which adapter of a repository of many languages."""
    replace: bool = False
    """Put it in the place of the one that speaks for the language now."""
    registry: Path | None = None
    """The registry file. Default: $WHISPER_MOE_REGISTRY, or adapters.json in the user's settings."""

    def run(self) -> int:
        from hub_utils import RegistryFile, entry_of

        if not self.sources:
            raise ValueError("Name a repository or a folder: whisper-moe adapters add owner/name")
        registry = RegistryFile(self.registry)
        for source in self.sources:
            entry = entry_of(source, revision=self.revision, subfolder=self.subfolder)
            registry.add(entry, replace=self.replace)
            print(f"{entry.key}: {entry.source}")
        return 0


@dataclass(frozen=True)
class RemoveAdapter:
    """Take languages out of the registry. Files stay."""

    keys: Positional[tuple[str, ...]]
    """Languages, with the domain where there is one: cy, en/child."""
    registry: Path | None = None
    """The registry file. Default: $WHISPER_MOE_REGISTRY, or adapters.json in the user's settings."""

    def run(self) -> int:
        from hub_utils import RegistryFile

        if not self.keys:
            raise ValueError("Name a language: whisper-moe adapters remove cy")
        for key in self.keys:
            entry = RegistryFile(self.registry).remove(key)
            print(f"{entry.key}: {entry.source} removed")
        return 0


@dataclass(frozen=True)
class UpdateAdapters:
    """Pin repositories to their newest commits, unless they have become something else."""

    keys: Positional[tuple[str, ...]] = ()
    """Languages. Default: all."""
    dry_run: bool = False
    """Only say what is new."""
    registry: Path | None = None
    """The registry file. Default: $WHISPER_MOE_REGISTRY, or adapters.json in the user's settings."""

    def run(self) -> int:
        from hub_utils import RegistryFile, update_registry

        updates = update_registry(RegistryFile(self.registry), list(self.keys) or None, write=not self.dry_run)
        for update in updates:
            if update.problem is not None:
                print(f"{update.key}: stays at {update.old}. {update.problem}", file=sys.stderr)
            else:
                print(
                    f"{update.key}: {update.old} is the newest"
                    if update.old == update.new
                    else f"{update.key}: {update.old} -> {update.new}"
                )
        return SOME_FAILED if any(update.problem for update in updates) else 0


@dataclass(frozen=True)
class FetchAdapters:
    """Fetch every adapter of the registry, for work without a network."""

    keys: Positional[tuple[str, ...]] = ()
    """Languages. Default: all."""
    verify: bool = False
    """Fetch nothing: say whether what is here is, byte for byte, what was fetched."""
    cache: Path | None = None
    """Folder to keep adapters in. Default: `adapters` in the Hub client's home (HF_HOME)."""
    registry: Path | None = None
    """The registry file. Default: $WHISPER_MOE_REGISTRY, or adapters.json in the user's settings."""

    def run(self) -> int:
        _quiet_client()
        from hub_utils import RegistryFile, mirror_adapters, verify_mirror

        registry, keys = RegistryFile(self.registry), self.keys or None
        if self.verify:
            rows = verify_mirror(registry, keys, cache_dir=self.cache)
        else:
            rows = mirror_adapters(registry, keys, cache_dir=self.cache, progress=_show_progress if sys.stderr.isatty() else None)
        for row in rows:
            if row.problem is not None:
                print(f"{row.key}: {row.problem}", file=sys.stderr)
            else:
                print(f"{row.key}: {'fetched' if row.downloaded else 'here'}, {_size(row.num_bytes)}, {row.path}")
        print(f"{sum(row.problem is None for row in rows)} of {len(rows)} adapters are here, {_size(sum(row.num_bytes for row in rows))}.")
        return SOME_FAILED if any(row.problem for row in rows) else 0


@dataclass(frozen=True)
class FindAdapters:
    """Show the adapters for a language, best first: those of the registry, of named owners or of one collection."""

    language: Positional[str]
    """The language: a code or a name."""
    base: str
    """Hub id of the base ("openai/whisper-small")."""
    owners: tuple[str, ...] = ()
    """Users and organisations to search."""
    collection: str | None = None
    """Collection to search instead ("owner/slug")."""
    domain: str | None = None
    """Kind of speech ("child")."""
    metric: Literal["wer", "cer"] = "wer"
    """What to order by."""
    test_set: str | None = None
    """The test set whose figures count. Default: the one that all were measured on."""
    registry: Path | None = None
    """The registry file. Default: $WHISPER_MOE_REGISTRY, or adapters.json in the user's settings."""

    def run(self) -> int:
        from hub_utils import RegistryFile, find_adapters
        from whisper_moe.languages import language_code

        found = find_adapters(
            self.base,
            language_code(self.language),
            registry=RegistryFile(self.registry),
            namespaces=self.owners,
            collection=self.collection,
            domain=self.domain,
            metric=self.metric,
            test_set=self.test_set,
        )
        for adapter in found:
            closed = ", private" if adapter.private else ", gated" if adapter.gated else ""
            print(f"{adapter.rank}. {adapter.source} ({adapter.peft_type or 'method unknown'}{closed}): {adapter.reason}")
        if not found:
            print("None there. `whisper-moe train` makes one.", file=sys.stderr)
        return 0


# ---- the registry file and a transcriber -------------------------------------------------------------------------------


def expect_registry(transcriber: Transcriber, path: Path | None, model: str | None, *, folders_first: bool = False) -> None:
    """Have a transcriber fetch the adapters of a registry file, each when its language is first heard.

    Args:
        transcriber: Its registry learns what to expect.
        path: The registry file; None: the user's, if there is one.
        model: What the base was loaded from, as it was given; an adapter that says it was made for another is refused.
        folders_first: Leave alone the languages that adapters at hand write: they were named on the command line.
    """
    from hub_utils import RegistryFile

    registry = RegistryFile(path)
    if path is not None and not registry.path.is_file():
        raise ValueError(f"There is no registry file {path}. `whisper-moe adapters add --registry {path} ...` makes one.")
    expect_entries(transcriber, registry.entries(), base_id(model), folders_first=folders_first)


def expect_entries(
    transcriber: Transcriber,
    entries: Iterable[RegistryEntry],
    base_model: str | None,
    *,
    folders_first: bool = False,
    cache_dir: Path | None = None,
    api: Any = None,
) -> list[AdapterSource]:
    """Have a transcriber fetch these adapters when they are needed. Languages that it expects an adapter for already are left alone.

    Args:
        transcriber: Its registry learns what to expect.
        entries: The adapters: pinned repositories, or folders.
        base_model: The base's id on the Hub, if it has one; an adapter that says it was made for another is refused.
        folders_first: Leave alone the languages that adapters at hand write, too.
        cache_dir, api: As for `hub_utils.fetch_entry`; the latter is a Hub client.

    Returns:
        What is expected now and was not before.
    """
    from hub_utils.load import describe_base
    from whisper_moe.languages import language_code

    known = [*transcriber.registry.expected, *(transcriber.registry if folders_first else ())]
    named = {(adapter.language, adapter.domain) for adapter in known}
    base = describe_base(transcriber.model)  # once: what is fetched later is checked while others use the model
    expected = []
    for entry in entries:
        if (language_code(entry.language), entry.domain) not in named:
            fetch = partial(_fetch_for, transcriber, entry, base_model, base, cache_dir, api)
            expected.append(transcriber.registry.expect(entry.language, fetch, where=str(entry.source), domain=entry.domain))
            named.add((expected[-1].language, entry.domain))
    return expected


def _fetch_for(
    transcriber: Transcriber, entry: RegistryEntry, base_model: str | None, base: BaseModel, cache_dir: Path | None, api: Any
) -> Path:
    """The folder of an entry's adapter, fetched and trusted, if it was made for the transcriber's base and fits it."""
    from hub_utils import check_adapter, fetch_entry
    from whisper_moe.registry import LanguageAdapter

    if sys.stderr.isatty():
        print(f"\r\x1b[2KFetching the adapter {entry.source}", file=sys.stderr, flush=True)
    folder = fetch_entry(entry, base_model=base_model, cache_dir=cache_dir, api=api)
    transcriber.check_fit(LanguageAdapter.load(folder))
    check_adapter(folder, base)
    return folder


def base_id(model: str | None) -> str | None:
    """The base's id on the Hub; None where it is a folder, whose weights are compared instead."""
    from hub_utils.card import POCKET

    if model is None:
        return POCKET
    return None if Path(model).exists() else model


def fetch_experts(experts: Mapping[str, str], base: str | None) -> Mapping[str, Path]:
    """`hub_utils.fetch_experts`, imported when it is needed."""
    from hub_utils import fetch_experts as fetch

    return fetch(experts, base)


def registry_lines(path: Path | None) -> list[str]:
    """What the registry file says, a line an entry."""
    from hub_utils import RegistryFile

    registry = RegistryFile(path)
    return [f"{entry.key}: {entry.source} (in {registry.path})" for entry in registry.entries()]


def _show_progress(key: str, done: int, total: int) -> None:
    print(f"\r\x1b[2K{key}: {_size(done)} of {_size(total)}", end="\r" if done == total else "", file=sys.stderr, flush=True)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"


def _quiet_client() -> None:
    """No loading bars of the Hub's client between the lines. It looks once, when it is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
