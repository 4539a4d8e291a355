"""A registry's adapters for work without a network: fetched, found again, checked, mended."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_adapters import write_run
from loopback_hub import LoopbackHub, hub_fixture, no_network, online_fixture  # noqa: F401

from hub_utils import Pinned, RegistryEntry, RegistryFile, cached_adapters, entry_of, mirror_adapters, publish_adapter, verify_mirror

pytestmark = pytest.mark.usefixtures("online")


@pytest.fixture
def registry(hub: LoopbackHub, tmp_path: Path) -> RegistryFile:
    """Welsh in a repository of its own, Irish and Breton in one, Kichwa in a folder."""
    registry = RegistryFile(tmp_path / "adapters.json")
    publish_adapter(write_run(tmp_path / "cy"), "alice/cy", api=hub.api("hf_alice"))
    for seed, code in enumerate(("br", "ga"), 1):
        publish_adapter(write_run(tmp_path / code, language=code, seed=seed), "alice/many", subfolder=code, api=hub.api("hf_alice"))
        registry.add(entry_of("alice/many", subfolder=code, api=hub.api()))
    registry.add(entry_of("alice/cy", api=hub.api()))
    registry.add(entry_of(write_run(tmp_path / "qug", language="qug", carrier="es", seed=3)))
    return registry


@pytest.fixture
def mirror(hub: LoopbackHub, registry: RegistryFile, tmp_path: Path) -> Callable[..., Any]:
    return lambda *arguments, **options: mirror_adapters(
        registry, *arguments, cache_dir=tmp_path / "cache", **({"api": hub.api()} | options)
    )


def test_every_entry_is_here_afterwards_with_its_size(
    hub: LoopbackHub, registry: RegistryFile, mirror: Callable[..., Any], tmp_path: Path
) -> None:
    rows = mirror()
    assert [(row.key, row.downloaded, row.problem) for row in rows] == [
        ("br", True, None),
        ("cy", True, None),
        ("ga", True, None),
        ("qug", False, None),
    ]
    for row, entry in zip(rows, registry.entries(), strict=True):
        assert (row.path / "adapter_model.safetensors").read_bytes() == (tmp_path / row.key / "adapter_model.safetensors").read_bytes()
        names = ("adapter_config.json", "adapter_model.safetensors", "language_adapter.json")
        assert row.num_bytes == sum((row.path / name).stat().st_size for name in names)
        assert (row.path == entry.source) == isinstance(entry.source, Path)


def test_a_second_time_nothing_is_downloaded_and_no_network_is_needed(hub: LoopbackHub, mirror: Callable[..., Any]) -> None:
    first = mirror()
    with no_network(hub):
        again = mirror()
    assert [row.path for row in again] == [row.path for row in first]
    assert not any(row.downloaded or row.problem for row in again)


def test_a_download_that_was_killed_before_its_last_step_does_not_count(
    registry: RegistryFile, mirror: Callable[..., Any], tmp_path: Path
) -> None:
    rows = {row.key: row.path for row in mirror()}
    for key in ("cy", "ga"):  # all files and the list of them, not yet under their name
        rows[key].rename(rows[key].with_name(f"{rows[key].name}.partial"))
    cached = {found.path for found in cached_adapters(tmp_path / "cache")}
    assert cached == {rows["br"]}
    here = {row.key: row.problem is None for row in verify_mirror(registry, cache_dir=tmp_path / "cache")}
    assert here == {"br": True, "cy": False, "ga": False, "qug": True}
    assert {row.key for row in mirror() if row.downloaded} == {"cy", "ga"}


def test_progress_is_told_for_each_entry_up_to_its_end(mirror: Callable[..., Any]) -> None:
    seen: list[tuple[str, int, int]] = []
    rows = mirror(progress=lambda *step: seen.append(step))
    for row in rows:
        steps = [(done, total) for key, done, total in seen if key == row.key]
        if row.downloaded:
            assert len(steps) > 1
            assert steps[-1] == (row.num_bytes, row.num_bytes)
            assert [done for done, _ in steps] == sorted(done for done, _ in steps)
        else:
            assert steps == []
    seen.clear()
    mirror(progress=lambda *step: seen.append(step))  # from the cache: told as done
    assert seen == [(row.key, row.num_bytes, row.num_bytes) for row in rows if row.downloaded]


def test_one_that_cannot_be_had_does_not_stop_the_others(
    hub: LoopbackHub, registry: RegistryFile, mirror: Callable[..., Any], tmp_path: Path
) -> None:
    registry.add(RegistryEntry("aa", None, Pinned("alice/none", "0" * 40)))
    registry.add(RegistryEntry("ab", None, tmp_path / "nothing"))
    registry.add(RegistryEntry("ac", None, tmp_path / "cy"))
    registry.add(RegistryEntry("ad", None, registry.get("cy").source))
    rows = {row.key: row for row in mirror()}
    says = {"aa": "alice/none", "ab": "There is no adapter folder", "ac": "writes 'cy', the registry says 'ac'", "ad": "wanted is 'ad'"}
    for key, problem in says.items():
        assert problem in rows[key].problem
        assert (rows[key].path, rows[key].num_bytes) == (None, 0)
    assert all(rows[key].problem is None for key in ("br", "cy", "ga", "qug"))


def test_entries_can_be_named_and_unknown_ones_are_refused(mirror: Callable[..., Any]) -> None:
    assert [row.key for row in mirror(["ga", "cy"])] == ["cy", "ga"]
    with pytest.raises(ValueError, match="has no 'gd'"):
        mirror(["gd"])


def test_private_and_gated_adapters_need_the_token(hub: LoopbackHub, mirror: Callable[..., Any]) -> None:
    hub.repos["alice/cy"].private = True
    hub.repos["alice/many"].gated = "manual"
    problems = {row.key: row.problem for row in mirror()}
    assert "log in" in problems["cy"]
    assert "gated" in problems["ga"]
    assert not any(row.problem for row in mirror(api=hub.api("hf_alice")))


def test_verifying_names_what_is_missing_or_damaged_and_mirroring_mends_it(
    registry: RegistryFile, mirror: Callable[..., Any], hub: LoopbackHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def problems() -> dict[str, bool]:
        return {row.key: row.problem is not None for row in verify_mirror(registry, cache_dir=tmp_path / "cache")}

    assert problems() == {"br": True, "cy": True, "ga": True, "qug": False}
    rows = {row.key: row for row in mirror()}
    with no_network(hub):
        assert not any(problems().values())
        weights = rows["ga"].path / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        (tmp_path / "qug" / "adapter_config.json").write_text('{"peft_type": "VERA"}')
        with caplog.at_level(logging.WARNING):
            assert problems() == {"br": False, "cy": False, "ga": True, "qug": True}
        assert "adapter_model.safetensors is not the file that was fetched" in caplog.text
    mended = {row.key: row.downloaded for row in mirror(["br", "cy", "ga"])}
    assert mended == {"br": False, "cy": False, "ga": True}
    assert not problems()["ga"]
