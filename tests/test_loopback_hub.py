"""The loopback Hub itself, asked by the real client: what the other tests of the Hub rest on."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from loopback_hub import LoopbackHub, hub_fixture, no_network, online_fixture  # noqa: F401

pytestmark = pytest.mark.usefixtures("online")
WEIGHTS = bytes(range(256)) * 400
CARD = b"---\nlanguage:\n- cy\nlicense: mit\nbase_model: openai/whisper-small\nbase_model_relation: adapter\ntags:\n- x\n---\n# Card\n"


@pytest.fixture
def alice(hub: LoopbackHub) -> HfApi:
    return hub.api("hf_alice")


def upload(api: HfApi, repo: str = "alice/a", **files: bytes) -> Any:
    """Make a repository if need be, and commit files (`w__safetensors` for `w.safetensors`)."""
    api.create_repo(repo, exist_ok=True)
    return api.create_commit(
        repo, [CommitOperationAdd(name.replace("__", "."), data) for name, data in files.items()], commit_message="files"
    )


def download(hub: LoopbackHub, path: str, folder: Path, repo: str = "alice/a", token: str | bool = False, **options: Any) -> bytes:
    return Path(hf_hub_download(repo, path, endpoint=hub.endpoint, cache_dir=folder, token=token, **options)).read_bytes()


# ---- writing and reading -----------------------------------------------------------------------------------------------


def test_what_is_committed_is_downloaded_small_and_large(hub: LoopbackHub, alice: HfApi, tmp_path: Path) -> None:
    commit = upload(alice, README__md=CARD, w__safetensors=WEIGHTS)
    assert download(hub, "w.safetensors", tmp_path) == WEIGHTS
    assert download(hub, "README.md", tmp_path, revision=commit.oid) == CARD
    folder = Path(snapshot_download("alice/a", endpoint=hub.endpoint, cache_dir=tmp_path / "other", token=False))
    assert {path.name for path in folder.iterdir()} == {".gitattributes", "README.md", "w.safetensors"}
    assert hub.count("PUT", "/storage/") == 1
    assert hub.read("alice/a", "w.safetensors") == WEIGHTS


def test_info_gives_sizes_and_hashes_that_are_those_of_git_and_lfs(alice: HfApi, hub: LoopbackHub) -> None:
    upload(alice, README__md=CARD, w__safetensors=WEIGHTS)
    files = {file.rfilename: file for file in hub.api().model_info("alice/a", files_metadata=True).siblings}
    assert files["w.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert (files["w.safetensors"].size, files["README.md"].size) == (len(WEIGHTS), len(CARD))
    assert files["README.md"].lfs is None
    git = subprocess.run(["git", "hash-object", "--stdin"], input=CARD, capture_output=True, check=False)
    if git.returncode == 0:
        assert files["README.md"].blob_id == git.stdout.decode().strip()


def test_a_commit_can_delete_and_a_no_op_makes_none(alice: HfApi, hub: LoopbackHub) -> None:
    first = upload(alice, a__txt=b"1", b__txt=b"2", w__safetensors=WEIGHTS)
    assert upload(alice, a__txt=b"1", w__safetensors=WEIGHTS).oid == first.oid
    second = alice.create_commit("alice/a", [CommitOperationDelete("b.txt")], commit_message="less")
    assert set(hub.commit("alice/a").files) == {".gitattributes", "a.txt", "w.safetensors"}
    assert [commit.commit_id for commit in alice.list_repo_commits("alice/a")][:2] == [second.oid, first.oid]
    with pytest.raises(EntryNotFoundError):
        alice.create_commit("alice/a", [CommitOperationDelete("b.txt")], commit_message="again")


def test_a_stale_parent_is_refused(alice: HfApi, hub: LoopbackHub) -> None:
    first = upload(alice, a__txt=b"1")
    upload(alice, a__txt=b"2")
    with pytest.raises(HfHubHTTPError) as caught:
        alice.create_commit("alice/a", [CommitOperationAdd("a.txt", b"3")], commit_message="late", parent_commit=first.oid)
    assert caught.value.response.status_code == 412
    assert hub.read("alice/a", "a.txt") == b"2"
    hub.fault("POST .*/commit/", "stale")
    with pytest.raises(HfHubHTTPError):
        alice.create_commit("alice/a", [CommitOperationAdd("a.txt", b"3")], commit_message="late", parent_commit=hub.commit("alice/a").sha)
    assert hub.commit("alice/a").title == "in between"


def test_tags_branches_and_short_hashes_are_revisions(alice: HfApi, hub: LoopbackHub, tmp_path: Path) -> None:
    first = upload(alice, a__txt=b"1")
    alice.create_tag("alice/a", tag="v1")
    alice.create_branch("alice/a", branch="feature/x")
    upload(alice, a__txt=b"2")
    for revision in ("v1", "refs/tags/v1", "feature/x", first.oid, first.oid[:9]):
        assert hub.api().model_info("alice/a", revision=revision).sha == first.oid
    assert download(hub, "a.txt", tmp_path, revision="v1") == b"1"
    refs = alice.list_repo_refs("alice/a")
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first.oid)]
    assert {branch.name for branch in refs.branches} == {"main", "feature/x"}
    with pytest.raises(HfHubHTTPError):
        alice.create_tag("alice/a", tag="v1")
    alice.delete_tag("alice/a", tag="v1")
    with pytest.raises(RevisionNotFoundError):
        hub.api().model_info("alice/a", revision="v1")


def test_trees_and_paths_are_listed_in_pages(alice: HfApi, hub: LoopbackHub) -> None:
    hub.put("alice/a", {f"d{number}/x/f.txt": b"1" for number in range(5)} | {"w.safetensors": WEIGHTS})
    hub.page_size = 2
    flat = [(entry.path, type(entry).__name__) for entry in alice.list_repo_tree("alice/a")]
    assert flat == [(".gitattributes", "RepoFile"), *((f"d{n}", "RepoFolder") for n in range(5)), ("w.safetensors", "RepoFile")]
    assert "d3/x/f.txt" in {entry.path for entry in alice.list_repo_tree("alice/a", recursive=True)}
    assert [entry.path for entry in alice.list_repo_tree("alice/a", "d1")] == ["d1/x"]
    found = alice.get_paths_info("alice/a", ["w.safetensors", "none"])
    assert [(entry.path, entry.lfs.size) for entry in found] == [("w.safetensors", len(WEIGHTS))]


def test_ranges_are_served_by_hub_and_storage(hub: LoopbackHub) -> None:
    hub.put("alice/a", {"w.safetensors": WEIGHTS, "a.txt": WEIGHTS[:1000]})
    for path, content in (("w.safetensors", WEIGHTS), ("a.txt", WEIGHTS[:1000])):
        for said, expected in (("bytes=5-9", content[5:10]), ("bytes=900-", content[900:])):
            request = urllib.request.Request(f"{hub.endpoint}/alice/a/resolve/main/{path}", headers={"Range": said})
            with urllib.request.urlopen(request) as answer:
                assert (answer.status, answer.read()) == (206, expected)


# ---- discovery ---------------------------------------------------------------------------------------------------------


def test_filters_see_tags_language_licence_and_base(hub: LoopbackHub) -> None:
    hub.put("alice/a", {"README.md": CARD})
    hub.put("bob/b", {"README.md": CARD.replace(b"- cy", b"- no").replace(b"- x", b"- cy")})
    api = hub.api()

    def ids(**options: Any) -> list[str]:
        return sorted(model.id for model in api.list_models(**options))

    assert ids() == ["alice/a", "bob/b"]
    assert ids(filter=["base_model:adapter:openai/whisper-small", "license:mit"]) == ["alice/a", "bob/b"]
    assert ids(filter="cy") == ["alice/a", "bob/b"]  # a plain tag counts as well: that is why cards are read again
    assert ids(filter=["cy", "x"]) == ["alice/a"]
    assert ids(author="bob") == ["bob/b"]
    assert ids(search="/a") == ["alice/a"]
    (model,) = api.list_models(filter="no", expand=["sha", "cardData", "downloads"])
    assert (model.sha, model.card_data.language, model.downloads) == (hub.commit("bob/b").sha, ["no"], 0)


def test_cards_that_the_hub_would_refuse_are_refused(alice: HfApi, hub: LoopbackHub) -> None:
    alice.create_repo("alice/a")
    for line, says in (
        ("language: jw", "language"),
        ("language: Welsh", "language"),
        ("license: mine", "license"),
        ("base_model: /home/me/x", "base_model"),
    ):
        with pytest.raises(ValueError, match=says):
            alice.create_commit("alice/a", [CommitOperationAdd("README.md", f"---\n{line}\n---\n".encode())], commit_message="card")
    assert len(hub.history("alice/a")) == 1


def test_collections_are_read(hub: LoopbackHub) -> None:
    hub.collections["alice/welsh-012"] = ["bob/b", "alice/a"]
    assert [item.item_id for item in hub.api().get_collection("alice/welsh-012").items] == ["bob/b", "alice/a"]


# ---- who may what ------------------------------------------------------------------------------------------------------


def test_private_is_hidden_gated_is_closed_and_strangers_do_not_write(alice: HfApi, hub: LoopbackHub, tmp_path: Path) -> None:
    upload(alice, "alice/private", a__txt=b"1")
    alice.update_repo_settings("alice/private", private=True)
    upload(alice, "alice/gated", a__txt=b"1", README__md=CARD)
    alice.update_repo_settings("alice/gated", gated="manual")
    for token in (False, "hf_bob"):
        with pytest.raises(RepositoryNotFoundError):
            hub.api(token).model_info("alice/private")
        with pytest.raises(GatedRepoError):
            download(hub, "a.txt", tmp_path, "alice/gated", token)
    assert hub.api().model_info("alice/gated").gated == "manual"
    assert download(hub, "README.md", tmp_path, "alice/gated") == CARD
    assert download(hub, "a.txt", tmp_path, "alice/private", "hf_alice") == b"1"
    hub.repos["alice/gated"].granted.add("bob")
    assert download(hub, "a.txt", tmp_path, "alice/gated", "hf_bob") == b"1"
    with pytest.raises(HfHubHTTPError) as caught:
        hub.api("hf_bob").create_commit("alice/gated", [CommitOperationAdd("a.txt", b"2")], commit_message="mine")
    assert caught.value.response.status_code == 403


def test_accounts_creation_deletion_and_moves(alice: HfApi, hub: LoopbackHub) -> None:
    assert alice.whoami()["name"] == "alice"
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        hub.api("hf_nobody").whoami()
    alice.create_repo("alice/a", private=True)
    assert hub.repos["alice/a"].private
    with pytest.raises(HfHubHTTPError):
        alice.create_repo("alice/a")
    with pytest.raises(HfHubHTTPError):
        alice.create_repo("bob/a")
    alice.move_repo("alice/a", "alice/b")
    assert alice.model_info("alice/a").id == "alice/b"
    alice.delete_repo("alice/b")
    with pytest.raises(RepositoryNotFoundError):
        alice.model_info("alice/b")


def test_the_storage_refuses_a_token_and_the_client_sends_it_none(alice: HfApi, hub: LoopbackHub, tmp_path: Path) -> None:
    upload(alice, w__safetensors=WEIGHTS)
    alice.update_repo_settings("alice/a", private=True)
    assert download(hub, "w.safetensors", tmp_path, token="hf_alice") == WEIGHTS
    assert {request.status for request in hub.requests if request.path.startswith("/storage/")} == {200}
    request = urllib.request.Request(
        f"{hub.storage}/storage/{hashlib.sha256(WEIGHTS).hexdigest()}", headers={"Authorization": "Bearer hf_alice"}
    )
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(request)


def test_errors_carry_the_codes_the_client_tells_them_apart_by(alice: HfApi, hub: LoopbackHub, tmp_path: Path) -> None:
    upload(alice, a__txt=b"1")
    with pytest.raises(EntryNotFoundError):
        download(hub, "b.txt", tmp_path)
    with pytest.raises(RevisionNotFoundError):
        download(hub, "a.txt", tmp_path, revision="v9")
    with pytest.raises(RepositoryNotFoundError):
        download(hub, "a.txt", tmp_path, "alice/none")


# ---- faults ------------------------------------------------------------------------------------------------------------


def fetch(hub: LoopbackHub, path: str = "/alice/a/resolve/main/a.txt") -> tuple[int, bytes, float]:
    """(status, body, seconds) of a request; status 0 if the connection broke."""
    started = time.monotonic()
    try:
        with urllib.request.urlopen(hub.endpoint + path) as answer:
            status, body = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, body = error.code, error.read()
    except OSError:
        status, body = 0, b""
    except Exception as error:  # http.client.IncompleteRead
        status, body = 0, getattr(error, "partial", b"")
    return status, body, time.monotonic() - started


def test_each_fault_hits_as_often_as_it_was_told_and_then_ends(hub: LoopbackHub) -> None:
    content = bytes(range(200))
    hub.put("alice/a", {"a.txt": content})
    hub.fault("GET .*a.txt", "status", status=429, times=2, headers={"Retry-After": "1"})
    assert [fetch(hub)[0] for _ in range(3)] == [429, 429, 200]
    hub.fault("GET .*a.txt", "drop")
    hub.fault("GET .*other", "drop", times=-1)
    assert [fetch(hub)[0] for _ in range(2)] == [0, 200]
    hub.fault("a.txt", "cut")
    assert fetch(hub)[:2] == (0, content[:100])
    hub.fault("a.txt", "flip")
    status, body, _ = fetch(hub)
    assert status == 200
    assert len(body) == 200
    assert sum(a != b for a, b in zip(body, content, strict=True)) == 1
    assert fetch(hub)[:2] == (200, content)
    hub.fault("a.txt", "slow", seconds=0.3)
    assert fetch(hub)[2] > 0.3
    hub.fault("a.txt", "trickle", seconds=0.3)
    status, body, seconds = fetch(hub)
    assert (status, body) == (200, content)
    assert seconds > 0.25


def test_a_lost_answer_is_to_a_request_that_was_carried_out(alice: HfApi, hub: LoopbackHub) -> None:
    upload(alice, a__txt=b"1")
    hub.fault("POST .*/commit/", "lose")
    with pytest.raises(Exception, match=r"(?i)disconnected|closed|reset|broken"):
        upload(alice, a__txt=b"2")
    assert hub.read("alice/a", "a.txt") == b"2"


def test_without_a_network_connections_are_refused_and_open_ones_end(hub: LoopbackHub, alice: HfApi) -> None:
    upload(alice, a__txt=b"1")  # leaves the client with open connections
    port = hub.endpoint
    with no_network(hub):
        assert fetch(hub)[0] == 0
        with pytest.raises(Exception, match=r"(?i)refused|disconnected|reset|closed"):
            alice.model_info("alice/a")
    assert hub.endpoint == port
    assert fetch(hub)[:2] == (200, b"1")


# ---- other processes ---------------------------------------------------------------------------------------------------


def test_a_fresh_process_needs_nothing_but_the_environment(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.put("alice/a", {"w.safetensors": WEIGHTS}, private=True)
    code = "from huggingface_hub import hf_hub_download; print(hf_hub_download('alice/a', 'w.safetensors'))"
    done = subprocess.run([sys.executable, "-c", code], env=hub.environment("hf_alice"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_bytes() == WEIGHTS
    stranger = hub.environment(home=tmp_path / "elsewhere")
    without = subprocess.run([sys.executable, "-c", code], env=stranger, capture_output=True, text=True, check=False)
    assert "RepositoryNotFoundError" in without.stderr
