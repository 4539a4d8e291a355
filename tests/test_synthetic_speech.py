"""Packs of speech: what is interrupted is no pack, and what is missing is said before anything is made."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("soxr")

from recipes.evidence.ground import Data
from recipes.synthetic_speech import (
    FLITE_VOICES,
    PackWriter,
    Settings,
    make_packs,
    pack_flite,
    pack_recorded,
    read_pack,
    speak_flite,
    split_sentences,
)


def add(writer: PackWriter, value: int) -> None:
    writer.add(np.full(5, value, np.int16), text=f"said {value}", language="cy", speaker="one", split="train")


def test_a_pack_reads_back_clip_by_clip(tmp_path: Path) -> None:
    writer = PackWriter(tmp_path, "cy")
    for value in (3, 4):
        add(writer, value)
    writer.close()
    samples, rows = read_pack(tmp_path, "cy")
    assert [samples[row["offset"] : row["offset"] + row["samples"]].tolist() for row in rows] == [[3] * 5, [4] * 5]
    assert [row["text"] for row in rows] == ["said 3", "said 4"]


def test_an_interrupted_pack_leaves_the_one_that_was_there(tmp_path: Path) -> None:
    first = PackWriter(tmp_path, "cy")
    add(first, 1)
    first.close()
    add(PackWriter(tmp_path, "cy"), 2)  # and its process ends
    samples, rows = read_pack(tmp_path, "cy")
    assert samples.tolist() == [1] * 5
    assert json.loads((tmp_path / "cy.jsonl").read_text())["text"] == rows[0]["text"] == "said 1"


def test_recordings_that_are_not_there_make_no_empty_pack(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no parquet file"):
        pack_recorded(tmp_path / "de_kerstin", tmp_path / "packs", "de_kerstin")
    assert not (tmp_path / "packs").exists()


@pytest.mark.skipif(shutil.which("flite") is None, reason="needs the flite program")
def test_another_synthesizer_says_the_test_sentences_and_no_others(tmp_path: Path) -> None:
    lines = [f"{first} {second}." for first in ("Red", "Small", "Old") for second in ("birds sing", "dogs run", "trees fall")]
    (tmp_path / "en.txt").write_text("\n".join(lines))
    pack_flite(tmp_path, tmp_path / "packs", "flite-en", num_test=4)
    samples, rows = read_pack(tmp_path / "packs", "flite-en")
    assert [row["text"] for row in rows] == split_sentences(lines, 0, 2, 4)["test"]
    assert [row["speaker"] for row in rows] == [*FLITE_VOICES, FLITE_VOICES[0]]
    assert {row["split"] for row in rows} == {"test"}
    spoken = [samples[row["offset"] : row["offset"] + row["samples"]] for row in rows]
    assert all(8_000 < len(each) < 48_000 for each in spoken)  # half a second to three
    assert all(np.abs(each).max() > 3_000 for each in spoken)
    assert not np.array_equal(speak_flite("Red birds.", "slt"), speak_flite("Red birds.", "rms"))


@pytest.mark.skipif(shutil.which("flite") is None, reason="needs the flite program")
def test_what_flite_says_is_a_test_set_by_name(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "en.txt").write_text("Red birds sing.\nOld dogs run.\n")
    data = Data(text=tmp_path / "text", work=tmp_path / "work")
    clips = data.clips("flite-en", "test")
    assert {(clip.text, clip.language) for clip in clips.clips} == {("Red birds sing.", "en"), ("Old dogs run.", "en")}
    assert len(data.clips("flite-en", "train")) == 0
    assert [len(clip.samples) for clip in data.clips("flite-en", "test").clips] == [len(clip.samples) for clip in clips.clips]


def test_a_missing_flite_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="apt-get install flite"):
        speak_flite("Hello.", "slt")


def test_what_is_missing_is_named_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "de.txt").write_text("Guten Tag.\n")
    settings = replace(
        Settings(), text=tmp_path / "text", speech=tmp_path / "speech", out=tmp_path / "out", written=("de", "fr"), detected_only=()
    )
    with pytest.raises(ValueError, match=r"fr\.txt.*speech/de_kerstin") as told:
        make_packs(settings)
    assert "de.txt" not in str(told.value)
    assert not (tmp_path / "out").exists()
