"""One encoder pass, two candidates where the language is unsure, and a language for each piece: against the same done by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLE_RATE, SHARED, build_tiny_model, noise, silence, tone, write_adapter
from peft import LoraConfig, PeftModel

from peft_s2lora import S2LoraConfig
from whisper_moe import engine, transcribe
from whisper_moe.audio import Span, find_windows, load_audio
from whisper_moe.cli import main
from whisper_moe.languages import language_posterior
from whisper_moe.layouts import decoder_only
from whisper_moe.registry import AdapterRegistry
from whisper_moe.segments import find_segments, steady_languages
from whisper_moe.transcribe import Transcriber

ABOVE = ("q_proj", "v_proj", "out_proj")
SHORT = tone(300)
LONG = np.concatenate([np.concatenate([tone(200 + 240 * i, 1.0), silence(1.5)]) for i in range(5)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_processor: Any) -> Path:
    """Welsh on the decoder only, Kichwa (as Spanish) on the decoder only as S2-LoRA, Breton everywhere."""
    folder, model = tmp_path_factory.mktemp("adapters"), build_tiny_model(tiny_processor)
    above = decoder_only(model, ABOVE)
    write_adapter(folder / "cy", model, "cy", peft_config=LoraConfig(r=2, lora_alpha=2, target_modules=above))
    write_adapter(folder / "fi", model, "fi", peft_config=S2LoraConfig(r=4, target_modules=above, init_weights=False), seed=2)
    write_adapter(folder / "br", model, "br", seed=3)
    return folder


@pytest.fixture
def transcriber(tiny_model: Any, tiny_processor: Any, folder: Path) -> Transcriber:
    return Transcriber(tiny_model, tiny_processor, AdapterRegistry.from_folder(folder), name="tiny")


@contextmanager
def encoded_windows(model: Any) -> Iterator[list[int]]:
    """How many windows each call of the encoder was given."""
    rows: list[int] = []
    handle = model.get_encoder().register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    try:
        yield rows
    finally:
        handle.remove()


# ---- one pass ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["cy", "fi", "fr"])
@pytest.mark.parametrize("sound", [SHORT, LONG], ids=["one window", "five windows"])
def test_each_window_is_encoded_once_where_the_encoder_is_the_bases(transcriber: Transcriber, language: str, sound: np.ndarray) -> None:
    given = transcriber.transcribe(sound, language=language, batch_size=2)
    with encoded_windows(transcriber.model) as rows:
        heard = transcriber.transcribe(sound, allowed=[language], batch_size=2)
    assert sum(rows) == len(find_windows(sound, 2.0))
    assert (heard.language, heard.adapter) == (language, given.adapter)
    assert heard.text == given.text != ""
    assert [(part.start_s, part.text) for part in heard.segments] == [(part.start_s, part.text) for part in given.segments]


def test_an_adapter_in_the_encoder_costs_the_windows_that_were_listened_to(transcriber: Transcriber) -> None:
    given = transcriber.transcribe(LONG, language="br", batch_size=2)
    with encoded_windows(transcriber.model) as rows:
        heard = transcriber.transcribe(LONG, allowed=["br"], batch_size=2)
    assert rows == [3, 2, 2, 1]  # three listened to, then all five once with the adapter on
    assert heard.text == given.text != ""
    assert heard.adapter == "br"


def test_whether_an_adapter_touches_the_encoder_is_read_from_its_weights(transcriber: Transcriber, folder: Path, tmp_path: Path) -> None:
    assert {adapter.name: adapter.touches_encoder for adapter in transcriber.registry} == {"cy": False, "fi": False, "br": True}
    transcript = transcriber.transcribe(SHORT, language="cy")
    assert transcript.adapter_info is not None
    assert transcript.adapter_info["touches_encoder"] is False


def test_states_of_the_base_are_not_used_for_an_adapter_in_the_encoder(transcriber: Transcriber, tiny_processor: Any, folder: Path) -> None:
    model = PeftModel.from_pretrained(build_tiny_model(tiny_processor), str(folder / "br"))
    inputs = tiny_processor(SHORT, sampling_rate=SAMPLE_RATE, return_tensors="pt")
    tokens = model.generate(**inputs, language="br", task="transcribe", max_length=56)
    expected = tiny_processor.batch_decode(tokens, skip_special_tokens=True)[0].strip().rstrip("\ufffd").rstrip()
    assert transcriber.transcribe(SHORT, allowed=["br"]).text == expected


def test_noise_is_left_out_with_an_adapter_in_the_encoder_only_if_the_base_hears_it_too(
    transcriber: Transcriber, tiny_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [tone(200), noise(1.0), tone(700), noise(1.0, seed=1), tone(3000), noise(1.0, 0.2, seed=2)]
    sound = np.concatenate([np.concatenate([part, silence(2)]) for part in parts])
    spans = find_windows(sound, 2.0)
    waves = [sound[round(span.start_s * SAMPLE_RATE) : round(span.end_s * SAMPLE_RATE)] for span in spans]
    features = tiny_processor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    base = build_tiny_model(tiny_processor)
    by_base = [float(each.no_speech or 0) for each in language_posterior(base, features)]
    adapted = transcriber.registry["br"]
    with transcriber.engine.table(adapted) as (table, name), table.rows([name] * len(spans)), torch.no_grad():
        encoded = transcriber.model.get_encoder()(features)
    by_suspicion = [float(each.no_speech or 0) for each in language_posterior(transcriber.model, None, encoder_outputs=encoded)]
    later = range(3, len(spans))  # the first three are listened to

    def tells(limit: float) -> bool:  # one that is noise to both, one that is only suspected, and speech at the beginning
        noisy = [(by_base[index] > limit, by_suspicion[index] > limit) for index in later]
        return (True, True) in noisy and (False, True) in noisy and min(by_base[:3]) < limit

    limit = next(limit for limit in sorted([*by_base, *by_suspicion]) if tells(limit * 1.000001)) * 1.000001
    monkeypatch.setattr(engine, "NO_SPEECH", limit)
    kept = [
        span.start_s
        for index, span in enumerate(spans)
        if not (by_base[index] > limit and (index not in later or by_suspicion[index] > limit))
    ]
    assert 0 < len(kept) < len(spans)
    found = transcriber.transcribe(sound, allowed=["br"])
    assert [part.start_s for part in found.segments] == pytest.approx(kept)


def test_more_windows_than_are_remembered_are_written_all_the_same(transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = transcriber.transcribe(LONG, allowed=["cy"])
    monkeypatch.setattr(transcribe, "_NUM_REMEMBERED", 1)
    assert transcriber.transcribe(LONG, allowed=["cy"]).text == expected.text


# ---- the two best --------------------------------------------------------------------------------------------------------


def plain_score(model: Any, processor: Any, samples: np.ndarray, language: str) -> tuple[str, float]:
    """What a model writes, and the mean log probability of its tokens and the end, one decoder step at a time."""
    config = model.generation_config
    inputs = processor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
    limit = 16 + round(40 * len(samples) / SAMPLE_RATE)
    tokens = model.generate(**inputs, language=language, task="transcribe", max_length=limit)[0].tolist()
    written = tokens[: tokens.index(config.eos_token_id)] if config.eos_token_id in tokens else tokens
    wanted = [*written, config.eos_token_id] if len(written) < limit else written
    ids = [config.decoder_start_token_id, config.lang_to_id[f"<|{language}|>"], config.task_to_id["transcribe"]]
    ids.append(config.no_timestamps_token_id)
    total = 0.0
    with torch.no_grad():
        for token in wanted:
            logits = model(inputs.input_features, decoder_input_ids=torch.tensor([ids])).logits[0, -1]
            total += float(logits.double().log_softmax(-1)[token])
            ids.append(token)
    text = processor.decode(tokens, skip_special_tokens=True).strip().rstrip("\ufffd").rstrip()
    return text, total / len(wanted)


@pytest.mark.parametrize("pair", [("cy", "br"), ("cy", "fi"), ("cy", "sv"), ("sv", "da")])
def test_the_likelier_of_the_two_best_languages_is_kept(
    transcriber: Transcriber, tiny_processor: Any, folder: Path, pair: tuple[str, str]
) -> None:
    expected = {}
    for code in pair:
        model = build_tiny_model(tiny_processor)
        if (folder / code).exists():
            model = PeftModel.from_pretrained(model, str(folder / code))
        expected[code] = plain_score(model, tiny_processor, SHORT, code)
    best = max(pair, key=lambda code: expected[code][1])
    found = transcriber.transcribe(SHORT, allowed=pair, threshold=1.0, if_unsure="two-best")
    assert found.scores == pytest.approx({code: score for code, (_, score) in expected.items()}, abs=1e-4)
    assert (found.language, found.text) == (best, expected[best][0])
    assert found.adapter == (best if (folder / best).exists() else None)
    assert "was uncertain" in found.reason
    assert "If you know it" in found.warnings[0]
    assert f"{expected[best][1]:.2f}" in found.reason


def test_the_end_of_a_text_counts_and_nothing_after_it(transcriber: Transcriber) -> None:
    """Scores of given tokens: a text that ends early, one that `generate` stopped at the limit, and an empty one."""
    model = transcriber.model
    config = model.generation_config
    end = config.eos_token_id
    tokens = torch.tensor([[70, 80, end, end, end], [71, 81, 91, 72, 82], [end] * 5])
    features = transcriber._features(np.concatenate([SHORT] * 3), [Span(0, 1), Span(1, 2), Span(2, 3)])
    with torch.no_grad():
        encoded = model.get_encoder()(torch.stack(features))
    for limit, counts in ((5, [3, 5, 1]), (6, [3, 6, 1])):
        scores = transcriber.engine._log_probabilities(encoded, tokens, ["cy", "fi", "sv"], [limit] * 3)
        assert [found for _, found in scores] == counts
        for row, (language, count) in enumerate(zip(("cy", "fi", "sv"), counts, strict=True)):
            ids = [config.decoder_start_token_id, config.lang_to_id[f"<|{language}|>"], config.task_to_id["transcribe"]]
            ids.append(config.no_timestamps_token_id)
            total = 0.0
            for token in [*tokens[row].tolist(), end][:count]:
                with torch.no_grad():
                    logits = model(encoder_outputs=(encoded[0][row : row + 1],), decoder_input_ids=torch.tensor([ids])).logits[0, -1]
                total += float(logits.double().log_softmax(-1)[token])
                ids.append(token)
            assert scores[row][0] == pytest.approx(total, abs=1e-3)
    filled, other_pad = tokens.masked_fill(tokens == end, 7), 7  # what fills rows up need not be the end
    config.pad_token_id, before = other_pad, config.pad_token_id
    try:
        again = transcriber.engine._log_probabilities(encoded, filled, ["cy", "fi", "sv"], [6] * 3)
    finally:
        config.pad_token_id = before
    assert again == scores


def test_both_rows_of_one_writer_are_one_batch_and_nothing_is_encoded_or_written_twice(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    handle = transcriber.model.get_encoder().register_forward_hook(lambda *_: calls.append(1))
    generated: list[Any] = []
    generate = transcriber.engine._generate

    def counting(encoded: Any, languages: Any, *options: Any) -> Any:
        generated.append(languages)
        return generate(encoded, languages, *options)

    monkeypatch.setattr(transcriber.engine, "_generate", counting)
    transcriber.transcribe(LONG, allowed=["sv", "da"], threshold=1.0, if_unsure="two-best")
    handle.remove()
    assert [len(languages) for languages in generated] == [6, 2]  # two languages of three windows, then the rest in the better one
    assert set(generated[0]) == {"sv", "da"}
    assert len(calls) == 2


def test_the_rest_is_written_by_the_winner(transcriber: Transcriber) -> None:
    found = transcriber.transcribe(LONG, allowed=["cy", "fi"], threshold=1.0, if_unsure="two-best")
    assert len(found.segments) == 5
    assert {part.language for part in found.segments} == {found.language}
    given = transcriber.transcribe(LONG, language=found.language)
    assert [part.text for part in found.segments[:3]] == [part.text for part in given.segments[:3]]


def test_one_language_or_a_sure_one_is_not_tried(transcriber: Transcriber) -> None:
    assert transcriber.transcribe(SHORT, allowed=["cy"], threshold=1.0, if_unsure="two-best").scores == {}
    assert transcriber.transcribe(SHORT, allowed=["cy", "fi"], threshold=0.0, if_unsure="two-best").scores == {}
    with pytest.raises(ValueError, match="if_unsure is one of 'base', 'two-best'"):
        transcriber.transcribe(SHORT, if_unsure="guess")  # type: ignore[arg-type]


# ---- piece by piece ------------------------------------------------------------------------------------------------------


def test_every_piece_has_its_own_language_times_and_writer(
    transcriber: Transcriber, tiny_processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcribe, "steady_languages", lambda each, lengths: steady_languages(each, lengths, switch_cost=0.0))
    spans, base = find_segments(LONG, 2.0), build_tiny_model(tiny_processor)
    sounds = [LONG[round(span.start_s * SAMPLE_RATE) : round(span.end_s * SAMPLE_RATE)] for span in spans]
    features = tiny_processor(sounds, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    everything = [posterior.probabilities for posterior in language_posterior(base, features)]
    codes = [code for code in everything[0] if code not in ("cy", "fi", "br")]
    mine, others = next(  # two languages of which now one, now the other is heard
        pair for pair in combinations(codes, 2) if len({each[pair[0]] > each[pair[1]] for each in everything}) == 2
    )
    above = LoraConfig(r=2, lora_alpha=2, target_modules=decoder_only(base, ABOVE))
    transcriber.add_adapter(write_adapter(tmp_path / mine, base, mine, peft_config=above, seed=7))
    found = transcriber.transcribe(LONG, allowed=[mine, others], threshold=0.0, switching=True)
    assert len(found.segments) == len(spans) == 5
    seconds: dict[str, float] = {}
    for part, span, sound, heard in zip(found.segments, spans, sounds, everything, strict=True):
        both = heard[mine] + heard[others]
        assert part.probabilities == pytest.approx({code: heard[code] / both for code in (mine, others)}, rel=1e-3)
        language = max(mine, others, key=lambda code: heard[code])
        assert (part.language, part.adapter) == (language, mine if language == mine else None)
        assert (part.start_s, part.end_s) == pytest.approx((span.start_s, span.end_s), abs=0.01)
        assert part.text.startswith(transcriber.transcribe(sound, language=language).text[:16])  # limits are those of a batch
        seconds[language] = seconds.get(language, 0) + span.end_s - span.start_s
    assert found.language == max(seconds, key=lambda code: seconds[code])
    assert "listened to by itself" in found.reason


def test_a_piece_in_an_uncertain_language_is_written_by_the_base(transcriber: Transcriber) -> None:
    found = transcriber.transcribe(LONG, allowed=["cy", "fi"], threshold=1.0, switching=True)
    assert {part.adapter for part in found.segments} == {None}
    assert "only a guess" in found.warnings[0]


def test_noise_between_pieces_is_left_out(transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "NO_SPEECH", -1.0)
    assert "hears nobody speak" in transcriber.transcribe(LONG, switching=True).reason


def test_a_given_language_does_not_switch(transcriber: Transcriber) -> None:
    for options in ({"language": "cy"}, {"adapter": "cy"}):
        with pytest.raises(ValueError, match="leave language and adapter out"):
            transcriber.transcribe(SHORT, switching=True, **options)
    assert transcriber.transcribe(SHORT, switching=True, adapter="none").adapter is None
    assert transcriber.transcribe(silence(2), switching=True).text == ""


# ---- the first step of the decoder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bare", "lora", "merged"])
def test_the_posterior_is_that_of_the_models_own_forward(tiny_model: Any, tiny_processor: Any, folder: Path, kind: str) -> None:
    with torch.no_grad():
        for name, parameter in tiny_model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()  # a new model has none to speak of
    bare, model = copy.deepcopy(tiny_model), tiny_model
    if kind != "bare":
        model = PeftModel.from_pretrained(tiny_model, str(folder / "br"))
        if kind == "merged":
            model.merge_adapter()  # its weights are not the base's: the model has to be called
    features = tiny_processor([SHORT, tone(900)], sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    start = torch.full((2, 1), bare.generation_config.decoder_start_token_id)
    with torch.no_grad():
        logits = bare(features, decoder_input_ids=start).logits[:, 0]
    ids = list(bare.generation_config.lang_to_id.values())
    no_speech = logits.softmax(-1)[:, bare.generation_config.no_timestamps_token_id - 1].tolist()
    for row, posterior in enumerate(language_posterior(model, features)):
        expected = dict(zip(bare.generation_config.lang_to_id, logits[row, ids].softmax(-1).tolist(), strict=True))
        assert {f"<|{code}|>": value for code, value in posterior.probabilities.items()} == pytest.approx(expected, rel=1e-3)
        assert posterior.no_speech == pytest.approx(no_speech[row], rel=1e-3)


# ---- real speech ---------------------------------------------------------------------------------------------------------


@pytest.mark.shared
@pytest.mark.pocket
def test_a_recording_that_goes_from_english_to_german_is_cut_there() -> None:
    """The one clip of three whose two languages the pocket knows. One language for the whole of it is wrong for its beginning."""
    pq = pytest.importorskip("pyarrow.parquet")
    rows = pq.read_table(SHARED / "speech" / "code_switch" / "test.parquet").to_pylist()
    (sound,) = (row["audio"]["bytes"] for row in rows if row["audio"]["path"] == "multilingual.flac")
    samples = load_audio(sound)[: 24 * SAMPLE_RATE]
    transcriber = Transcriber.from_pretrained(device="cpu")
    whole = transcriber.transcribe(samples)
    pieces = transcriber.transcribe(samples, switching=True)
    assert len({part.language for part in whole.segments}) == 1
    languages = [part.language for part in pieces.segments]
    assert languages == ["en"] + ["de"] * (len(languages) - 1)
    assert pieces.segments[0].end_s == pytest.approx(5.0, abs=0.5)
    assert pieces.segments[0].probabilities["en"] > 0.9


def test_the_command_line_switches_and_tries_two(
    tiny_folder: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    soundfile.write(tmp_path / "sound.wav", LONG, SAMPLE_RATE)
    shared = ["transcribe", str(tmp_path / "sound.wav"), "--model", str(tiny_folder), "--adapters", str(folder), "--json"]
    assert main([*shared, "--switching", "--allowed", "cy", "fi", "--threshold", "0"]) == 0
    pieces = json.loads(capsys.readouterr().out)["segments"]
    assert len(pieces) == 5
    assert all(set(piece["probabilities"]) == {"cy", "fi"} for piece in pieces)
    assert main([*shared, "--if-unsure", "two-best", "--allowed", "cy", "fi", "--threshold", "1"]) == 0
    assert set(json.loads(capsys.readouterr().out)["scores"]) == {"cy", "fi"}
