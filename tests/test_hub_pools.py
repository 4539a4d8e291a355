"""Pooled S2-LoRA on the Hub: coefficients in one repository, the A and B they need in another, named by commit.

Published, fetched and loaded with their pool; and every way the pool may be missing, said with the way out.
"""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import build_tiny_model, build_tiny_processor, write_adapter
from hostile_server import fingerprint
from loopback_hub import LoopbackHub, hub_fixture, no_network, online_fixture  # noqa: F401
from peft import PeftModel

from hub_utils import (
    AdapterError,
    Pinned,
    RegistryEntry,
    RegistryFile,
    fetch_adapter,
    fetch_entry,
    load_adapter,
    mirror_adapters,
    publish_adapter,
    verify_mirror,
)
from hub_utils.adapter_files import CONFIG_FILE, LANGUAGE_FILE
from peft_s2lora import S2LoraConfig
from whisper_moe import AdapterSwitch, LanguageAdapter, check_base

BASE = "tests/tiny"
TARGETS = ["q_proj", "v_proj", "out_proj"]

pytestmark = [pytest.mark.usefixtures("online"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(scope="module")
def base() -> Any:
    return build_tiny_model(build_tiny_processor())


def make_pool(folder: Path, base: Any, language: str, seed: int) -> dict[str, Path]:
    """A pool, and the coefficients of a language on it, both called as their trainer called them: "pool"."""
    pool = write_adapter(folder / "pool", base, "en", seed=seed, peft_config=S2LoraConfig(r=4, target_modules=TARGETS))
    trained = PeftModel.from_pretrained(copy.deepcopy(base), str(pool), adapter_name="pool")
    trained.add_adapter(language, S2LoraConfig(pool="pool"))
    torch.manual_seed(seed)
    for name, parameter in trained.named_parameters():
        if name.endswith(f"coefficients.{language}"):
            torch.nn.init.normal_(parameter)
    trained.save_pretrained(str(folder), selected_adapters=[language], save_embedding_layers=False)
    row = json.loads((pool / LANGUAGE_FILE).read_text())
    (folder / language / LANGUAGE_FILE).write_text(json.dumps(row | {"name": language, "language": language}))
    trained.set_adapter(language)
    torch.save(logits(trained), folder / f"{language}.pt")
    return {"pool": pool, language: folder / language}


def logits(model: Any) -> torch.Tensor:
    features = torch.linspace(-1, 1, 80 * 200).reshape(1, 80, 200)
    with torch.no_grad():
        return model.eval()(input_features=features, decoder_input_ids=torch.tensor([[1, 2, 3]])).logits


@pytest.fixture(scope="module")
def trained(base: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `cy` and `br`, each with a pool of its own beside it that is called "pool"; and what they compute."""
    root = tmp_path_factory.mktemp("pools")
    make_pool(root / "1", base, "cy", 1)
    make_pool(root / "2", base, "br", 2)
    return root


@pytest.fixture
def published(hub: LoopbackHub, trained: Path) -> dict[str, Pinned]:
    """Both pools and both languages, published by alice."""
    options: dict[str, Any] = {"base_model": BASE, "license": "cc0-1.0", "api": hub.api("hf_alice")}
    sources = {}
    for number, language in (("1", "cy"), ("2", "br")):
        pool = publish_adapter(trained / number / "pool", f"alice/pool-{number}", **options)
        made = publish_adapter(trained / number / language, f"alice/{language}", pool=pool.source, **options)
        sources |= {f"pool-{number}": Pinned.parse(pool.source), language: Pinned.parse(made.source)}
    return sources


@pytest.fixture
def fetch(hub: LoopbackHub, tmp_path: Path) -> Callable[[Pinned], Path]:
    return lambda pinned: fetch_adapter(pinned.repo_id, pinned.sha, api=hub.api(), cache_dir=tmp_path / "cache").path


# ---- publishing --------------------------------------------------------------------------------------------------------


def test_the_card_of_a_pooled_adapter_names_its_pool_and_fetches_it(hub: LoopbackHub, published: dict[str, Pinned]) -> None:
    card = hub.read("alice/cy", "README.md").decode()
    pool = published["pool-1"]
    assert "**It needs its pool.** The file holds coefficients only" in card
    assert f"`{pool}`" in card
    lines = card.splitlines()
    first = lines.index(f'fetch_adapter("alice/pool-1", "{pool.sha}")  # the pool')
    assert lines[first + 1] == 'folder = fetch_adapter("alice/cy").path'
    assert f"pool: {pool}" in card  # in the metadata, for searches
    assert json.loads(hub.read("alice/cy", LANGUAGE_FILE))["pool_source"] == str(pool)
    assert "needs its pool" not in hub.read("alice/pool-1", "README.md").decode()


def test_the_cards_way_by_peft_alone_works(hub: LoopbackHub, base: Any, trained: Path, published: dict[str, Pinned], fetch: Any) -> None:
    code = re.findall(r"```python\n(.*?)```", hub.read("alice/cy", "README.md").decode(), re.DOTALL)[-1]
    compile(code, "card", "exec")
    lines = [line for line in code.splitlines() if line.startswith("model") or "model = " in line]
    whisper = SimpleNamespace(from_pretrained=lambda name: copy.deepcopy(base) if name == BASE else None)
    names = {"PeftModel": PeftModel, "WhisperForConditionalGeneration": whisper}
    names |= {"pool": str(fetch(published["pool-1"])), "folder": str(fetch(published["cy"]))}
    exec("\n".join(lines), names)
    assert torch.equal(logits(names["model"]), torch.load(trained / "1" / "cy.pt"))


def test_coefficients_without_a_published_pool_are_not_published(hub: LoopbackHub, trained: Path) -> None:
    options: dict[str, Any] = {"base_model": BASE, "license": "cc0-1.0", "api": hub.api("hf_alice")}
    with pytest.raises(ValueError, match=r"uses the pool 'pool' and holds coefficients only.*--pool.*to_lora"):
        publish_adapter(trained / "1" / "cy", "alice/cy", **options)
    with pytest.raises(ValueError, match="not pinned"):
        publish_adapter(trained / "1" / "cy", "alice/cy", pool="alice/pool-1@main", **options)
    with pytest.raises(OSError, match=r"the pool alice/pool-1@0+ .*no such revision|is not on the Hub"):
        publish_adapter(trained / "1" / "cy", "alice/cy", pool=f"alice/pool-1@{'0' * 40}", **options)
    empty = hub.put("alice/empty", {"notes.txt": b"nothing"})
    with pytest.raises(ValueError, match=r"has no adapter_config\.json, so it is no adapter"):
        publish_adapter(trained / "1" / "cy", "alice/cy", pool=f"alice/empty@{empty}", **options)
    with pytest.raises(ValueError, match="the adapter uses none"):
        publish_adapter(trained / "1" / "pool", "alice/pool-1", pool=f"alice/empty@{empty}", **options)
    assert set(hub.repos) == {"alice/empty"}


# ---- loading -----------------------------------------------------------------------------------------------------------


def test_a_pool_in_the_cache_is_put_on_the_model_first(
    hub: LoopbackHub, base: Any, trained: Path, published: dict[str, Pinned], fetch: Any
) -> None:
    for name in ("pool-1", "pool-2"):
        fetch(published[name])
    model = copy.deepcopy(base)
    adapted = load_adapter(model, fetch(published["cy"]), "welsh", check_base=check_base)
    assert torch.equal(logits(adapted), torch.load(trained / "1" / "cy.pt"))  # active, not its pool
    adapted = load_adapter(adapted, fetch(published["br"]), "breton", check_base=check_base)  # another pool that was called the same
    adapted.set_adapter("breton")
    assert torch.equal(logits(adapted), torch.load(trained / "2" / "br.pt"))
    adapted.set_adapter("welsh")
    assert torch.equal(logits(adapted), torch.load(trained / "1" / "cy.pt"))


def test_a_switch_gives_pooled_adapters_their_pools(base: Any, trained: Path, published: dict[str, Pinned], fetch: Any) -> None:
    for name in ("pool-1", "pool-2"):
        fetch(published[name])
    adapters = [LanguageAdapter.load(fetch(published[name])) for name in ("cy", "br")]
    expected = [torch.load(trained / "1" / "cy.pt"), torch.load(trained / "2" / "br.pt")]
    model = copy.deepcopy(base)
    bare, switch = logits(model), AdapterSwitch(model, load_adapter, max_adapters=1)
    for turn in (0, 1, 0, 1):
        with switch.active(adapters[turn]):
            assert torch.equal(logits(model), expected[turn])
        assert torch.equal(logits(model), bare)
    switch.unload()
    assert set(model.state_dict()) == set(base.state_dict())


def test_a_missing_pool_is_named_with_the_way_to_get_it(
    hub: LoopbackHub, base: Any, published: dict[str, Pinned], fetch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder, pool, model = fetch(published["cy"]), published["pool-1"], copy.deepcopy(base)
    assert f"Its pool is not in the cache: fetch_adapter('alice/pool-1', '{pool.sha}')" in caplog.text
    before = fingerprint(model)
    with pytest.raises(AdapterError, match=rf"its pool is {pool}. Fetch that: fetch_adapter\('alice/pool-1', '{pool.sha}'\)"):
        load_adapter(model, folder, check_base=check_base)
    assert fingerprint(model) == before


def test_a_pool_that_nobody_named_is_asked_of_the_makers(base: Any, trained: Path) -> None:
    model = copy.deepcopy(base)
    with pytest.raises(AdapterError, match="does not say where its pool is published: ask its makers"):
        load_adapter(model, trained / "1" / "cy", check_base=check_base)


def test_a_pool_that_is_another_one_is_refused_by_its_hash(hub: LoopbackHub, base: Any, published: dict[str, Pinned], fetch: Any) -> None:
    files = {name: hub.read("alice/cy", name) for name in (CONFIG_FILE, LANGUAGE_FILE, "adapter_model.safetensors")}
    files[LANGUAGE_FILE] = json.dumps(json.loads(files[LANGUAGE_FILE]) | {"pool_source": str(published["pool-2"])}).encode()
    wrong = Pinned("alice/wrong", hub.put("alice/wrong", files))
    fetch(published["pool-2"])
    model = copy.deepcopy(base)
    before = fingerprint(model)
    with pytest.raises(AdapterError, match=r"needs the pool 'pool', which is not loaded"):
        load_adapter(model, fetch(wrong), check_base=check_base)
    assert fingerprint(model) == before  # the wrong pool is gone too


@pytest.mark.parametrize("said", ["../../pool", "alice/pool-1", 5, ["alice/pool-1"], f"alice/pool-1@{'0' * 40}/../.."])
def test_a_pool_source_that_is_none_is_not_followed(
    hub: LoopbackHub, base: Any, published: dict[str, Pinned], fetch: Any, said: Any
) -> None:
    files = {name: hub.read("alice/cy", name) for name in (CONFIG_FILE, LANGUAGE_FILE, "adapter_model.safetensors")}
    files[LANGUAGE_FILE] = json.dumps(json.loads(files[LANGUAGE_FILE]) | {"pool_source": said}).encode()
    folder = fetch(Pinned("alice/wrong", hub.put("alice/wrong", files)))
    with pytest.raises(AdapterError, match="does not say where its pool is published"):
        load_adapter(copy.deepcopy(base), folder, check_base=check_base)


# ---- the registry ------------------------------------------------------------------------------------------------------


def test_a_registry_brings_the_pool_along_and_misses_it_when_it_is_gone(
    hub: LoopbackHub, base: Any, trained: Path, published: dict[str, Pinned], tmp_path: Path
) -> None:
    registry, where = RegistryFile(tmp_path / "adapters.json"), {"cache_dir": tmp_path / "cache"}
    registry.add(RegistryEntry("cy", None, published["cy"]))
    folder = fetch_entry(registry.entries()[0], base_model=BASE, api=hub.api(), **where)
    with no_network(hub):
        adapted = load_adapter(copy.deepcopy(base), folder, "welsh", check_base=check_base)
        assert [row.problem for row in mirror_adapters(registry, api=hub.api(), **where)] == [None]
    assert torch.equal(logits(adapted), torch.load(trained / "1" / "cy.pt"))
    shutil.rmtree(tmp_path / "cache" / "alice--pool-1")
    [row] = verify_mirror(registry, **where)
    assert row.problem is not None
    assert f"Its pool {published['pool-1']} is not in the cache" in row.problem
    assert [row.problem for row in mirror_adapters(registry, api=hub.api(), **where)] == [None]
    assert [row.problem for row in verify_mirror(registry, **where)] == [None]


def test_a_pool_of_another_owner_is_fetched_only_by_name(hub: LoopbackHub, published: dict[str, Pinned], tmp_path: Path) -> None:
    """An adapter must not choose whose repository is asked: it could name one that counts who listens."""
    files = {name: hub.read("alice/cy", name) for name in (CONFIG_FILE, LANGUAGE_FILE, "adapter_model.safetensors")}
    entry = RegistryEntry("cy", None, Pinned("mallory/cy", hub.put("mallory/cy", files)))
    options: dict[str, Any] = {"api": hub.api(), "cache_dir": tmp_path / "cache"}
    with pytest.raises(AdapterError, match=r"uses the pool alice/pool-1@\w+, which belongs to somebody else"):
        fetch_entry(entry, **options)
    assert hub.count("GET", r"pool-1/resolve") == 0
    fetch_adapter("alice/pool-1", published["pool-1"].sha, **options)
    assert fetch_entry(entry, **options).is_dir()


def test_a_log_line_is_all_that_fetching_says_of_a_pool(published: dict[str, Pinned], fetch: Any, caplog: pytest.LogCaptureFixture) -> None:
    fetch(published["pool-1"])
    with caplog.at_level(logging.INFO):
        fetch(published["cy"])
    assert "pool" not in caplog.text  # it is here
