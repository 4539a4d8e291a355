"""An adapter from the Hub into a cache on this machine: pinned to one commit, hashes compared, there whole or not at all.

    repository, revision -> one commit's sha, sizes, hashes      one request; none if the commit is named and in the cache
      -> two small files and the weights, by that sha            bounded in bytes, time and tries
      -> hashes, then the rules of trust.py                      anything refused is never in the cache
      -> one rename                                              a process that dies leaves nothing that is trusted

What the cache holds lies in `<cache>/<owner>--<name>/<sha>[--<subfolder>]/`, as plain files beside a `fetched.json` with their hashes,
which are compared again every time. Nothing is ever unpacked or run. Which repository is asked is the caller's choice, not a recording's.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import RevisionNotFoundError
from huggingface_hub.utils import WeakFileLock, build_hf_headers, hf_raise_for_status

from ._hub import explain, is_ours, is_passing
from .adapter_files import (
    CONFIG_FILE,
    LANGUAGE_FILE,
    MAX_JSON_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_FILE,
    AdapterError,
    parse_json,
    read_adapter,
    read_file,
    short,
)
from .card import hub_language
from .naming import Pinned, is_hub_id
from .trust import check_config, declared_base, declared_pool

logger = logging.getLogger(__name__)

MANIFEST_FILE = "fetched.json"
_FORMAT = 1

_SHA = re.compile(r"[0-9a-f]{40}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
_SUBFOLDER_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")

_TRIES = 5
_REQUEST_TIMEOUT_S = 10.0
_IMPATIENT_TIMEOUT_S = 3.0  # where a cached copy could be used instead


@dataclass(frozen=True)
class FetchedAdapter:
    """An adapter in the cache, checked.

    Args:
        path: Its folder, absolute: what `load_adapter` and `AdapterRegistry.add` take.
        repo_id: Where it came from.
        sha: The commit. Fetching `repo_id` at `sha` gives the same bytes for ever.
        subfolder: Its place in the repository; None for the top.
        num_bytes: Size of its files.
        from_cache: Whether nothing was downloaded.
    """

    path: Path
    repo_id: str
    sha: str
    subfolder: str | None
    num_bytes: int
    from_cache: bool


@dataclass(frozen=True)
class _RemoteFile:
    name: str
    size: int
    sha256: str | None  # of files in large storage
    git_oid: str | None  # of the others


def fetch_adapter(
    repo_id: str,
    revision: str | None = None,
    *,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    api: HfApi | None = None,
    base_model: str | None = None,
    language: str | None = None,
    max_weights_bytes: int = MAX_WEIGHTS_BYTES,
    timeout_s: float = 120.0,
    progress: Callable[[int, int], None] | None = None,
) -> FetchedAdapter:
    """Fetch an adapter, or find it in the cache.

    A full commit sha that is in the cache needs no network. A branch or tag is looked up; if the network fails, the commit that it last
    stood for is used, with a line in the log. Errors of the Hub itself (no such repository, no access) are not papered over.

    Args:
        repo_id: `"owner/name"` on the Hub; never a path.
        revision: A full commit sha (best: it cannot change), a tag or a branch; the main branch by default.
        subfolder: Where the adapter lies in a repository of many.
        token: For private and gated repositories; by default the one of `api`, or of `hf auth login`.
        cache_dir: Where to keep adapters; by default `adapters` in the Hub client's home (`HF_HOME`). May be shared by processes.
        api: The client to use, for instance with another endpoint.
        base_model: Hub id of the base model it must be made for, if that matters.
        language: Language it must write, if that matters.
        max_weights_bytes: Larger weights are refused.
        timeout_s: Give up after this time.
        progress: Called with the bytes that are there and the bytes wanted.

    Raises:
        AdapterError: It cannot be had, or is not trusted.
    """
    _check_names(repo_id, revision, subfolder)
    store = _Store(cache_dir, repo_id, subfolder)
    wanted = _Wanted(base_model, language)
    if revision is not None and _SHA.fullmatch(revision):
        found = store.find(revision)
        if found is not None:
            return wanted.checked(found)
    api = HfApi() if api is None else api
    deadline = time.monotonic() + timeout_s
    known = store.find(store.read_ref(revision))
    try:
        if constants.is_offline_mode():
            raise _Unreachable("HF_HUB_OFFLINE is set")
        info = _model_info(api, repo_id, revision, token, deadline, impatient=known is not None)
        _check_history(api, repo_id, info.sha, known, token, deadline)
    except _Unreachable as error:
        if known is None:
            raise AdapterError(
                f"{_title(repo_id, revision, subfolder)} is not in the cache, and the Hub ({api.endpoint}) cannot be reached: {error}. "
                "Fetch it once while there is a network, or give the folder of a copy."
            ) from None
        logger.warning("The Hub cannot be reached (%s): using the cached commit %s of %s.", error, known.sha, repo_id)
        return wanted.checked(known)
    found = store.find(info.sha)
    if found is None:
        with store.locked(info.sha, deadline):
            found = store.find(info.sha)  # another process may have been quicker
            if found is None:
                found = _download(api, store, info, wanted, token, deadline, max_weights_bytes, progress)
    store.write_ref(revision, info.sha)
    return wanted.checked(found)


def size_of(repo_id: str, revision: str, subfolder: str | None = None, *, token: str | bool | None = None, api: HfApi | None = None) -> int:
    """How many bytes `fetch_adapter` would download, by what the Hub says of a revision. One request.

    Raises:
        AdapterError: There is no such adapter, it is no adapter that could be fetched, or the Hub cannot be reached.
    """
    _check_names(repo_id, revision, subfolder)
    title = _title(repo_id, revision, subfolder)
    try:
        info = _model_info(HfApi() if api is None else api, repo_id, revision, token, time.monotonic() + _REQUEST_TIMEOUT_S, impatient=True)
    except _Unreachable as error:
        raise AdapterError(f"{title}: the Hub cannot be reached: {error}. Try again later.") from None
    return sum(file.size for file in _remote_files(info, subfolder, title, MAX_WEIGHTS_BYTES))


def cached_adapters(cache_dir: str | Path | None = None) -> list[FetchedAdapter]:
    """Every adapter in the cache whose files are what was fetched. What is not is named in the log."""
    found = []
    for manifest in sorted(cache_folder(cache_dir).glob(f"*/*/{MANIFEST_FILE}")):
        adapter = _read_entry(manifest.parent)
        # Named for what it holds, or it is a download that ended before its last step, and nobody would find it again.
        if adapter is not None and _Store(cache_dir, adapter.repo_id, adapter.subfolder).holds(adapter):
            found.append(adapter)
    return found


def find_cached(pinned: Pinned, cache_dir: str | Path | None = None) -> FetchedAdapter | None:
    """The adapter of one commit, if it is in the cache and its files are what was fetched. Needs no network."""
    return _Store(cache_dir, pinned.repo_id, pinned.subfolder).find(pinned.sha)


def cached_origin(folder: str | Path, cache_dir: str | Path | None = None) -> FetchedAdapter | None:
    """What the Hub gave for a folder: only if it lies in this cache, in the place of its commit, and its files are still those whose
    hashes were compared when it was fetched. A folder elsewhere may carry the same note, written by anybody: None.
    """
    path = Path(os.path.abspath(folder))
    if path.parent.parent != cache_folder(cache_dir) or not (path / MANIFEST_FILE).is_file():
        return None
    found = _read_entry(path)
    return found if found is not None and _Store(cache_dir, found.repo_id, found.subfolder).holds(found) else None


def pool_of(adapter: FetchedAdapter) -> Pinned | None:
    """Where the pool of an adapter is published, if it uses one and says so; not whether it is here."""
    files = read_adapter(adapter.path)
    return declared_pool(files.config, files.language)


def verify_cached(adapter: FetchedAdapter) -> bool:
    """Whether an adapter's files are still, byte for byte, those that were fetched."""
    return _read_entry(adapter.path) is not None


# ---- names -------------------------------------------------------------------------------------------------------------


def _check_names(repo_id: str, revision: str | None, subfolder: str | None) -> None:
    if not isinstance(repo_id, str) or not is_hub_id(repo_id):
        raise AdapterError(
            f"{short(repo_id)} is no repository of the Hub, such as 'owner/whisper-small-s2lora-cy'. A folder here needs no fetching."
        )
    if revision is not None and (not isinstance(revision, str) or not _REVISION.fullmatch(revision) or ".." in revision):
        raise AdapterError(f"{short(revision)} is no revision: give a commit's sha (40 hexadecimal digits), a tag or a branch.")
    if subfolder is not None:
        parts = subfolder.split("/") if isinstance(subfolder, str) else []
        if not 1 <= len(parts) <= 4 or not all(_SUBFOLDER_PART.fullmatch(part) for part in parts) or "--" in subfolder or ".." in subfolder:
            raise AdapterError(f"{short(subfolder)} is no subfolder of a repository: plain names with single '/' between them, at most 4.")


def _title(repo_id: str, revision: str | None, subfolder: str | None = None) -> str:
    return f"The adapter {repo_id}{'' if revision is None else f'@{revision}'}{'' if subfolder is None else f' ({subfolder})'}"


# ---- asking the Hub ----------------------------------------------------------------------------------------------------


class _Unreachable(Exception):
    """No answer, or none that helps, from a Hub that may well answer later."""


class _Broken(Exception):
    """An answer that is not what it should be; another try may be better."""


class _NoSuchRevision(AdapterError):
    """The repository is there, the commit is not."""


def _model_info(api: HfApi, repo_id: str, revision: str | None, token: Any, deadline: float, impatient: bool) -> Any:
    """What the Hub says of a revision: its sha, its files with sizes and hashes, the metadata of its card."""
    longest_s = _IMPATIENT_TIMEOUT_S if impatient else _REQUEST_TIMEOUT_S

    def ask(remaining_s: float) -> Any:
        try:
            return api.model_info(repo_id, revision=revision, files_metadata=True, timeout=min(longest_s, remaining_s), token=token)
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # no JSON, or not of this shape
            if is_ours(error):
                raise
            raise _Broken("an answer that cannot be read") from None

    info = _tried(ask, _title(repo_id, revision), deadline, tries=1 if impatient else _TRIES)
    if info.id != repo_id:
        raise AdapterError(
            f"{repo_id} has moved to {short(info.id)}. Anybody may take the old name one day, so it is not followed: if you trust the new "
            f"owner, ask for {short(info.id)}."
        )
    if not isinstance(info.sha, str) or not _SHA.fullmatch(info.sha) or (revision and _SHA.fullmatch(revision) and info.sha != revision):
        raise AdapterError(
            f"{_title(repo_id, revision)}: the Hub answers with the commit {short(info.sha)}. That is not what was asked for."
        )
    return info


def _check_history(api: HfApi, repo_id: str, sha: str, known: FetchedAdapter | None, token: Any, deadline: float) -> None:
    """Refuse a repository that has forgotten the commit it had before: its history was rewritten, or its name has a new owner."""
    if known is None or known.sha == sha:
        return
    try:
        _model_info(api, repo_id, known.sha, token, deadline, impatient=True)
    except _NoSuchRevision:
        raise AdapterError(
            f"The adapter {repo_id} no longer has the commit {known.sha} that was fetched before: its history was rewritten, or the name "
            f"belongs to somebody else now. If you trust what is there, ask for it by its sha: revision={sha!r}."
        ) from None


def _tried(ask: Callable[[float], Any], title: str, deadline: float, tries: int = _TRIES) -> Any:
    """The answer, asked for again after faults that pass. `ask` is given the seconds that are left.

    Raises:
        AdapterError: The Hub says no. Nothing of the request is quoted: it carries the token.
        _Unreachable: The Hub says nothing useful in time.
    """
    for attempt in range(1, tries + 1):
        wait_s = 0.25 * 2**attempt
        try:
            return ask(max(deadline - time.monotonic(), 0.1))
        except _Broken as error:
            reason = str(error)
        except Exception as error:
            if not is_ours(error):
                raise
            if isinstance(error, RevisionNotFoundError):
                raise _NoSuchRevision(
                    f"{title} does not exist, though its repository does: it was deleted, or the name belongs to somebody else now. Look "
                    "at the repository before you choose another revision."
                ) from None
            if not is_passing(error):
                raise AdapterError(explain(error, title)) from None
            reason, wait_s = _reason(error), max(wait_s, _retry_after(error))
        if attempt == tries or time.monotonic() + wait_s >= deadline:
            break
        logger.info("%s: %s; trying again in %.1f s.", title, reason, wait_s)
        time.sleep(wait_s)
    raise _Unreachable(reason)


def _reason(error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return type(error).__name__ if status is None else f"status {status}"


def _retry_after(error: Exception) -> float:
    """Seconds that the Hub asks to wait; the deadline decides whether there is time for it."""
    response = getattr(error, "response", None)
    said = "" if response is None else response.headers.get("Retry-After", "")
    return float(said) if said.isdecimal() and len(said) < 6 else 0.0


# ---- downloading -------------------------------------------------------------------------------------------------------


def _download(
    api: HfApi,
    store: _Store,
    info: Any,
    wanted: _Wanted,
    token: Any,
    deadline: float,
    max_weights_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> FetchedAdapter:
    title = _title(info.id, info.sha, store.subfolder)
    wanted.check_card(info, title)
    files = _remote_files(info, store.subfolder, title, max_weights_bytes)
    total, done = sum(file.size for file in files), 0
    partial = store.new_partial(info.sha)
    try:
        for file in files:  # small ones first: the configuration is judged before the weights are asked for
            report = None if progress is None else _Report(progress, done, total)
            _download_file(api, info, store.subfolder, file, partial / file.name, token, deadline, report)
            done += file.size
            if file.name == CONFIG_FILE:
                check_config(parse_json((partial / CONFIG_FILE).read_bytes(), CONFIG_FILE, title), title)
        adapter = read_adapter(partial, title)
        wanted.check_files(adapter.config, adapter.language, info, title)
        pool = declared_pool(adapter.config, adapter.language)
        if pool is not None and find_cached(pool, store.folder.parent) is None:
            logger.warning(
                "%s holds coefficients only. Its pool is not in the cache: fetch_adapter(%r, %r).", title, pool.repo_id, pool.sha
            )
        return store.publish(partial, info.sha)
    except _Unreachable as error:
        raise AdapterError(f"{title} could not be downloaded: {error}. Try again later; nothing half-done is kept.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@dataclass(frozen=True)
class _Report:
    progress: Callable[[int, int], None]
    done: int
    total: int

    def __call__(self, num_bytes: int) -> None:
        self.progress(self.done + num_bytes, self.total)


def _remote_files(info: Any, subfolder: str | None, title: str, max_weights_bytes: int) -> list[_RemoteFile]:
    """The files to fetch, in order: what an adapter needs and nothing else of the repository."""
    prefix = "" if subfolder is None else f"{subfolder}/"
    siblings = {sibling.rfilename.removeprefix(prefix): sibling for sibling in info.siblings or [] if sibling.rfilename.startswith(prefix)}
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if name not in siblings]
    if missing:
        pickles = sorted(name for name in siblings if "/" not in name and name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")))
        found = f" It has {short(pickles[0])}, a pickle, which could run code when opened and is never fetched." if pickles else ""
        raise AdapterError(f"{title} has no {' and no '.join(missing)}.{found} Ask its makers to publish it as safetensors.")
    files = []
    for name, max_bytes in ((CONFIG_FILE, MAX_JSON_BYTES), (LANGUAGE_FILE, MAX_JSON_BYTES), (WEIGHTS_FILE, max_weights_bytes)):
        if name not in siblings:
            continue
        sibling = siblings[name]
        sha256 = None if sibling.lfs is None else sibling.lfs.sha256
        if not isinstance(sibling.size, int) or (sha256 is None and sibling.blob_id is None):
            raise AdapterError(
                f"{title}: the Hub does not say size and hash of {name}, so it could not be verified. Is the endpoint a Hub?"
            )
        if sibling.size > max_bytes:
            raise AdapterError(
                f"{title}: {name} has {sibling.size:,} bytes; at most {max_bytes:,} are fetched. "
                "An adapter is smaller: is this a whole model?"
            )
        files.append(_RemoteFile(name, sibling.size, sha256, sibling.blob_id))
    return files


def _download_file(
    api: HfApi, info: Any, subfolder: str | None, file: _RemoteFile, path: Path, token: Any, deadline: float, report: _Report | None
) -> None:
    url = hf_hub_url(info.id, file.name, subfolder=subfolder, revision=info.sha, endpoint=api.endpoint)
    headers = build_hf_headers(token=api.token if token is None else token)
    title = f"{_title(info.id, info.sha, subfolder)}: {file.name}"

    def ask(remaining_s: float) -> None:
        with path.open("ab") as target:
            _receive(url, headers, file, target, min(_REQUEST_TIMEOUT_S, remaining_s), deadline, report)
        _verify(path, file)

    _tried(ask, title, deadline)


def _receive(
    url: str, headers: dict[str, str], file: _RemoteFile, target: Any, timeout: float, deadline: float, report: _Report | None
) -> None:
    """Append to `target` what it lacks of the file."""
    have = target.tell()
    wanted = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with get_session().stream("GET", url, headers=headers | wanted, timeout=timeout, follow_redirects=True) as response:
        hf_raise_for_status(response)
        if have and response.status_code != 206:  # the server begins anew, and so do we
            target.truncate(0)
            have = 0
        for chunk in response.iter_bytes():  # as they come: one that trickles must not get past the deadline
            have += len(chunk)
            if have > file.size:
                target.truncate(0)
                raise _Broken(f"more than the {file.size:,} bytes it should have")
            if time.monotonic() > deadline:
                raise _Broken("too slow")
            target.write(chunk)
            if report is not None:
                report(have)
    if have < file.size:
        raise _Broken(f"cut off after {have:,} of {file.size:,} bytes")


def _verify(path: Path, file: _RemoteFile) -> None:
    data = path.read_bytes()
    if file.sha256 is not None:
        same = hashlib.sha256(data).hexdigest() == file.sha256
    else:
        same = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest() == file.git_oid
    if not same:
        path.unlink()
        raise _Broken("its hash is not the one the Hub gave: it was damaged on the way")


# ---- what is wanted ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Wanted:
    """What the caller expects the adapter to be."""

    base_model: str | None
    language: str | None

    def check_card(self, info: Any, title: str) -> None:
        """Before anything is downloaded: the card's metadata, where there is a card."""
        self._check_base(_listed(info.card_data, "base_model"), title, "its card")
        self._check_language(_languages(info), title, "its card")

    def check_files(self, config: Any, language: Any, info: Any, title: str) -> None:
        """After the download: what the files say is what was wanted, and what the card says."""
        base, card_bases = declared_base(config, language), _listed(info.card_data, "base_model")
        if base is not None and card_bases and base not in card_bases:
            raise AdapterError(f"{title}: the card says it is for {short(card_bases[0])}, its files say {base!r}. Do not use it.")
        spoken, card_languages = (language or {}).get("language"), _languages(info)
        if isinstance(spoken, str) and card_languages and not {spoken, hub_language(spoken)} & set(card_languages):
            raise AdapterError(f"{title}: the card says it writes {short(card_languages)}, its files say {spoken!r}. Do not use it.")
        self._check_base([] if base is None else [base], title, "its files")
        self._check_language([spoken] if isinstance(spoken, str) else [], title, "its files")

    def checked(self, found: FetchedAdapter) -> FetchedAdapter:
        """The adapter, if its files say what is wanted. The cache may hold it for somebody who wanted something else."""
        if self.base_model is None and self.language is None:
            return found
        adapter, title = read_adapter(found.path), _title(found.repo_id, found.sha, found.subfolder)
        base, language = declared_base(adapter.config, adapter.language), (adapter.language or {}).get("language")
        self._check_base([] if base is None else [base], title, "its files")
        self._check_language([language] if isinstance(language, str) else [], title, "its files")
        return found

    def _check_base(self, said: list[str], title: str, who: str) -> None:
        if self.base_model is not None and said and self.base_model not in said:
            raise AdapterError(
                f"{title} is for {short(said[0])}, says {who}; wanted is one for {self.base_model!r}. Choose another adapter."
            )

    def _check_language(self, said: list[str], title: str, who: str) -> None:
        if self.language is not None and said and not {self.language, hub_language(self.language)} & set(said):
            raise AdapterError(
                f"{title} writes {', '.join(map(short, said[:5]))}, says {who}; wanted is {self.language!r}. Choose another one."
            )


def _listed(card: Any, name: str) -> list[str]:
    value = None if card is None else card.get(name)
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, str)]


def _languages(info: Any) -> list[str]:
    return [*_listed(info.card_data, "language"), *_listed(info.card_data, "language_bcp47")]


# ---- the cache ---------------------------------------------------------------------------------------------------------


def cache_folder(cache_dir: str | Path | None) -> Path:
    """The cache, absolute; None: the usual one."""
    return Path(os.path.abspath(Path(constants.HF_HOME) / "adapters" if cache_dir is None else cache_dir))


class _Store:
    """The part of the cache that belongs to one repository. Entries appear by a rename, so they are whole or not there."""

    def __init__(self, cache_dir: str | Path | None, repo_id: str, subfolder: str | None) -> None:
        self.repo_id, self.subfolder = repo_id, subfolder
        self.folder = cache_folder(cache_dir) / repo_id.replace("/", "--")

    def _entry(self, sha: str) -> Path:
        return self.folder / (sha if self.subfolder is None else f"{sha}--{self.subfolder.replace('/', '--')}")

    def holds(self, adapter: FetchedAdapter) -> bool:
        """Whether an adapter lies where one of its commit belongs."""
        return adapter.path == self._entry(adapter.sha)

    def find(self, sha: str | None) -> FetchedAdapter | None:
        """The adapter at a commit, if it is there and its hashes are right."""
        if sha is None or not (self._entry(sha) / MANIFEST_FILE).is_file():
            return None
        found = _read_entry(self._entry(sha))
        if found is None or (found.repo_id, found.sha, found.subfolder) != (self.repo_id, sha, self.subfolder):
            return None
        return found

    @contextmanager
    def locked(self, sha: str, deadline: float) -> Iterator[None]:
        """Alone with an entry. The lock goes with the process that holds it, however that ends."""
        locks = self.folder / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        try:
            with WeakFileLock(locks / f"{self._entry(sha).name}.lock", timeout=max(deadline - time.monotonic(), 0.1)):
                yield
        except TimeoutError:
            raise AdapterError(
                f"{_title(self.repo_id, sha, self.subfolder)}: another process has been downloading it all the time. Try again later."
            ) from None

    def new_partial(self, sha: str) -> Path:
        """An empty folder to download into. Call it with the lock held: what a dead process left there goes."""
        partial = self.folder / f"{self._entry(sha).name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        return partial

    def publish(self, partial: Path, sha: str) -> FetchedAdapter:
        """Make a complete download part of the cache."""
        names = sorted(path.name for path in partial.iterdir())
        sizes = {name: (partial / name).stat().st_size for name in names}
        files = {name: {"size": size, "sha256": _sha256(partial / name)} for name, size in sizes.items()}
        row = {"format": _FORMAT, "repo_id": self.repo_id, "sha": sha, "subfolder": self.subfolder, "files": files}
        (partial / MANIFEST_FILE).write_text(json.dumps(row, indent=2), "utf-8")
        for name in [*names, MANIFEST_FILE]:
            _sync(partial / name)
        entry = self._entry(sha)
        if entry.exists():  # damaged, or find would have found it
            shutil.rmtree(entry)
        partial.rename(entry)
        return FetchedAdapter(entry, self.repo_id, sha, self.subfolder, sum(sizes.values()), False)

    def _ref(self, revision: str | None) -> Path:
        name = "main" if revision is None else revision
        subfolder = "" if self.subfolder is None else f"--{self.subfolder.replace('/', '--')}"
        return self.folder / ".refs" / f"{name.replace('/', '--')}{subfolder}"

    def read_ref(self, revision: str | None) -> str | None:
        """The commit that a revision stood for when it was last fetched."""
        try:
            text = self._ref(revision).read_text("ascii")
        except (OSError, ValueError):
            return None
        return text if _SHA.fullmatch(text) else None

    def write_ref(self, revision: str | None, sha: str) -> None:
        ref = self._ref(revision)
        if self.read_ref(revision) == sha:
            return
        ref.parent.mkdir(parents=True, exist_ok=True)
        part = ref.with_name(f"{ref.name}.{os.getpid()}.partial")
        part.write_text(sha, "ascii")
        part.replace(ref)


def _read_entry(folder: Path) -> FetchedAdapter | None:
    """What a folder of the cache holds; None, and a line in the log, if it is not what was fetched."""
    try:
        row = parse_json(read_file(folder / MANIFEST_FILE, MAX_JSON_BYTES, "The cache"), MANIFEST_FILE, "The cache")
        if row.get("format") != _FORMAT or not {CONFIG_FILE, WEIGHTS_FILE} <= set(row["files"]) <= {
            CONFIG_FILE,
            WEIGHTS_FILE,
            LANGUAGE_FILE,
        }:
            raise AdapterError("its list of files is of another version")
        for name, file in row["files"].items():
            path = folder / name
            if path.is_symlink() or path.stat().st_size != file["size"] or _sha256(path) != file["sha256"]:
                raise AdapterError(f"{name} is not the file that was fetched")
        size = sum(file["size"] for file in row["files"].values())
        return FetchedAdapter(folder, row["repo_id"], row["sha"], row["subfolder"], size, True)
    except (AdapterError, OSError, KeyError, TypeError, AttributeError) as error:
        logger.warning("The cached adapter in %s is damaged and will not be used: %s.", folder, error)
        return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Have the file on the disk before its name counts."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
