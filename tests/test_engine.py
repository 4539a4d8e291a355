"""The engine: everybody's windows in common batches, each answered as if it were alone, whatever happens to the others."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SAMPLE_RATE, base_hash, build_tiny_model, noise, silence, tone, write_adapter
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import BaseModelOutput

from peft_s2lora import S2LoraConfig
from whisper_moe import engine as engine_module
from whisper_moe.audio import AudioError
from whisper_moe.cropped_encoder import encode_cropped
from whisper_moe.engine import Engine, Row, UnusableError
from whisper_moe.languages import language_posterior
from whisper_moe.registry import AdapterRegistry, LanguageAdapter, load_folder
from whisper_moe.transcribe import Transcriber, Transcript, _without_repetition

SOUNDS = [tone(200 + 90 * number, 0.6) for number in range(6)]
LONG = np.concatenate([np.concatenate([tone(200 + 240 * i, 0.7), silence(1.6)]) for i in range(5)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_processor: Any) -> Path:
    """Three adapters that a table holds, one in the decoder only, and a DoRA, which it does not hold."""
    folder, model = tmp_path_factory.mktemp("adapters"), build_tiny_model(tiny_processor)
    write_adapter(folder / "cy", model, "cy")
    write_adapter(
        folder / "fi", model, "fi", peft_config=S2LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False), seed=2
    )
    decoder = r"model\.decoder\..*(q_proj|v_proj)"
    write_adapter(folder / "br", model, "br", peft_config=LoraConfig(r=3, target_modules=decoder), seed=3)
    dora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True)
    write_adapter(folder / "sv", model, "sv", peft_config=dora, seed=4)
    return folder


@pytest.fixture
def transcriber(tiny_model: Any, tiny_processor: Any, folder: Path) -> Transcriber:
    return Transcriber(tiny_model, tiny_processor, AdapterRegistry.from_folder(folder), name="tiny")


def by_peft(tiny_processor: Any, folder: Path | None, sound: np.ndarray, language: str) -> str:
    """What transformers and PEFT write, without any of this package's engine."""
    model: Any = build_tiny_model(tiny_processor).eval()
    if folder is not None:
        model = PeftModel.from_pretrained(model, str(folder))
    inputs = tiny_processor(sound, sampling_rate=SAMPLE_RATE, return_tensors="pt")
    tokens = model.generate(**inputs, language=language, task="transcribe", max_length=16 + round(40 * len(sound) / SAMPLE_RATE))
    return cleaned(tiny_processor, tokens[0])


def cleaned(tiny_processor: Any, tokens: Any) -> str:
    """Tokens as text, as it stands in a transcript."""
    return _without_repetition(tiny_processor.decode(tokens, skip_special_tokens=True).strip().rstrip("\ufffd").rstrip())


@contextmanager
def queued(transcriber: Transcriber, calls: list[Callable[[], Any]]) -> Iterator[list[Any]]:
    """Start the calls in threads of their own while the model is taken; they go on, all at once, after the block."""
    futures: list[Any] = []
    with ThreadPoolExecutor(len(calls)) as pool, transcriber.engine.exclusive():
        futures += [pool.submit(call) for call in calls]
        deadline = time.monotonic() + 30
        while len(transcriber.engine._waiting) < len(calls):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        yield futures


def text_of(answer: Transcript | Exception) -> str:
    assert isinstance(answer, Transcript), answer
    return answer.text


# ---- the same text as alone --------------------------------------------------------------------------------------------


def test_rows_of_one_batch_have_their_own_adapters_and_write_what_peft_writes(
    transcriber: Transcriber, tiny_processor: Any, folder: Path
) -> None:
    languages = ["cy", "fi", "br", "fr", "cy", "br"]
    calls = [lambda s=s, c=c: transcriber.transcribe(s, language=c) for s, c in zip(SOUNDS, languages, strict=True)]
    before = transcriber.engine.num_batches
    with queued(transcriber, calls) as futures:
        pass
    assert transcriber.engine.num_batches == before + 1
    expected = [
        by_peft(tiny_processor, folder / c if (folder / c).is_dir() else None, s, c) for s, c in zip(SOUNDS, languages, strict=True)
    ]
    assert [future.result().text for future in futures] == expected
    assert len(set(expected)) == len(expected)


def test_recordings_that_are_heard_first_share_batches_too(transcriber: Transcriber) -> None:
    allowed = [["cy"], ["fi"], ["fr", "br"], None, ["cy"], ["de"]]
    alone = [transcriber.transcribe(sound, allowed=each) for sound, each in zip(SOUNDS, allowed, strict=True)]
    calls = [lambda s=s, a=a: transcriber.transcribe(s, allowed=a) for s, a in zip(SOUNDS, allowed, strict=True)]
    before = transcriber.engine.num_batches
    with queued(transcriber, calls) as futures:
        pass
    together = [future.result() for future in futures]
    assert [each.text for each in together] == [each.text for each in alone]
    for one, other in zip(together, alone, strict=True):
        assert list(one.probabilities) == list(other.probabilities)
        assert list(one.probabilities.values()) == pytest.approx(list(other.probabilities.values()), abs=1e-5)
    assert transcriber.engine.num_batches - before < len(calls) * 2


def test_many_recordings_of_different_lengths_come_back_in_their_order(transcriber: Transcriber) -> None:
    sounds = [*SOUNDS, LONG, noise(0.4), silence(1), LONG[: 3 * SAMPLE_RATE]]
    alone = [transcriber.transcribe(sound).text for sound in sounds]
    done: dict[int, str] = {}
    together = transcriber.transcribe_many(sounds, at_once=5, on_done=lambda number, answer: done.update({number: text_of(answer)}))
    assert [text_of(each) for each in together] == alone
    assert done == dict(enumerate(alone))


def test_with_beams_or_scores_the_text_is_that_of_alone_too(transcriber: Transcriber) -> None:
    for options in ({"num_beams": 2}, {"threshold": 1.0, "if_unsure": "two-best"}, {"switching": True}):
        alone = [transcriber.transcribe(sound, **options) for sound in (SOUNDS[0], SOUNDS[3], LONG)]
        together = transcriber.transcribe_many([SOUNDS[0], SOUNDS[3], LONG] * 2, **options)
        assert [text_of(each) for each in together] == [each.text for each in alone] * 2


# ---- one fails, the others do not ----------------------------------------------------------------------------------------


def test_an_adapter_that_cannot_be_used_fails_its_own_request_only(
    transcriber: Transcriber, tiny_processor: Any, folder: Path, tmp_path: Path
) -> None:
    broken = write_adapter(tmp_path / "da", build_tiny_model(tiny_processor), "da", seed=9)
    weights = load_file(broken / "adapter_model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in weights.items()}, broken / "adapter_model.safetensors")
    transcriber.add_adapter(broken)
    calls = [lambda s=s, c=c: transcriber.transcribe(s, language=c) for s, c in zip(SOUNDS, ["cy", "da", "fi"], strict=False)]
    with queued(transcriber, calls) as futures:
        pass
    assert futures[0].result().text == by_peft(tiny_processor, folder / "cy", SOUNDS[0], "cy")
    assert futures[2].result().text == by_peft(tiny_processor, folder / "fi", SOUNDS[2], "fi")
    with pytest.raises(ValueError, match="not numbers"):
        futures[1].result()


def test_a_batch_that_is_too_large_for_the_memory_is_run_in_parts(transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = [transcriber.transcribe(sound, language="cy").text for sound in SOUNDS[:4]]
    generate = transcriber.engine._generate

    def small_device(encoded: Any, *options: Any) -> Any:
        if len(encoded.last_hidden_state) > 2:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return generate(encoded, *options)

    monkeypatch.setattr(transcriber.engine, "_generate", small_device)
    with queued(transcriber, [lambda s=s: transcriber.transcribe(s, language="cy") for s in SOUNDS[:4]]) as futures:
        pass
    assert [future.result().text for future in futures] == alone
    assert transcriber.engine.max_rows == 2


def test_a_fault_of_the_model_reaches_the_one_who_asked_and_the_next_request_works(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = transcriber.transcribe(SOUNDS[0], language="cy").text
    with monkeypatch.context() as patch:
        patch.setattr(transcriber.engine, "_generate", lambda *_: (_ for _ in ()).throw(RuntimeError("a cosmic ray")))
        with pytest.raises(RuntimeError, match="a cosmic ray"):
            transcriber.transcribe(SOUNDS[0], language="cy")
    assert transcriber.transcribe(SOUNDS[0], language="cy").text == expected


def test_who_is_interrupted_while_working_for_others_leaves_their_work_to_them(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = [transcriber.transcribe(sound, language="cy").text for sound in SOUNDS[:3]]
    run, interrupted = transcriber.engine._write_all, []

    def interrupt_once(jobs: Any) -> Any:
        if not interrupted:
            interrupted.append(threading.get_ident())
            raise KeyboardInterrupt
        return run(jobs)

    monkeypatch.setattr(transcriber.engine, "_write_all", interrupt_once)
    answers: list[str | None] = [None] * 3

    def call(number: int) -> None:
        try:
            answers[number] = transcriber.transcribe(SOUNDS[number], language="cy").text
        except KeyboardInterrupt:
            answers[number] = "interrupted"

    with queued(transcriber, [lambda n=n: call(n) for n in range(3)]):
        pass
    assert sorted(a == b for a, b in zip(answers, alone, strict=True)) == [False, True, True]
    assert answers.count("interrupted") == 1
    assert not transcriber.engine._waiting


def test_more_windows_than_a_batch_may_have_are_written_in_several(
    tiny_model: Any, tiny_processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, sizes = Engine(tiny_model.eval(), max_rows=4), []
    generate = engine._generate
    monkeypatch.setattr(engine, "_generate", lambda encoded, *rest: sizes.append(len(encoded[0])) or generate(encoded, *rest))
    features = tiny_processor(SOUNDS, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    rows = [Row(features[number % 6], "fr", 20) for number in range(11)]
    written = engine.write(rows, None)
    assert sizes == [4, 4, 3]
    assert [each.tokens for each in written] == [engine.write([row], None)[0].tokens for row in rows]


def test_one_request_that_is_too_large_for_the_memory_is_run_in_parts_and_what_failed_is_freed_first(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = transcriber.transcribe(LONG, language="cy").text
    generate, failed = transcriber.engine._generate, []

    def small_device(encoded: Any, *options: Any) -> Any:
        gc.collect()
        assert not any(batch() is not None for batch in failed), "what did not fit is still in memory"
        if len(encoded.last_hidden_state) > 2:
            failed.append(weakref.ref(encoded.last_hidden_state))
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return generate(encoded, *options)

    monkeypatch.setattr(transcriber.engine, "_generate", small_device)
    assert transcriber.transcribe(LONG, language="cy").text == alone
    assert len(failed) >= 1
    assert transcriber.engine.max_rows <= 2


def test_the_thread_that_has_the_model_for_itself_is_told_when_it_asks_for_more(transcriber: Transcriber) -> None:
    with transcriber.engine.exclusive(), pytest.raises(RuntimeError, match="leave engine"):
        transcriber.transcribe(SOUNDS[0], language="cy")
    assert transcriber.transcribe(SOUNDS[0], language="cy").text


def test_an_interruption_while_the_model_is_taken_leaves_it_free(transcriber: Transcriber) -> None:
    expected = transcriber.transcribe(SOUNDS[0], language="cy").text

    class Interrupted(threading.Condition):
        """A signal that lands as the lock is given back, with the model taken."""

        def __exit__(self, *arguments: Any) -> None:
            super().__exit__(*arguments)
            if engine._worker is not None and not arguments[0]:
                engine._changed = self_before
                raise KeyboardInterrupt

    engine = transcriber.engine
    self_before, engine._changed = engine._changed, Interrupted()
    with pytest.raises(KeyboardInterrupt):
        transcriber.transcribe(SOUNDS[0], language="cy")
    assert engine._worker is None
    assert not engine._waiting
    assert transcriber.transcribe(SOUNDS[0], language="cy").text == expected


def test_an_interruption_while_layers_are_exchanged_leaves_every_text_as_it_was(
    transcriber: Transcriber, monkeypatch: pytest.MonkeyPatch
) -> None:
    from whisper_moe import language_table

    expected = {code: transcriber.transcribe(SOUNDS[0], language=code).text for code in ("cy", "fi")}
    replace, count = language_table._replace, []

    def interrupted(*arguments: Any) -> None:
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        replace(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(language_table, "_replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            transcriber.unload()
    assert {code: transcriber.transcribe(SOUNDS[0], language=code).text for code in ("cy", "fi")} == expected
    assert transcriber.transcribe(SOUNDS[0], language="sv").adapter == "sv"  # by the switch, which wants the bare model


# ---- adapters on the model -----------------------------------------------------------------------------------------------


def test_adapters_that_no_table_holds_take_turns_with_the_others(transcriber: Transcriber, tiny_processor: Any, folder: Path) -> None:
    names = set(build_tiny_model(tiny_processor).state_dict())
    before = base_hash(transcriber.model, names)
    for language in ("sv", "cy", "fr", "sv", "sv", "br", "fr", "cy"):
        expected = by_peft(tiny_processor, folder / language if (folder / language).is_dir() else None, SOUNDS[1], language)
        assert transcriber.transcribe(SOUNDS[1], language=language).text == expected, language
        assert base_hash(transcriber.model, names) == before
    languages = ["sv", "cy", "sv", "fr", "fi", "sv"]
    calls = [lambda s=s, c=c: transcriber.transcribe(s, language=c) for s, c in zip(SOUNDS, languages, strict=True)]
    with queued(transcriber, calls) as futures:
        pass
    for future, sound, language in zip(futures, SOUNDS, languages, strict=True):
        assert future.result().text == by_peft(tiny_processor, folder / language if (folder / language).is_dir() else None, sound, language)
    transcriber.unload()
    assert set(transcriber.model.state_dict()) == names
    assert base_hash(transcriber.model, names) == before


def test_the_table_keeps_the_adapters_used_last(tiny_model: Any, tiny_processor: Any, folder: Path) -> None:
    engine = Engine(tiny_model.eval(), max_adapters=2)
    features = [tiny_processor(sound, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features[0] for sound in SOUNDS]
    for name in ("cy", "fi", "br", "cy", "fi", "br"):
        adapter = LanguageAdapter.load(folder / name)
        (written,) = engine.write([Row(features[0], name, 40)], adapter)
        expected = by_peft(tiny_processor, folder / name, SOUNDS[0], name)
        assert cleaned(tiny_processor, written.tokens) == expected
        with engine.table(adapter) as found:
            assert found is not None
            assert len(found[0]) <= 2


def test_an_adapter_is_looked_over_on_the_bare_model_before_it_is_laid_in_the_table(
    tiny_model: Any, tiny_processor: Any, folder: Path
) -> None:
    seen: list[tuple[str, bool]] = []

    def check(path: Path, model: Any) -> None:
        seen.append((path.name, any(hasattr(module, "base_layer") for module in model.modules())))
        if path.name == "fi":
            raise ValueError("Finnish is not trusted here.")

    def load(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("what can lie in the table needs no loading")

    transcriber = Transcriber(tiny_model, tiny_processor, AdapterRegistry.from_folder(folder), load=load, check=check)
    for _ in range(2):
        assert transcriber.transcribe(SOUNDS[0], language="cy").adapter == "cy"
        with pytest.raises(ValueError, match="Finnish is not trusted"):
            transcriber.transcribe(SOUNDS[0], language="fi")
        assert transcriber.transcribe(SOUNDS[0], language="br").adapter == "br"
    assert seen == [("cy", False), ("fi", False), ("br", False), ("fi", False)]


def test_with_a_loader_and_nobody_to_look_over_every_adapter_goes_through_the_loader(
    tiny_model: Any, tiny_processor: Any, folder: Path
) -> None:
    loaded: list[str] = []

    def load(model: Any, path: Any, *arguments: Any, **options: Any) -> Any:
        loaded.append(Path(path).name)
        return load_folder(model, path, *arguments, **options)

    transcriber = Transcriber(tiny_model, tiny_processor, AdapterRegistry.from_folder(folder), load=load)
    for language in ("cy", "fi"):
        assert transcriber.transcribe(SOUNDS[2], language=language).text == by_peft(tiny_processor, folder / language, SOUNDS[2], language)
    assert loaded == ["cy", "fi"]


def test_files_that_change_while_they_are_read_are_not_used(
    transcriber: Transcriber, tiny_processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_adapter(tmp_path / "da", build_tiny_model(tiny_processor), "da", seed=9)
    adapter = transcriber.add_adapter(path)

    def check(folder: Path, model: Any) -> None:  # looked over, and exchanged before they are read
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "adapter_model.safetensors")

    with monkeypatch.context() as patch:
        patch.setattr(transcriber.engine._adapters, "_check", check)
        with pytest.raises(UnusableError, match="changed while they were read"):
            transcriber.engine.check(adapter)
    assert transcriber.transcribe(SOUNDS[0], language="da").adapter == "da"


def test_a_mixture_whose_router_is_the_language_is_weighted_by_what_the_base_hears(
    transcriber: Transcriber, tiny_processor: Any, folder: Path, tmp_path: Path
) -> None:
    from whisper_moe import LoraMoeConfig, use_gates

    experts = {"cy": str(folder / "cy"), "br": str(folder / "br")}
    path = write_adapter(
        tmp_path / "da", build_tiny_model(tiny_processor), "da", peft_config=LoraMoeConfig(r=4, experts=experts, router="language")
    )
    transcriber.add_adapter(path)
    written = transcriber.transcribe(SOUNDS[4], language="da")
    bare = build_tiny_model(tiny_processor).eval()
    inputs = tiny_processor(SOUNDS[4], sampling_rate=SAMPLE_RATE, return_tensors="pt")
    heard = language_posterior(bare, inputs.input_features)[0].probabilities
    gates = {code: heard[code] / (heard["cy"] + heard["br"]) for code in experts}
    adapted = PeftModel.from_pretrained(build_tiny_model(tiny_processor).eval(), str(path))
    with use_gates(adapted, gates):
        tokens = adapted.generate(**inputs, language="da", task="transcribe", max_length=40)
    assert written.text == cleaned(tiny_processor, tokens[0])


@pytest.mark.parametrize("router", ["utterance", "language", "token"])
@pytest.mark.parametrize("how", ["table", "switch"])
def test_a_mixture_writes_what_peft_writes_in_the_table_and_by_the_switch(
    tiny_model: Any, tiny_processor: Any, folder: Path, tmp_path: Path, router: str, how: str
) -> None:
    from whisper_moe import LoraMoeConfig, use_gates

    experts = {"cy": str(folder / "cy"), "br": str(folder / "br")}
    config = LoraMoeConfig(r=4, experts=experts, router=router)
    path = write_adapter(tmp_path / "da", build_tiny_model(tiny_processor), "da", peft_config=config, seed=5)
    transcriber = Transcriber(tiny_model, tiny_processor, load=load_folder if how == "switch" else None)
    transcriber.add_adapter(path)
    for sound in SOUNDS[:2]:
        inputs = tiny_processor(sound, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        heard = language_posterior(build_tiny_model(tiny_processor).eval(), inputs.input_features)[0].probabilities
        gates = {code: heard[code] / (heard["cy"] + heard["br"]) for code in experts}
        adapted = PeftModel.from_pretrained(build_tiny_model(tiny_processor).eval(), str(path))
        with use_gates(adapted, gates) if router == "language" else nullcontext():
            tokens = adapted.generate(**inputs, language="da", task="transcribe", max_length=40)
        expected = cleaned(tiny_processor, tokens[0])
        assert transcriber.transcribe(sound, language="da").text == expected
        assert transcriber.transcribe(sound, allowed=["da"]).text == expected, "what may be heard is not what weighs the experts"


def test_experts_that_somebody_fetches_are_fetched_for_many_recordings_too(
    tiny_model: Any, tiny_processor: Any, folder: Path, tmp_path: Path
) -> None:
    from whisper_moe import LoraMoeConfig, fetch_experts_with

    experts = {name: f"owner/{name}@{'a' * 40}" for name in ("cy", "br")}
    transcriber = Transcriber(tiny_model, tiny_processor)
    with fetch_experts_with(lambda asked, base: {name: folder / name for name in asked}):
        config = LoraMoeConfig(r=4, experts=experts, router="utterance", save_experts="reference")
        path = write_adapter(tmp_path / "da", build_tiny_model(tiny_processor), "da", peft_config=config, seed=5)
        transcriber.add_adapter(path)
    (refused,) = transcriber.transcribe_many(SOUNDS[:1], language="da")
    assert "nobody was named who fetches" in str(refused)
    with fetch_experts_with(lambda asked, base: {name: folder / name for name in asked}):
        together = transcriber.transcribe_many(SOUNDS[:2], language="da")
        assert [text_of(each) for each in together] == [transcriber.transcribe(sound, language="da").text for sound in SOUNDS[:2]]
        with transcriber.engine.table(transcriber.registry["da"]) as found:
            assert found is not None, "a passing trouble keeps nobody out of the table"


def test_what_adapters_took_in_the_table_goes_with_them(tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> None:
    engine = Engine(tiny_model.eval(), max_adapters=2)
    sizes = []
    for number in range(8):
        targets = [f"model.{side}.layers.{layer}.self_attn.q_proj" for side in ("encoder", "decoder") for layer in (0, 1)]
        config = LoraConfig(r=2, target_modules=[targets[number % 4], targets[(number + 1 + number // 4) % 4]])
        path = write_adapter(tmp_path / str(number), build_tiny_model(tiny_processor), "cy", peft_config=config)
        with engine.table(LanguageAdapter.load(path)) as found:
            assert found is not None
            sizes.append(found[0].nbytes())
    assert max(sizes[2:]) <= 2 * max(sizes[:2])


def test_a_configuration_that_changes_while_it_is_read_is_not_used(
    transcriber: Transcriber, tiny_processor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_adapter(tmp_path / "da", build_tiny_model(tiny_processor), "da", seed=9)
    adapter = transcriber.add_adapter(path)

    def check(folder: Path, model: Any) -> None:
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 2', '"lora_alpha": 200000'))

    monkeypatch.setattr(transcriber.engine._adapters, "_check", check)
    with pytest.raises(UnusableError, match="changed while they were read"):
        transcriber.engine.check(adapter)


# ---- cropped windows -----------------------------------------------------------------------------------------------------


def test_a_model_that_says_so_is_given_windows_cropped_to_the_speech_in_them(
    tiny_processor: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whisper_moe.transcribe._CROP_S", 0.5)
    model = build_tiny_model(tiny_processor)
    model.generation_config.cropped_windows = True
    cropping = Transcriber(model, tiny_processor, AdapterRegistry.from_folder(folder))
    sounds = [tone(400, 0.3), tone(500, 0.9), tone(600, 1.9)]
    bare = build_tiny_model(tiny_processor).eval()
    for sound, frames in zip(sounds, (50, 100, 200), strict=True):
        (features,) = cropping._features(sound, engine_spans(sound))
        assert features.shape[-1] == frames
        with torch.no_grad():
            states = encode_cropped(bare, features[None])
            tokens = bare.generate(
                encoder_outputs=BaseModelOutput(states),
                language="fr",
                task="transcribe",
                max_length=16 + round(40 * len(sound) / SAMPLE_RATE),
            )
        assert cropping.transcribe(sound, language="fr").text == cleaned(tiny_processor, tokens[0])
    alone = [cropping.transcribe(sound, language=code).text for sound in sounds for code in ("cy", "br", "sv")]
    for code in ("cy", "br", "sv"):
        together = cropping.transcribe_many(sounds, language=code)
        assert [text_of(each) for each in together] == alone[("cy", "br", "sv").index(code) :: 3]


def engine_spans(sound: np.ndarray) -> Any:
    from whisper_moe.audio import Span

    return [Span(0.0, len(sound) / SAMPLE_RATE)]


# ---- many callers --------------------------------------------------------------------------------------------------------


def test_nobody_is_passed_over_for_ever(transcriber: Transcriber) -> None:
    """A lone request of its own kind is served after a few fuller batches, however many of those wait."""
    engine = transcriber.engine
    features = transcriber._features(SOUNDS[0], engine_spans(SOUNDS[0]))[0]
    lonely = engine_module._Write([0], rows=[Row(features, "fr", 20)], num_beams=3)
    engine._waiting.append(lonely)
    num_before = 0
    while True:
        engine._waiting.extend(engine_module._Write([0], rows=[Row(features, "fr", 20)]) for _ in range(2 * engine.max_rows))
        taken: list[Any] = []
        engine._take(taken)
        if lonely in taken:
            break
        num_before += 1
        assert num_before <= engine_module._TIMES_PASSED
    engine._waiting.clear()
    assert num_before > 0


def test_a_recording_that_cannot_be_used_does_not_end_the_others(transcriber: Transcriber, tmp_path: Path) -> None:
    (tmp_path / "broken.wav").write_bytes(b"nothing of the kind")
    answers = transcriber.transcribe_many([SOUNDS[0], tmp_path / "broken.wav", SOUNDS[1]], language="cy")
    assert [type(each) for each in answers] == [Transcript, AudioError, Transcript]
    with pytest.raises(ValueError, match="at_once is at least 1"):
        transcriber.transcribe_many([], at_once=0)


def test_recordings_are_asked_for_when_there_is_somebody_to_work_on_them_and_an_interruption_ends_the_rest(
    transcriber: Transcriber,
) -> None:
    asked: list[int] = []
    done: list[int] = []

    def recordings() -> Iterator[np.ndarray]:
        for number in range(100):
            assert number - len(done) <= 3, "recordings wait in memory"
            if number == 6:  # as a signal would, in the middle of the work
                raise KeyboardInterrupt
            asked.append(number)
            yield LONG

    with pytest.raises(KeyboardInterrupt):
        transcriber.transcribe_many(recordings(), at_once=2, language="cy", batch_size=1, on_done=lambda number, _: done.append(number))
    answers = len(done)
    assert asked == list(range(6))
    assert not any(thread.name.startswith("transcribe") for thread in threading.enumerate())
    assert transcriber.transcribe(SOUNDS[0], language="cy").text
    assert len(done) == answers


def test_segments_come_as_soon_as_they_are_written(transcriber: Transcriber) -> None:
    shown: list[Any] = []
    transcript = transcriber.transcribe(LONG, language="cy", batch_size=2, on_segments=lambda new: shown.append(list(new)))
    assert [segment for new in shown for segment in new] == list(transcript.segments)
    assert len(shown) > 1


@pytest.mark.parametrize("options", [{"language": "cy"}, {}, {"switching": True}], ids=["given", "heard", "switching"])
def test_what_progress_raises_ends_the_work_and_the_next_request_works(transcriber: Transcriber, options: dict[str, Any]) -> None:
    class EnoughError(Exception):
        pass

    told: list[float] = []

    def stop_at_the_third(share: float, what: str) -> None:
        told.append(share)
        if share > 0.15:
            raise EnoughError

    with pytest.raises(EnoughError):
        transcriber.transcribe(LONG, batch_size=1, on_progress=stop_at_the_third, **options)
    assert told[-1] < 1
    assert transcriber.transcribe(SOUNDS[0], language="cy").text


def test_the_engine_refuses_sizes_that_make_no_sense(tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="max_rows and max_adapters are at least 1"):
        Engine(tiny_model, max_rows=0)
