"""A mixture whose experts lie on the Hub: named by repository and commit, fetched, checked, and found again on another machine.

The Hub is the loopback one, the client unpatched. What arrives must give, bit for bit, the mixture that the trainer's own folders give.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_tiny_model, build_tiny_processor, write_adapter
from loopback_hub import LoopbackHub, no_network, online_fixture  # noqa: F401
from peft import PeftModel, get_peft_model

from hub_utils import AdapterError, fetch_experts
from hub_utils.adapter_files import CONFIG_FILE, LANGUAGE_FILE, WEIGHTS_FILE
from peft_s2lora import S2LoraConfig
from whisper_moe import LoraMoeConfig, fetch_experts_with
from whisper_moe.expert_sources import names_repository

FILES = (CONFIG_FILE, LANGUAGE_FILE, WEIGHTS_FILE)
BASE = "tests/tiny"

pytestmark = pytest.mark.usefixtures("online")


@pytest.fixture(scope="module")
def base() -> Any:
    return build_tiny_model(build_tiny_processor())


@pytest.fixture(scope="module")
def folders(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA and an S2-LoRA, as their trainers have them."""
    root = tmp_path_factory.mktemp("experts")
    targets = ["q_proj", "v_proj", "out_proj"]
    made = {
        "br": write_adapter(root / "br", base, "br", seed=1),
        "gd": write_adapter(root / "gd", base, "gd", seed=2, peft_config=S2LoraConfig(r=4, target_modules=targets, init_weights=False)),
    }
    for folder in made.values():
        row = json.loads((folder / LANGUAGE_FILE).read_text())
        (folder / LANGUAGE_FILE).write_text(json.dumps(row | {"base_model": BASE}))
    return made


def files_of(folder: Path, **record: Any) -> dict[str, bytes]:
    """A folder's files, with fields of the record changed."""
    files = {name: (folder / name).read_bytes() for name in FILES}
    return files | {LANGUAGE_FILE: json.dumps(json.loads(files[LANGUAGE_FILE]) | record).encode()}


@pytest.fixture
def sources(hub: LoopbackHub, folders: dict[str, Path]) -> dict[str, str]:
    """The same on the Hub, one of them in a repository of many."""
    br = hub.put("alice/tiny-lora-br", files_of(folders["br"]))
    gd = hub.put("alice/many", {f"gd/{name}": data for name, data in files_of(folders["gd"]).items()})
    return {"br": f"alice/tiny-lora-br@{br}", "gd": f"alice/many@{gd}/gd"}


@pytest.fixture
def fetch(hub: LoopbackHub, tmp_path: Path) -> Callable[..., Any]:
    return partial(fetch_experts, api=hub.api(), cache_dir=tmp_path / "cache")


@pytest.fixture(name="hub")
def hub_of_the_test(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path) as running:
        yield running


def logits(model: Any) -> torch.Tensor:
    features = torch.linspace(-1, 1, 80 * 200).reshape(1, 80, 200)
    with torch.no_grad():
        return model(input_features=features, decoder_input_ids=torch.tensor([[1, 2, 3]])).logits


def mixture(base: Any, experts: Mapping[str, Any], **options: Any) -> Any:
    torch.manual_seed(3)
    config = LoraMoeConfig(r=2, experts={name: str(source) for name, source in experts.items()}, init_weights=False, **options)
    return get_peft_model(copy.deepcopy(base), config).eval()


def test_experts_of_the_hub_give_the_mixture_that_their_makers_folders_give(
    base: Any, folders: dict[str, Path], sources: dict[str, str], fetch: Any
) -> None:
    expected = logits(mixture(base, folders))
    with fetch_experts_with(fetch):
        found = logits(mixture(base, sources))
    assert torch.equal(found, expected)
    assert not torch.equal(found, logits(mixture(base, {"br": folders["br"]})))  # the other expert counts


def test_a_mixture_saved_by_reference_names_commits_and_loads_on_another_machine(
    hub: LoopbackHub, base: Any, sources: dict[str, str], fetch: Any, tmp_path: Path
) -> None:
    with fetch_experts_with(fetch):
        made = mixture(base, sources, save_experts="reference")
    made.save_pretrained(str(tmp_path / "mixture"), save_embedding_layers=False)
    saved = json.loads((tmp_path / "mixture" / CONFIG_FILE).read_text())
    assert saved["experts"] == sources
    assert {len(value) for value in saved["expert_hashes"].values()} == {64}
    assert str(tmp_path) not in json.dumps(saved)
    shutil.rmtree(tmp_path / "cache")  # another machine: nothing is there but the mixture's own folder
    with fetch_experts_with(fetch):
        again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "mixture")).eval()
    assert torch.equal(logits(again), logits(made))
    with no_network(hub), fetch_experts_with(fetch):  # and from now on without a network
        again = PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "mixture")).eval()
    assert torch.equal(logits(again), logits(made))


def test_without_anybody_who_fetches_the_way_out_is_named(base: Any, sources: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"'br': alice/tiny-lora-br@\w+ names a repository.*fetch_experts_with\(hub_utils.fetch_experts\)"):
        mixture(base, sources)


@pytest.mark.parametrize("revision", ["@main", "@v1", "@0123abc", f"@{'0' * 40}/../up", ""])
def test_a_source_that_is_not_pinned_is_refused_without_asking(
    hub: LoopbackHub, base: Any, sources: dict[str, str], fetch: Any, revision: str
) -> None:
    source = f"alice/tiny-lora-br{revision}"
    asked = len(hub.requests)
    with fetch_experts_with(fetch), pytest.raises(ValueError, match=r"'moved'.*(40 hex digits|40 hexadecimal)"):
        mixture(base, {"moved": source})
    with pytest.raises(AdapterError, match=r"Expert 'moved': .* is not pinned to a commit"):
        fetch({"gd": sources["gd"], "moved": source})
    assert len(hub.requests) == asked


def test_a_folder_here_that_is_called_like_the_repository_is_not_taken_for_it(
    base: Any, folders: dict[str, Path], sources: dict[str, str], fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shadow = tmp_path / sources["br"]
    shutil.copytree(folders["gd"], shadow)
    with fetch_experts_with(fetch):
        assert torch.equal(logits(mixture(base, {"br": sources["br"]})), logits(mixture(base, {"br": folders["br"]})))
        assert torch.equal(logits(mixture(base, {"br": f"./{sources['br']}"})), logits(mixture(base, {"br": folders["gd"]})))


def test_an_expert_for_another_base_is_refused_by_its_name_and_by_its_weights(
    hub: LoopbackHub, base: Any, folders: dict[str, Path], fetch: Any, tmp_path: Path
) -> None:
    named = f"mallory/other@{hub.put('mallory/other', files_of(folders['br'], base_model='mallory/whisper'))}"
    with pytest.raises(AdapterError, match=r"Expert 'x': .* is for 'mallory/whisper', says its files; wanted is one for 'tests/tiny'"):
        fetch({"x": named}, BASE)
    other = write_adapter(tmp_path / "other", build_tiny_model(build_tiny_processor(), seed=5), "br")
    same_name = f"mallory/same@{hub.put('mallory/same', files_of(other, base_model=BASE))}"
    model = copy.deepcopy(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.config._name_or_path = BASE
    with fetch_experts_with(fetch), pytest.raises(ValueError, match=r"Expert 'x'.*other weights"):
        get_peft_model(model, LoraMoeConfig(r=2, experts={"x": same_name}))
    with fetch_experts_with(fetch), pytest.raises(ValueError, match=r"Expert 'x'.*wanted is one for 'tests/tiny'"):
        get_peft_model(model, LoraMoeConfig(r=2, experts={"x": named}))  # the base's name goes along without being said
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert len(before) == len(model.state_dict())


def test_a_file_that_changed_under_its_commit_is_refused(
    hub: LoopbackHub,
    base: Any,
    folders: dict[str, Path],
    sources: dict[str, str],
    fetch: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fetch_experts_with(fetch):
        mixture(base, sources, save_experts="reference").save_pretrained(str(tmp_path / "mixture"), save_embedding_layers=False)
    cached = next((tmp_path / "cache").rglob(f"*tiny-lora-br/*/{WEIGHTS_FILE}"))
    cached.write_bytes(cached.read_bytes()[:-1] + b"\x7f")  # on this machine: noticed, and without a network there is no other
    monkeypatch.setattr("hub_utils.fetch.time.sleep", lambda seconds: None)
    with no_network(hub), pytest.raises(AdapterError, match=r"Expert 'br': .* is not in the cache"):
        fetch(sources, BASE)
    # at the Hub: another adapter under the very commit, with hashes that fit it
    commit = hub.commit("alice/tiny-lora-br", sources["br"].partition("@")[2])
    forged = write_adapter(tmp_path / "forged", base, "br", seed=9)
    commit.files[WEIGHTS_FILE] = hub.store((forged / WEIGHTS_FILE).read_bytes(), True)
    shutil.rmtree(tmp_path / "cache")
    with fetch_experts_with(fetch), pytest.raises(ValueError, match=r"Expert 'br': alice/.* has changed since the mixture was saved"):
        PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "mixture"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "XLORA"}, "peft_type 'XLORA'"),
        ({"modules_to_save": ["proj_out"]}, "whole modules"),
        ({"target_modules": "(a+)+$"}, "no regular expression"),
    ],
)
def test_a_hostile_expert_is_refused_before_its_weights_are_asked_for(
    hub: LoopbackHub, folders: dict[str, Path], fetch: Any, fields: dict[str, Any], words: str
) -> None:
    files = files_of(folders["br"])
    files[CONFIG_FILE] = json.dumps(json.loads(files[CONFIG_FILE]) | fields).encode()
    sha = hub.put("mallory/x", files)
    with pytest.raises(AdapterError, match=f"Expert 'x': .*{words}"):
        fetch({"x": f"mallory/x@{sha}"})
    assert hub.count("GET", "/storage/") == 0


def test_the_context_ends_with_its_block(base: Any, sources: dict[str, str], fetch: Any) -> None:
    with pytest.raises(KeyboardInterrupt), fetch_experts_with(fetch):
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="nobody was named"):
        mixture(base, sources)


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        (f"owner/name@{'a' * 40}", True),
        (f"owner/name@{'a' * 40}/cy", True),
        ("owner/name@main", True),
        ("owner/name", False),
        ("./owner/name@main", False),
        ("/owner/name@main", False),
        ("name@main", False),
        ("cy", False),
        ("C:\\x\\y@z", False),
    ],
)
def test_a_repository_is_told_from_a_folder_by_its_form(source: str, is_one: bool) -> None:
    assert names_repository(source) is is_one
