"""The whole path on a tiny Whisper: what `generate` alone would write, by the adapter that was chosen, and no harm from anything bad."""

from __future__ import annotations

import copy
import io
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLE_RATE, SHARED, base_hash, build_tiny_model, noise, silence, tone, write_adapter
from peft import PeftModel
from safetensors.torch import load_file, save_file

from peft_s2lora import S2LoraConfig
from whisper_moe import engine, transcribe
from whisper_moe.audio import AudioError, find_windows
from whisper_moe.base_signature import WrongBaseError
from whisper_moe.languages import language_posterior
from whisper_moe.registry import AdapterRegistry
from whisper_moe.transcribe import Transcriber, Transcript

S2LORA = S2LoraConfig(r=4, target_modules=["q_proj", "v_proj", "out_proj"], init_weights=False)
SHORT = tone(300)
LONG = np.concatenate([tone(200, 0.8), silence(2), tone(700, 3.5), silence(2), tone(1500, 1.0)])


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory, tiny_processor: Any) -> Path:
    """A Welsh LoRA, a Kichwa S2-LoRA under the Spanish token, and an English domain adapter, all for the tiny model."""
    folder, model = tmp_path_factory.mktemp("adapters"), build_tiny_model(tiny_processor)
    write_adapter(folder / "cy", model, "cy")
    write_adapter(folder / "qug", model, "qug", carrier="es", peft_config=S2LORA, seed=2)
    write_adapter(folder / "en-child", model, "en", domain="child", seed=3)
    return folder


@pytest.fixture
def transcriber(tiny_model: Any, tiny_processor: Any, adapter_folder: Path) -> Transcriber:
    return Transcriber(tiny_model, tiny_processor, AdapterRegistry.from_folder(adapter_folder), name="tiny")


@pytest.fixture
def bare(tiny_processor: Any) -> Any:
    """The same base once more, that nothing has touched."""
    return build_tiny_model(tiny_processor)


def plain_generate(model: Any, processor: Any, samples: np.ndarray, language: str) -> str:
    """What Transformers writes without any of this package, for sound within one window."""
    inputs = processor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
    limit = 16 + round(40 * len(samples) / SAMPLE_RATE)
    tokens = model.generate(**inputs, language=language, task="transcribe", max_length=limit)
    return processor.batch_decode(tokens, skip_special_tokens=True)[0].strip().rstrip("\ufffd").rstrip()


def same(first: Transcript, second: Transcript) -> bool:
    """Equal but for the time it took."""
    rows = [transcript.to_dict() | {"elapsed_s": 0} for transcript in (first, second)]
    return rows[0] == rows[1]


# ---- text --------------------------------------------------------------------------------------------------------------


def test_the_base_writes_what_generate_writes(transcriber: Transcriber, tiny_processor: Any, bare: Any) -> None:
    transcript = transcriber.transcribe(SHORT, language="French")
    assert transcript.text == plain_generate(bare, tiny_processor, SHORT, "fr")
    assert (transcript.language, transcript.language_name, transcript.adapter, transcript.probability) == ("fr", "French", None, None)
    assert "No adapter for French" in transcript.warnings[0]
    assert transcript.duration_s == 1.0
    assert transcript.model == "tiny"


@pytest.mark.parametrize(("language", "prompt", "method"), [("cy", "cy", "LORA"), ("qug", "es", "S2LORA")])
def test_an_adapter_writes_what_peft_writes_under_its_token(
    transcriber: Transcriber, tiny_processor: Any, bare: Any, language: str, prompt: str, method: str
) -> None:
    adapter = transcriber.registry[language]
    expected = plain_generate(PeftModel.from_pretrained(bare, str(adapter.path)), tiny_processor, SHORT, prompt)
    transcript = transcriber.transcribe(SHORT, language=language)
    assert transcript.text == expected
    assert (transcript.language, transcript.adapter, transcript.warnings) == (language, language, ())
    assert transcript.adapter_info is not None
    assert transcript.adapter_info["peft_type"] == method
    assert transcript.adapter_info["metrics"]["after"]["wer"] == 0.5


def test_a_long_recording_is_written_window_by_window(transcriber: Transcriber, tiny_processor: Any, bare: Any) -> None:
    transcript = transcriber.transcribe(LONG, language="fr")
    spans = find_windows(LONG, 2.0)
    assert len(spans) > 3
    assert [part.start_s for part in transcript.segments] == pytest.approx([span.start_s for span in spans])
    assert [part.end_s for part in transcript.segments] == pytest.approx([span.end_s for span in spans])
    assert transcript.text == " ".join(part.text for part in transcript.segments)
    inputs = [LONG[round(span.start_s * SAMPLE_RATE) : round(span.end_s * SAMPLE_RATE)] for span in spans]
    features = tiny_processor(inputs, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    longest_s = max(span.end_s - span.start_s for span in spans)
    tokens = bare.generate(features, language="fr", task="transcribe", max_length=min(64, 16 + round(40 * longest_s)))
    for part, text in zip(transcript.segments, tiny_processor.batch_decode(tokens, skip_special_tokens=True), strict=True):
        assert text.strip().startswith(part.text)  # a repetition at the end may be cut


def test_the_batch_size_makes_no_difference(transcriber: Transcriber) -> None:
    one_by_one = transcriber.transcribe(LONG[: 8 * SAMPLE_RATE], language="cy", batch_size=1)
    together = transcriber.transcribe(LONG[: 8 * SAMPLE_RATE], language="cy", batch_size=8)
    pairs = list(zip(one_by_one.segments, together.segments, strict=True))
    # The limit of a batch is that of its longest window: only there may a text go on.
    assert all(max(a.text, b.text, key=len).startswith(min(a.text, b.text, key=len).rstrip("\ufffd")) for a, b in pairs)


def test_beams_are_passed_on(transcriber: Transcriber, tiny_processor: Any, bare: Any) -> None:
    inputs = tiny_processor(SHORT, sampling_rate=SAMPLE_RATE, return_tensors="pt")
    tokens = bare.generate(**inputs, language="fr", task="transcribe", max_length=56, num_beams=3)
    expected = tiny_processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
    assert expected.startswith(transcriber.transcribe(SHORT, language="fr", num_beams=3).text)


def test_a_short_clip_cannot_fill_the_whole_window(transcriber: Transcriber) -> None:
    assert len(transcriber.transcribe(tone(300, 0.2), language="fr").text) <= 16 + 40 * 0.2  # a letter is a token or more


@pytest.mark.parametrize(
    ("text", "shortened"),
    [
        ("the cat sat on the mat", "the cat sat on the mat"),
        ("thank you. " * 12, "thank you."),
        ("so it goes and then " + "na " * 40, "so it goes and then na"),
        ("so it goes and then " + "thank you very much. " * 8 + "thank you ve", "so it goes and then thank you very much."),
        ("no no no no", "no no no no"),
        ("ha ha ha ha ha ha ha", "ha ha ha ha ha ha ha"),
        ("one two " * 9 + "and then it went on", "one two " * 9 + "and then it went on"),
        ("", ""),
    ],
)
def test_only_an_endless_ending_is_cut(text: str, shortened: str) -> None:
    assert transcribe._without_repetition(text) == shortened


# ---- the language ------------------------------------------------------------------------------------------------------


def test_the_language_is_that_of_the_posterior_and_its_adapter_speaks(transcriber: Transcriber, tiny_processor: Any, bare: Any) -> None:
    features = tiny_processor(SHORT, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    (posterior,) = language_posterior(bare, features)
    transcript = transcriber.transcribe(SHORT, threshold=0)
    assert transcript.language == posterior.best[0]
    assert transcript.probability == pytest.approx(posterior.best[1])
    assert transcript.probabilities == pytest.approx(posterior.top(8))
    assert transcript.no_speech == pytest.approx(posterior.no_speech)


def test_the_allow_list_decides_who_may_be_heard(transcriber: Transcriber) -> None:
    transcript = transcriber.transcribe(SHORT, allowed=["Welsh"])
    assert (transcript.language, transcript.probability, transcript.adapter) == ("cy", 1.0, "cy")
    assert transcript.text == transcriber.transcribe(SHORT, language="cy").text  # the encoder's adapter is at work too
    assert set(transcriber.transcribe(SHORT, allowed=["fr", "es"]).probabilities) == {"fr", "es"}


def test_below_the_threshold_the_base_writes_with_a_warning(transcriber: Transcriber, bare: Any, tmp_path: Path) -> None:
    best = transcriber.transcribe(SHORT, threshold=0).language
    transcriber.add_adapter(write_adapter(tmp_path / "best", bare, str(best)))
    assert transcriber.transcribe(SHORT, threshold=0).adapter == "best"
    unsure = transcriber.transcribe(SHORT, threshold=1.0)
    assert (unsure.adapter, unsure.language) == (None, best)
    assert "uncertain" in unsure.warnings[0]


def test_the_active_adapter_does_not_colour_what_is_heard(transcriber: Transcriber, tiny_processor: Any) -> None:
    before = transcriber.transcribe(SHORT)
    for language in ("cy", "qug"):
        transcriber.transcribe(SHORT, language=language)
        after = transcriber.transcribe(SHORT)
        assert after.probabilities == before.probabilities
        assert after.no_speech == before.no_speech
    features = tiny_processor(SHORT, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    with transcriber.engine.table(transcriber.registry["cy"]) as (table, name), table.rows([name]):
        assert language_posterior(transcriber.model, features)[0].top(8) == before.probabilities


def test_one_language_for_the_recording_is_the_mean_of_its_first_windows(transcriber: Transcriber, tiny_processor: Any, bare: Any) -> None:
    spans = find_windows(LONG, 2.0)[:3]
    waves = [LONG[round(span.start_s * SAMPLE_RATE) : round(span.end_s * SAMPLE_RATE)] for span in spans]
    posteriors = language_posterior(bare, tiny_processor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features)
    lengths = [span.end_s - span.start_s for span in spans]
    found = transcriber.transcribe(LONG).probabilities
    for code, probability in found.items():
        expected = sum(p.probabilities[code] * length for p, length in zip(posteriors, lengths, strict=True)) / sum(lengths)
        assert probability == pytest.approx(expected, rel=1e-4)


def test_an_adapter_by_name_and_the_base_by_name(transcriber: Transcriber) -> None:
    child = transcriber.transcribe(SHORT, adapter="en-child")
    assert (child.adapter, child.language, child.probability, child.probabilities) == ("en-child", "en", None, {})
    base = transcriber.transcribe(SHORT, adapter="none", allowed=["cy"])
    assert (base.adapter, base.language, base.probability) == (None, "cy", 1.0)
    assert base.text != transcriber.transcribe(SHORT, allowed=["cy"]).text


def test_a_checkpoint_may_say_what_it_hears_and_writes(tiny_model: Any, tiny_processor: Any) -> None:
    tiny_model.generation_config.heard_languages, tiny_model.generation_config.written_languages = ["fi", "fr"], ["fr"]
    transcriber = Transcriber(tiny_model, tiny_processor)
    assert (transcriber.detectable_languages, transcriber.base_languages) == (["fi", "fr"], ["fr"])
    assert set(transcriber.transcribe(SHORT).probabilities) == {"fi", "fr"}
    assert transcriber.transcribe(SHORT, language="fr").warnings == ()
    assert "never learnt to write" in transcriber.transcribe(SHORT, language="fi").warnings[0]


def test_an_english_only_model_writes_english(tiny_model: Any, tiny_processor: Any) -> None:
    config = tiny_model.generation_config
    config.is_multilingual = False
    del config.lang_to_id, config.task_to_id
    transcriber = Transcriber(tiny_model, tiny_processor)
    transcript = transcriber.transcribe(SHORT)
    assert (transcript.language, transcript.probability) == ("en", 1.0)
    assert transcript.text == transcriber.transcribe(SHORT, language="en").text
    with pytest.raises(ValueError, match="no language token for French"):
        transcriber.transcribe(SHORT, language="fr")


# ---- state -------------------------------------------------------------------------------------------------------------


def test_a_then_b_then_a_is_the_same_a_and_the_base_keeps_its_bytes(transcriber: Transcriber, bare: Any) -> None:
    names = set(bare.state_dict())
    before = base_hash(bare, names)
    transcripts = {}
    for language in ("cy", "qug", "fr", "cy", "cy", "qug", "fr"):
        transcript = transcriber.transcribe(SHORT, language=language)
        assert same(transcript, transcripts.setdefault(language, transcript))
        assert base_hash(transcriber.model, names) == before
    assert len({transcript.text for transcript in transcripts.values()}) == 3
    transcriber.unload()
    assert set(transcriber.model.state_dict()) == names
    assert base_hash(transcriber.model, names) == before


def test_two_threads_get_what_each_would_get_alone(transcriber: Transcriber) -> None:
    requests = [(tone(200, 0.5), "cy"), (tone(900, 0.5), "qug"), (tone(400, 0.5), "fr")]
    alone = [transcriber.transcribe(sound, language=language) for sound, language in requests]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda request: transcriber.transcribe(request[0], language=request[1]), requests * 3))
    assert all(same(first, second) for first, second in zip(together, alone * 3, strict=True))


def test_a_slow_download_holds_up_nobody_else(tiny_model: Any, tiny_processor: Any, adapter_folder: Path, tmp_path: Path) -> None:
    asked, go = threading.Event(), threading.Event()

    def fetch() -> Path:
        asked.set()
        return adapter_folder / "cy" if go.wait(30) else tmp_path

    registry = AdapterRegistry()
    registry.expect("cy", fetch, where="alice/a@0")
    transcriber = Transcriber(tiny_model, tiny_processor, registry)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(transcriber.transcribe, SHORT, allowed=["cy"])
        try:
            assert asked.wait(30)
            assert pool.submit(transcriber.transcribe, SHORT, allowed=["fr"]).result(20).text
            transcriber.add_adapter(adapter_folder / "en-child")
            assert not waiting.done()
        finally:
            go.set()
        assert waiting.result().adapter == "cy"


@pytest.mark.parametrize(
    "options",
    [{"language": "cy"}, {"allowed": ["cy"]}, {"allowed": ["cy"], "switching": True}, {"threshold": 1.0, "if_unsure": "two-best"}],
    ids=["given", "heard", "switching", "two-best"],
)
def test_a_fetched_adapter_that_cannot_be_attached_gives_way_to_the_one_it_displaced(
    tiny_model: Any, tiny_processor: Any, adapter_folder: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    alone = Transcriber(tiny_model, tiny_processor, AdapterRegistry([adapter_folder / "cy"]))
    heard = list(alone.transcribe(SHORT).probabilities)[:2]
    if options.get("if_unsure"):
        options = options | {"allowed": ["cy", next(code for code in heard if code != "cy")]}
    expected = alone.transcribe(SHORT, **options)
    alone.unload()
    broken = write_adapter(tmp_path / "broken", tiny_model, "cy", seed=9)
    weights = load_file(broken / "adapter_model.safetensors")
    save_file({name: tensor * math.nan for name, tensor in weights.items()}, broken / "adapter_model.safetensors")
    registry, asked = AdapterRegistry([adapter_folder / "cy"]), []
    registry.expect("cy", lambda: asked.append(1) or broken, where="alice/a@0")
    transcriber = Transcriber(tiny_model, tiny_processor, registry)
    for _ in range(2):
        transcript = transcriber.transcribe(SHORT, **options)
        assert (transcript.adapter, transcript.text) == (expected.adapter, expected.text)
        assert "(alice/a@0) cannot be used: " in transcript.warnings[0]
        assert "not numbers" in transcript.warnings[0]
    assert len(asked) == 1  # not again within the minute
    with pytest.raises(ValueError, match=r"\(alice/a@0\) cannot be used"):
        transcriber.transcribe(SHORT, adapter="cy")
    assert [source.key for source in transcriber.registry.expected] == ["cy"]


def test_progress_rises_from_nothing_to_done(transcriber: Transcriber) -> None:
    calls: list[tuple[float, str]] = []
    transcriber.transcribe(LONG, batch_size=2, on_progress=lambda share, what: calls.append((share, what)))
    shares = [share for share, _ in calls]
    assert (shares[0], shares[-1]) == (0.0, 1.0)
    assert shares == sorted(shares)
    assert all(what for _, what in calls)
    assert sum("Writing" in what for _, what in calls) > 1


def test_a_transcript_is_plain_json(transcriber: Transcriber) -> None:
    transcript = transcriber.transcribe(LONG[: 5 * SAMPLE_RATE], language="qug")
    row = json.loads(json.dumps(transcript.to_dict()))
    assert row == transcript.to_dict()
    part = transcript.segments[0]
    where_and_what = {"start_s": part.start_s, "end_s": part.end_s, "text": part.text}
    assert row["segments"][0] == where_and_what | {"language": "qug", "adapter": "qug", "probabilities": {}}


# ---- bad input: each is answered, and the next request works -----------------------------------------------------------


def stereo_at_8_khz() -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.stack([tone(300, rate=8000)] * 2, axis=1), 8000, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    ("audio", "options", "error", "words"),
    [
        (b"", {}, AudioError, "empty"),
        (np.zeros(0, np.float32), {}, AudioError, "empty"),
        (b"RIFF\x00\x01garbage" * 20, {}, AudioError, "not a recording"),
        ("no/such/file.wav", {}, AudioError, "no file"),
        (np.full(1000, np.nan), {}, AudioError, "not numbers"),
        (SHORT, {"max_duration_s": 0.5}, AudioError, "longer than 0.5 seconds"),
        (SHORT, {"language": "Frensh"}, ValueError, r"fr \(French\)"),
        (SHORT, {"language": "chr"}, ValueError, "Cherokee"),
        (SHORT, {"adapter": "klingon"}, ValueError, "no adapter 'klingon'"),
        (SHORT, {"language": "fr", "adapter": "cy"}, ValueError, "not French"),
        (SHORT, {"allowed": ["qug"]}, ValueError, "no language token for 'qug'"),
        (SHORT, {"threshold": 1.5}, ValueError, "threshold"),
        (SHORT, {"batch_size": 0}, ValueError, "batch_size"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_and_the_next_one_works(
    transcriber: Transcriber, bare: Any, audio: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    names = set(bare.state_dict())
    with pytest.raises(error, match=words):
        transcriber.transcribe(audio, **options)
    assert base_hash(transcriber.model, names) == base_hash(bare, names)
    assert transcriber.transcribe(stereo_at_8_khz(), language="cy").adapter == "cy"


@pytest.mark.parametrize(
    ("audio", "words"),
    [(silence(3), "silent"), (silence(3) + 0.2, "silent"), (noise(3, 1e-5), "silent"), (silence(0.001), "silent")],
)
def test_silence_is_answered_with_no_text_and_a_hint(transcriber: Transcriber, audio: np.ndarray, words: str) -> None:
    transcript = transcriber.transcribe(audio)
    assert (transcript.text, transcript.segments, transcript.language, transcript.language_name) == ("", (), None, "")
    assert words in transcript.reason
    assert "microphone" in transcript.warnings[0]
    assert transcriber.transcribe(audio, language="cy").language == "cy"
    assert transcriber.transcribe(SHORT, language="cy").text


def test_noise_gets_an_answer(transcriber: Transcriber) -> None:
    assert isinstance(transcriber.transcribe(noise(3)).text, str)


def test_sound_in_which_nobody_speaks_is_not_written(transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "NO_SPEECH", -1.0)  # everything counts as noise
    transcript = transcriber.transcribe(LONG)
    assert (transcript.text, transcript.language) == ("", None)
    assert "hears nobody speak" in transcript.reason
    assert "say which language" in transcript.warnings[0]
    assert transcript.probabilities
    assert transcriber.transcribe(LONG, language="cy").text  # told so, it writes


def test_speech_after_much_noise_is_found_and_every_window_is_heard_once_before_giving_up(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = np.concatenate([np.concatenate([tone(200 + 50 * i, 0.5), silence(2)]) for i in range(18)])
    assert len(find_windows(sound, 2.0)) == 18
    expected = transcriber.transcribe(sound, language="cy").segments[15:]
    heard, real = [], engine.language_posterior

    def deaf_until(first: int) -> Any:
        def posteriors(*arguments: Any, **options: Any) -> list[Any]:
            found = real(*arguments, **options)
            heard.extend(range(len(heard), len(heard) + len(found)))
            return [replace(each, no_speech=float(number < first)) for number, each in zip(heard[-len(found) :], found, strict=True)]

        return posteriors

    monkeypatch.setattr(engine, "language_posterior", deaf_until(15))
    monkeypatch.setattr(transcribe, "_NUM_REMEMBERED", 2)
    transcript = transcriber.transcribe(sound, allowed=["cy"], batch_size=2)
    assert [(part.start_s, part.text) for part in transcript.segments] == [(part.start_s, part.text) for part in expected]
    assert any("15 of 18 parts were left out" in warning for warning in transcript.warnings)
    heard.clear()
    monkeypatch.setattr(engine, "language_posterior", deaf_until(99))
    assert transcriber.transcribe(sound, batch_size=4).text == ""
    assert len(heard) == 18


def test_parts_in_which_nobody_speaks_are_left_out(
    transcriber: Transcriber, tiny_processor: Any, bare: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [tone(200, 1.0), noise(1.0), tone(200, 1.0), tone(3000, 1.0)]
    sound = np.concatenate([np.concatenate([part, silence(2)]) for part in parts])
    spans = find_windows(sound, 2.0)
    assert len(spans) == 4
    waves = [sound[round(span.start_s * SAMPLE_RATE) : round(span.end_s * SAMPLE_RATE)] for span in spans]
    features = tiny_processor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    silences = [float(posterior.no_speech or 0) for posterior in language_posterior(bare, features)]
    limit = float(np.mean(sorted(set(silences))[-2:]))
    monkeypatch.setattr(engine, "NO_SPEECH", limit)
    transcript = transcriber.transcribe(sound)
    kept = [span for span, no_speech in zip(spans, silences, strict=True) if no_speech <= limit]
    assert 0 < len(kept) < 4
    assert [part.start_s for part in transcript.segments] == [pytest.approx(span.start_s) for span in kept]
    assert any(f"{4 - len(kept)} of 4 parts were left out" in warning for warning in transcript.warnings)


def test_two_hours_of_silence_with_a_few_words_cost_a_few_windows(transcriber: Transcriber) -> None:
    samples = np.zeros(7200 * SAMPLE_RATE, np.int8)
    samples[7000 * SAMPLE_RATE : 7001 * SAMPLE_RATE] = (SHORT * 300).astype(np.int8)
    (segment,) = transcriber.transcribe((SAMPLE_RATE, samples), language="cy").segments
    assert segment.start_s == pytest.approx(6999.8, abs=0.2)
    with pytest.raises(AudioError, match="longer than 4 hours"):
        transcriber.transcribe((SAMPLE_RATE, np.zeros(5 * 3600 * SAMPLE_RATE, np.int8)))


def test_the_language_is_checked_before_the_recording_is_read(transcriber: Transcriber) -> None:
    with pytest.raises(ValueError, match="Cherokee"):
        transcriber.transcribe("no/such/file.wav", language="chr")


def test_an_adapter_for_another_base_is_refused_and_the_others_work(transcriber: Transcriber, tiny_processor: Any, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "alien", build_tiny_model(tiny_processor, seed=9), "fr")
    with pytest.raises(WrongBaseError, match=r"'alien' was made for 'tiny-whisper', not for .*other weights"):
        transcriber.add_adapter(folder)
    assert transcriber.registry.for_language("fr") is None
    transcriber.registry.add(folder)  # by the back door: then it is refused when it is wanted
    with pytest.raises(WrongBaseError):
        transcriber.transcribe(SHORT, language="fr")
    assert transcriber.transcribe(SHORT, language="cy").text


# ---- loading -----------------------------------------------------------------------------------------------------------


def test_a_folder_is_loaded_with_its_adapters(tiny_folder: Path, adapter_folder: Path, transcriber: Transcriber) -> None:
    loaded = Transcriber.from_pretrained(tiny_folder, adapter_folder, device="cpu")
    assert [adapter.name for adapter in loaded.registry] == ["cy", "en-child", "qug"]
    assert (loaded.window_s, loaded.model.dtype, loaded.name) == (2.0, torch.float32, tiny_folder.name)
    assert loaded.describe() == f"{tiny_folder.name}, 0.0242 million parameters, float32 on cpu"
    assert loaded.transcribe(SHORT, language="cy").text == transcriber.transcribe(SHORT, language="cy").text
    assert loaded.describe() == f"{tiny_folder.name}, 0.0242 million parameters, float32 on cpu"  # adapters are not counted
    assert len(Transcriber.from_pretrained(str(tiny_folder)).registry) == 0
    assert len(Transcriber.from_pretrained(tiny_folder, [adapter_folder / "cy", adapter_folder / "qug"]).registry) == 2


def test_half_precision_is_a_flag(tiny_folder: Path, adapter_folder: Path) -> None:
    loaded = Transcriber.from_pretrained(tiny_folder, adapter_folder / "cy", device="cpu", dtype="bfloat16")
    assert loaded.model.dtype == torch.bfloat16
    assert loaded.transcribe(SHORT, language="cy").adapter == "cy"
    assert loaded.transcribe(SHORT).probability
    with pytest.raises(ValueError, match="Unknown dtype 'float7'"):
        Transcriber.from_pretrained(tiny_folder, dtype="float7")


def test_a_folder_without_a_model_or_without_adapters_is_an_error(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        Transcriber.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no folder"):
        Transcriber.from_pretrained(tiny_folder, tmp_path / "gone")


def test_a_model_that_hears_another_rate_is_refused(tiny_model: Any, tiny_processor: Any) -> None:
    processor = copy.deepcopy(tiny_processor)
    processor.feature_extractor.sampling_rate = 8000
    with pytest.raises(ValueError, match="hears 8000 Hz"):
        Transcriber(tiny_model, processor)


@pytest.mark.shared
@pytest.mark.parametrize("language", ["cy", None])
def test_the_configuration_of_a_published_whisper_works_too(tmp_path: Path, language: str | None) -> None:
    """Its tokenizer, 30 s window, 99 languages and suppressed tokens, on a decoder of random weights."""
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

    folder = SHARED / "whisper-base"
    width = {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    layers = {"encoder_layers": 2, "decoder_layers": 2, "init_std": 0.4}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(folder, **width, **layers)).eval()
    model.generation_config = GenerationConfig.from_pretrained(folder)
    processor = WhisperProcessor.from_pretrained(folder)
    bare = copy.deepcopy(model)
    adapter = write_adapter(tmp_path / "cy", model, "cy")
    transcriber = Transcriber(model, processor, AdapterRegistry([adapter]))
    assert transcriber.window_s == 30
    assert len(transcriber.detectable_languages) == 99
    transcript = transcriber.transcribe(SHORT, language=language, allowed=["cy"])
    expected = plain_generate(PeftModel.from_pretrained(bare, str(adapter)), processor, SHORT, "cy")
    assert expected.startswith(transcript.text)
    assert transcript.text
    with pytest.raises(ValueError, match="no language token for Cantonese"):
        transcriber.transcribe(SHORT, language="yue")


# ---- the pocket --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pocket() -> Transcriber:
    return Transcriber.from_pretrained(device="cpu")


@pytest.mark.pocket
def test_the_shipped_adapters_fit_the_shipped_pocket(pocket: Transcriber) -> None:
    assert len(pocket.registry) >= 3
    for adapter in pocket.registry:
        assert pocket.transcribe(SHORT, adapter=adapter.name).adapter == adapter.name


@pytest.mark.pocket
def test_the_pocket_hears_that_nobody_speaks(pocket: Transcriber) -> None:
    assert pocket.transcribe(silence(3)).text == ""
    assert pocket.transcribe(noise(3, 0.05)).text == ""


@pytest.mark.pocket
@pytest.mark.shared
def test_the_kichwa_adapter_at_least_halves_the_character_errors_of_the_pocket(pocket: Transcriber) -> None:
    import pyarrow.parquet

    from whisper_moe.evaluate import score

    clips = pyarrow.parquet.read_table(SHARED / "speech/qug_killkan/test.parquet").slice(0, 24).to_pylist()
    texts = [clip["text"] for clip in clips]
    base = [pocket.transcribe(clip["audio"]["bytes"], language="es", adapter="none").text for clip in clips]
    told = [pocket.transcribe(clip["audio"]["bytes"], language="qug").text for clip in clips]
    assert score(texts, told).cer <= 0.5 * score(texts, base).cer
