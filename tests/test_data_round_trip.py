"""Small data sets drawn at random, written in every layout that people use: the same clips come back, and what is unusable is counted."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import tone
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe.data import Clips, load_clips, stream_clips, tidy_text
from whisper_moe.sources import METADATA

pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the train extra: pip install peft-s2lora[train]")
parquet = pytest.importorskip("pyarrow.parquet")

SOUNDS = [(tone(200 * (1 + number), 0.15 + 0.05 * number) * 32767).astype(np.int16) for number in range(3)]
Rows = list[dict[str, Any]]

# What people type: any letters, and what tables trip over. No NUL: Python 3.10's csv has none.
TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12),
    st.sampled_from(
        ['"Ja", sagt er', "eins; zwei", "a|b", "tab\tin it", "two\nlines", "'", "#no", "null", "nan", "007", "", "  ", "é", "e\u0301"]
    ),
)
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "sound": st.integers(0, len(SOUNDS) - 1),
            "text": TEXT,
            "language": st.sampled_from([None, "cy", "Welsh", "fr-FR", "qug"]),
            "speaker": st.sampled_from([None, "s1", "s2"]),
        }
    ),
    min_size=1,
    max_size=5,
)


def named(rows: Rows, columns: tuple[str, str, str, str], audio: Callable[[int], Any]) -> Rows:
    """Rows under the names of a layout."""
    return [dict(zip(columns, (audio(row["sound"]), row["text"], row["language"], row["speaker"]), strict=True)) for row in rows]


def write_table(path: Path, rows: Rows, delimiter: str = ",", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter, **options)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_sounds(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(SOUNDS):
        soundfile.write(folder / f"{number}.flac", samples, 16000)


# ---- layouts -----------------------------------------------------------------------------------------------------------


def as_parquet_with_bytes(folder: Path, rows: Rows) -> tuple[Path, dict[str, Any]]:
    table = named(rows, ("audio", "text", "language", "speaker_id"), lambda n: {"bytes": (folder / f"{n}.flac").read_bytes(), "path": None})
    kinds = {"bytes": pyarrow.binary(), "path": pyarrow.string()}
    schema = pyarrow.schema([("audio", pyarrow.struct(kinds.items())), *((name, pyarrow.string()) for name in list(table[0])[1:])])
    parquet.write_table(pyarrow.Table.from_pylist(table, schema), folder / "train-00000-of-00001.parquet")
    return folder, {"split": "train"}


def as_parquet_with_paths(folder: Path, rows: Rows) -> tuple[Path, dict[str, Any]]:
    table = named(rows, ("path", "sentence", "locale", "client_id"), lambda n: f"{n}.flac")
    schema = pyarrow.schema([(name, pyarrow.string()) for name in table[0]])
    parquet.write_table(pyarrow.Table.from_pylist(table, schema), folder / "clips.parquet")
    return folder / "clips.parquet", {}


def as_csv(folder: Path, rows: Rows) -> tuple[Path, dict[str, Any]]:
    return write_table(folder / "list.csv", named(rows, ("file", "transcript", "lang", "speaker"), lambda n: f"{n}.flac")), {}


def as_csv_with_semicolons(folder: Path, rows: Rows) -> tuple[Path, dict[str, Any]]:
    return write_table(folder / "list.csv", named(rows, ("wav", "text", "lang", "speaker"), lambda n: f"{n}.flac"), ";"), {}


def as_jsonl(folder: Path, rows: Rows) -> tuple[Path, dict[str, Any]]:
    lines = [
        json.dumps(row, ensure_ascii=False) for row in named(rows, ("audio_filepath", "text", "lang", "speaker"), lambda n: f"{n}.flac")
    ]
    (folder / "list.jsonl").write_text("\n".join(lines), "utf-8", newline="\n")
    return folder / "list.jsonl", {}


def as_folder_with_metadata(folder: Path, rows: Rows) -> tuple[Path, dict[str, Any]]:
    write_table(folder / METADATA[0], named(rows, ("file_name", "transcription", "language", "speaker_id"), lambda n: f"{n}.flac"))
    return folder, {}


def as_common_voice(folder: Path, rows: Rows) -> tuple[Path, dict[str, Any]]:
    """Tabs between, quotes as they are: a sentence holds neither tabs nor line breaks, Mozilla sees to that."""
    write_sounds(folder / "clips")
    table = named(rows, ("path", "sentence", "locale", "client_id"), lambda n: f"{n}.flac")
    lines = ["\t".join(str("" if value is None else value) for value in row.values()) for row in table]
    (folder / "validated.tsv").write_text("\n".join(["\t".join(table[0]), *lines]) + "\n", "utf-8", newline="\n")
    return folder, {"split": "validated"}


LAYOUTS = [
    *(as_parquet_with_bytes, as_parquet_with_paths, as_csv, as_csv_with_semicolons),
    *(as_jsonl, as_folder_with_metadata, as_common_voice),
]


# ---- what comes back ---------------------------------------------------------------------------------------------------


def expected_of(rows: Rows) -> list[tuple[bytes, str, str | None, str | None]]:
    """What a reader must find, in the order of the rows."""
    codes = {None: None, "Welsh": "cy", "fr-FR": "fr"}
    kept = [row for row in rows if tidy_text(row["text"])]
    return [
        (SOUNDS[row["sound"]].tobytes(), tidy_text(row["text"]), codes.get(row["language"], row["language"]), row["speaker"])
        for row in kept
    ]


def found_in(clips: Clips) -> list[tuple[bytes, str, str | None, str | None]]:
    return [(clip.samples.tobytes(), clip.text, clip.language, clip.speaker) for clip in clips.clips]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@settings(max_examples=15, deadline=None)
@given(rows=ROWS)
def test_the_same_clips_come_back_from_every_layout(layout: Any, rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> None:
    if layout is as_common_voice:
        rows = [row | {"text": " ".join(row["text"].split())} for row in rows]
    folder = tmp_path_factory.mktemp("set")
    write_sounds(folder)
    source, options = layout(folder, rows)
    expected = expected_of(rows)
    if not expected:
        with pytest.raises(ValueError, match="without a transcript"):
            load_clips(source, **options)
        return
    clips = load_clips(source, **options)
    assert found_in(clips) == expected
    assert clips.report.left_out == ({"without a transcript": len(rows) - len(expected)} if len(rows) > len(expected) else {})
    streamed = [(item["text"], item["language"]) for item in stream_clips(source, **options)]
    assert streamed == [(text, language) for _, text, language, _ in expected]


@settings(max_examples=15, deadline=None)
@given(rows=ROWS, wanted=st.sampled_from(["cy", "fr", "French"]))
def test_asked_for_one_language_a_set_gives_its_clips_and_those_that_do_not_say(
    rows: Rows, wanted: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("set")
    write_sounds(folder)
    source, options = as_csv(folder, rows)
    code = {"French": "fr"}.get(wanted, wanted)
    expected = [(sound, text, code, speaker) for sound, text, said, speaker in expected_of(rows) if said in (None, code)]
    if not expected:
        with pytest.raises(ValueError, match="no usable clip"):
            load_clips(source, language=wanted, **options)
        return
    clips = load_clips(source, language=wanted, **options)
    assert found_in(clips) == expected
    assert sum(clips.report.left_out.values()) == len(rows) - len(expected)
