"""Publishing, against a real server: what lies on the Hub afterwards, what is refused before anything is sent, and what faults do."""

from __future__ import annotations

import ast
import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_adapters import CONFIG, RUN, write_run
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub, hub_fixture, online_fixture  # noqa: F401

from hub_utils import HubError, publish_adapter

pytestmark = pytest.mark.usefixtures("online")
REPO = "alice/whisper-small-s2lora-cy"
FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "language_adapter.json"}


@pytest.fixture
def publish(hub: LoopbackHub) -> Callable[..., Any]:
    """`publish_adapter` as alice."""
    return lambda folder, *arguments, **options: publish_adapter(folder, *arguments, api=hub.api("hf_alice"), **options)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between tries are for real servers."""
    monkeypatch.setattr("hub_utils._hub._LONGEST_WAIT_S", 0.01)


# ---- what lies there ---------------------------------------------------------------------------------------------------


def test_one_commit_holds_weights_config_record_and_card(hub: LoopbackHub, publish: Callable[..., Any], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    published = publish(folder)
    assert published.repo_id == REPO
    assert published.changed
    assert published.sha == hub.commit(REPO).sha
    assert published.source == f"{REPO}@{published.sha}"
    assert [commit.title for commit in hub.history(REPO)] == ["S2-LoRA adapter for cy", "initial commit"]
    assert set(hub.commit(REPO).files) == FILES | {".gitattributes"}
    assert hub.read(REPO, "adapter_model.safetensors") == (folder / "adapter_model.safetensors").read_bytes()
    assert json.loads(hub.read(REPO, "language_adapter.json")) == RUN


def test_the_folder_stays_as_it_is_and_what_goes_out_names_no_path(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
) -> None:
    training = {"command": "whisper-moe train --data /home/me/clips/cy.parquet --out C:\\Users\\me\\out", "see": "https://example.org/a/b"}
    folder = write_run(tmp_path / "run", training=training, train_data="/srv/data/cy (see https://example.org/x)")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    publish(folder, license="cc0-1.0")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    sent = json.loads(hub.read(REPO, "language_adapter.json"))
    assert sent["training"] == {"command": "whisper-moe train --data cy.parquet --out out", "see": "https://example.org/a/b"}
    assert sent["train_data"] == "cy (see https://example.org/x)"
    assert json.loads(hub.read(REPO, "adapter_config.json")) == CONFIG | {"base_model_name_or_path": "openai/whisper-small"}
    everything = b"".join(hub.read(REPO, name) for name in FILES - {"adapter_model.safetensors"})
    assert b"/home/me" not in everything
    assert b"Users" not in everything


def test_the_card_is_found_by_the_hubs_filters_and_says_what_the_run_measured(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
) -> None:
    publish(write_run(tmp_path / "run"), language_name="Welsh")
    found = list(hub.api().list_models(filter=["base_model:adapter:openai/whisper-small", "cy", "language-adapter"]))
    assert [model.id for model in found] == [REPO]
    card = ModelCard(hub.read(REPO, "README.md").decode())
    assert "Welsh (`cy`)" in card.text
    assert "| base model alone | 104.2 % | 50.0 % | 1,200 |" in card.text
    assert "| with this adapter | 21.0 % | 8.0 % | 1,200 |" in card.text
    assert "Text normaliser: mark-preserving" in card.text
    assert "| start | the adapter br |" in card.text
    assert card.data.get("language_adapters") == [
        {
            "language": "cy",
            "name": "cy",
            "base_model": "openai/whisper-small",
            "peft_type": "S2LORA",
            "num_parameters": 64,
            "num_bytes": len(hub.read(REPO, "adapter_model.safetensors")),
            "wer": 0.21,
            "cer": 0.08,
            "test_set": "held-out voices",
            "normalizer": "mark-preserving",
        }
    ]


@pytest.mark.parametrize(
    ("language", "carrier", "on_the_hub"), [("no", None, "no"), ("jw", None, "jv"), ("qug", "es", "qug"), ("pt-BR", "pt", "pt")]
)
def test_every_language_code_is_accepted_and_kept(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
    language: str,
    carrier: str | None,
    on_the_hub: str,
) -> None:
    publish(write_run(tmp_path / "run", language=language, carrier=carrier), "alice/adapter")
    info = hub.api().model_info("alice/adapter")
    assert info.card_data.language == [on_the_hub]
    assert on_the_hub in info.tags
    assert info.card_data.get("language_adapters")[0]["language"] == language
    assert info.card_data.get("language_bcp47") == ([language] if "-" in language else None)


def test_the_snippets_of_the_card_fetch_this_repository(hub: LoopbackHub, publish: Callable[..., Any], tmp_path: Path) -> None:
    publish(write_run(tmp_path / "run"))
    publish(write_run(tmp_path / "run"), "alice/many", subfolder="cy")
    for repo, path, call in (
        (REPO, "README.md", f'folder = fetch_adapter("{REPO}").path'),
        ("alice/many", "cy/README.md", 'folder = fetch_adapter("alice/many", subfolder="cy").path'),
        ("alice/many", "README.md", 'folder = fetch_adapter("alice/many", subfolder="cy").path'),
    ):
        snippets = re.findall(r"```python\n(.*?)```", hub.read(repo, path).decode(), flags=re.DOTALL)
        assert call in snippets[0]
        for snippet in snippets:
            ast.parse(snippet)


# ---- again, and releases -----------------------------------------------------------------------------------------------


def test_publishing_the_same_again_makes_no_commit_and_sends_no_file(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
) -> None:
    folder = write_run(tmp_path / "run")
    first = publish(folder)
    hub.requests.clear()
    again = publish(folder)
    assert (again.sha, again.changed) == (first.sha, False)
    assert len(hub.history(REPO)) == 2
    assert hub.count("PUT", "") == 0
    assert hub.count("POST", "/commit/") == 0


def test_a_better_adapter_replaces_the_old_one_in_one_more_commit(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
) -> None:
    first = publish(write_run(tmp_path / "run"))
    second = publish(write_run(tmp_path / "run", seed=1, metrics=RUN["metrics"] | {"after": {"wer": 0.1, "cer": 0.04, "clips": 1200}}))
    assert second.changed
    assert [commit.sha for commit in hub.history(REPO)[:2]] == [second.sha, first.sha]
    assert hub.read(REPO, "adapter_model.safetensors") != hub.read(REPO, "adapter_model.safetensors", first.sha)
    assert "10.0 %" in hub.read(REPO, "README.md").decode()


def test_a_release_is_tagged_and_does_not_move(hub: LoopbackHub, publish: Callable[..., Any], tmp_path: Path) -> None:
    first = publish(write_run(tmp_path / "run"), tag="v1")
    assert hub.repos[REPO].tags == {"v1": first.sha}
    assert publish(write_run(tmp_path / "run"), tag="v1").sha == first.sha
    with pytest.raises(ValueError, match="release 'v1' already, and it holds something else"):
        publish(write_run(tmp_path / "run", seed=1), tag="v1")
    assert hub.commit(REPO).sha == first.sha
    second = publish(write_run(tmp_path / "run", seed=1), tag="v2")
    assert hub.repos[REPO].tags == {"v1": first.sha, "v2": second.sha}


# ---- a repository of many languages ------------------------------------------------------------------------------------


def test_subfolders_share_a_repository_and_its_front_page_lists_them(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
) -> None:
    publish(write_run(tmp_path / "cy"), "alice/many", subfolder="cy")
    published = publish(write_run(tmp_path / "no", language="no", name="no", seed=1), "alice/many", subfolder="no")
    assert published.source == f"alice/many@{published.sha}/no"
    assert set(hub.commit("alice/many").files) == {
        ".gitattributes",
        "README.md",
        *(f"cy/{name}" for name in FILES),
        *(f"no/{name}" for name in FILES),
    }
    info = hub.api().model_info("alice/many")
    assert info.card_data.language == ["cy", "no"]
    assert {"cy", "no", "base_model:adapter:openai/whisper-small"} <= set(info.tags)
    assert [(row["subfolder"], row["language"]) for row in info.card_data.get("language_adapters")] == [("cy", "cy"), ("no", "no")]
    front = hub.read("alice/many", "README.md").decode()
    assert "| [cy](cy) | cy | openai/whisper-small | S2LORA | 21.0 % | 8.0 % | held-out voices |" in front
    assert yaml.safe_load(front.split("---\n")[1])["license"] == "cc-by-4.0"
    assert publish(write_run(tmp_path / "cy"), "alice/many", subfolder="cy").changed is False


def test_two_languages_published_at_once_into_one_repository_are_both_there(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
) -> None:
    codes = ["br", "cy", "ga", "gd"]
    folders = [write_run(tmp_path / code, language=code, seed=at) for at, code in enumerate(codes)]
    threads = [
        threading.Thread(target=publish, args=(folder, "alice/many"), kwargs={"subfolder": folder.name, "attempts": 12})
        for folder in folders
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    entries = hub.api().model_info("alice/many").card_data.get("language_adapters")
    assert [entry["subfolder"] for entry in entries] == codes
    assert {f"{code}/{name}" for code in codes for name in FILES} <= set(hub.commit("alice/many").files)


@pytest.mark.parametrize(
    ("first", "then", "says"),
    [
        ({}, {"changes": {"language": "ga"}}, "language is 'cy'; this one's is 'ga'"),
        ({}, {"changes": {"base_model": "openai/whisper-tiny"}}, "base_model is 'openai/whisper-small'"),
        ({}, {"subfolder": "ga"}, "holds one adapter"),
        ({"subfolder": "cy"}, {}, "in subfolders"),
        ({"subfolder": "cy"}, {"subfolder": "cy", "changes": {"domain": "child"}}, "domain is None; this one's is 'child'"),
    ],
)
def test_another_adapter_is_not_overwritten(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
    first: dict[str, Any],
    then: dict[str, Any],
    says: str,
) -> None:
    sha = publish(write_run(tmp_path / "run"), "alice/adapters", **first).sha
    changes = then.pop("changes", {})
    with pytest.raises(ValueError, match=re.escape(says)):
        publish(write_run(tmp_path / "run", **changes), "alice/adapters", **then)
    assert hub.commit("alice/adapters").sha == sha


def test_a_renamed_repository_is_not_written_to_under_its_old_name(hub: LoopbackHub, publish: Callable[..., Any], tmp_path: Path) -> None:
    first = publish(write_run(tmp_path / "run"))
    hub.api("hf_alice").move_repo(REPO, "alice/welsh")
    with pytest.raises(ValueError, match=f"{REPO} is called 'alice/welsh' now"):
        publish(write_run(tmp_path / "run", seed=1))
    assert hub.commit("alice/welsh").sha == first.sha


# ---- who may see it ----------------------------------------------------------------------------------------------------


def test_a_private_repository_is_private_before_anything_lies_in_it(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
) -> None:
    hub.fault("POST .*/commit/", "status", status=403)
    with pytest.raises(HubError):
        publish(write_run(tmp_path / "run"), private=True, gated="manual")
    assert hub.repos[REPO].private
    assert hub.repos[REPO].gated == "manual"
    assert len(hub.history(REPO)) == 1


def test_settings_change_only_when_they_are_given(hub: LoopbackHub, publish: Callable[..., Any], tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    publish(folder, private=True, gated="auto")
    publish(folder)
    assert (hub.repos[REPO].private, hub.repos[REPO].gated) == (True, "auto")
    publish(folder, private=False, gated=False)
    assert (hub.repos[REPO].private, hub.repos[REPO].gated) == (False, False)


def test_the_default_owner_is_whose_token_it_is_and_others_are_refused(hub: LoopbackHub, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    assert publish_adapter(folder, api=hub.api("hf_bob")).repo_id == "bob/whisper-small-s2lora-cy"
    with pytest.raises(HubError, match="write access"):
        publish_adapter(folder, owner="alice", api=hub.api("hf_bob"))
    assert "alice/whisper-small-s2lora-cy" not in hub.repos


def test_no_message_holds_the_token(hub: LoopbackHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="does not accept the token") as caught:
        publish_adapter(write_run(tmp_path / "run"), api=hub.api("hf_secret_of_nobody"))
    error: BaseException | None = caught.value
    while error is not None:
        assert "secret_of_nobody" not in str(error)
        error = error.__cause__


# ---- refused before anything is sent -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "changes", "options", "says"),
    [
        ({}, {"base_model": "/home/me/whisper"}, {}, "base is '/home/me/whisper', which others cannot load"),
        ({}, {"base_model": "whisper"}, {}, "which others cannot load"),
        ({}, {"base_model": None}, {}, "which others cannot load"),
        ({}, {}, {"base_model": "openai/whisper-tiny"}, "was trained on 'openai/whisper-small'"),
        ({}, {"language": None}, {}, "does not say the language"),
        ({}, {"language": "Welsh"}, {}, "expected a code"),
        ({}, {"format": 2}, {}, "format 2"),
        ({"peft_type": "VERA"}, {}, {}, "peft_type 'VERA'; trusted are"),
        ({"peft_type": "LORAMOE", "share_scope": None, "save_experts": "reference"}, {}, {}, "save_experts='reference', expected 'copy'"),
        ({"peft_type": "LORAMOE", "share_scope": None, "experts": {"cy": "/home/me/cy"}}, {}, {}, "experts=.*expected null"),
        ({"target_modules": "all-linear"}, {}, {}, "target_modules='all-linear', expected a list"),
        ({"modules_to_save": ["proj_out"]}, {}, {}, "whole modules would replace the base model's"),
        ({}, {}, {"subfolder": "cy"}, "needs the repository"),
        ({}, {}, {"repo_id": "alice/many", "subfolder": "../cy"}, "one plain name"),
        ({}, {}, {"repo_id": "alice/many", "subfolder": "a/b"}, "one plain name"),
        ({}, {}, {"repo_id": "alice/many", "owner": "alice"}, "not both"),
        ({}, {}, {"repo_id": "no repository"}, "no repository of the Hub"),
        ({}, {}, {"tag": "main"}, "name of a release"),
        ({}, {}, {"tag": "a b"}, "name of a release"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_before_anything_is_sent(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
    config: dict[str, Any],
    changes: dict[str, Any],
    options: dict[str, Any],
    says: str,
) -> None:
    with pytest.raises(ValueError, match=says):
        publish(write_run(tmp_path / "run", config, **changes), **options)
    assert hub.repos == {}


def test_a_base_known_as_a_folder_is_published_under_its_public_name(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
) -> None:
    publish(write_run(tmp_path / "run", base_model="/home/me/whisper"), base_model="openai/whisper-tiny")
    repo = "alice/whisper-tiny-s2lora-cy"
    assert json.loads(hub.read(repo, "language_adapter.json"))["base_model"] == "openai/whisper-tiny"
    assert json.loads(hub.read(repo, "adapter_config.json"))["base_model_name_or_path"] == "openai/whisper-tiny"


@pytest.mark.parametrize("missing", ["language_adapter.json", "adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_that_is_no_adapter_is_refused_with_what_it_lacks(publish: Callable[..., Any], tmp_path: Path, missing: str) -> None:
    folder = write_run(tmp_path / "run")
    (folder / missing).unlink()
    with pytest.raises(ValueError, match=f"not an adapter folder: {re.escape(missing)}"):
        publish(folder)


def test_pickled_cut_or_meaningless_weights_are_refused(hub: LoopbackHub, publish: Callable[..., Any], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    folder = write_run(tmp_path / "run")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(ValueError, match="safetensors"):
        publish(folder)
    save_file({"a": torch.tensor([1.0, float("nan")])}, weights)
    with pytest.raises(ValueError, match="not numbers, in 'a'"):
        publish(folder)
    save_file({}, weights)
    with pytest.raises(ValueError, match="no tensors"):
        publish(folder)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match="a pickle, which nobody should load"):
        publish(folder)
    assert hub.repos == {}


def test_missing_metrics_are_said_and_published_as_missing(hub: LoopbackHub, publish: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="metrics before, metrics after"):
        publish(write_run(tmp_path / "run", metrics={}))
    assert "Not measured." in hub.read(REPO, "README.md").decode()
    assert "wer" not in hub.api().model_info(REPO).card_data.get("language_adapters")[0]


def test_what_the_hub_does_not_know_as_a_licence_is_refused_with_its_own_words(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
) -> None:
    with pytest.raises(ValueError, match='"license" must be one of'):
        publish(write_run(tmp_path / "run"), license="free for all")
    assert len(hub.history(REPO)) == 1


# ---- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "kind", "status"),
    [
        ("POST .*/commit/", "status", 503),
        ("POST .*/commit/", "status", 429),
        ("POST .*/commit/", "drop", 0),
        ("POST .*/commit/", "lose", 0),
        ("POST .*/commit/", "stale", 0),
        ("GET /api/models/", "status", 503),
        ("GET /api/models/", "drop", 0),
        ("POST /api/repos/create", "status", 503),
        ("GET /api/whoami", "status", 502),
        ("PUT /storage/", "status", 500),
        ("POST .*/preupload/", "drop", 0),
    ],
)
def test_a_passing_fault_does_not_stop_publishing_and_makes_no_second_commit(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pattern: str,
    kind: str,
    status: int,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's own pauses too
    hub.fault(pattern, kind, status=status)
    published = publish(write_run(tmp_path / "run"))
    assert hub.faults[0].times == 0
    assert set(hub.commit(REPO).files) >= FILES
    assert [commit.title for commit in hub.history(REPO)].count("S2-LoRA adapter for cy") == 1
    assert published.sha == hub.commit(REPO).sha


def test_a_storage_that_fails_for_longer_than_the_client_tries_is_tried_again(
    hub: LoopbackHub, publish: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault("PUT /storage/", "status", status=500, times=7)  # the client gives up after six
    assert publish(write_run(tmp_path / "run")).changed
    assert hub.count("PUT", "/storage/", 500) == 7
    hub.fault("PUT /storage/", "status", status=403, times=-1)
    with pytest.raises(HubError, match="may not do this"):
        publish(write_run(tmp_path / "run", seed=1))


def test_a_hub_that_stays_away_ends_in_one_error_and_another_try_goes_on(
    hub: LoopbackHub,
    publish: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault("POST .*/commit/", "status", times=-1)
    with pytest.raises(HubError, match=r"answered 503 about alice/whisper-small-s2lora-cy"):
        publish(write_run(tmp_path / "run"))
    assert hub.count("POST", "/commit/") == 4
    hub.faults.clear()
    assert publish(write_run(tmp_path / "run")).changed


def test_offline_mode_is_named(hub: LoopbackHub, publish: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
        publish(write_run(tmp_path / "run"))
    assert hub.requests == []
