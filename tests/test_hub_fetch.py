"""Fetching adapters from a real (loopback) Hub with the unpatched client: what is asked for, what is refused, what survives faults."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_adapter
from loopback_hub import LoopbackHub, hub_fixture, no_network, online_fixture  # noqa: F401 - fixtures

from hub_utils import AdapterError, FetchedAdapter, cached_adapters, fetch_adapter, verify_cached
from hub_utils.adapter_files import CONFIG_FILE, LANGUAGE_FILE, WEIGHTS_FILE
from hub_utils.fetch import MANIFEST_FILE

REPO = "alice/whisper-tiny-lora-cy"
FILES = (CONFIG_FILE, LANGUAGE_FILE, WEIGHTS_FILE)
CARD = b"---\nlanguage: [cy]\nbase_model: openai/whisper-tiny\n---\n# Welsh\n"

pytestmark = pytest.mark.usefixtures("online")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a good adapter."""
    from conftest import build_tiny_model, build_tiny_processor

    folder = write_adapter(tmp_path_factory.mktemp("adapter"), build_tiny_model(build_tiny_processor()), "cy")
    row = json.loads((folder / LANGUAGE_FILE).read_text()) | {"base_model": "openai/whisper-tiny"}
    (folder / LANGUAGE_FILE).write_text(json.dumps(row))
    return {name: (folder / name).read_bytes() for name in FILES}


@pytest.fixture
def fetch(hub: LoopbackHub, tmp_path: Path) -> Callable[..., FetchedAdapter]:
    """`fetch_adapter` with this Hub and a cache of the test's own."""

    def call(repo_id: str = REPO, revision: str | None = None, *, as_user: str | None = None, **options: Any) -> FetchedAdapter:
        token = False if as_user is None else f"hf_{as_user}"
        return fetch_adapter(repo_id, revision, api=hub.api(token), cache_dir=tmp_path / "cache", **options)

    return call


def changed(adapter: dict[str, bytes], file: str, **fields: Any) -> dict[str, bytes]:
    return adapter | {file: json.dumps(json.loads(adapter[file]) | fields).encode()}


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST_FILE}


def nothing_in(cache: Path) -> bool:
    """Whether no file of an adapter is there; locks may be."""
    return not [path for path in cache.rglob("*") if path.is_file() and path.suffix != ".lock"]


# ---- what arrives ------------------------------------------------------------------------------------------------------


def test_an_adapter_arrives_byte_for_byte_pinned_to_its_commit(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    sha = hub.put(REPO, adapter | {"README.md": CARD})
    found = fetch()
    assert (found.repo_id, found.sha, found.subfolder, found.from_cache) == (REPO, sha, None, False)
    assert found.path.is_absolute()
    assert content(found.path) == adapter
    assert found.num_bytes == sum(map(len, adapter.values()))


def test_nothing_but_the_adapters_own_files_is_asked_for(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    hub.put(REPO, adapter | {"README.md": CARD, "run.py": b"print()", "adapter_model.bin": b"pickle", "sub/x.safetensors": b"x"})
    assert set(content(fetch().path)) == set(FILES)
    asked = {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path}
    assert asked == set(FILES)


def test_every_file_is_asked_for_by_the_commits_sha(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    """So that a commit made meanwhile cannot mix its files in."""
    sha = hub.put(REPO, adapter)
    fetch(revision="main")
    assert [f"/resolve/{sha}/" in r.path for r in hub.requests if "/resolve/" in r.path] == [True] * 3


def test_an_adapter_of_a_repository_of_many_is_fetched_alone(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    welsh = {f"cy/{name}": data for name, data in adapter.items()}
    hub.put(REPO, welsh | {f"fr/{name}": b"{}" for name in adapter})
    found = fetch(subfolder="cy")
    assert content(found.path) == adapter
    assert found.subfolder == "cy"
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json and no adapter_model\.safetensors"):
        fetch()


def test_a_tag_and_a_branch_are_followed_and_a_commit_is_not_moved(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    old = hub.put(REPO, adapter)
    hub.repos[REPO].tags["v1"] = old
    new = hub.put(REPO, changed(adapter, LANGUAGE_FILE, name="newer"))
    assert fetch(revision="v1").sha == old
    assert fetch(revision=old).sha == old
    assert fetch().sha == new
    assert json.loads((fetch().path / LANGUAGE_FILE).read_text())["name"] == "newer"


def test_the_second_time_nothing_is_downloaded_and_a_pinned_commit_asks_nobody(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    sha = hub.put(REPO, adapter)
    first = fetch()
    asked = hub.count("GET", "/resolve/")
    again = fetch()
    assert again.from_cache
    assert again.path == first.path
    assert hub.count("GET", "/resolve/") == asked
    everything = len(hub.requests)
    assert fetch(revision=sha).from_cache
    assert len(hub.requests) == everything


def test_progress_is_told_in_bytes_and_ends_at_the_whole(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    hub.put(REPO, adapter)
    seen: list[tuple[int, int]] = []
    found = fetch(progress=lambda done, total: seen.append((done, total)))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (found.num_bytes, found.num_bytes)


def test_the_cache_can_be_listed_and_verified(hub: LoopbackHub, fetch: Any, adapter: Any, tmp_path: Path) -> None:
    hub.put(REPO, adapter)
    hub.put("bob/other", adapter)
    fetched = [fetch(), fetch("bob/other")]
    assert [(a.repo_id, a.sha) for a in cached_adapters(tmp_path / "cache")] == [(a.repo_id, a.sha) for a in fetched]
    assert verify_cached(fetched[0])
    (fetched[0].path / WEIGHTS_FILE).write_bytes(b"x")
    assert not verify_cached(fetched[0])
    assert [a.repo_id for a in cached_adapters(tmp_path / "cache")] == ["bob/other"]


# ---- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repo_id",
    ["../../etc", "/etc/passwd", "alice", "alice/a/b", "alice/..", "alice/a--b", "http://evil/a/x", "alice/x?y", "", "alice/\n", None, 5],
)
def test_a_name_that_is_no_repository_is_refused_without_asking(hub: LoopbackHub, fetch: Any, repo_id: Any) -> None:
    with pytest.raises(AdapterError, match="is no repository of the Hub"):
        fetch(repo_id)
    assert not hub.requests


@pytest.mark.parametrize("subfolder", ["..", "../x", "a/../b", "/abs", "a//b", "a\\b", ".hidden", "", "a/b/c/d/e", "a--b", "x" * 99, "a\n"])
def test_a_subfolder_that_leads_elsewhere_is_refused_without_asking(hub: LoopbackHub, fetch: Any, subfolder: str) -> None:
    with pytest.raises(AdapterError, match="is no subfolder"):
        fetch(subfolder=subfolder)
    assert not hub.requests


@pytest.mark.parametrize("revision", ["../main", "", "a b", "refs\n", "x" * 300, "a?b"])
def test_a_revision_that_is_none_is_refused_without_asking(hub: LoopbackHub, fetch: Any, revision: str) -> None:
    with pytest.raises(AdapterError, match="is no revision"):
        fetch(revision=revision)
    assert not hub.requests


def test_a_folder_here_that_is_called_like_the_repository_is_not_looked_at(
    hub: LoopbackHub, fetch: Any, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.put(REPO, adapter)
    shadow = tmp_path / "work" / REPO
    shadow.mkdir(parents=True)
    for name in adapter:
        (shadow / name).write_bytes(b"hostile")
    monkeypatch.chdir(tmp_path / "work")
    assert content(fetch().path) == adapter


@pytest.mark.parametrize("missing", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_repository_that_lacks_a_file_is_refused(hub: LoopbackHub, fetch: Any, adapter: Any, missing: str) -> None:
    hub.put(REPO, {name: data for name, data in adapter.items() if name != missing})
    with pytest.raises(AdapterError, match=f"has no {missing}"):
        fetch()


def test_a_pickle_is_never_fetched(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    hub.put(REPO, {CONFIG_FILE: adapter[CONFIG_FILE], "adapter_model.bin": b"pickle"})
    with pytest.raises(AdapterError, match=r"adapter_model.bin', a pickle.*never fetched"):
        fetch()
    assert hub.count("GET", "/resolve/") == 0


def test_weights_above_the_limit_are_refused_before_they_are_asked_for(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    hub.put(REPO, adapter)
    with pytest.raises(AdapterError, match="at most 1,000 are fetched"):
        fetch(max_weights_bytes=1_000)
    hub.put(REPO, {CONFIG_FILE: b"{}" + b" " * 140_000})
    with pytest.raises(AdapterError, match=r"adapter_config.json has 140,002 bytes; at most 131,072"):
        fetch()
    assert hub.count("GET", "/resolve/") == 0


def test_a_hostile_configuration_is_refused_before_the_weights_are_asked_for(
    hub: LoopbackHub, fetch: Any, adapter: Any, tmp_path: Path
) -> None:
    hub.put(REPO, changed(adapter, CONFIG_FILE, modules_to_save=["proj_out"]))
    with pytest.raises(AdapterError, match="modules_to_save"):
        fetch()
    assert hub.count("GET", "safetensors") == 0
    assert nothing_in(tmp_path / "cache")


@pytest.mark.parametrize("spoil", [lambda data: data[:-8], lambda data: b"\xff" * 8 + data, lambda data: b"pickle"])
def test_broken_weights_never_get_into_the_cache(hub: LoopbackHub, fetch: Any, adapter: Any, tmp_path: Path, spoil: Any) -> None:
    hub.put(REPO, adapter | {WEIGHTS_FILE: spoil(adapter[WEIGHTS_FILE])})
    with pytest.raises(AdapterError, match=r"cut off|no safetensors"):
        fetch()
    assert nothing_in(tmp_path / "cache")


def test_another_base_or_language_than_wanted_is_refused_by_the_card(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    hub.put(REPO, adapter | {"README.md": CARD})
    with pytest.raises(AdapterError, match="is for 'openai/whisper-tiny', says its card; wanted is one for 'openai/whisper-small'"):
        fetch(base_model="openai/whisper-small")
    with pytest.raises(AdapterError, match="writes 'cy', says its card; wanted is 'fr'"):
        fetch(language="fr")
    assert hub.count("GET", "/resolve/") == 0
    assert fetch(base_model="openai/whisper-tiny", language="cy").sha


def test_another_base_or_language_than_wanted_is_refused_by_the_files(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    sha = hub.put(REPO, adapter)
    with pytest.raises(AdapterError, match="writes 'cy', says its files"):
        fetch(language="fr")
    fetch()  # somebody else wants it
    with pytest.raises(AdapterError, match="writes 'cy', says its files"):
        fetch(revision=sha, language="fr")
    with pytest.raises(AdapterError, match="says its files; wanted is one for 'openai/whisper-small'"):
        fetch(revision=sha, base_model="openai/whisper-small")


@pytest.mark.parametrize(("field", "value"), [("language", "fr"), ("base_model", "mallory/whisper-tiny")])
def test_a_card_that_says_something_else_than_the_files_is_refused(
    hub: LoopbackHub, fetch: Any, adapter: Any, field: str, value: str, tmp_path: Path
) -> None:
    hub.put(REPO, changed(adapter, LANGUAGE_FILE, **{field: value}) | {"README.md": CARD})
    with pytest.raises(AdapterError, match=f"the card says .* its files say '{value}'"):
        fetch()
    assert nothing_in(tmp_path / "cache")


def test_a_language_that_the_hub_lists_under_another_code_is_the_same_language(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    hub.put(REPO, changed(adapter, LANGUAGE_FILE, language="jw") | {"README.md": CARD.replace(b"cy", b"jv")})
    assert fetch(language="jw").sha


# ---- who answers -------------------------------------------------------------------------------------------------------


def test_a_commit_that_is_gone_is_refused_and_the_owner_is_doubted(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    """alice left, and somebody registered her name and repository again: the pin holds."""
    sha = hub.put(REPO, adapter)
    del hub.repos[REPO]
    hub.put(REPO, changed(adapter, LANGUAGE_FILE, name="mallory's"))
    with pytest.raises(AdapterError, match=f"@{sha} does not exist, though its repository does.*belongs to somebody else now"):
        fetch(revision=sha)


def test_a_repository_that_forgot_what_was_fetched_before_is_refused(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    old = hub.put(REPO, adapter)
    fetch()
    del hub.repos[REPO]
    new = hub.put(REPO, changed(adapter, LANGUAGE_FILE, name="mallory's"))
    with pytest.raises(AdapterError, match=f"no longer has the commit {old}.*revision='{new}'"):
        fetch()
    assert fetch(revision=old).from_cache  # what is here stays usable
    assert fetch(revision=new).sha == new  # and trust can be given


def test_a_moved_repository_is_not_followed(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    hub.put("mallory/new", adapter)
    hub.moved[REPO] = "mallory/new"
    with pytest.raises(AdapterError, match=r"has moved to 'mallory/new'.*ask for 'mallory/new'"):
        fetch()


def test_the_files_of_two_commits_are_not_mixed(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    """Somebody commits while the files are on their way."""
    sha = hub.put(REPO, adapter)
    hub.fault(f"GET /{REPO}/resolve/.*{CONFIG_FILE}", "slow", seconds=0.5)
    newer = changed(changed(adapter, CONFIG_FILE, r=4), LANGUAGE_FILE, name="newer")
    timer = threading.Timer(0.2, lambda: hub.put(REPO, newer))
    timer.start()
    found = fetch()
    timer.join()
    assert hub.commit(REPO).sha != sha
    assert found.sha == sha
    assert content(found.path) == adapter


def test_private_and_gated_repositories_need_a_token(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    hub.put("alice/private", adapter, private=True)
    hub.put("alice/gated", adapter, gated="auto")
    for user in (None, "mallory"):
        with pytest.raises(AdapterError, match=r"alice/private is not on the Hub, or it is private"):
            fetch("alice/private", as_user=user)
        with pytest.raises(AdapterError, match=r"alice/gated.* is gated"):
            fetch("alice/gated", as_user=user)
    assert content(fetch("alice/private", as_user="alice").path) == adapter
    hub.repos["alice/gated"].granted.add("bob")
    assert content(fetch("alice/gated", as_user="bob").path) == adapter


def test_a_token_given_to_the_call_is_used(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    hub.put("alice/private", adapter, private=True)
    assert fetch("alice/private", token="hf_alice").sha


def test_access_that_was_taken_back_is_not_papered_over_by_the_cache(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    hub.put("alice/private", adapter, private=True)
    fetch("alice/private", as_user="alice")
    with pytest.raises(AdapterError, match="private"):
        fetch("alice/private", as_user="mallory")


def test_the_token_is_in_no_message_no_log_and_no_file(
    hub: LoopbackHub, fetch: Any, adapter: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.put("alice/private", adapter, private=True)
    caplog.set_level(logging.DEBUG)
    messages = []
    for user, repo_id in (("mallory", "alice/private"), ("nobody", "alice/private")):
        with pytest.raises(AdapterError) as caught:
            fetch(repo_id, as_user=user)
        messages.append(str(caught.value))
        assert caught.value.__cause__ is None  # the request, which carries the token, is not kept with the error
    hub.fault("GET", "status", status=503, times=2)
    fetch("alice/private", as_user="alice")
    assert "status 503" in caplog.text
    said = "\n".join(messages) + caplog.text
    assert not [token for token in ("hf_mallory", "hf_nobody", "hf_alice") if token in said]
    for path in (tmp_path / "cache").rglob("*"):
        assert not path.is_file() or b"hf_alice" not in path.read_bytes()


# ---- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "kind", "options"),
    [
        ("GET /api/models", "status", {"status": 503, "times": 2}),
        ("GET /api/models", "drop", {}),
        ("GET /api/models", "cut", {}),
        ("GET .*/resolve/", "status", {"status": 503, "times": 2}),
        ("GET .*/resolve/", "status", {"status": 429, "headers": {"Retry-After": "1"}}),
        ("GET .*/resolve/", "drop", {}),
        (f"GET .*{CONFIG_FILE}", "cut", {}),
        (f"GET .*{CONFIG_FILE}", "flip", {}),
        ("GET /storage/", "status", {"status": 503}),
        ("GET /storage/", "drop", {}),
        ("GET /storage/", "cut", {"times": 2}),
        ("GET /storage/", "flip", {"times": 2}),
        ("GET /storage/", "trickle", {"seconds": 0.5}),
    ],
)
def test_a_fault_that_passes_is_outlived(
    hub: LoopbackHub, fetch: Any, adapter: Any, pattern: str, kind: str, options: dict[str, Any]
) -> None:
    hub.put(REPO, adapter)
    hub.fault(pattern, kind, **options)
    assert content(fetch().path) == adapter
    assert all(fault.times == 0 for fault in hub.faults)


def test_a_cut_download_goes_on_where_it_ended(hub: LoopbackHub, fetch: Any, adapter: Any) -> None:
    hub.put(REPO, adapter)
    hub.fault("GET /storage/", "cut")
    seen: list[int] = []
    total = sum(map(len, adapter.values()))
    assert fetch(progress=lambda done, _: seen.append(done)).num_bytes == total
    assert seen == sorted(seen)  # it never went back


@pytest.mark.parametrize(("kind", "words"), [("flip", "hash is not the one the Hub gave"), ("cut", "RemoteProtocolError|cut off")])
def test_a_download_that_is_always_damaged_is_given_up_and_not_kept(
    hub: LoopbackHub, fetch: Any, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, words: str
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.put(REPO, adapter)
    hub.fault(f"GET .*{CONFIG_FILE}", kind, times=-1)
    with pytest.raises(AdapterError, match=f"could not be downloaded: .*({words})"):
        fetch()
    assert nothing_in(tmp_path / "cache")


@pytest.mark.parametrize(
    ("pattern", "options"),
    [
        ("GET /storage/", {"kind": "trickle", "seconds": 10.0}),
        ("GET /api/models", {"kind": "slow", "seconds": 30.0}),
        ("GET .*/resolve/", {"kind": "status", "status": 503}),
        ("GET .*/resolve/", {"kind": "status", "status": 429, "headers": {"Retry-After": "3600"}}),
    ],
)
def test_a_hub_that_keeps_one_waiting_is_given_up_in_time(
    hub: LoopbackHub, fetch: Any, adapter: Any, tmp_path: Path, pattern: str, options: dict[str, Any]
) -> None:
    hub.put(REPO, adapter)
    hub.fault(pattern, options.pop("kind"), times=-1, **options)
    start = time.monotonic()
    with pytest.raises(AdapterError, match=r"could not be downloaded|cannot be reached"):
        fetch(timeout_s=2.0)
    assert time.monotonic() - start < 6
    assert nothing_in(tmp_path / "cache")


def test_a_body_that_never_ends_is_cut_off(
    hub: LoopbackHub, fetch: Any, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The listing says one size, the storage sends more."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub.put(REPO, adapter)
    digest = hashlib.sha256(adapter[WEIGHTS_FILE]).hexdigest()
    (hub.folder / digest).write_bytes(adapter[WEIGHTS_FILE] * 100)
    with pytest.raises(AdapterError, match=r"more than the [0-9,]+ bytes"):
        fetch()
    assert nothing_in(tmp_path / "cache")


def test_without_a_network_the_last_known_commit_is_used_and_the_log_says_so(
    hub: LoopbackHub, fetch: Any, adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    hub.put(REPO, adapter)
    first = fetch()
    with no_network(hub):
        start = time.monotonic()
        found = fetch()
        assert fetch(revision=first.sha).sha == first.sha
        assert time.monotonic() - start < 1
    assert (found.path, found.from_cache) == (first.path, True)
    assert f"cannot be reached (ConnectError): using the cached commit {first.sha} of {REPO}" in caplog.text


@pytest.mark.parametrize(("kind", "options"), [("status", {"status": 503}), ("drop", {}), ("slow", {"seconds": 30.0})])
def test_a_flaky_hub_gives_way_to_the_cache(hub: LoopbackHub, fetch: Any, adapter: Any, kind: str, options: dict[str, Any]) -> None:
    hub.put(REPO, adapter)
    first = fetch()
    hub.fault("GET /api/models", kind, times=-1, **options)
    start = time.monotonic()
    assert fetch().path == first.path
    assert time.monotonic() - start < 4


def test_without_a_network_and_without_a_copy_the_message_says_so_in_time(
    hub: LoopbackHub, fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with no_network(hub), pytest.raises(AdapterError, match=r"is not in the cache, and the Hub .* cannot be reached: ConnectError"):
        fetch()


def test_offline_mode_asks_nobody(hub: LoopbackHub, fetch: Any, adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    hub.put(REPO, adapter)
    first = fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert fetch().path == first.path
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE is set"):
        fetch("bob/other")
    assert len(hub.requests) == asked


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"\x7f", lambda data: b""])
def test_a_damaged_copy_is_not_used_but_fetched_again(
    hub: LoopbackHub, fetch: Any, adapter: Any, name: str, damage: Callable[[bytes], bytes]
) -> None:
    sha = hub.put(REPO, adapter)
    path = fetch().path
    (path / name).write_bytes(damage((path / name).read_bytes()))
    found = fetch(revision=sha)
    assert not found.from_cache
    assert content(found.path) == adapter


def test_a_copy_with_a_strange_manifest_is_not_used(hub: LoopbackHub, fetch: Any, adapter: Any, tmp_path: Path) -> None:
    hub.put(REPO, adapter)
    manifest = fetch().path / MANIFEST_FILE
    row = json.loads(manifest.read_text())
    for broken in (row | {"files": {}}, row | {"files": {"../../x": {}}}, row | {"repo_id": "mallory/x"}, [], row | {"format": 99}):
        manifest.write_text(json.dumps(broken))
        assert not fetch().from_cache
        assert manifest.is_file()


# ---- several processes -------------------------------------------------------------------------------------------------

PROGRAM = textwrap.dedent(
    """
    import sys, time, logging
    from hub_utils import fetch_adapter
    repo_id, wait = sys.argv[1], float(sys.argv[2])
    time.sleep(max(0.0, wait - time.time()))
    start = time.perf_counter()
    found = fetch_adapter(repo_id)
    print(found.path, found.from_cache, time.perf_counter() - start)
    """
)


def start(hub: LoopbackHub, repo_id: str = REPO, at: float = 0.0) -> subprocess.Popen[str]:
    """A fresh process that fetches, with the environment's cache."""
    command = [sys.executable, "-c", PROGRAM, repo_id, str(at)]
    environment = hub.environment(PYTHONPATH=str(ROOT))
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> tuple[Path, bool, float]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    path, from_cache, seconds = out.split()
    return Path(path), from_cache == "True", float(seconds)


def test_eight_processes_fetch_a_cold_adapter_with_one_download(hub: LoopbackHub, adapter: Any) -> None:
    hub.put(REPO, adapter)
    hub.fault("GET /storage/", "slow", seconds=0.5)  # long enough for all of them to come and wait
    at = time.time() + 4
    answers = [answer(process) for process in [start(hub, at=at) for _ in range(8)]]
    assert hub.count("GET", "/storage/") == 1
    assert hub.count("GET", f"/resolve/.*{CONFIG_FILE}") == 1
    assert len({path for path, _, _ in answers}) == 1
    assert sorted(from_cache for _, from_cache, _ in answers) == [False] + [True] * 7
    assert content(answers[0][0]) == adapter


def test_a_process_killed_while_it_fetches_leaves_nothing_that_is_trusted(hub: LoopbackHub, adapter: Any) -> None:
    hub.put(REPO, adapter)
    hub.fault("GET /storage/", "trickle", seconds=20.0)
    process = start(hub)
    deadline = time.monotonic() + 30
    while not list((hub.folder / "home" / "adapters").rglob(WEIGHTS_FILE)) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    leftovers = list((hub.folder / "home" / "adapters").rglob(WEIGHTS_FILE))
    assert leftovers, "it was killed too early to have left anything"
    assert cached_adapters(hub.folder / "home" / "adapters") == []
    path, from_cache, seconds = answer(start(hub))
    assert not from_cache
    assert content(path) == adapter
    assert not leftovers[0].exists()
    assert seconds < 5  # the dead process's lock went with it


def test_a_fresh_process_without_a_network_finds_its_copy_in_under_a_second(hub: LoopbackHub, adapter: Any) -> None:
    hub.put(REPO, adapter)
    path, _, _ = answer(start(hub))
    with no_network(hub):
        found, from_cache, seconds = answer(start(hub))
    assert (found, from_cache) == (path, True)
    assert seconds < 1


def test_a_cache_that_is_copied_to_another_machine_works_there(hub: LoopbackHub, fetch: Any, adapter: Any, tmp_path: Path) -> None:
    sha = hub.put(REPO, adapter)
    fetch()
    shutil.copytree(tmp_path / "cache", tmp_path / "carried")
    shutil.rmtree(tmp_path / "cache")
    with no_network(hub):
        found = fetch_adapter(REPO, sha, cache_dir=os.path.relpath(tmp_path / "carried"), api=hub.api())
    assert content(found.path) == adapter
