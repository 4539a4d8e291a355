"""Every kind of source gives the same clips, wrong columns are answered with the right ones, streams break off and go on, and nothing is
lost or repeated between workers. The Hub is a fake of `load_dataset`, or that function itself on local parquet files."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import tone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from whisper_moe.data import (
    Clip,
    Clips,
    ClipStream,
    Collator,
    Filters,
    StreamMixture,
    batches,
    clips_from_rows,
    load_clips,
    mix_clips,
    stream_clips,
)
from whisper_moe.languages import language_code
from whisper_moe.sources import (
    AUDIO_COLUMNS,
    FLEURS_LOCALES,
    PARQUET_BRANCH,
    TEXT_COLUMNS,
    Columns,
    HubRows,
    hold_out,
    is_network_fault,
    known_config,
    open_rows,
)

TEXTS = ["eins", "zwei, drei", '"vier" fünf']


def wav(path: Path, frequency: float = 440, duration_s: float = 0.3, rate: int = 16000) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, tone(frequency, duration_s, rate=rate), rate)
    return path


def encoded(frequency: float = 440, duration_s: float = 0.2) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(frequency, duration_s), 16000, format="flac")
    return buffer.getvalue()


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the train extra: pip install peft-s2lora[train]")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


# ---- layouts -----------------------------------------------------------------------------------------------------------


def a_csv(folder: Path) -> tuple[Path, dict[str, Any]]:
    return write_csv(folder / "list.csv", [{"path": f"{i}.wav", "sentence": text} for i, text in enumerate(TEXTS)]), {}


def a_csv_with_semicolons_and_a_byte_order_mark(folder: Path) -> tuple[Path, dict[str, Any]]:
    path = write_csv(folder / "list.csv", [{"file": f"{i}.wav", "text": text} for i, text in enumerate(TEXTS)], ";")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    return path, {}


def a_jsonl(folder: Path) -> tuple[Path, dict[str, Any]]:
    lines = [json.dumps({"audio_filepath": f"{i}.wav", "text": text}) for i, text in enumerate(TEXTS)]
    (folder / "list.jsonl").write_text("\n".join(lines) + "\n\n", "utf-8")
    return folder / "list.jsonl", {}


def a_folder_with_metadata(folder: Path) -> tuple[Path, dict[str, Any]]:
    write_csv(folder / "metadata.csv", [{"file_name": f"{i}.wav", "transcription": text} for i, text in enumerate(TEXTS)])
    return folder, {}


def a_folder_with_metadata_and_a_split_column(folder: Path) -> tuple[Path, dict[str, Any]]:
    rows = [{"file_name": f"{i}.wav", "text": text, "split": "validation"} for i, text in enumerate(TEXTS)]
    write_csv(folder / "metadata.csv", [*rows, {"file_name": "0.wav", "text": "not this one", "split": "train"}])
    return folder, {"split": "dev"}


def metadata_in_sub_folders(folder: Path) -> tuple[Path, dict[str, Any]]:
    for split in ("train", "validation"):
        write_csv(folder / split / "metadata.csv", [{"file_name": f"../{i}.wav", "text": text} for i, text in enumerate(TEXTS)])
    return folder, {"split": "dev"}


def an_unpacked_common_voice(folder: Path) -> tuple[Path, dict[str, Any]]:
    (folder / "clips").mkdir()
    for i in range(len(TEXTS)):
        (folder / f"{i}.wav").rename(folder / "clips" / f"{i}.wav")
    lines = ["client_id\tpath\tsentence\tlocale", *(f"speaker{i}\t{i}.wav\t{text}\tde" for i, text in enumerate(TEXTS))]
    (folder / "test.tsv").write_text("\n".join(lines), "utf-8")
    (folder / "train.tsv").write_text(lines[0] + "\nx\t0.wav\tnot this one\tde\n", "utf-8")
    return folder, {"split": "test"}


def parquet_files(folder: Path) -> tuple[Path, dict[str, Any]]:
    write_parquet(folder / "data" / "validation-0.parquet", [{"audio": f"../{i}.wav", "text": text} for i, text in enumerate(TEXTS)])
    return folder, {"split": "dev"}


LAYOUTS = [
    *(a_csv, a_csv_with_semicolons_and_a_byte_order_mark, a_jsonl, a_folder_with_metadata, a_folder_with_metadata_and_a_split_column),
    *(metadata_in_sub_folders, an_unpacked_common_voice, parquet_files),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_gives_the_same_clips_in_memory_and_as_a_stream(tmp_path: Path, layout: Any) -> None:
    for i in range(len(TEXTS)):
        wav(tmp_path / f"{i}.wav", 300 + 100 * i)
    source, options = layout(tmp_path)
    clips = load_clips(source, language="de", **options)
    assert clips.texts == TEXTS
    for i in range(len(TEXTS)):
        assert np.abs(clips[i]["audio"] - tone(300 + 100 * i, 0.3)).max() < 1e-4
    stream = stream_clips(source, filters=Filters("de"), **options)
    assert [item["text"] for item in stream] == TEXTS
    assert all(np.array_equal(item["audio"], clips[i]["audio"]) for i, item in enumerate(stream))


def test_speakers_of_common_voice_are_kept(tmp_path: Path) -> None:
    for i in range(len(TEXTS)):
        wav(tmp_path / f"{i}.wav")
    clips = load_clips(an_unpacked_common_voice(tmp_path)[0], split="test")
    assert [clip.speaker for clip in clips.clips] == ["speaker0", "speaker1", "speaker2"]
    assert clips.clips[0].language == "de"


def test_a_folder_without_a_data_set_says_what_it_holds_and_what_was_looked_for(tmp_path: Path) -> None:
    wav(tmp_path / "one.wav")
    with pytest.raises(ValueError, match=r"metadata\.csv.*It holds: one\.wav"):
        load_clips(tmp_path)


def test_text_that_is_not_utf8_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes("path,text\n0.wav,für\n".encode("latin-1"))
    with pytest.raises(ValueError, match="Save it as UTF-8"):
        load_clips(tmp_path / "list.csv")


# ---- columns -----------------------------------------------------------------------------------------------------------


names = st.lists(st.sampled_from([*TEXT_COLUMNS, *AUDIO_COLUMNS, "id", "words", "sound", "duration"]), unique=True, max_size=12)


@given(names)
def test_guessed_columns_exist_differ_and_are_the_first_of_their_list(columns: list[str]) -> None:
    texts, sounds = ([name for name in wanted if name in columns] for wanted in (TEXT_COLUMNS, AUDIO_COLUMNS))
    if texts and sounds:
        guessed = Columns.guess(columns, "it")
        assert (guessed.text, guessed.audio) == (texts[0], sounds[0])
        return
    with pytest.raises(ValueError) as caught:
        Columns.guess(columns, "it")
    assert all(name in str(caught.value) for name in columns)
    assert ("text_column" if not texts else "audio_column") in str(caught.value)


def test_columns_may_be_named(tmp_path: Path) -> None:
    wav(tmp_path / "0.wav")
    path = write_csv(tmp_path / "list.csv", [{"sound": "0.wav", "words": "hello", "text": "no"}])
    with pytest.raises(ValueError, match=r"Its columns: sound, words, text.*audio_column"):
        load_clips(path, text_column="words")
    assert load_clips(path, text_column="words", audio_column="sound").texts == ["hello"]


# ---- what is bad -------------------------------------------------------------------------------------------------------


def test_bad_rows_of_a_table_are_counted_and_the_others_go_on(tmp_path: Path) -> None:
    wav(tmp_path / "good.wav")
    wav(tmp_path / "rate.wav", rate=8000)
    (tmp_path / "bad.wav").write_bytes(b"RIFF nothing of the kind")
    rows = [
        {"audio": "good.wav", "text": "one"}, {"audio": "bad.wav", "text": "x"}, {"audio": "gone.wav", "text": "x"},
        {"audio": "", "text": "x"}, {"audio": "good.wav", "text": ""}, {"audio": "good.wav", "text": 7},
        {"audio": "good.wav", "text": "much too much for three tenths of a second"}, {"audio": "good.wav"},
        {"audio": "rate.wav", "text": "two"},
    ]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    lines[3:3] = ['{"audio": "good.wav", "te', "[1, 2]"]
    (tmp_path / "list.jsonl").write_text("\n".join(lines), "utf-8")
    expected = {
        "not decodable": 3,
        "on a line that is no JSON object": 2,
        "without a transcript": 2,
        "whose transcript is no text": 1,
        "with more than 25 characters a second": 1,
    }
    clips = load_clips(tmp_path / "list.jsonl", max_chars_per_s=25)
    assert (clips.texts, clips.report.left_out) == (["one", "two"], expected)
    assert {clip.duration_s for clip in clips.clips} == {0.3}
    stream = stream_clips(tmp_path / "list.jsonl", filters=Filters(max_chars_per_s=25))
    with pytest.warns(UserWarning, match="cannot be decoded and is passed over"):
        assert [item["text"] for item in stream] == ["one", "two"]
    assert (stream.report.left_out, stream.num_read) == (expected, 2)


def test_a_line_that_cannot_be_read_is_counted_where_one_trains_and_nowhere_else(tmp_path: Path) -> None:
    for index in range(12):
        wav(tmp_path / f"{index}.wav", 300 + index)
    rows = [{"file_name": f"{index}.wav", "text": f"w{index}"} for index in range(12)]
    one_bad = {"on a line that is no JSON object": 1}
    for case, with_splits in (("divided", False), ("own", True)):
        values = [row | ({"split": ("train", "validation", "test")[at % 3]} if with_splits else {}) for at, row in enumerate(rows)]
        (tmp_path / "metadata.jsonl").write_text("\n".join([json.dumps(row) for row in values] + ['{"file_name": "0.wav", "te']))
        parts = {split: load_clips(tmp_path, split=split) for split in ("train", "dev", "test")}
        assert sorted(text for clips in parts.values() for text in clips.texts) == sorted(row["text"] for row in rows), case
        assert parts["train"].report.left_out == one_bad
        assert not parts["dev"].report.left_out
        assert not parts["test"].report.left_out
        stream = stream_clips(tmp_path, split="train")
        assert len(list(stream)) == len(parts["train"])
        assert stream.report.left_out == one_bad


@pytest.mark.parametrize("cell", ["", "  ", None])
def test_a_row_with_an_empty_cell_for_the_split_is_counted(tmp_path: Path, cell: str | None) -> None:
    wav(tmp_path / "0.wav")
    rows = [{"file_name": "0.wav", "text": split, "split": split} for split in ("train", "test")]
    rows += [{"file_name": "0.wav", "text": "nowhere", **({} if cell is None else {"split": cell})}]  # type: ignore[dict-item]
    if cell is None:
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        write_csv(tmp_path / "metadata.csv", rows)
    train, test = (load_clips(tmp_path, split=split) for split in ("train", "test"))
    assert (train.texts, train.report.left_out) == (["train"], {"with an empty cell for the split": 1})
    assert (test.texts, test.report.left_out) == (["test"], {})


def test_filters_that_nothing_can_pass_are_refused() -> None:
    with pytest.raises(ValueError, match="none such"):
        Filters(min_duration_s=3, max_duration_s=2)
    with pytest.raises(ValueError, match="no regular expression"):
        Filters(exclude_text="[unclosed")


structs = st.fixed_dictionaries(
    {},
    optional={
        "array": st.one_of(st.none(), st.text(), st.lists(st.one_of(st.floats(), st.lists(st.floats(), max_size=2)), max_size=4)),
        "sampling_rate": st.one_of(st.none(), st.integers(-1, 10**7), st.text(max_size=3)),
        "bytes": st.one_of(st.none(), st.binary(max_size=9), st.just(encoded())),
        "path": st.one_of(st.none(), st.text(max_size=5)),
    },
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "audio": st.one_of(st.none(), st.binary(max_size=40), st.text(max_size=10), st.integers(), st.just(encoded()), structs),
                "text": st.one_of(st.none(), st.text(max_size=20), st.integers(), st.lists(st.text(max_size=2))),
            },
            optional={
                "language": st.one_of(st.none(), st.booleans(), st.text(max_size=5), st.lists(st.text())),
                "speaker": st.one_of(st.none(), st.integers()),
            },
        ),
        max_size=6,
    )
)
def test_whatever_a_row_holds_it_is_either_kept_or_counted(rows: list[dict[str, Any]]) -> None:
    good = {"audio": tone(440, 0.2), "text": "good"}
    clips = clips_from_rows([*rows, good])
    assert len(clips) + clips.report.left_out.total() == len(rows) + 1
    assert clips.texts[-1] == "good"
    assert all(clip.text and clip.text == " ".join(clip.text.split()) for clip in clips.clips)


# ---- dividing what is not split ----------------------------------------------------------------------------------------


def test_twenty_clips_of_ones_own_are_divided_once_and_for_all(tmp_path: Path) -> None:
    for i in range(20):
        wav(tmp_path / f"{i}.wav", duration_s=0.15)
    write_csv(tmp_path / "metadata.csv", [{"file_name": f"{i}.wav", "text": f"clip {i}"} for i in range(20)])
    parts = {split: load_clips(tmp_path, split=split) for split in ("train", "dev", "test")}
    assert {split: len(part) for split, part in parts.items()} == {"train": 14, "dev": 2, "test": 4}
    assert len({text for part in parts.values() for text in part.texts}) == 20
    assert parts["test"].texts == load_clips(tmp_path, split="test").texts
    assert "divided by transcript here: 14 train, 2 dev, 4 test" in str(parts["train"])
    assert len(load_clips(tmp_path)) == 20


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60))
def test_a_division_keeps_every_row_once_and_no_group_in_two_parts(pairs: list[tuple[int, int]]) -> None:
    rows = [{"audio": str(i), "text": str(text), "speaker": f"s{speaker}"} for i, (text, speaker) in enumerate(pairs)]
    by_speaker = len({speaker for _, speaker in pairs}) >= 5
    key = "speaker" if by_speaker else "text"
    if len({row[key] for row in rows}) < 3:
        with pytest.raises(ValueError, match="make the splits yourself"):
            hold_out(rows)
        return
    parts, by = hold_out(rows)
    assert by == ("speaker" if by_speaker else "transcript")
    assert sorted(row["audio"] for part in parts.values() for row in part) == sorted(row["audio"] for row in rows)
    groups = [{row[key] for row in part} for part in parts.values()]
    assert all(groups)
    assert sum(map(len, groups)) == len(set().union(*groups))


# ---- the Hub -----------------------------------------------------------------------------------------------------------


class FakeHub:
    """`load_dataset` of a Hub that holds one data set and has its moods."""

    def __init__(self, rows: list[dict[str, Any]], splits: tuple[str, ...] = ("train",), script: bool = False, faults: int = 0) -> None:
        self.rows, self.splits, self.script, self.faults = rows, splits, script, faults
        self.calls: list[dict[str, Any]] = []
        self.by_folder = False

    def __call__(self, dataset: str, *, split: str, streaming: bool, **options: Any) -> Any:
        self.calls.append({"dataset": dataset, "split": split, **options})
        if self.faults:
            self.faults -= 1
            raise ConnectionError("name resolution failed")
        if dataset != "owner/set" and not dataset.startswith(("google/", "facebook/")):
            raise FileNotFoundError(f"Dataset '{dataset}' doesn't exist on the Hub or cannot be accessed.")
        if self.script and options.get("revision") != PARQUET_BRANCH:
            raise RuntimeError("Dataset scripts are no longer supported, but found set.py")
        if self.by_folder and "data_dir" not in options:
            raise ValueError(f"BuilderConfig '{options.get('name')}' not found. Available: ['default']")
        if split not in self.splits:
            raise ValueError(f'Unknown split "{split}". Should be one of {list(self.splits)}.')
        return self.rows


def hub_rows(number: int = 4) -> list[dict[str, Any]]:
    return [
        {"audio": {"bytes": encoded(200 + 50 * i), "path": None}, "transcription": str(i), "language": "Klingon"} for i in range(number)
    ]


def test_a_fleurs_language_finds_its_config_and_the_parquet_branch() -> None:
    hub = FakeHub(hub_rows(), ("train", "validation"), script=True)
    clips = load_clips("google/fleurs", split="dev", language="Welsh", load_dataset=hub)
    assert clips.texts == ["0", "1", "2", "3"]
    assert {clip.language for clip in clips.clips} == {"cy"}  # the config has chosen it, whatever the column says
    assert hub.calls[-1] == {"dataset": "google/fleurs", "split": "validation", "name": "cy_gb", "revision": PARQUET_BRANCH}
    assert clips.name == "google/fleurs:cy_gb/dev"


def test_a_config_that_the_branch_knows_only_as_a_folder_is_found() -> None:
    hub = FakeHub(hub_rows(), script=True)
    hub.by_folder = True
    assert len(load_clips("owner/set:special", split="train", load_dataset=hub)) == 4
    assert hub.calls[-1]["data_dir"] == "special"


def test_a_data_set_that_does_not_exist_is_refused_at_once() -> None:
    hub = FakeHub(hub_rows())
    with pytest.raises(ValueError, match="doesn't exist on the Hub"):
        load_clips("owner/other", split="train", load_dataset=hub)
    assert len(hub.calls) == 1
    with pytest.raises(ValueError, match="Should be one of"):
        load_clips("owner/set", split="9_hours", load_dataset=hub)


def test_faults_of_the_network_are_waited_out_and_then_told() -> None:
    waits: list[float] = []
    rows = HubRows("owner/set", None, "train", load_dataset=FakeHub(hub_rows(), faults=3), sleep=waits.append)
    assert len(list(rows.read())) == 4
    assert waits == [1.0, 2.0, 4.0]
    gone = FakeHub(hub_rows(), faults=99)
    with pytest.raises(ConnectionError, match="name resolution"):
        list(HubRows("owner/set", None, "train", load_dataset=gone, sleep=waits.append).read())
    assert len(gone.calls) == 5


class Breaking:
    """A stream that breaks off every few rows, each time it is opened."""

    column_names = ("audio", "text")

    def __init__(self, rows: list[dict[str, Any]], after: int) -> None:
        self.rows, self.after, self.skipped = rows, after, 0

    def skip(self, number: int) -> Breaking:
        rest = Breaking(self.rows, self.after)
        rest.skipped = number
        return rest

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(self.rows[self.skipped :]):
            if number == self.after:
                raise TimeoutError("read timed out")
            yield row


def test_a_stream_that_breaks_off_goes_on_where_it_was() -> None:
    texts = [{"audio": b"", "text": str(i)} for i in range(20)]
    rows = HubRows("owner/set", None, "train", streaming=True, load_dataset=lambda *_, **__: Breaking(texts, 7), sleep=lambda _: None)
    assert [row["text"] for row in rows.read()] == [row["text"] for row in texts]
    stuck = HubRows("owner/set", None, "train", load_dataset=lambda *_, **__: Breaking(texts, 0), sleep=lambda _: None)
    with pytest.raises(ConnectionError, match="broke off after 0 rows, and 4 more attempts failed"):
        list(stuck.read())


def test_only_faults_that_pass_are_tried_again() -> None:
    class Answer(Exception):
        def __init__(self, status: int) -> None:
            self.response = type("Response", (), {"status_code": status})

    assert [is_network_fault(Answer(status)) for status in (401, 404, 429, 500, 503)] == [False, False, True, True, True]
    assert not is_network_fault(FileNotFoundError())
    assert not is_network_fault(KeyError("audio"))


def test_a_data_set_of_the_hub_needs_a_split_and_fleurs_a_language() -> None:
    with pytest.raises(ValueError, match="split='train'"):
        open_rows("owner/set")
    with pytest.raises(ValueError, match="No language was given"):
        open_rows("google/fleurs", split="test")
    with pytest.raises(ValueError, match="no Latin"):
        open_rows("google/fleurs", split="test", language="la")
    assert known_config("facebook/multilingual_librispeech", "de-AT") == "german"


def test_every_fleurs_locale_is_a_language_and_the_way_back_leads_to_it() -> None:
    assert len(FLEURS_LOCALES) == len({language_code(locale) for locale in FLEURS_LOCALES}) == 102
    for locale in FLEURS_LOCALES:
        assert known_config("google/fleurs", language_code(locale)) == locale


@pytest.mark.parametrize("streaming", [False, True])
def test_the_datasets_library_itself_gives_the_same_clips(tmp_path: Path, streaming: bool) -> None:
    datasets = pytest.importorskip("datasets", reason="data sets of the Hub need the train extra: pip install peft-s2lora[train]")
    rows = [{"audio": {"bytes": encoded(200 + 50 * i), "path": f"{i}.flac"}, "text": str(i)} for i in range(5)]
    features = datasets.Features({"audio": datasets.Audio(sampling_rate=16000, decode=True), "text": datasets.Value("string")})
    plain = datasets.Dataset.from_list(rows).cast(
        datasets.Features({"audio": datasets.Audio(decode=False), "text": datasets.Value("string")})
    )
    plain.cast(features).to_parquet(tmp_path / "x.parquet")  # stored as the Hub does: reading an item would decode it with torchcodec

    def load(dataset: str, *, split: str, streaming: bool, **_: Any) -> Any:
        files = {split: str(tmp_path / "x.parquet")}
        return datasets.load_dataset("parquet", data_files=files, split=split, streaming=streaming, cache_dir=str(tmp_path / "cache"))

    if streaming:
        found = list(stream_clips("owner/set", split="train", load_dataset=load))
    else:
        clips = load_clips("owner/set", split="train", load_dataset=load)
        found = [clips[i] for i in range(len(clips))]
        assert load_clips("owner/set", split="train", load_dataset=load, limit=2, seed=3).report.left_out == {}
    assert [item["text"] for item in found] == ["0", "1", "2", "3", "4"]
    assert np.abs(found[2]["audio"] - tone(300, 0.2)).max() < 1e-4


def test_workers_share_a_stream_of_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="data sets of the Hub need the train extra: pip install peft-s2lora[train]")
    files = [
        str(write_parquet(tmp_path / f"{part}.parquet", [{"audio": {"bytes": encoded()}, "text": f"{part}-{i}"} for i in range(4)]))
        for part in range(3)
    ]

    def load(dataset: str, *, split: str, streaming: bool, **_: Any) -> Any:
        return datasets.load_dataset("parquet", data_files={split: files}, split=split, streaming=True, cache_dir=str(tmp_path / "cache"))

    stream = stream_clips("owner/set", split="train", load_dataset=load)
    stream.rows.loaded()  # type: ignore[attr-defined]
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=2, multiprocessing_context="fork")
    assert sorted(item["text"] for item in loader) == sorted(f"{part}-{i}" for part in range(3) for i in range(4))


# ---- streams -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def long_table(tmp_path: Path) -> Path:
    """23 rows, every fifth of them bad."""
    wav(tmp_path / "0.wav", duration_s=0.15)
    return write_csv(tmp_path / "list.csv", [{"audio": "0.wav" if i % 5 else "gone.wav", "text": str(i)} for i in range(23)])


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_workers_read_every_clip_once_and_their_counts_come_together(long_table: Path, tiny_processor: Any, workers: int) -> None:
    stream = stream_clips(long_table, shuffle_buffer=4)
    seen = [item["text"] for item in torch.utils.data.DataLoader(stream, batch_size=None, num_workers=workers)]
    assert sorted(seen, key=int) == [str(i) for i in range(23) if i % 5]
    assert (stream.num_read, stream.report.left_out) == (18, {"not decodable": 5})
    loaded = list(batches(stream, Collator(tiny_processor, "de"), 4, num_workers=workers))
    assert sum(len(batch["labels"]) for batch in loaded) == 18


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_the_order_of_a_stream_is_that_of_its_seed_and_epoch(long_table: Path) -> None:
    def order(seed: int, epoch: int) -> list[str]:
        stream = stream_clips(long_table, shuffle_buffer=6, seed=seed)
        stream.set_epoch(epoch)
        items = list(stream)
        assert {item["key"][0] for item in items} == {epoch}
        assert len({item["key"] for item in items}) == len(items)
        return [item["text"] for item in items]

    first = order(0, 0)
    assert first == order(0, 0)
    assert len({tuple(first), tuple(order(0, 1)), tuple(order(1, 0))}) == 3
    assert sorted(first) == sorted(order(0, 1))


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_workers_that_persist_hear_of_the_next_epoch(long_table: Path) -> None:
    stream = stream_clips(long_table, shuffle_buffer=6)
    mixture = StreamMixture([stream], [1])
    loader = torch.utils.data.DataLoader(mixture, batch_size=None, num_workers=1, persistent_workers=True)
    passes = []
    for epoch in (0, 1):
        mixture.set_epoch(epoch)
        items = list(loader)
        assert {item["key"][0] for item in items} == {epoch}
        passes.append([item["text"] for item in items])
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1])


def test_clips_that_do_not_fit_the_model_are_counted_in_a_stream_too(tmp_path: Path, tiny_processor: Any) -> None:
    wav(tmp_path / "short.wav")
    wav(tmp_path / "long.wav", duration_s=2.5)
    rows = [{"audio": "short.wav", "text": "a"}, {"audio": "long.wav", "text": "b"}, {"audio": "short.wav", "text": "c" * 70}]
    stream = stream_clips(write_csv(tmp_path / "list.csv", rows)).fitting(tiny_processor, 64, "de")
    assert [item["text"] for item in stream] == ["a"]
    assert stream.report.left_out == {"longer than the window of 2 s": 1, "longer than 64 tokens": 1}


def test_a_stream_reads_no_further_ahead_than_it_was_told() -> None:
    class Endless:
        name, notes, given = "endless", (), 0

        def read(self, shard: int = 0, num_shards: int = 1) -> Iterator[dict[str, Any]]:
            while True:
                self.given += 1
                yield {"audio": tone(440, 0.2), "text": "a"}

    rows = Endless()
    stream = iter(ClipStream(rows, read_ahead=5))
    for _ in range(3):
        next(stream)
    assert rows.given <= 3 + 5


# ---- mixtures ----------------------------------------------------------------------------------------------------------


def clips_named(name: str, number: int) -> Clips:
    return Clips([Clip(np.zeros(1600, np.int16), f"{name}{i}") for i in range(number)], name)


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.integers(1, 12), st.floats(0.01, 10)), min_size=1, max_size=4),
    st.integers(0, 3),
    st.one_of(st.none(), st.integers(1, 50)),
)
def test_a_mixture_has_the_asked_shares_and_repeats_as_little_as_it_can(
    parts: list[tuple[int, float]], seed: int, num_clips: int | None
) -> None:
    sources = [clips_named(chr(97 + at), size) for at, (size, _) in enumerate(parts)]
    weights = [weight for _, weight in parts]
    mixed = mix_clips(sources, weights, num_clips=num_clips, seed=seed)
    total = sum(map(len, sources)) if num_clips is None else num_clips
    assert len(mixed) == total
    for source, weight in zip(sources, weights, strict=True):
        counts = Counter(text for text in mixed.texts if text[0] == source.name)
        assert abs(counts.total() - total * weight / sum(weights)) <= 1
        uses = [counts[text] for text in source.texts]
        assert max(uses) - min(uses) <= 1


@pytest.mark.parametrize("weights", [[1], [1, 0], [1, -1], [1, float("nan")]])
def test_weights_that_make_no_mixture_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weight"):
        mix_clips([clips_named("a", 2), clips_named("b", 2)], weights)


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_mixed_streams_keep_their_shares_and_all_of_both_is_seen(tmp_path: Path) -> None:
    wav(tmp_path / "0.wav", duration_s=0.12)
    paths = {
        name: write_csv(tmp_path / f"{name}.csv", [{"audio": "0.wav", "text": f"{name}{i}"} for i in range(size)])
        for name, size in (("a", 60), ("b", 10))
    }
    streams = [stream_clips(path) for path in paths.values()]
    seen = [item["text"] for item in StreamMixture(streams, [3, 1], seed=1)]
    assert {f"a{i}" for i in range(60)} | {f"b{i}" for i in range(10)} == set(seen)
    assert abs(sum(text[0] == "a" for text in seen) / len(seen) - 0.75) < 0.12
    short = [item["text"] for item in StreamMixture(streams, [3, 1], stop="first", seed=1)]
    assert len(set(short)) == len(short)
    assert seen[: len(short)] == short


@pytest.mark.filterwarnings("ignore:.*cannot be decoded")
def test_a_short_stream_of_a_mixture_comes_round_in_new_orders_and_with_new_augmentation(tmp_path: Path) -> None:
    wav(tmp_path / "0.wav", duration_s=0.12)
    paths = [write_csv(tmp_path / f"{n}.csv", [{"audio": "0.wav", "text": f"{n}{i}"} for i in range(k)]) for n, k in (("a", 40), ("b", 6))]
    mixture = StreamMixture([stream_clips(path, shuffle_buffer=8) for path in paths], [1, 1], seed=2)
    items = [item for epoch in range(3) for item in mixture.read_pass(epoch)]
    short = [item for item in items if item["text"][0] == "b"]
    assert len(short) > 60
    assert len({item["key"] for item in items}) == len(items), "no two items are augmented alike"
    rounds = [tuple(item["text"] for item in short[at : at + 6]) for at in range(0, 36, 6)]
    assert all(len(set(each)) == 6 for each in rounds[:5])
    assert len(set(rounds)) > 3, "the orders differ"
    again = [item["key"] for epoch in range(3) for item in mixture.read_pass(epoch)]
    assert again == [item["key"] for item in items]
