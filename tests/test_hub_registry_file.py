"""The registry file: what people may write in it, what several processes may do to it, and commits that may not be followed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_adapters import write_run
from loopback_hub import LoopbackHub, hub_fixture, online_fixture  # noqa: F401

from hub_utils import HubError, Pinned, RegistryEntry, RegistryFile, default_registry, entry_of, publish_adapter, update_registry

SHA, OTHER = "0123456789abcdef0123456789abcdef01234567", "f" * 40


@pytest.fixture
def registry(tmp_path: Path) -> RegistryFile:
    return RegistryFile(tmp_path / "settings" / "adapters.json")


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hub_utils._hub._LONGEST_WAIT_S", 0.01)


def write(registry: RegistryFile, adapters: Any) -> None:
    registry.path.parent.mkdir(parents=True, exist_ok=True)
    registry.path.write_text(json.dumps({"format": 1, "adapters": adapters}))


# ---- reading and writing -----------------------------------------------------------------------------------------------


def test_what_is_added_is_read_back_and_written_for_people(registry: RegistryFile, tmp_path: Path) -> None:
    assert registry.entries() == []
    entries = [
        RegistryEntry("cy", None, Pinned("alice/whisper-small-s2lora-cy", SHA)),
        RegistryEntry("en", "child", Pinned("alice/many", SHA, "en-child")),
        RegistryEntry("pt-BR", None, tmp_path / "settings" / "pt"),
        RegistryEntry("qug", None, tmp_path / "elsewhere"),
    ]
    for entry in entries:
        registry.add(entry)
    assert RegistryFile(registry.path).entries() == entries
    assert json.loads(registry.path.read_text())["adapters"] == {
        "cy": f"alice/whisper-small-s2lora-cy@{SHA}",
        "en/child": f"alice/many@{SHA}/en-child",
        "pt-BR": "./pt",
        "qug": str(tmp_path / "elsewhere"),
    }
    assert registry.get("en") is None
    assert registry.get("en", "child") == entries[1]


def test_the_file_and_the_folders_below_it_can_move_together(registry: RegistryFile, tmp_path: Path) -> None:
    registry.add(RegistryEntry("cy", None, registry.path.parent / "adapters" / "cy"))
    moved = registry.path.parent.rename(tmp_path / "moved")
    (entry,) = RegistryFile(moved / "adapters.json").entries()
    assert entry.source == moved / "adapters" / "cy"


def test_a_link_to_the_file_is_followed_and_stays_a_link(registry: RegistryFile, tmp_path: Path) -> None:
    registry.add(RegistryEntry("cy", None, Pinned("alice/a", SHA)))
    link = tmp_path / "link.json"
    link.symlink_to(registry.path)
    RegistryFile(link).add(RegistryEntry("ga", None, registry.path.parent / "irish"))
    assert link.is_symlink()
    assert [entry.key for entry in registry.entries()] == ["cy", "ga"]
    assert RegistryFile(link).entries() == registry.entries()


def test_another_adapter_for_a_language_is_refused_unless_it_shall_replace(registry: RegistryFile) -> None:
    registry.add(RegistryEntry("cy", None, Pinned("alice/a", SHA)))
    registry.add(RegistryEntry("cy", None, Pinned("alice/a", SHA)))
    with pytest.raises(ValueError, match=f"cy is spoken for by alice/a@{SHA}.*--replace"):
        registry.add(RegistryEntry("cy", None, Pinned("bob/b", SHA)))
    registry.add(RegistryEntry("cy", None, Pinned("bob/b", SHA)), replace=True)
    assert registry.get("cy") == RegistryEntry("cy", None, Pinned("bob/b", SHA))


def test_removing_takes_one_line_out_and_unknown_ones_are_named(registry: RegistryFile) -> None:
    for code in ("cy", "ga"):
        registry.add(RegistryEntry(code, None, Pinned("alice/a", SHA)))
    assert registry.remove("cy").language == "cy"
    assert [entry.key for entry in registry.entries()] == ["ga"]
    with pytest.raises(ValueError, match=r"has no 'cy'. It has: ga\."):
        registry.remove("cy")


@pytest.mark.parametrize(
    ("adapters", "says"),
    [
        ([], "is no registry"),
        ({"Welsh": f"alice/a@{SHA}"}, "'Welsh' is no language code"),
        ({"../cy": f"alice/a@{SHA}"}, "'../cy' is no language code"),
        ({"cy": "alice/a"}, "cy: 'alice/a' is not pinned"),
        ({"cy": "alice/a@main"}, "cy: 'alice/a@main' is not pinned"),
        ({"cy": f"alice/a@{SHA[:7]}"}, "is not pinned"),
        ({"cy": f"alice/a@{SHA.upper()}"}, "is not pinned"),
        ({"cy": f"alice/a@{SHA}/../b"}, "is not pinned"),
        ({"cy": f"a/l/ice@{SHA}"}, "is not pinned"),
        ({"cy": f"a b/c@{SHA}"}, "is not pinned"),
        ({"cy": 7}, "cy is 7; expected owner/name@commit"),
        ({"cy": ""}, "cy is ''; expected"),
    ],
)
def test_a_wrong_line_is_named_by_its_key(registry: RegistryFile, adapters: Any, says: str) -> None:
    write(registry, adapters)
    with pytest.raises(ValueError, match=re.escape(says)):
        registry.entries()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "adapters": {}}', '{"adapters": {"cy": "./a", "cy": "./b"}, "format": 1}'])
def test_a_broken_file_is_refused_and_not_overwritten(registry: RegistryFile, text: str) -> None:
    registry.path.parent.mkdir(parents=True)
    registry.path.write_text(text)
    with pytest.raises(ValueError, match="registry"):
        registry.entries()
    with pytest.raises(ValueError, match="registry"):
        registry.add(RegistryEntry("cy", None, Pinned("alice/a", SHA)))
    assert registry.path.read_text() == text


def test_a_failed_write_leaves_the_old_file(registry: RegistryFile, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.add(RegistryEntry("cy", None, Pinned("alice/a", SHA)))
    before = registry.path.read_bytes()

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("json.dump", full)
    with pytest.raises(OSError, match="no space"):
        registry.add(RegistryEntry("ga", None, Pinned("alice/a", SHA)))
    assert registry.path.read_bytes() == before
    assert {path.name for path in registry.path.parent.iterdir()} <= {"adapters.json", ".adapters.json.lock"}


ADD_MANY = """
import sys
from hub_utils import Pinned, RegistryEntry, RegistryFile

path, letter = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()  # all begin at once
for other in "abcdefghijklmnopqrstuvwxyz":
    RegistryFile(path).add(RegistryEntry(letter + other, None, Pinned("alice/a", "0" * 40)))
"""


def test_several_processes_adding_at_once_lose_nothing(registry: RegistryFile) -> None:
    command = [sys.executable, "-c", ADD_MANY, str(registry.path)]
    processes = [subprocess.Popen([*command, letter], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for letter in "wxyz"]
    assert [process.stdout.readline() for process in processes] == ["ready\n"] * 4
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.wait() for process in processes] == [0] * 4
    letters = "abcdefghijklmnopqrstuvwxyz"
    assert [entry.key for entry in registry.entries()] == [f"{letter}{other}" for letter in "wxyz" for other in letters]


def test_the_default_place_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WHISPER_MOE_REGISTRY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_registry() == tmp_path / "whisper-moe" / "adapters.json"
    monkeypatch.setenv("WHISPER_MOE_REGISTRY", str(tmp_path / "mine.json"))
    assert RegistryFile().path == tmp_path / "mine.json"


@pytest.mark.parametrize("text", [f"alice/a@{SHA}", f"alice/a.b-c@{SHA}/cy", f"alice/a@{SHA}/en-child.1"])
def test_a_pinned_source_is_written_as_it_was_read(text: str) -> None:
    assert str(Pinned.parse(text)) == text


# ---- entries from sources ----------------------------------------------------------------------------------------------


@pytest.fixture
def publish(hub: LoopbackHub, tmp_path: Path) -> Callable[..., Any]:
    """Publish an adapter as alice."""

    def call(*arguments: Any, seed: int = 0, subfolder: str | None = None, **changes: Any) -> Any:
        folder = write_run(tmp_path / "run", seed=seed, **changes)
        return publish_adapter(folder, *arguments, subfolder=subfolder, api=hub.api("hf_alice"))

    return call


@pytest.mark.usefixtures("online")
def test_a_repository_is_pinned_to_the_commit_it_is_at(hub: LoopbackHub, publish: Callable[..., Any]) -> None:
    first = publish("alice/a")
    hub.api("hf_alice").create_tag("alice/a", tag="v1")
    second = publish("alice/a", seed=1)
    entry = entry_of("alice/a", api=hub.api())
    assert entry == RegistryEntry("cy", None, Pinned("alice/a", second.sha))
    for source, options in (("alice/a@v1", {}), ("alice/a", {"revision": "v1"}), (first.source, {})):
        assert entry_of(source, api=hub.api(), **options).source == Pinned("alice/a", first.sha)


@pytest.mark.usefixtures("online")
def test_of_many_languages_one_must_be_named(hub: LoopbackHub, publish: Callable[..., Any]) -> None:
    publish("alice/many", subfolder="cy")
    published = publish("alice/many", subfolder="child", language="en", domain="child", name="en-child")
    with pytest.raises(ValueError, match=r"holds 2 adapters: child, cy\. Name the subfolder"):
        entry_of("alice/many", api=hub.api())
    expected = RegistryEntry("en", "child", Pinned("alice/many", published.sha, "child"))
    assert entry_of("alice/many", subfolder="child", api=hub.api()) == expected
    assert entry_of(published.source, api=hub.api()) == expected
    with pytest.raises(ValueError, match="no card of a language adapter for the folder 'br'"):
        entry_of("alice/many", subfolder="br", api=hub.api())


@pytest.mark.usefixtures("online")
def test_what_is_no_adapter_is_not_added(hub: LoopbackHub, tmp_path: Path) -> None:
    hub.put("alice/model", {"README.md": b"---\nlanguage: cy\n---\n"})
    with pytest.raises(ValueError, match="no card of a language adapter"):
        entry_of("alice/model", api=hub.api())
    with pytest.raises(HubError, match="alice/none is not on the Hub"):
        entry_of("alice/none", api=hub.api())
    with pytest.raises(ValueError, match="neither a folder nor a repository"):
        entry_of("a b", api=hub.api())
    with pytest.raises(ValueError, match="language_adapter"):
        entry_of(tmp_path, api=hub.api())


@pytest.mark.usefixtures("online")
def test_a_renamed_repository_is_not_followed(hub: LoopbackHub, publish: Callable[..., Any]) -> None:
    publish("alice/a")
    hub.api("hf_alice").move_repo("alice/a", "alice/b")
    with pytest.raises(ValueError, match="alice/a is called 'alice/b' now"):
        entry_of("alice/a", api=hub.api())


def test_a_folder_says_its_language_itself(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", language="en", domain="child")
    assert entry_of(folder) == RegistryEntry("en", "child", folder)
    with pytest.raises(ValueError, match="are for repositories"):
        entry_of(folder, revision="main")
    with pytest.raises(ValueError, match="expected a language code"):
        entry_of(write_run(tmp_path / "run", language="Welsh"))


def test_a_folder_that_is_called_like_a_repository_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "alice" / "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"Say \./alice/a for the folder, alice/a@main else"):
        entry_of("alice/a")
    assert entry_of("./alice/a") == entry_of(Path("alice/a")) == RegistryEntry("cy", None, folder)


# ---- newer commits -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("online")
def test_an_update_pins_the_newest_commit_and_leaves_folders_alone(
    hub: LoopbackHub, registry: RegistryFile, publish: Callable[..., Any], tmp_path: Path
) -> None:
    old = publish("alice/a")
    registry.add(entry_of("alice/a", api=hub.api()))
    registry.add(RegistryEntry("ga", None, tmp_path / "irish"))
    assert [(u.key, u.old == u.new, u.problem) for u in update_registry(registry, api=hub.api())] == [("cy", True, None)]
    new = publish("alice/a", seed=1)
    (update,) = update_registry(registry, api=hub.api(), write=False)
    assert (update.old, update.new) == (old.sha, new.sha)
    assert registry.get("cy").source.sha == old.sha
    update_registry(registry, ["cy"], api=hub.api())
    assert registry.get("cy").source.sha == new.sha
    assert registry.get("ga").source == tmp_path / "irish"
    with pytest.raises(ValueError, match="has no 'br'"):
        update_registry(registry, ["br"], api=hub.api())


@pytest.mark.usefixtures("online")
@pytest.mark.parametrize("case", ["gone", "new owner", "other language", "other base", "no card", "renamed"])
def test_an_update_follows_no_repository_that_became_another(
    hub: LoopbackHub, registry: RegistryFile, publish: Callable[..., Any], case: str
) -> None:
    old = publish("alice/a")
    publish("alice/good", language="ga")
    for repo in ("alice/a", "alice/good"):
        registry.add(entry_of(repo, api=hub.api()))
    good = publish("alice/good", seed=1, language="ga")
    card = hub.read("alice/a", "README.md").decode()
    says = {
        "gone": "not on the Hub",
        "new owner": "no longer has the pinned commit",
        "other language": "is for br on",
        "other base": "on openai/whisper-tiny now",
        "no card": "no card of a language adapter",
        "renamed": "is called 'alice/b' now",
    }
    if case in ("gone", "new owner"):
        del hub.repos["alice/a"]
    if case == "new owner":
        publish("alice/a", seed=5)
    if case == "other language":
        hub.put("alice/a", {"README.md": card.replace("language: cy", "language: br").encode()})
    if case == "other base":
        hub.put("alice/a", {"README.md": card.replace("whisper-small", "whisper-tiny").encode()})
    if case == "no card":
        hub.put("alice/a", {"README.md": b"nothing"})
    if case == "renamed":
        hub.api("hf_alice").move_repo("alice/a", "alice/b")
    updates = {update.key: update for update in update_registry(registry, api=hub.api())}
    assert says[case] in updates["cy"].problem
    assert registry.get("cy").source.sha == old.sha
    assert updates["ga"].problem is None
    assert registry.get("ga").source.sha == good.sha
