"""The recipe of a real encoder with a decoder of our own, end to end, on tones and a random encoder: no weights of Whisper's, no speech."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tone
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from recipes.own_decoder import (
    Settings,
    applied_merges,
    build_model,
    build_processor,
    make_shards,
    prune_tokens,
    shard_of_turn,
    train,
)
from recipes.own_decoder_data import Shards, draws
from recipes.synthetic_speech import PackWriter
from whisper_moe import Transcriber
from whisper_moe.data import extract_features
from whisper_moe.languages import language_posterior

PITCHES = {"en": {"low low": 250.0, "high": 2500.0}, "de": {"tief": 300.0, "hoch": 3000.0}, "cy": {"isel": 700.0}}
MERGES = [("l", "o"), ("lo", "w"), ("\u0120", "low"), ("h", "i"), ("g", "h"), ("hi", "gh"), ("\u0120", "high"), ("t", "i"), ("c", "h")]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A random encoder in a folder as that of a Whisper, packs of tones, and settings that fit them."""
    folder = tmp_path_factory.mktemp("own_decoder")
    base = folder / "base"
    width = {"d_model": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = WhisperConfig(**width, encoder_layers=1, decoder_layers=4, max_source_positions=200, init_std=0.3)
    config.save_pretrained(base)
    torch.manual_seed(0)
    weights = {f"model.encoder.{name}": weight.half() for name, weight in WhisperEncoder(config).state_dict().items()}
    save_file(weights, base / "encoder.safetensors")
    (base / "preprocessor_config.json").write_text(json.dumps({"feature_size": 80, "hop_length": 160, "n_fft": 400}))
    tokens = [*sorted(ByteLevel.alphabet()), *("".join(merge) for merge in MERGES)]
    (base / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (base / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, MERGES)) + "\n")
    rng = np.random.default_rng(0)
    for name, language in (("en", "en"), ("de", "de"), ("cy", "cy"), ("en_people", "en")):
        writer = PackWriter(folder / "packs", name)
        for split, count in (("train", 10), ("dev", 2), ("test", 2)):
            for text, pitch in list(PITCHES[language].items()) * (count // 2):
                clip = tone(pitch * rng.uniform(0.97, 1.03), rng.uniform(0.5, 1.2))
                writer.add((clip * 32767).astype(np.int16), text=text, language=language, speaker="t", split=split)
        writer.close()
    return Settings(
        base=base,
        data=folder / "packs",
        states=folder / "states",
        out=folder / "model",
        written=("en", "de"),
        detected_only=("cy",),
        recorded=(("en_people", 0.5),),
        detected_weight=0.5,
        window_s=2,
        shard_clips=48,
        encode_batch=8,
        dev_clips=2,
        min_free_gb=0,
        num_shards=2,
        steps_per_shard=4,
        decoder_layers=2,
        min_uses=5,
        num_steps=120,
        warmup_steps=10,
        learning_rate=4e-3,
        guided_steps=0,
        dropout=0.05,
        report_every=20,
        evaluate_every=120,
    )


@pytest.fixture(scope="module")
def trained(settings: Settings) -> Path:
    """The model's folder after a whole run."""
    make_shards(settings)
    return train(settings)


def test_a_pruned_tokenizer_cuts_its_corpus_as_the_whole_one_does_and_still_writes_anything(settings: Settings) -> None:
    words = Counter({"\u0120low": 7, "\u0120high": 6, "\u0120low\u0120tie": 1, "\u0120hi": 3})
    ranks = {merge: rank for rank, merge in enumerate(MERGES)}
    needed = set().union(*(applied_merges(word, ranks) for word in words))
    vocabulary, merges = prune_tokens(settings.base, words, 1)
    assert set(merges) == needed == set(MERGES) - {("c", "h")}
    assert len(vocabulary) == 256 + len(merges)
    _, frequent = prune_tokens(settings.base, words, 7)
    assert frequent == [("l", "o"), ("lo", "w"), ("\u0120", "low"), ("h", "i")]  # "hi" is made on the way to "high": 9 uses

    tokenizer = build_processor(settings).tokenizer
    for text in (" low high", " ñandú 😀 high", " tiefer"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer(" low", add_special_tokens=False).input_ids) == ["\u0120low"]


def test_packs_are_drawn_by_weight_and_no_clip_twice_before_all_others(settings: Settings) -> None:
    drawn = [draw for shard in range(5) for draw in draws(settings, shard)]
    packs = Counter(draw.pack for draw in drawn)
    assert packs["en"] == packs["de"] == pytest.approx(2 * packs["cy"], abs=2) == pytest.approx(2 * packs["en_people"], abs=2)
    of_en = [draw.wave.tobytes() for draw in drawn if draw.pack == "en"]
    assert len(set(of_en[:10])) == len(set(of_en[10:20])) == 10
    assert of_en[:10] != of_en[10:20]  # in another order


def test_states_are_what_the_encoder_of_the_finished_model_says(settings: Settings, trained: Path) -> None:
    model = WhisperForConditionalGeneration.from_pretrained(trained, dtype=torch.float32).eval()
    processor = WhisperProcessor.from_pretrained(trained)
    start = build_model(settings, processor)
    dev = Shards(settings, start, processor).dev()
    texts = [row["text"] for row in dev.rows]
    assert sorted(texts) == sorted([*["low low", "high"] * 2, "tief", "hoch", "isel"])
    rows = [json.loads(line) for line in (settings.data / "de.jsonl").read_text().splitlines()]
    row = next(row for row in rows if row["split"] == "dev" and row["text"] == "hoch")
    samples = np.fromfile(settings.data / "de.i16", np.int16)[row["offset"] : row["offset"] + row["samples"]]
    with torch.no_grad():
        expected = model.model.encoder(extract_features(processor, [samples.astype(np.float32) / 32768])).last_hidden_state
    found = dev.batch([texts.index("hoch")]).float()
    assert found.shape == expected.shape == (1, 100, 32)
    assert torch.allclose(found, expected, atol=0.1)  # bf16 where the processor has it
    assert (found - expected).abs().mean() < 0.02 * expected.abs().mean()

    base = load_file(settings.base / "encoder.safetensors")
    saved = load_file(trained / "model.safetensors")
    of_encoder = {name for name in saved if name.startswith("model.encoder.")}
    assert of_encoder == set(base)
    for name in of_encoder:  # the same bits; of the sinusoids the first
        assert torch.equal(saved[name], base[name][: len(saved[name])]), name


def test_shorter_clips_of_a_batch_are_filled_up_with_their_last_position(settings: Settings, trained: Path) -> None:
    processor = WhisperProcessor.from_pretrained(trained)
    shard = Shards(settings, build_model(settings, processor), processor).train(0)
    lengths = [row["positions"] for row in shard.rows]
    short, long = int(np.argmin(lengths)), int(np.argmax(lengths))
    assert lengths[short] < lengths[long]
    batch = shard.batch([short, long])
    row = shard.rows[short]
    assert torch.equal(batch[0, : lengths[short]], shard.states[row["start"] : row["start"] + lengths[short]])
    assert (batch[0, lengths[short] :] == batch[0, lengths[short] - 1]).all()
    assert all(row["last"] <= row["positions"] and row["first"] <= row["last"] for row in shard.rows)
    assert [row["start"] for row in shard.rows] == [sum(lengths[:index]) for index in range(len(lengths))]
    assert shard.states.shape[0] == sum(lengths)


def test_the_model_writes_and_names_what_it_learnt_to_hear(trained: Path) -> None:
    transcriber = Transcriber.from_pretrained(trained, adapters=[])
    assert transcriber.window_s == 2
    for language in ("en", "de"):
        for text, pitch in PITCHES[language].items():
            assert transcriber.transcribe(tone(pitch), language=language).text == text
            assert transcriber.transcribe(tone(pitch)).text == text  # and with the language that it hears
    features = extract_features(transcriber.processor, [tone(PITCHES["cy"]["isel"])])
    posterior = language_posterior(WhisperForConditionalGeneration.from_pretrained(trained, dtype=torch.float32).eval(), features)[0]
    assert posterior.probabilities["cy"] > 0.8  # heard, though never written
    assert json.loads((trained / "config.json").read_text())["dropout"] == 0.0
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["dev"]["de"]["wer"] == 0
    assert lines[-1]["dev"]["cy"].keys() == {"detected"}


class Interrupted(Exception):
    pass


def test_a_resumed_run_and_one_that_encodes_as_it_goes_end_as_the_uninterrupted_one(settings: Settings, trained: Path) -> None:
    short = replace(settings, num_steps=4, out=trained.parent / "whole")
    train(short)

    def interrupt(step: int) -> None:
        if step == 2:
            raise Interrupted

    parts = replace(short, out=trained.parent / "parts", states=trained.parent / "other_states", checkpoint_every_s=-1)
    with pytest.raises(Interrupted):
        train(parts, interrupt)
    train(parts)
    whole, resumed = (load_file(run.out / "model.safetensors") for run in (short, parts))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = load_file(trained / "model.safetensors")
    assert not all(torch.equal(whole[name], other[name]) for name in whole)


def test_new_shards_come_in_order_between_old_ones_and_later_each_as_often(settings: Settings) -> None:
    wide = replace(settings, num_shards=7, turns_per_new_shard=2)
    turns = [shard_of_turn(wide, turn) for turn in range(14 + 21)]
    assert turns[:14:2] == list(range(7))
    assert all(repeated <= new for new, repeated in zip(turns[:14:2], turns[1:14:2], strict=True))
    assert Counter(turns[14:]) == dict.fromkeys(range(7), 3)
    assert turns[14:21] != turns[21:28]


def test_states_made_with_other_settings_or_no_room_are_an_error_that_says_so(settings: Settings, trained: Path, tmp_path: Path) -> None:
    processor = WhisperProcessor.from_pretrained(trained)
    model = build_model(settings, processor)
    with pytest.raises(ValueError, match=r"another augmented_share \(0\.45, now 0\.9\)\. Name another folder"):
        Shards(replace(settings, augmented_share=0.9), model, processor)
    full = Shards(replace(settings, states=tmp_path, min_free_gb=1e9), model, processor)
    with pytest.raises(ValueError, match=r"min_free_gb is 1e\+09"):
        full.train(0)
    assert not [*tmp_path.glob("*.safetensors"), *tmp_path.glob("*.part")]
    with pytest.raises(ValueError, match=r"the encoder in .* has 200 positions"):
        build_model(replace(settings, window_s=5), processor)


def test_the_rate_rises_stays_and_falls_and_a_longer_run_begins_the_same(settings: Settings) -> None:
    wide = replace(settings, num_steps=1000, warmup_steps=100, decay_share=0.4)
    assert [wide.learning_rate_factor(step) for step in (0, 99, 300, 600, 800)] == pytest.approx([0.01, 1, 1, 1, 0.5])
    longer = replace(wide, num_steps=2000)
    assert all(wide.learning_rate_factor(step) == longer.learning_rate_factor(step) for step in range(600))
