"""Finding adapters, against a real server: who may be searched, what a card must say, and an order that leaves nothing to chance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_adapters import write_run
from loopback_hub import LoopbackHub, hub_fixture, online_fixture  # noqa: F401

from hub_utils import FoundAdapter, HubError, Pinned, RegistryEntry, RegistryFile, find_adapters, pick_adapter, publish_adapter

pytestmark = pytest.mark.usefixtures("online")
BASE = "openai/whisper-small"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub_utils._hub._LONGEST_WAIT_S", 0.01)


@pytest.fixture
def find(hub: LoopbackHub) -> Callable[..., list[FoundAdapter]]:
    """`find_adapters` for Welsh, as somebody without a token."""

    def call(base: str = BASE, language: str = "cy", **options: Any) -> list[FoundAdapter]:
        return find_adapters(base, language, api=hub.api(options.pop("token", False)), **options)

    return call


def put_card(hub: LoopbackHub, repo_id: str, **changes: Any) -> str:
    """A repository with nothing but a card of ours, some of whose entry is changed. Returns its commit."""
    entry = {"language": "cy", "base_model": BASE, "peft_type": "LORA", "wer": 0.2, "cer": 0.1} | {
        "test_set": "held-out voices",
        "normalizer": "mark-preserving",
    }
    entry = {key: value for key, value in (entry | changes).items() if value is not None}
    tags = ["peft", "language-adapter", f"base_model:adapter:{BASE}", "cy"]
    card = {"language": ["cy"], "base_model": BASE, "library_name": "peft", "tags": tags, "language_adapters": [entry]}
    return hub.put(repo_id, {"README.md": f"---\n{yaml.safe_dump(card)}---\ntext".encode()})


# ---- who may be searched -----------------------------------------------------------------------------------------------


def test_published_adapters_are_found_with_what_their_card_says(hub: LoopbackHub, find: Callable[..., Any], tmp_path: Path) -> None:
    published = publish_adapter(write_run(tmp_path / "run"), api=hub.api("hf_alice"))
    hub.repos[published.repo_id].downloads = 7
    (found,) = find(namespaces=["alice"])
    assert found.source == published.source
    assert (found.language, found.base_model, found.peft_type, found.domain) == ("cy", BASE, "S2LORA", None)
    assert (found.wer, found.cer, found.test_set, found.normalizer) == (0.21, 0.08, "held-out voices", "mark-preserving")
    assert (found.downloads, found.gated, found.private, found.rank) == (7, False, False, 1)


def test_only_named_owners_are_searched(hub: LoopbackHub, find: Callable[..., Any]) -> None:
    put_card(hub, "alice/a")
    put_card(hub, "mallory/better", wer=0.01)
    assert [adapter.repo_id for adapter in find(namespaces=["alice", "bob"])] == ["alice/a"]
    hub.ignores_author = True
    assert [adapter.repo_id for adapter in find(namespaces=["alice", "bob"])] == ["alice/a"]
    assert not [request for request in hub.requests if "author=" not in request.path and "/collections/" not in request.path]


def test_without_anybody_to_search_nothing_is_searched(hub: LoopbackHub, find: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Say where to look.*never searched"):
        find()
    with pytest.raises(ValueError, match=r"adapters\.json has none for 'cy'"):
        find(registry=RegistryFile(tmp_path / "adapters.json"))
    with pytest.raises(ValueError, match="not both"):
        find(namespaces=["alice"], collection="alice/welsh")
    assert hub.requests == []


def test_a_collection_may_hold_several_owners_and_the_gone_are_left_out(hub: LoopbackHub, find: Callable[..., Any]) -> None:
    put_card(hub, "alice/a", wer=0.3)
    put_card(hub, "bob/b")
    put_card(hub, "mallory/m", wer=0.01)
    put_card(hub, "bob/hidden", wer=0.01)
    hub.repos["bob/hidden"].private = True
    hub.collections["alice/welsh-0123"] = ["alice/a", "bob/deleted", "bob/hidden", "bob/b"]
    assert [adapter.repo_id for adapter in find(collection="alice/welsh-0123")] == ["bob/b", "alice/a"]
    with pytest.raises(HubError, match="the collection alice/none is not on the Hub"):
        find(collection="alice/none")


def test_a_repository_that_moved_is_not_followed(hub: LoopbackHub, find: Callable[..., Any]) -> None:
    put_card(hub, "alice/a")
    hub.collections["alice/welsh"] = ["alice/a"]
    hub.api("hf_alice").move_repo("alice/a", "alice/b")
    assert find(collection="alice/welsh") == []


def test_private_adapters_are_found_by_their_owner_alone(hub: LoopbackHub, find: Callable[..., Any]) -> None:
    put_card(hub, "alice/a")
    hub.repos["alice/a"].private = True
    assert find(namespaces=["alice"]) == []
    (found,) = find(namespaces=["alice"], token="hf_alice")
    assert found.private


def test_every_page_of_a_long_list_is_read(hub: LoopbackHub, find: Callable[..., Any]) -> None:
    hub.page_size = 3
    for number in range(8):
        put_card(hub, f"alice/a{number}", wer=0.1 + number / 100)
    assert [adapter.repo_id for adapter in find(namespaces=["alice"])] == [f"alice/a{number}" for number in range(8)]
    assert hub.count("GET", "/api/models") == 3


def test_a_busy_hub_is_asked_again_and_a_silent_one_is_named(
    hub: LoopbackHub,
    find: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    put_card(hub, "alice/a")
    hub.fault("GET /api/models", "status", status=503, times=2)
    assert len(find(namespaces=["alice"])) == 1
    hub.stop()
    with pytest.raises(HubError, match="cannot be reached for the models of alice"):
        find(namespaces=["alice"])


# ---- the registry goes first -------------------------------------------------------------------------------------------


def test_an_entry_of_the_registry_is_the_answer_and_the_hub_is_not_asked(
    hub: LoopbackHub,
    find: Callable[..., Any],
    tmp_path: Path,
) -> None:
    put_card(hub, "alice/a", wer=0.01)
    registry = RegistryFile(tmp_path / "adapters.json")
    registry.add(RegistryEntry("cy", None, Pinned("bob/mine", "0" * 40, "cy")))
    registry.add(RegistryEntry("ga", None, tmp_path / "irish"))
    (found,) = find(registry=registry, namespaces=["alice"])
    assert found.source == f"bob/mine@{'0' * 40}/cy"
    (found,) = find(language="ga", registry=registry, namespaces=["alice"])
    assert (found.repo_id, found.path) == (None, tmp_path / "irish")
    assert hub.requests == []
    assert find(language="cy", domain="child", registry=registry, namespaces=["alice"]) == []


# ---- the card is read again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"language": "ga"},
        {"language": None},
        {"language": ["cy"]},
        {"base_model": "openai/whisper-tiny"},
        {"base_model": "../whisper-small"},
        {"base_model": None},
        {"domain": "child"},
        {"domain": ["child"]},
        {"subfolder": "../cy"},
        {"subfolder": 7},
        {"peft_type": "VERA"},
        {"peft_type": {"a": 1}},
    ],
)
def test_a_card_that_says_something_else_than_its_tags_is_left_out(
    hub: LoopbackHub,
    find: Callable[..., Any],
    changes: dict[str, Any],
) -> None:
    put_card(hub, "alice/good")
    put_card(hub, "alice/bad", **changes)
    assert [adapter.repo_id for adapter in find(namespaces=["alice"])] == ["alice/good"]


@pytest.mark.parametrize("sign", ["\x1b", "\x9b", "\x85", "\u202e", "\u2066", "\u200b"])
def test_text_that_could_steer_a_terminal_or_turn_itself_around_is_not_shown(hub: LoopbackHub, find: Callable[..., Any], sign: str) -> None:
    put_card(hub, "alice/good", test_set=f"voices{sign}2J", wer=0.1)
    put_card(hub, "alice/bad", domain=f"child{sign}")
    (found,) = find(namespaces=["alice"])
    assert (found.repo_id, found.test_set) == ("alice/good", None)
    assert found.reason.isprintable()


@pytest.mark.parametrize("rows", ["cy", {"language": "cy"}, [None, 3, "cy"], [[]], []])
def test_entries_of_the_wrong_kind_are_left_out(hub: LoopbackHub, find: Callable[..., Any], rows: Any) -> None:
    card = {"language": ["cy"], "tags": [f"base_model:adapter:{BASE}", "cy"], "language_adapters": rows}
    hub.put("alice/a", {"README.md": f"---\n{yaml.safe_dump(card)}---\n".encode()})
    assert find(namespaces=["alice"]) == []


@pytest.mark.parametrize("wer", [float("nan"), float("inf"), -1.0, "0.01", True, [0.01]])
def test_a_figure_that_cannot_be_one_counts_as_not_measured(hub: LoopbackHub, find: Callable[..., Any], wer: Any) -> None:
    put_card(hub, "alice/cheats", wer=wer)
    put_card(hub, "alice/honest", wer=0.9)
    found = find(namespaces=["alice"])
    assert [adapter.repo_id for adapter in found] == ["alice/honest", "alice/cheats"]
    assert found[1].wer is None


def test_a_repository_of_many_languages_yields_the_right_folder(hub: LoopbackHub, find: Callable[..., Any], tmp_path: Path) -> None:
    for code in ("br", "cy"):
        publish_adapter(write_run(tmp_path / code, language=code), "alice/many", subfolder=code, api=hub.api("hf_alice"))
    (found,) = find(namespaces=["alice"])
    assert (found.subfolder, found.language) == ("cy", "cy")
    assert found.source == f"alice/many@{hub.commit('alice/many').sha}/cy"


@pytest.mark.parametrize(("language", "base"), [("jw", BASE), ("no", BASE), ("cy", "peft-s2lora/pocket-whisper")])
def test_codes_the_hub_has_not_and_the_pocket_are_found_too(
    hub: LoopbackHub,
    find: Callable[..., Any],
    tmp_path: Path,
    language: str,
    base: str,
) -> None:
    publish_adapter(write_run(tmp_path / "run", language=language, base_model=base), "alice/a", api=hub.api("hf_alice"))
    (found,) = find(base, language, namespaces=["alice"])
    assert (found.language, found.base_model) == (language, base)


def test_an_adapter_published_by_other_means_is_found_by_the_hubs_own_fields(hub: LoopbackHub, find: Callable[..., Any]) -> None:
    fields = {"library_name": "peft", "base_model": BASE, "language": "jv", "tags": [f"base_model:adapter:{BASE}"]}
    hub.put("bob/plain", {"README.md": f"---\n{yaml.safe_dump(fields)}---\n".encode()})
    hub.put("bob/two", {"README.md": f"---\n{yaml.safe_dump(fields | {'language': ['jv', 'su']})}---\n".encode()})
    hub.put("bob/full-model", {"README.md": f"---\n{yaml.safe_dump(fields | {'library_name': 'transformers'})}---\n".encode()})
    (found,) = find(language="jw", namespaces=["bob"])
    assert (found.repo_id, found.peft_type, found.wer) == ("bob/plain", None, None)


def test_methods_can_be_asked_for(hub: LoopbackHub, find: Callable[..., Any]) -> None:
    put_card(hub, "alice/lora")
    put_card(hub, "alice/s2", peft_type="S2LORA", wer=0.1)
    assert [adapter.repo_id for adapter in find(namespaces=["alice"], methods=["LORA"])] == ["alice/lora"]


# ---- the order ---------------------------------------------------------------------------------------------------------


def test_the_named_metric_decides_and_downloads_come_last(hub: LoopbackHub, find: Callable[..., Any]) -> None:
    put_card(hub, "alice/popular", wer=0.4, cer=0.1)
    put_card(hub, "alice/good", wer=0.2, cer=0.3)
    put_card(hub, "alice/good-and-popular", wer=0.2, cer=0.3)
    put_card(hub, "alice/other-set", wer=0.01, cer=0.01, test_set="its own training data")
    put_card(hub, "alice/other-normalizer", wer=0.02, cer=0.02, normalizer="whisper-basic")
    for name, downloads in (("popular", 900), ("good", 1), ("good-and-popular", 5), ("other-set", 50), ("other-normalizer", 60)):
        hub.repos[f"alice/{name}"].downloads = downloads
    by_wer = find(namespaces=["alice"], test_set="held-out voices")
    assert [(adapter.repo_id.removeprefix("alice/"), adapter.rank) for adapter in by_wer] == [
        ("good-and-popular", 1),
        ("good", 2),
        ("popular", 3),
        ("other-normalizer", 4),
        ("other-set", 5),
    ]
    assert by_wer[0].reason == "WER 20.0% on held-out voices, 5 downloads"
    assert by_wer[4].reason == "no figure that could be compared, 50 downloads"
    by_cer = find(namespaces=["alice"], test_set="held-out voices", metric="cer")
    assert by_cer[0].repo_id == "alice/popular"
    basic = find(namespaces=["alice"], test_set="held-out voices", normalizer="whisper-basic")
    assert basic[0].repo_id == "alice/other-normalizer"


def test_without_a_named_set_figures_of_different_sets_are_not_compared(hub: LoopbackHub, find: Callable[..., Any]) -> None:
    put_card(hub, "alice/a", wer=0.5)
    put_card(hub, "alice/b", wer=0.1)
    assert [adapter.repo_id for adapter in find(namespaces=["alice"])] == ["alice/b", "alice/a"]
    put_card(hub, "alice/b", wer=0.1, test_set="easy")
    hub.repos["alice/a"].downloads = 3
    found = find(namespaces=["alice"])
    assert [adapter.repo_id for adapter in found] == ["alice/a", "alice/b"]
    assert {adapter.reason.partition(",")[0] for adapter in found} == {"no figure that could be compared"}


def test_equals_share_a_rank_and_choosing_between_them_is_refused(hub: LoopbackHub, find: Callable[..., Any]) -> None:
    first, second = put_card(hub, "alice/a"), put_card(hub, "bob/b")
    put_card(hub, "bob/worse", wer=0.3)
    found = find(namespaces=["alice", "bob"])
    assert [adapter.rank for adapter in found] == [1, 1, 3]
    with pytest.raises(ValueError, match=f"2 adapters are equally good: alice/a@{first} .*; bob/b@{second} "):
        pick_adapter(found)
    hub.repos["bob/b"].downloads = 1
    assert pick_adapter(find(namespaces=["alice", "bob"])).repo_id == "bob/b"
    with pytest.raises(ValueError, match="No adapter was found"):
        pick_adapter([])


@pytest.mark.parametrize(("options", "says"), [({"metric": "bleu"}, "'wer' or 'cer'"), ({"base": "a b"}, "a model of the Hub")])
def test_a_request_that_makes_no_sense_is_refused(find: Callable[..., Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        find(namespaces=["alice"], **options)
