"""The page's adapters: where they came from, what `--adapters` may name, and fetching one from a Hub while the page runs.

The Hub is real HTTP on this machine (loopback_hub.py), the model the tiny Whisper, its adapters real ones with random weights.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import soundfile
from browser import DESKTOP, PHONE, Window, choose, message, save_picture, serious_findings, upload
from conftest import build_tiny_model, build_tiny_processor, tone, write_adapter
from loopback_hub import LoopbackHub, no_network
from peft import VeraConfig
from safetensors.torch import load_file, save_file
from test_demo_handlers import make_adapter, words_of

from demo import app, cards, handlers, views_adapters
from demo.catalogue import Catalogue, Fetching
from demo.named_adapters import PATIENCE_S, NamedAdapters, add_named
from demo.page import Limits, Page
from demo.visitors import is_at_this_machine
from hub_utils import (
    AdapterError,
    HubError,
    Pinned,
    RegistryEntry,
    check_adapter,
    check_reachable,
    fetch_adapter,
    fetch_entry,
    load_adapter,
    publish_adapter,
)
from whisper_moe import AdapterRegistry, LanguageAdapter, Transcriber
from whisper_moe.pocket import ADAPTERS
from whisper_moe.registry import short_source

BASE = "tests/tiny"
SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    processor = build_tiny_processor()
    return build_tiny_model(processor), processor


@pytest.fixture(scope="module")
def folders(tiny: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters as they were trained; "spoof" is a Breton one that calls itself French."""
    top = tmp_path_factory.mktemp("trained")
    made = {
        name: write_adapter(top / name, tiny[0], name, seed=seed)
        for seed, name in enumerate(("cy", "br", "ga", "fr", "it"), 1)
        if name != "ga"
    }
    made["spoof"] = write_adapter(top / "spoof", tiny[0], "br", name="fr", seed=7)
    made["child"] = write_adapter(top / "child", tiny[0], "en", name="en-child", domain="child", seed=8)
    made["other"] = write_adapter(top / "other", build_tiny_model(tiny[1], seed=5), "es")
    made["vera"] = write_adapter(top / "vera", tiny[0], "pt", peft_config=VeraConfig(r=2, target_modules=["q_proj"]))
    return made


@pytest.fixture(scope="module")
def hub(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    """alice has one repository each for Breton and Spanish (of another base), and one of many; bob and mallory an Italian one each."""
    from huggingface_hub import constants

    with LoopbackHub(tmp_path_factory.mktemp("hub")) as running, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)

        def publish(name: str, repo: str, **options: Any) -> None:
            api = running.api(f"hf_{repo.split('/')[0]}")
            publish_adapter(folders[name], repo, base_model=BASE, license="cc0-1.0", api=api, **options)

        publish("br", "alice/tiny-lora-br")
        publish("other", "alice/tiny-lora-es")
        for name in ("fr", "child"):
            publish(name, "alice/many", subfolder=name)
        publish("it", "bob/tiny-lora-it")
        publish("it", "mallory/tiny-lora-it")
        publish("spoof", "mallory/tiny-lora-br")
        files = {path: running.read("alice/tiny-lora-br", path) for path in running.commit("alice/tiny-lora-br").files}
        for name in ("carol/a", "carol/b"):
            running.put(name, files)
        running.collections["team/celtic"] = ["alice/tiny-lora-br", "alice/many"]
        yield running


@pytest.fixture
def transcriber(tiny: Any, folders: dict[str, Path]) -> Iterator[Transcriber]:
    """With an adapter for Welsh."""
    one = Transcriber(*tiny, AdapterRegistry([folders["cy"]]), load=load_adapter, check=check_adapter)
    yield one
    one.unload()


@pytest.fixture
def catalogue(transcriber: Transcriber, hub: LoopbackHub, tmp_path: Path) -> Callable[..., Catalogue]:
    """Makes a catalogue; visitors may fetch what alice has."""

    def make(**values: Any) -> Catalogue:
        fetching = Fetching(**{"allowed": True, "base_model": BASE, "owners": ("alice",)} | values)
        return Catalogue(transcriber, fetching, api=hub.api(), cache_dir=tmp_path / "cache")

    return make


def found_in(catalogue: Catalogue, language: str, owner: str = "", *, is_own: bool = False) -> str:
    """The source of the first finding."""
    return catalogue.search(language, owner, is_own=is_own).adapters[0].source


# ---- where an adapter came from ----------------------------------------------------------------------------------------


def test_an_adapter_says_where_it_came_from_and_never_a_path_of_this_machine(hub: LoopbackHub, tmp_path: Path, folders: Any) -> None:
    fetched = fetch_adapter("alice/many", subfolder="fr", api=hub.api(), cache_dir=tmp_path / "cache")
    assert LanguageAdapter.load(fetched.path).source == f"alice/many@{fetched.sha[:7]}/fr, as its folder says"
    assert LanguageAdapter.load(ADAPTERS / "cy").source == "shipped with the pocket"
    assert LanguageAdapter.load(folders["cy"]).source == "cy"
    moved = tmp_path / "mine"
    fetched.path.rename(moved)  # a note that does not agree with its place is anybody's
    assert LanguageAdapter.load(moved).source == "mine"
    shutil.copytree(folders["cy"], tmp_path / "shipped with the pocket")
    assert LanguageAdapter.load(tmp_path / "shipped with the pocket").source == "a folder called 'shipped with the pocket'"


def test_only_files_that_were_compared_with_the_hubs_hashes_are_said_to_agree(
    catalogue: Callable[..., Catalogue], hub: LoopbackHub, tmp_path: Path, folders: Any
) -> None:
    desk = catalogue()
    real = desk.fetch(found_in(desk, "br"))
    at_home = tmp_path / "cy@home"
    shutil.copytree(folders["cy"], at_home)
    unpacked = tmp_path / "elsewhere" / real.path.parent.name / real.path.name  # with the note, at such a place, and right hashes in it
    shutil.copytree(real.path, unpacked)
    agree = "files agree with the Hub's hashes"
    for folder, is_said in ((real.path, True), (at_home, False), (unpacked, False)):
        adapter = LanguageAdapter.load(folder)
        assert desk.is_from_hub(adapter) == is_said
        assert (agree in words_of(views_adapters.installed([adapter], [], is_from_hub=desk.is_from_hub))) == is_said
    assert "as its folder says" in words_of(views_adapters.installed([LanguageAdapter.load(unpacked)], []))
    weights = real.path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # changed after it was fetched
    assert not desk.is_from_hub(real)


@pytest.mark.parametrize(
    ("where", "said"),
    [
        (f"alice/a@{SHA}", "alice/a@0123456"),
        (f"alice/a@{SHA}/fr", "alice/a@0123456/fr"),
        ("/home/me/adapters/cy", "cy"),
        ("/", "a folder of this machine"),
        ("/home/me/\x1b[2Jcy", "?[2Jcy"),
    ],
)
def test_a_source_is_shortened_for_people(where: str, said: str) -> None:
    assert short_source(where) == said


# ---- what --adapters may name ------------------------------------------------------------------------------------------


def test_names_are_sorted_by_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "cy").mkdir(parents=True)
    (tmp_path / "team.json").write_text("{}")
    names = ["me/cy", "team.json", "gone.json", "alice/br", f"alice/many@{SHA}/fr", "owner:alice", "collection:team/celtic", "./no/such"]
    kinds = ["folder", "registry", "registry", "repository", "repository", "owner", "collection", "folder"]
    values = [*names[:5], "alice", "team/celtic", names[7]]
    assert NamedAdapters.sort(names).names == tuple(zip(kinds, values, strict=True))


def test_a_repository_is_fetched_at_once_and_one_of_many_when_its_language_is_heard(
    transcriber: Transcriber, hub: LoopbackHub, tmp_path: Path
) -> None:
    where = {"api": hub.api(), "cache_dir": tmp_path}
    assert add_named(transcriber, NamedAdapters.sort(["alice/tiny-lora-br", "alice/many"]), BASE, **where) == []
    sha = hub.commit("alice/tiny-lora-br").sha
    assert {each.name: each.source for each in transcriber.registry} == {"cy": "cy", "br": f"alice/tiny-lora-br@{sha[:7]}"}
    assert {source.key: source.source.split("@")[0] for source in transcriber.registry.expected} == {
        "fr": "alice/many",
        "en/child": "alice/many",
    }
    assert transcriber.transcribe(tone(300), language="fr").adapter == "fr"
    assert add_named(transcriber, NamedAdapters.sort(["alice/many/child"]), BASE, **where) == []  # already expected, fetched by name
    assert transcriber.transcribe(tone(300), adapter="en/child").adapter == "en-child"


def test_owners_and_collections_are_named_as_a_whole_and_equals_are_left_out(
    transcriber: Transcriber, hub: LoopbackHub, tmp_path: Path
) -> None:
    where = {"api": hub.api(), "cache_dir": tmp_path}
    problems = add_named(
        transcriber, NamedAdapters.sort(["collection:team/celtic", "owner:mallory", "owner:carol", "owner:nobody"]), BASE, **where
    )
    assert {source.key for source in transcriber.registry.expected} == {"br", "fr", "en/child", "it"}
    assert transcriber.registry.for_language("br").source.startswith("alice/")  # who is named first speaks
    assert len(problems) == 2
    assert problems[0].startswith("owner:carol: 2 adapters are equally good: carol/a@")
    assert problems[1] == f"owner:nobody: nothing there is a language adapter for {BASE}."


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("alice/tiny-lora-es", "was made for"),  # its card has the same base, its fingerprint has not
        ("alice/gone", "not on the Hub"),
        ("alice/many/xx", "no adapter in the folder 'xx'. It has: child, fr"),
        ("alice/b@d@e", "not on the Hub"),
    ],
)
def test_what_cannot_be_had_is_said_and_the_rest_is_there(
    transcriber: Transcriber, hub: LoopbackHub, tmp_path: Path, name: str, says: str
) -> None:
    import re

    problems = add_named(transcriber, NamedAdapters.sort([name, "bob/tiny-lora-it"]), BASE, api=hub.api(), cache_dir=tmp_path)
    assert len(problems) == 1
    assert re.search(says, problems[0]), problems[0]
    assert {each.name for each in transcriber.registry} == {"cy", "it"}


def test_an_adapter_of_another_base_is_refused_by_its_card(transcriber: Transcriber, hub: LoopbackHub, tmp_path: Path) -> None:
    named = NamedAdapters.sort(["alice/tiny-lora-br"])
    problems = add_named(transcriber, named, "openai/whisper-small", api=hub.api(), cache_dir=tmp_path)
    assert problems == [
        f"alice/tiny-lora-br: It is for {BASE}, and the base here is openai/whisper-small. Start the page with that base: --model."
    ]
    assert len(transcriber.registry) == 1


def test_without_a_network_the_page_starts_with_what_is_there_and_what_was_fetched_before(
    transcriber: Transcriber, hub: LoopbackHub, tmp_path: Path
) -> None:
    api = hub.api()
    fetch_adapter("bob/tiny-lora-it", api=api, cache_dir=tmp_path)
    with no_network(hub):
        started = time.monotonic()
        with pytest.raises(HubError, match="cannot be reached"):
            check_reachable(api)
        assert time.monotonic() - started < 2.5
        named = NamedAdapters.sort(["alice/tiny-lora-br", "bob/tiny-lora-it", "owner:alice"])
        problems = add_named(transcriber, named, BASE, api=api, cache_dir=tmp_path)
    assert [problem.split(":")[0] for problem in problems] == ["alice/tiny-lora-br", "owner"]
    assert all("cannot be reached" in problem for problem in problems)
    assert {each.name for each in transcriber.registry} == {"cy", "it"}


def test_what_was_fetched_by_its_name_is_there_when_the_next_start_has_no_network(
    tiny: Any, folders: dict[str, Path], hub: LoopbackHub, tmp_path: Path
) -> None:
    where = {"api": hub.api(), "cache_dir": tmp_path}
    named = NamedAdapters.sort(["bob/tiny-lora-it", "alice/many", "collection:team/celtic", "owner:mallory", "owner:nobody"])

    def start() -> tuple[Transcriber, list[str]]:
        one = Transcriber(*tiny, AdapterRegistry([folders["cy"]]), load=load_adapter, check=check_adapter)
        return one, add_named(one, named, BASE, **where)

    first, problems = start()
    assert [problem.split(":")[1] for problem in problems] == ["nobody"]
    for key in ("fr", "br"):
        first.registry[key]
    with no_network(hub):
        again, problems = start()
        assert [problem.split(":")[1] for problem in problems] == ["nobody"]
        assert {each.name for each in again.registry} == {"cy", "it"}
        assert {each.key: each.where for each in again.registry.expected} == {
            key: arrival.where for key, arrival in {each.key: each for each in start_of(first)}.items() if key != "it"
        }
        assert {again.registry[key].name for key in ("fr", "br")} == {"fr", "br"}
        with pytest.raises(ValueError, match="cannot be reached"):
            again.registry["en/child"]  # known by name, never fetched
        for path in (tmp_path / ".named").iterdir():
            path.write_text('{"format": 1')
        _, problems = start()
        assert [problem.split(":")[0] for problem in problems] == ["bob/tiny-lora-it", "alice/many", "collection", "owner", "owner"]


def start_of(transcriber: Transcriber) -> list[Any]:
    """What a transcriber expected when it started."""
    registry = transcriber.registry
    return [*registry.expected, *(arrival.source for arrival in registry._fetched.values())]


def test_a_hub_that_needs_a_moment_is_waited_for_at_the_start_and_not_at_a_click() -> None:
    from huggingface_hub import HfApi

    answers: list[float] = []

    class Slow(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            time.sleep(0.5)
            answers.append(time.monotonic())
            if len(answers) != 2:  # the second one is lost
                self.send_response(200)
                self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        api = HfApi(endpoint=f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(HubError, match="cannot be reached"):
            check_reachable(api, patience_s=0.2)
        assert PATIENCE_S >= 10
        time.sleep(0.6)
        check_reachable(api, patience_s=PATIENCE_S, attempts=2)  # the first of these is lost
        assert len(answers) == 3
    finally:
        server.shutdown()
        server.server_close()


# ---- fetching while the page runs --------------------------------------------------------------------------------------


def test_what_a_visitor_fetches_speaks_for_its_language_and_others_need_not_wait(
    catalogue: Callable[..., Catalogue], transcriber: Transcriber, hub: LoopbackHub
) -> None:
    desk = catalogue()
    source = found_in(desk, "Breton")
    offer = desk.offer(source)
    files = hub.commit("alice/tiny-lora-br").files
    names = ("adapter_config.json", "language_adapter.json", "adapter_model.safetensors")
    assert (offer.author, offer.num_bytes, offer.taken_by) == ("alice", sum(files[name].size for name in names), None)
    downloading, go_on, went_on = threading.Event(), threading.Event(), []

    def hold(share: float, what: str) -> None:
        if share > 0 and not downloading.is_set():
            downloading.set()
            went_on.append(go_on.wait(20))

    fetching = threading.Thread(target=lambda: desk.fetch(source, hold))
    fetching.start()
    assert downloading.wait(20)
    assert transcriber.transcribe(tone(300), language="br").adapter is None  # not held up by the download
    go_on.set()
    fetching.join(30)
    assert went_on == [True]
    assert transcriber.transcribe(tone(300), language="br").adapter == "br"
    assert ("br: Breton", "br") in handlers.adapter_choices(transcriber)


@pytest.mark.parametrize(
    ("options", "language", "owner", "says"),
    [
        ({"allowed": False}, "br", "", "Visitors may not fetch"),
        ({}, "br", "mallory", "Owners that this page trusts: alice"),
        ({"owners": ()}, "br", "", "Say whose adapters"),
        ({}, " ", "", "Say which language"),
        ({}, "Brretonn", "", "Did you mean br"),
        ({"base_model": None}, "br", "", "--base-model"),
    ],
)
def test_a_search_that_is_not_allowed_or_makes_no_sense_is_refused(
    catalogue: Callable[..., Catalogue], hub: LoopbackHub, options: dict, language: str, owner: str, says: str
) -> None:
    asked = len(hub.requests)
    with pytest.raises(ValueError, match=says):
        catalogue(**options).search(language, owner)
    assert len(hub.requests) == asked  # nobody was bothered


def test_owners_named_by_a_visitor_count_on_ones_own_machine(catalogue: Callable[..., Catalogue]) -> None:
    assert found_in(catalogue(owners=(), any_owner=True), "it", "bob", is_own=True).startswith("bob/tiny-lora-it@")
    in_collection = catalogue(owners=(), collections=("team/celtic",)).search("fr").adapters
    assert [each.source.rpartition("/")[2] for each in in_collection] == ["fr"]


def test_only_findings_can_be_fetched_and_only_for_languages_without_an_adapter(
    catalogue: Callable[..., Catalogue], transcriber: Transcriber, hub: LoopbackHub, folders: dict[str, Path]
) -> None:
    desk = catalogue()
    with pytest.raises(ValueError, match="not found by a search here"):
        desk.fetch(f"mallory/tiny-lora-br@{hub.commit('mallory/tiny-lora-br').sha}")
    source = found_in(desk, "br")
    transcriber.add_adapter(folders["br"])
    assert desk.offer(source).taken_by == "br"
    with pytest.raises(ValueError, match=f"Breton has an adapter here already: br. .* --adapters {source}"):
        desk.fetch(source)


def test_number_and_bytes_of_what_visitors_fetch_are_bounded(catalogue: Callable[..., Catalogue], transcriber: Transcriber) -> None:
    small = catalogue(max_mb=0.001)
    with pytest.raises(ValueError, match=r"0\.0 MB may still be fetched"):
        small.fetch(found_in(small, "br"))
    desk = catalogue(max_adapters=1)
    desk.fetch(found_in(desk, "br"))
    with pytest.raises(ValueError, match="1 adapters have been fetched here"):
        desk.fetch(found_in(desk, "fr"))
    assert [each.name for each in transcriber.registry] == ["cy", "br"]


def test_the_download_itself_is_bounded_too(hub: LoopbackHub, tmp_path: Path) -> None:
    """The Hub could say one size when it is asked, and have another file when it is fetched."""
    entry = RegistryEntry("br", None, Pinned("alice/tiny-lora-br", hub.commit("alice/tiny-lora-br").sha))
    with pytest.raises(AdapterError, match="at most 100 are fetched"):
        fetch_entry(entry, api=hub.api(), cache_dir=tmp_path, max_bytes=100)
    assert fetch_entry(entry, api=hub.api(), cache_dir=tmp_path, max_bytes=100_000).is_dir()


def test_an_adapter_cannot_take_the_name_of_another(catalogue: Callable[..., Catalogue], hub: LoopbackHub) -> None:
    desk = catalogue(owners=("mallory",))
    adapter = desk.fetch(found_in(desk, "br"))
    assert (adapter.language, adapter.name) == ("br", f"mallory/tiny-lora-br@{hub.commit('mallory/tiny-lora-br').sha[:7]}")


def test_a_bad_adapter_changes_nothing_and_the_message_names_no_folder(
    catalogue: Callable[..., Catalogue], transcriber: Transcriber, hub: LoopbackHub, tmp_path: Path, folders: dict[str, Path]
) -> None:
    path, repo = "adapter_model.safetensors", "mallory/tiny-lora-it"
    good = load_file(folders["it"] / path)
    save_file(good | {"base_model.model.model.encoder.conv1.bias": good[next(iter(good))][0].clone()}, tmp_path / "bad")
    hub.put(repo, {path: (tmp_path / "bad").read_bytes()})
    desk, before = catalogue(owners=("mallory",)), transcriber.transcribe(tone(300), language="it").text
    source = found_in(desk, "it")
    with pytest.raises(ValueError, match="holds 1 tensor") as refused:
        desk.fetch(source)
    assert str(tmp_path) not in str(refused.value)
    assert source in str(refused.value)
    assert [each.name for each in transcriber.registry] == ["cy"]
    assert transcriber.transcribe(tone(300), language="it").text == before
    hub.put(repo, {path: (folders["it"] / path).read_bytes()})


def test_an_expected_adapter_can_be_fetched_before_it_is_heard(catalogue: Callable[..., Catalogue], transcriber: Transcriber) -> None:
    desk = catalogue()
    add_named(transcriber, NamedAdapters.sort(["collection:team/celtic"]), BASE, **desk._where(is_own=True))
    assert desk.fetch_expected("fr").name == "fr"
    with pytest.raises(ValueError, match="here already"):
        desk.fetch_expected("fr")
    with pytest.raises(ValueError, match="Visitors may not"):
        catalogue(allowed=False).fetch_expected("br")


def test_the_hub_that_is_gone_is_noticed_within_two_seconds(catalogue: Callable[..., Catalogue], hub: LoopbackHub) -> None:
    desk = catalogue()
    source = found_in(desk, "br")
    with no_network(hub):
        for ask in (lambda: desk.search("br"), lambda: desk.fetch(source)):
            started = time.monotonic()
            with pytest.raises(ValueError, match="cannot be reached"):
                ask()
            assert time.monotonic() - started < 2.5


def test_what_only_the_owners_token_opens_is_not_for_strangers(
    transcriber: Transcriber, hub: LoopbackHub, tmp_path: Path, folders: dict[str, Path]
) -> None:
    publish_adapter(folders["it"], "alice/secret-it", base_model=BASE, license="cc0-1.0", api=hub.api("hf_alice"), private=True)
    fetching = Fetching(allowed=True, base_model=BASE, owners=("alice",))
    desk = Catalogue(transcriber, fetching, api=hub.api("hf_alice"), cache_dir=tmp_path)
    assert desk.search("it").adapters == ()
    source = found_in(desk, "it", is_own=True)
    for ask in (desk.offer, desk.fetch):
        with pytest.raises(ValueError, match="not on the Hub, or it is private"):
            ask(source)
    assert desk.fetch(source, is_own=True).source == f"alice/secret-it@{hub.commit('alice/secret-it').sha[:7]}"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("out of memory at /some/secret/x"), "Something went wrong here"),
        (OSError(28, "No space left", "/some/secret/x"), "could not be kept on this machine"),
        (
            ValueError("In /some/secret/x it cannot be used, see alice/y@1 and https://a.example/b/c"),
            "In x it cannot .* alice/y@1 and https://a.example/b/c",
        ),
        (KeyboardInterrupt(), ""),
    ],
)
def test_whatever_ends_a_fetch_gives_its_place_back_and_names_no_path(
    catalogue: Callable[..., Catalogue], transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch, error: BaseException, says: str
) -> None:
    desk = catalogue(max_adapters=1)
    source = found_in(desk, "br")

    def fail(adapter: LanguageAdapter) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(transcriber, "load", fail)
        with pytest.raises(ValueError if says else KeyboardInterrupt, match=says) as refused:
            desk.fetch(source)
        assert "secret" not in str(refused.value)
    assert desk.fetch(source).name == "br"


def test_of_two_that_come_for_one_language_at_once_one_is_added(
    catalogue: Callable[..., Catalogue], transcriber: Transcriber, folders: dict[str, Path]
) -> None:
    desk = catalogue()
    source = found_in(desk, "br")

    def be_quicker(share: float, what: str) -> None:
        if what == "Checking":
            transcriber.registry.expect("br", lambda: folders["br"], where="another way")
            transcriber.registry["br"]

    with pytest.raises(ValueError, match="Breton has an adapter here already: br"):
        desk.fetch(source, be_quicker)
    assert [each.source for each in transcriber.registry if each.language == "br"] == ["another way"]
    assert transcriber.registry.for_language("br") is not None


def test_a_name_that_is_taken_is_no_reason_to_refuse_and_no_path_is_said(
    catalogue: Callable[..., Catalogue], transcriber: Transcriber, folders: dict[str, Path]
) -> None:
    transcriber.add_adapter(replace(LanguageAdapter.load(folders["it"]), name="br"))
    desk = catalogue()
    adapter = desk.fetch(found_in(desk, "br"))
    assert adapter.name == adapter.source
    with pytest.raises(ValueError, match="has an adapter here already") as refused:
        transcriber.registry.add_if_free(LanguageAdapter.load(folders["br"]))
    assert str(folders["br"].parent) not in str(refused.value)


def test_findings_of_all_places_are_in_one_order_and_a_place_that_fails_does_not_end_the_others(
    catalogue: Callable[..., Catalogue], hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = {"alice/tiny-lora-br": 3, "carol/a": 9, "mallory/tiny-lora-br": 5}
    for repo, downloads in counted.items():
        monkeypatch.setattr(hub.repos[repo], "downloads", downloads)
    desk = catalogue(owners=("alice", "mallory", "carol"), collections=("team/celtic", "nobody/gone"))
    found = desk.search("br")
    assert [each.repo_id for each in found.adapters] == ["carol/a", "mallory/tiny-lora-br", "alice/tiny-lora-br", "carol/b"]
    assert [each.rank for each in found.adapters] == [1, 2, 3, 4]
    assert len(found.problems) == 1
    assert "nobody/gone is not on the Hub" in words_of(views_adapters.findings(found))
    with pytest.raises(ValueError, match="nobody/gone"):
        catalogue(owners=(), collections=("nobody/gone",)).search("br")
    monkeypatch.setattr("demo.catalogue._MOST_OFFERED", 2)
    found = desk.search("br")
    assert [each.repo_id for each in found.adapters] == ["carol/a", "mallory/tiny-lora-br"]
    for each in found.adapters:  # what is shown can be looked at
        assert desk.offer(each.source).found.repo_id == each.repo_id
    with pytest.raises(ValueError, match="no name of a user"):
        catalogue(any_owner=True).search("br", "../x", is_own=True)


# ---- who asks ----


def request_of(host: str = "127.0.0.1:7860", root: str = "", version: str = "1.1", client: str = "127.0.0.1", **headers: str) -> Any:
    scope = {"root_path": root, "http_version": version, "client": (client, 5)}
    names = {"host": host} | {name.replace("_", "-"): value for name, value in headers.items()}
    return SimpleNamespace(headers=names, request=SimpleNamespace(scope=scope))


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "[::1]:7860", "127.1.2.3", "LOCALHOST"])
def test_a_browser_on_this_machine_is_known(host: str) -> None:
    assert is_at_this_machine(request_of(host, origin=f"http://{host}", referer=f"http://{host}/?x"))
    assert is_at_this_machine(request_of(host))


@pytest.mark.parametrize(
    "request_",
    [
        request_of("whisper.example"),
        request_of("localhost.whisper.example"),
        request_of(""),
        request_of("[::1"),
        request_of(X_Forwarded_Proto="https"),
        request_of(x_forwarded_for="127.0.0.1"),
        request_of(Forwarded="for=1.2.3.4"),
        request_of(X_Real_IP="127.0.0.1"),
        request_of(root="/whisper"),
        request_of(version="1.0"),
        request_of(client="192.168.1.7"),
        request_of(origin="https://whisper.example"),
        request_of(origin="null"),
        request_of(Referer="https://whisper.example/"),
        None,
    ],
)
def test_whoever_comes_through_a_proxy_or_by_another_name_is_a_stranger(request_: Any) -> None:
    assert not is_at_this_machine(request_)


def test_a_path_in_the_environment_means_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_ROOT_PATH", "/whisper")
    assert not is_at_this_machine(request_of())


def test_strangers_at_a_page_of_ones_own_machine_may_fetch_nothing(catalogue: Callable[..., Catalogue], transcriber: Transcriber) -> None:
    desk = catalogue(any_owner=True, only_here=True)
    source = found_in(desk, "br", is_own=True)
    add_named(transcriber, NamedAdapters.sort(["alice/many"]), BASE, **desk._where(is_own=True))
    for ask in (lambda: desk.search("br"), lambda: desk.offer(source), lambda: desk.fetch(source), lambda: desk.fetch_expected("fr")):
        with pytest.raises(ValueError, match="Visitors may not fetch"):
            ask()
    with pytest.raises(ValueError, match="Owners that this page trusts: alice"):
        catalogue(any_owner=True).search("br", "mallory")
    assert len(transcriber.registry) == 1


# ---- the command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "allow", "forbid", "allowed", "any_owner"),
    [
        ("127.0.0.1", False, False, True, True),
        ("localhost", False, False, True, True),
        ("::1", False, False, True, True),
        ("127.0.0.1", False, True, False, True),
        ("0.0.0.0", False, False, False, False),
        ("192.168.1.5", False, False, False, False),
        ("0.0.0.0", True, False, True, False),
        ("127.0.0.1", True, False, True, True),
    ],
)
def test_strangers_fetch_nothing_unless_the_pages_owner_says_so(
    monkeypatch: pytest.MonkeyPatch, host: str, allow: bool, forbid: bool, allowed: bool, any_owner: bool
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(app, "load", lambda *arguments, **options: None)
    monkeypatch.setattr(app, "run", lambda transcriber, limits, catalogue, **options: seen.update(fetching=catalogue.fetching))
    app.serve(host=host, allow_fetch=allow, no_allow_fetch=forbid, adapters=("owner:alice", "alice/x"), owners=("bob", "alice"))
    fetching = seen["fetching"]
    assert fetching.of_visitor(is_own=False).allowed == (allow and not forbid)
    assert not fetching.of_visitor(is_own=False).any_owner
    assert (fetching.allowed, fetching.any_owner, fetching.owners) == (allowed, any_owner, ("bob", "alice"))


def test_flags_and_limits_reach_the_page(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import tyro

    seen: dict[str, Any] = {}
    monkeypatch.setattr(app, "load", lambda *arguments, **options: None)
    monkeypatch.setattr(
        app, "run", lambda transcriber, limits, catalogue, **options: seen.update(limits=limits, may=catalogue.fetching.allowed)
    )
    line = "--host 0.0.0.0 --allow-fetch --max-at-once 3 --max-waiting 4 --max-files 5 --max-minutes 2 --max-upload-mb 8 --adapters a/b"
    tyro.cli(app.serve, args=line.split())
    assert (seen["limits"], seen["may"]) == (Limits(max_minutes=2, max_upload_mb=8, max_files=5, max_at_once=3, max_waiting=4), True)
    tyro.cli(app.serve, args=["--no-allow-fetch"])
    assert (seen["limits"], seen["may"]) == (Limits(), False)
    with pytest.raises(ValueError, match="not both"):
        tyro.cli(app.serve, args=["--no-allow-fetch", "--allow-fetch"])
    with pytest.raises(ValueError, match="max_waiting is 0"):
        Limits(max_waiting=0)


# ---- what the tab says -------------------------------------------------------------------------------------------------


def test_a_card_of_a_stranger_can_do_nothing() -> None:
    html = cards.to_html(
        "---\nlicense: mit\n---\n# Hello <script>alert(1)</script>\n\n![pixel](https://evil.example/p.gif) [click](javascript:alert(1))\n\n"
        "<img src=x onerror=alert(1)>\n\n| a | b |\n|---|---|\n| `<b>` | **c** |\n\n- one\n- [two](https://a.example)\n\n```\n</pre><script>\n```\n"
    )
    assert "license" not in html
    assert not any(mark in html for mark in ("<script", "<img", "<a ", "href", 'src="', "<b>"))
    assert "[image: pixel]" in html
    assert "click (javascript:alert(1)" in html  # words, not a link
    assert "<code>&lt;b&gt;</code>" in html
    assert "<strong>c</strong>" in html
    assert "<li>two (https://a.example)</li>" in html
    assert words_of(html)


def test_any_text_makes_a_card_whose_tags_are_closed() -> None:
    for text in (
        "",
        "```",
        "---\n",
        "|",
        "- ",
        "#",
        "# \n##",
        "**",
        "`",
        "\x00\ufeff---\n",
        "![",
        "[a](b",
        "| | |\n|",
        "\u202e",
        "a\n" * 5000,
    ):
        words_of(cards.to_html(text))


def test_the_tab_says_of_each_adapter_what_a_stranger_wants_to_know(folders: dict[str, Path]) -> None:
    adapters = [LanguageAdapter.load(ADAPTERS / name) for name in ("cy", "qug", "en-child")]
    words = words_of(views_adapters.installed(adapters, ["cy", "en"], ["alice/br: The Hub cannot be reached."]))
    before, after = (adapters[0].metrics[when]["wer"] for when in ("before", "after"))
    assert "alice/br: The Hub cannot be reached." in words
    assert f"without it {before:.0%}".replace("%", " %") in words.replace("\u00a0", " ")
    assert f"with it {after:.0%}".replace("%", " %") in words.replace("\u00a0", " ")
    assert f"{adapters[0].metrics['after']['clips']} recordings of {adapters[0].metrics['test_set']}" in words
    assert "mark-preserving" in words
    assert "When Welsh is heard, or chosen" in words
    assert "the base model cannot hear this language" in words
    assert words.count("shipped with the pocket") == 3
    assert words.count("fingerprint of the base model agrees; files of this machine") == 3
    assert "Licence: cc0-1.0" in words  # of the card
    bare = make_adapter("br", "br", metrics={}, source=f"alice/br@{SHA[:7]}")
    words = words_of(views_adapters.installed([bare], ["br"], is_from_hub=lambda adapter: True))
    assert "Nobody has measured" in words
    assert "no fingerprint of its base" in words
    assert "files agree with the Hub's hashes" in words
    assert "--adapters" in words_of(views_adapters.installed([], []))


def test_an_adapter_without_a_card_shows_the_one_that_its_record_gives(hub: LoopbackHub, tmp_path: Path, folders: dict[str, Path]) -> None:
    form = folders["cy"] / "README.md"
    assert "More Information Needed" in form.read_text()  # PEFT writes it
    assert "none: random weights" in cards.card_of(LanguageAdapter.load(form.parent))
    assert cards.card_of(LanguageAdapter.load(ADAPTERS / "cy")) == (ADAPTERS / "cy" / "README.md").read_text("utf-8")
    fetched = fetch_adapter("alice/tiny-lora-br", api=hub.api(), cache_dir=tmp_path)
    assert "none: random weights" in cards.card_of(LanguageAdapter.load(fetched.path))
    (fetched.path / "language_adapter.json").write_text(json.dumps({"training": 5}))
    assert cards.card_of(replace(make_adapter("br", "br"), path=fetched.path)) == "This adapter has no card that can be shown."


def test_nothing_from_outside_becomes_html(folders: dict[str, Path]) -> None:
    from whisper_moe.registry import AdapterSource

    evil = "<script>alert(1)</script>"
    known = {"metrics": {"after": {"wer": 0.5}, "test_set": evil, "normalizer": evil}}
    adapter = make_adapter(evil, "cy", domain=evil, peft_type=evil, base=evil, source=evil, **known)
    source = AdapterSource("br", evil, f"/home/{evil}", lambda: "")
    pages = [
        views_adapters.installed([adapter], [], [evil]),
        views_adapters.expected([source], True),
        views_adapters.finding(Fetching(allowed=True, base_model=evil, owners=(evil,))),
        views_adapters.added(adapter),
    ]
    for html in pages:
        assert "<script" not in html
        assert "alert(1)" in words_of(html)


# ---- in a browser ------------------------------------------------------------------------------------------------------


needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="[e2e] to run it: pip install peft-s2lora[demo,e2e]")


def in_browser(test: Any) -> Any:
    """Marks a test that needs a browser and Gradio."""
    return pytest.mark.e2e(needs_gradio(test))


@contextmanager
def served_here(transcriber: Transcriber, limits: Limits, catalogue: Catalogue | None = None) -> Iterator[str]:
    """The address of a page that this process serves."""
    page = app.build_app(transcriber, limits, catalogue)
    _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1", **app.launch_options(limits))
    try:
        yield url
    finally:
        page.close(verbose=False)


@pytest.fixture
def window(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens windows on a page; afterwards none of them may have had a script error or a request to elsewhere."""
    opened: list[Window] = []

    def open_one(url: str, size: dict = DESKTOP, scheme: str = "light") -> Any:
        opened.append(Window(browser, url, size, scheme))
        return opened[-1].page

    yield open_one
    for each in opened:
        each.context.close()
    for each in opened:
        each.check()


@needs_gradio
def test_an_upload_is_deleted_when_its_time_is_over_and_the_page_goes_on(
    transcriber: Transcriber, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with served_here(transcriber, Limits(keep_uploads_s=1, max_upload_mb=1)) as url:
        sent = httpx.post(f"{url}gradio_api/upload", files={"files": ("voice.wav", bytes(1000))})
        uploaded = Path(sent.json()[0])
        assert uploaded.is_relative_to(tmp_path)
        too_large = httpx.post(f"{url}gradio_api/upload", files={"files": ("voice.wav", bytes(1_500_000))})
        assert too_large.status_code == 413
        deadline = time.monotonic() + 20
        while uploaded.exists():
            assert time.monotonic() < deadline, "it is kept for ever"
            time.sleep(0.1)
        assert httpx.get(url).status_code == 200
        late = Path(httpx.post(f"{url}gradio_api/upload", files={"files": ("late.wav", bytes(1000))}).json()[0])
    assert not [path for path in (uploaded, late) if path.exists()], "uploads outlive the page"


@needs_gradio
def test_a_part_of_the_page_that_cannot_look_does_not_stop_the_others(transcriber: Transcriber, caplog: pytest.LogCaptureFixture) -> None:
    import gradio as gr

    here = Page(gr, transcriber, Limits(), Catalogue(transcriber))
    with gr.Blocks() as blocks:
        broken, also, fine = gr.HTML(), gr.HTML(), gr.HTML()
        here.when_adapters_change([broken, also], lambda is_own: [str(10**400 / 3), "x"])
        here.when_adapters_change([fine], lambda is_own: ["seen"])
        here.connect(blocks, [])
    (event,) = blocks.fns.values()
    assert event.fn(None) == [gr.skip(), gr.skip(), "seen"]
    assert "could not look" in caplog.text


@needs_gradio
def test_a_stranger_behind_a_proxy_fetches_nothing_over_http(
    catalogue: Callable[..., Catalogue], transcriber: Transcriber, hub: LoopbackHub
) -> None:
    """As nginx of docs/demo.md passes it on, and as a browser of this machine asks."""
    import httpx

    def asked(url: str, headers: dict[str, str]) -> str:
        config = httpx.get(f"{url}config").json()
        (find,) = [each for each in config["dependencies"] if each["api_name"] == "find"]
        body = {"data": ["br", ""], "fn_index": find["id"], "session_hash": f"s{len(headers)}"}
        assert httpx.post(f"{url}gradio_api/queue/join", json=body, headers=headers).status_code == 200
        with httpx.stream("GET", f"{url}gradio_api/queue/data", params={"session_hash": body["session_hash"]}, timeout=30) as news:
            return next(line for line in news.iter_lines() if "process_completed" in line)

    with served_here(transcriber, Limits(), catalogue(any_owner=True, only_here=True)) as url:
        before = len(hub.requests)
        assert "Visitors may not fetch" in asked(url, {"Host": "whisper.example", "X-Forwarded-Proto": "https"})
        assert len(hub.requests) == before
        assert "alice/tiny-lora-br@" in asked(url, {})


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


@in_browser
def test_a_visitor_finds_an_adapter_fetches_it_and_everybody_can_choose_it(
    catalogue: Callable[..., Catalogue], transcriber: Transcriber, hub: LoopbackHub, window: Any
) -> None:
    desk, sha = catalogue(any_owner=True, only_here=True), hub.commit("alice/tiny-lora-br").sha
    add_named(transcriber, NamedAdapters.sort(["alice/many"]), BASE, **desk._where(is_own=True))
    with served_here(transcriber, Limits(), desk) as url:
        page, other = window(url), window(url)
        open_tab(page, "Adapters")
        page.get_by_role("heading", name="Welsh cy").wait_for()
        page.get_by_text("Named, not here yet").wait_for()
        page.get_by_role("button", name="Fetch now").click()  # the first one that is named: of many
        page.get_by_role("heading", name="English, child en-child").wait_for()
        page.get_by_label("For which language").fill("Breton")
        page.keyboard.press("Enter")
        page.get_by_role("radio", name="alice/tiny-lora-br").check()
        page.get_by_text("fetch this one?").wait_for()
        seen = page.locator("#finding").inner_text()
        assert all(part in seen for part in ("alice", sha, " kB", "Downloads")), seen
        assert serious_findings(page) == []
        save_picture(page, "demo_adapters_finding", whole=True, part="#adapters")
        page.get_by_role("button", name="Fetch and add").click()
        page.get_by_role("heading", name="Breton br").wait_for()
        for visitor in (page, other):  # other has been here all the time
            open_tab(visitor, "Live")
            open_tab(visitor, "Transcribe")
            choose(visitor, "Adapter", "br: Breton")
        assert page.get_by_label("Adapter", exact=True).input_value() == "br: Breton"
        open_tab(page, "Adapters")
        with no_network(hub):
            page.get_by_label("For which language").fill("fr")
            started = time.monotonic()
            page.get_by_role("button", name="Find", exact=True).click()
            assert "cannot be reached" in message(page)
            assert time.monotonic() - started < 6  # two seconds of it are the Hub's
        page.get_by_label("For which language").fill("Brretonn")
        page.get_by_role("button", name="Find", exact=True).click()
        assert "Did you mean br (Breton)" in message(page)
        page = window(url, PHONE, "dark")
        open_tab(page, "Adapters")
        page.get_by_text("Its card").first.click()
        page.locator(".wm-card").first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"], "it scrolls sideways"
        assert serious_findings(page) == []
        save_picture(page, "demo_adapters_phone", whole=True, part="#adapters")


class Held(Transcriber):
    """Writes nothing down until `go` is set."""

    asked, go = threading.Event(), threading.Event()

    def transcribe(self, *arguments: Any, **options: Any) -> Any:
        self.asked.set()
        assert self.go.wait(60)
        return super().transcribe(*arguments, **options)


@in_browser
def test_who_waits_sees_the_place_in_the_queue_and_who_finds_it_full_is_told_politely(tiny: Any, window: Any, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.utils import QueueError

    soundfile.write(tmp_path / "a.wav", tone(300), 16_000)
    with served_here(Held(*tiny), Limits(max_at_once=1, max_waiting=1)) as url:
        waiting, refused, program = window(url), window(url), Client(url, verbose=False)
        try:
            answer = program.submit(handle_file(tmp_path / "a.wav"), api_name="/transcribe")
            assert Held.asked.wait(20)
            upload(waiting, tmp_path / "a.wav")
            waiting.get_by_text("queue: 1/1").first.wait_for()
            upload(refused, tmp_path / "a.wav")
            assert "currently busy. Please try again" in message(refused)
            with pytest.raises(QueueError, match="Queue is full! Please try again"):
                program.predict(handle_file(tmp_path / "a.wav"), api_name="/transcribe")
        finally:
            Held.go.set()
        assert answer.result(30)["duration_s"] == 1
        waiting.locator(".wm-sentence, .wm-text").first.wait_for()
        refused.get_by_role("button", name="Transcribe").click()  # again, as it was told
        refused.locator(".wm-sentence, .wm-text").first.wait_for()
