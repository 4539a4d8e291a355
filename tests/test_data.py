"""Parquet to clips, clips to batches: bad clips counted, labels as Whisper's own tokenizer makes them, draws repeatable."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import SHARED, tone
from transformers import WhisperProcessor
from transformers.models.whisper.modeling_whisper import shift_tokens_right

from whisper_moe.data import (
    IGNORED,
    Clip,
    Clips,
    Collator,
    EpochOrder,
    TrainingView,
    augment_samples,
    clips_from_rows,
    extract_features,
    fit_for_training,
    label_ids,
    load_clips,
    mask_features,
)

pyarrow = pytest.importorskip("pyarrow", reason="parquet needs the train extra: pip install peft-s2lora[train]")
parquet = pytest.importorskip("pyarrow.parquet")


def encoded(duration_s: float = 0.5, frequency: float = 440, format: str = "flac") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(frequency, duration_s), 16000, format=format)
    return buffer.getvalue()


def row(text: str | None = "hello", audio: bytes | None = None, **columns: Any) -> dict[str, Any]:
    return {"audio": {"bytes": encoded() if audio is None else audio, "path": None}, "text": text, **columns}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def make_clips(*lengths_s: float, text: str = "abc") -> Clips:
    return Clips([Clip((tone(300 + 50 * i, length) * 32767).astype(np.int16), text, "de") for i, length in enumerate(lengths_s)])


# ---- reading -----------------------------------------------------------------------------------------------------------


def test_a_split_of_a_folder_is_read_with_its_texts_languages_and_sound(tmp_path: Path) -> None:
    write(tmp_path / "train.parquet", [row(" e\u0301  a ", encoded(0.5), language="German", speaker="x"), row("b", encoded(1.0))])
    write(tmp_path / "test.parquet", [row("c")])
    clips = load_clips(tmp_path, split="train")
    assert clips.texts == ["é a", "b"]
    assert (clips[0]["language"], clips[0]["speaker"], clips[1]["language"]) == ("de", "x", None)
    assert [clip.duration_s for clip in clips.clips] == [0.5, 1.0]
    assert np.abs(clips[0]["audio"] - tone(440, 0.5)).max() < 1e-4
    assert str(clips.report) == "none left out"


@pytest.mark.parametrize("name", ["data/train-00000-of-00001.parquet", "train-00000-of-00001.parquet", "train.parquet"])
def test_layouts_of_the_hub_are_found(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [row()])
    for source in (tmp_path, path, f"{path.parent}/tr*.parquet"):
        assert len(load_clips(source, split="train" if source == tmp_path else None)) == 1


def test_bad_clips_are_counted_and_the_good_ones_kept(tmp_path: Path) -> None:
    damaged = encoded(1.0, format="wav")[:30]
    bad = [row(None), row("  "), row("a", b""), row("a", b"no sound"), row("a", damaged), row("a", encoded(0.02)), row("a", encoded(3.0))]
    good = [row("good one", language="de"), row("good two")]
    path = write(tmp_path / "clips.parquet", [good[0], *bad, row("[UNK] word"), row("fr", language="fr"), good[1]])
    clips = load_clips(path, language="de", max_duration_s=2.0, exclude_text=r"\[UNK\]")
    assert clips.texts == ["good one", "good two"]
    assert clips.report.left_out == {
        "without a transcript": 2,
        "not decodable": 3,
        "shorter than 0.1 s": 1,
        "longer than 2 s": 1,
        "with an excluded transcript": 1,
        "in another language than de": 1,
    }
    assert "3 not decodable" in str(clips)
    assert clips.report.first_error is not None


def test_a_source_without_a_usable_clip_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 without a transcript"):
        load_clips(write(tmp_path / "a.parquet", [row(None), row("")]))


def test_missing_transcript_column_error_lists_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [{"audio": {"bytes": encoded(), "path": None}, "words": "hello", "id": 1}])
    with pytest.raises(ValueError, match="audio, words, id"):
        load_clips(path)
    assert load_clips(path, text_column="words").texts == ["hello"]


def test_missing_split_error_lists_the_splits(tmp_path: Path) -> None:
    write(tmp_path / "dev.parquet", [row()])
    write(tmp_path / "test.parquet", [row()])
    for split in (None, "train"):
        with pytest.raises(ValueError, match="dev, test"):
            load_clips(tmp_path, split=split)


def test_a_source_that_does_not_exist_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hf download"):
        load_clips("mozilla-foundation/common_voice")
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    with pytest.raises(ValueError, match="Not a parquet file"):
        load_clips(tmp_path / "a.parquet")


def test_limit_draws_the_same_rows_for_the_same_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", [row(str(number)) for number in range(20)])
    first, again, other = (load_clips(path, limit=5, seed=seed).texts for seed in (0, 0, 1))
    assert len(first) == 5
    assert first == again != other


def test_relative_audio_paths_are_looked_for_beside_the_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "one.flac").write_bytes(encoded())
    rows = [{"audio": {"bytes": None, "path": "one.flac"}, "text": "a"}, {"audio": {"bytes": None, "path": "two.flac"}, "text": "b"}]
    clips = load_clips(write(tmp_path / "a.parquet", rows))
    assert clips.texts == ["a"]
    assert clips.report.left_out["not decodable"] == 1


def test_rows_of_any_data_set_become_clips() -> None:
    decoded = {"array": tone(440, 0.5, rate=8000), "sampling_rate": 8000}
    sources = {"array": tone(440, 0.5), "bytes": encoded(), "decoded": decoded}
    clips = clips_from_rows({"audio": audio, "text": name} for name, audio in sources.items())
    assert clips.texts == ["array", "bytes", "decoded"]
    assert {clip.duration_s for clip in clips.clips} == {0.5}


@pytest.mark.shared
def test_the_real_speech_sets_are_read() -> None:
    clips = load_clips(SHARED / "speech" / "chr_durbin", split="test", language="chr")
    assert len(clips) == 29
    assert all(clip.language == "chr" for clip in clips.clips)


# ---- labels ------------------------------------------------------------------------------------------------------------


def check_labels_against_whispers_tokenizer(processor: WhisperProcessor) -> None:
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.set_prefix_tokens(language="german", task="transcribe", predict_timestamps=False)
    whole = tokenizer(" Über Nacht").input_ids
    assert tokenizer.convert_ids_to_tokens(whole[:1]) == ["<|startoftranscript|>"]
    labels = label_ids(processor, "Über Nacht", "de")
    assert labels == whole[1:]
    assert processor.tokenizer.decode(labels, skip_special_tokens=True) == " Über Nacht"


def test_labels_are_those_of_whispers_tokenizer_less_the_start(tiny_processor) -> None:
    check_labels_against_whispers_tokenizer(tiny_processor)


@pytest.mark.shared
def test_labels_are_those_of_the_real_whisper_tokenizer() -> None:
    check_labels_against_whispers_tokenizer(WhisperProcessor.from_pretrained(SHARED / "whisper-base"))


def test_the_decoder_reads_start_of_transcript_and_then_the_labels(tiny_model, tiny_processor) -> None:
    config = tiny_model.config
    labels = torch.tensor([label_ids(tiny_processor, "ab", "de")])
    inputs = shift_tokens_right(labels, config.pad_token_id, config.decoder_start_token_id)[0].tolist()
    text = ["<|startoftranscript|>", "<|de|>", "<|transcribe|>", "<|notimestamps|>", "Ġ", "a", "b"]
    assert tiny_processor.tokenizer.convert_ids_to_tokens(inputs) == text


def test_clips_that_do_not_fit_the_model_are_counted(tiny_processor) -> None:
    clips = Clips([*make_clips(1.0, 2.5).clips, *make_clips(1.0, text="x" * 70).clips])
    kept = fit_for_training(clips, tiny_processor, 64, "de")
    assert len(kept) == 1
    assert kept.report.left_out == {"longer than the window of 2 s": 1, "longer than 64 tokens": 1}


# ---- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_holds_whole_windows_and_padded_labels(tiny_processor) -> None:
    view = TrainingView(Clips([*make_clips(0.5, text="a").clips, *make_clips(1.0, text="abc").clips]))
    batch = Collator(tiny_processor, "de", augment=False)([view[0, 0], view[0, 1]])
    whole = tiny_processor([view.clips[0]["audio"], view.clips[1]["audio"]], sampling_rate=16000, return_tensors="pt").input_features
    assert torch.allclose(batch["input_features"], whole, atol=1e-5)
    assert batch["labels"].tolist() == [[*label_ids(tiny_processor, "a", "de"), IGNORED, IGNORED], label_ids(tiny_processor, "abc", "de")]


def test_a_cropped_window_is_the_beginning_of_the_whole_one(tiny_processor) -> None:
    view = TrainingView(make_clips(0.4, 0.6))
    items = [view[0, 0], view[0, 1]]
    cropped = Collator(tiny_processor, "de", augment=False, crop_share=1.0)(items)["input_features"]
    whole = Collator(tiny_processor, "de", augment=False)(items)["input_features"]
    frames = cropped.shape[-1]
    assert frames % 2 == 0
    assert 60 <= frames < whole.shape[-1] == 200
    assert torch.allclose(cropped[..., :-2], whole[..., : frames - 2], atol=1e-4)  # the last frames see the edge


def test_augmentation_depends_on_seed_epoch_and_clip_alone(tiny_processor) -> None:
    view = TrainingView(make_clips(0.5, 0.6))
    collator = Collator(tiny_processor, "de", augment=True, seed=3)
    first, again, next_epoch = (collator([view[epoch, 1]])["input_features"] for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, next_epoch)
    beside_another = collator([view[0, 1], view[0, 0]])["input_features"][:1]
    assert torch.allclose(first, beside_another, atol=1e-5)


def test_augmented_clips_still_fit_in_the_window() -> None:
    samples = tone(440, 2.0)
    lengths = {len(augment_samples(samples, np.random.default_rng(seed), len(samples))) for seed in range(50)}
    assert max(lengths) <= len(samples)
    assert min(lengths) < len(samples)


def test_masks_blank_bands_and_stretches_and_keep_the_rest() -> None:
    features = torch.ones(80, 200)
    mask_features(features, 100, np.random.default_rng(1))
    blanked = features == 0
    assert 0 < blanked.float().mean() < 0.6
    assert ((features == 0) | (features == 1)).all()


@pytest.mark.parametrize("lengths_s", [[1.3], [0.11, 0.4], [1.99, 0.3], [2.0], [3.0], [0.01]])
def test_extracted_features_are_whispers_own(tiny_processor, lengths_s: list[float]) -> None:
    waves = [tone(300 + 100 * i, length) for i, length in enumerate(lengths_s)]
    expected = tiny_processor(waves, sampling_rate=16000, return_tensors="pt").input_features
    found = extract_features(tiny_processor, waves)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)  # silence behind a clip is copied, not computed


def test_features_of_silence_are_whispers_own(tiny_processor) -> None:
    waves = [np.zeros(1600, np.float32), tone(300, 0.2)]
    expected = tiny_processor(waves, sampling_rate=16000, return_tensors="pt").input_features
    assert torch.allclose(extract_features(tiny_processor, waves), expected, atol=1e-5)


# ---- order -------------------------------------------------------------------------------------------------------------


def test_an_epoch_visits_every_clip_once_in_a_new_order() -> None:
    order = EpochOrder([float(i % 7) for i in range(50)], batch_size=8, seed=1)
    first = list(order)
    order.set_epoch(1)
    second = list(order)
    assert sorted(index for _, index in first) == sorted(index for _, index in second) == list(range(50))
    assert {epoch for epoch, _ in second} == {1}
    assert [index for _, index in first] != [index for _, index in second]
    assert list(EpochOrder([float(i % 7) for i in range(50)], batch_size=8, seed=1)) == first


def test_batches_hold_clips_of_similar_length() -> None:
    durations = np.random.default_rng(0).uniform(0, 10, 400).tolist()
    indices = [index for _, index in EpochOrder(durations, batch_size=10, seed=0)]
    spreads = [np.ptp([durations[i] for i in indices[at : at + 10]]) for at in range(0, 400, 10)]
    assert np.mean(spreads) < 1.0  # ten clips at random would spread over eight seconds


def test_the_short_batch_comes_last() -> None:
    durations = [float(i) for i in range(25)]
    indices = [index for _, index in EpochOrder(durations, batch_size=10, seed=0)]
    assert np.ptp(indices[:10]) == np.ptp(indices[10:20]) == 9
