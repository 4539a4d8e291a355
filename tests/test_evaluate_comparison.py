"""Adapters side by side: figures equal to one-by-one evaluation, old languages compared bit by bit, and files that survive trouble."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import base_hash, tone, write_adapter

from whisper_moe import comparison as module
from whisper_moe.comparison import FILES, EvalSet, OldLanguage, evaluate_adapters, fingerprint
from whisper_moe.data import Clip, Clips
from whisper_moe.evaluate import evaluate_clips, score
from whisper_moe.registry import AdapterSwitch, LanguageAdapter


def some_clips(name: str, number: int = 4, text: str = "ab cd", speakers: bool = False) -> Clips:
    return Clips(
        [
            Clip((tone(200 + 130 * i, 0.4 + 0.2 * i) * 32767).astype(np.int16), f"{text} {i}", None, f"s{i}" if speakers else None)
            for i in range(number)
        ],
        name,
    )


@pytest.fixture
def adapters(make_adapter: Callable[..., Path]) -> list[LanguageAdapter]:
    return [LanguageAdapter.load(make_adapter("cy", name=name, seed=seed)) for name, seed in (("one", 1), ("two", 2))]


def compare(model: Any, processor: Any, *arguments: Any, **options: Any) -> Any:
    return evaluate_adapters(model, processor, *arguments, num_resamples=200, batch_size=2, precision="fp32", **options)


# ---- figures -----------------------------------------------------------------------------------------------------------


def test_every_system_has_the_rates_of_its_own_evaluation(tiny_model: Any, tiny_processor: Any, adapters: list[LanguageAdapter]) -> None:
    clips = some_clips("set")
    result = compare(tiny_model, tiny_processor, [EvalSet(clips, "Welsh")], adapters).sets[0]
    assert [system.name for system in result.systems] == ["base", "one", "two"]
    switch = AdapterSwitch(tiny_model)
    for system, adapter in zip(result.systems, [None, *adapters], strict=True):
        with switch.active(adapter) as model:
            alone = evaluate_clips(model, tiny_processor, clips, prompt_language="cy", batch_size=2, precision="fp32")
        assert system.hypotheses == alone.hypotheses
        for kind, rates in system.rates.items():
            expected = score(clips.texts, alone.hypotheses, kind, language="cy")
            assert (rates.wer.value, rates.cer.value) == pytest.approx((expected.wer, expected.cer))
            assert rates.wer.low <= rates.wer.value <= rates.wer.high
    assert len({tuple(system.hypotheses) for system in result.systems}) == 3


def test_pairs_name_the_better_one_first(tiny_model: Any, tiny_processor: Any, adapters: list[LanguageAdapter]) -> None:
    result = compare(tiny_model, tiny_processor, [EvalSet(some_clips("set"), "cy")], adapters).sets[0]
    rates = {system.name: system.rates["mark-preserving"].wer.value for system in result.systems}
    assert {frozenset((pair.better, pair.than)) for pair in result.comparisons} == {
        frozenset(pair) for pair in (("base", "one"), ("base", "two"), ("one", "two"))
    }
    for pair in result.comparisons:
        assert pair.difference == pytest.approx(rates[pair.than] - rates[pair.better])
        assert pair.difference >= 0
        assert pair.p_value <= pair.p_adjusted <= 1


def test_a_script_without_spaces_is_compared_by_characters(tiny_model: Any, tiny_processor: Any, make_adapter: Callable[..., Path]) -> None:
    adapter = LanguageAdapter.load(make_adapter("th"))
    result = compare(tiny_model, tiny_processor, [EvalSet(some_clips("set"), "th")], [adapter]).sets[0]
    assert {pair.rate for pair in result.comparisons} == {"cer"}


def test_a_language_without_a_token_is_written_under_its_carrier(
    tiny_model: Any, tiny_processor: Any, make_adapter: Callable[..., Path]
) -> None:
    adapter = LanguageAdapter.load(make_adapter("qug", carrier="es"))
    kichwa = some_clips("set", 2)
    prompts = [
        system.prompt_language for system in compare(tiny_model, tiny_processor, [EvalSet(kichwa, "qug")], [adapter]).sets[0].systems
    ]
    assert prompts == ["es", "es"]
    given = compare(tiny_model, tiny_processor, [EvalSet(kichwa, "qug", "pt")], [adapter]).sets[0].systems
    assert [system.prompt_language for system in given] == ["pt", "es"]
    heard = compare(tiny_model, tiny_processor, [EvalSet(kichwa, "qug")]).sets[0].systems[0].prompt_language
    assert f"<|{heard}|>" in tiny_model.generation_config.lang_to_id


def test_the_model_leaves_as_it_came(tiny_model: Any, tiny_processor: Any, adapters: list[LanguageAdapter]) -> None:
    names, modules = set(tiny_model.state_dict()), [type(module) for module in tiny_model.modules()]
    before = base_hash(tiny_model, names)
    compare(tiny_model, tiny_processor, [EvalSet(some_clips("set", 2), "cy")], adapters)
    assert [type(module) for module in tiny_model.modules()] == modules
    assert base_hash(tiny_model, names) == before


# ---- old languages -----------------------------------------------------------------------------------------------------


def test_old_languages_are_identical_to_the_last_bit(
    tiny_model: Any, tiny_processor: Any, adapters: list[LanguageAdapter], make_adapter: Callable[..., Path]
) -> None:
    earlier = LanguageAdapter.load(make_adapter("de"))
    old = [OldLanguage(some_clips("german"), "de", earlier), OldLanguage(some_clips("french"), "fr")]
    found = compare(tiny_model, tiny_processor, [EvalSet(some_clips("set", 2), "cy")], adapters, old_languages=old)
    assert [(each.language, each.served_by, each.after, each.differing) for each in found.old_languages] == [
        (language, served_by, after, []) for after in ("one", "two") for language, served_by in (("de", "de"), ("fr", "base"))
    ]
    assert found.old_languages_unchanged
    assert found.to_markdown().count("identical to the last bit") == 4


@pytest.mark.parametrize("damage", ["weights", "adapter left on"])
def test_a_change_of_an_old_language_is_found(
    tiny_model: Any, tiny_processor: Any, adapters: list[LanguageAdapter], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """A switch that spoils the base, as a faulty one might: by a billionth of one weight, or by leaving an adapter at work."""
    attach = AdapterSwitch._attach

    def spoiling(self: AdapterSwitch, adapter: LanguageAdapter) -> str:
        name = attach(self, adapter)
        if damage == "weights":
            with torch.no_grad():
                weight = next(parameter for key, parameter in self.model.named_parameters() if key.endswith("encoder.conv1.weight"))
                weight.view(-1)[0] = torch.nextafter(weight.view(-1)[0], torch.tensor(torch.inf))
        return name

    monkeypatch.setattr(AdapterSwitch, "_attach", spoiling)
    if damage == "adapter left on":
        monkeypatch.setattr(AdapterSwitch, "_enable", lambda self, enabled: None)
    old = [OldLanguage(some_clips("french"), "fr")]
    found = compare(tiny_model, tiny_processor, [EvalSet(some_clips("set", 2), "cy")], adapters[:1], old_languages=old)
    assert not found.old_languages_unchanged
    assert ("weights" in found.old_languages[0].differing) == (damage == "weights")
    assert {"encoder", "logits"} <= set(found.old_languages[0].differing)
    assert "**different: " in found.to_markdown()


def test_a_fingerprint_sees_one_bit_of_one_weight_and_sees_through_peft(
    tiny_model: Any, tiny_processor: Any, adapters: list[LanguageAdapter]
) -> None:
    clips = some_clips("set", 3)
    first = fingerprint(tiny_model, tiny_processor, clips, prompt_language="fr", batch_size=2)
    switch = AdapterSwitch(tiny_model)
    with switch.active(adapters[0]):
        assert {"encoder", "logits"} <= set(
            first.differing(fingerprint(tiny_model, tiny_processor, clips, prompt_language="fr", batch_size=2))
        )
    assert not first.differing(fingerprint(tiny_model, tiny_processor, clips, prompt_language="fr", batch_size=2))
    switch.unload()
    changed = copy.deepcopy(tiny_model)
    with torch.no_grad():
        weight = changed.model.decoder.layers[1].fc2.weight
        weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    assert first.differing(fingerprint(changed, tiny_processor, clips, prompt_language="fr", batch_size=2))[0] == "weights"


# ---- requests that make no sense ---------------------------------------------------------------------------------------


def test_requests_that_make_no_sense_are_refused_before_any_work(
    tiny_model: Any, tiny_processor: Any, adapters: list[LanguageAdapter], tmp_path: Path
) -> None:
    from conftest import build_tiny_model

    german = EvalSet(some_clips("german"), "de")
    stranger = LanguageAdapter.load(write_adapter(tmp_path / "other", build_tiny_model(tiny_processor, seed=3), "de"))
    for sets, given, options, words in (
        ([german], adapters, {}, "there is no set of that language, only of de"),
        ([german], [], {"with_base": False}, "Nobody is to write german"),
        ([], [], {}, "nothing to evaluate"),
        ([german, german], [], {}, "Two sets have the name german"),
        ([german], [], {"normalizers": ["nltk"]}, "mark-preserving, whisper-basic"),
        ([german], [stranger], {}, "was made for"),
        ([german], [], {"level": 95}, "between 0 and 1"),
    ):
        if words == "between 0 and 1":
            found = compare(tiny_model, tiny_processor, sets, given, **options)
            assert words in found.problems[0]
            continue
        with pytest.raises(ValueError, match=words):
            compare(tiny_model, tiny_processor, sets, given, **options)
    with pytest.raises(ValueError, match="French"):
        EvalSet(some_clips("a"), "Frensh")


# ---- files -------------------------------------------------------------------------------------------------------------


def test_files_hold_the_figures_the_texts_and_a_picture(
    tiny_model: Any, tiny_processor: Any, adapters: list[LanguageAdapter], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib", reason="figures need the train extra: pip install peft-s2lora[train]")
    sets = [EvalSet(some_clips("set"), "cy"), EvalSet(some_clips("more|pipes", 2, "日本 語"), "ja")]
    found = compare(tiny_model, tiny_processor, sets, adapters, save_to=tmp_path / "out")
    row = json.loads((tmp_path / "out" / FILES["json"]).read_text("utf-8"))
    assert (
        row["sets"][0]["systems"][1]["rates"]["whisper-basic"]["cer"]["value"] == found.sets[0].systems[1].rates["whisper-basic"].cer.value
    )
    assert row["versions"]["jiwer"]
    lines = [json.loads(line) for line in (tmp_path / "out" / FILES["transcripts"]).read_text("utf-8").splitlines()]
    assert len(lines) == 6
    assert lines[2] == {"set": "set", "clip": 2, "reference": "ab cd 2"} | {s.name: s.hypotheses[2] for s in found.sets[0].systems}
    text = (tmp_path / "out" / FILES["markdown"]).read_text("utf-8")
    for system in found.sets[0].systems:
        assert f"| {system.name} | {system.rates['mark-preserving'].wer} |" in text
    assert (tmp_path / "out" / FILES["figure"]).read_bytes().startswith(b"\x89PNG")
    assert not list((tmp_path / "out").glob("*.new"))
    axes = found.figure().axes
    marks = [line.get_xdata()[0] for line in axes[0].lines if len(line.get_xdata()) == 1]
    assert marks == pytest.approx([100 * system.rates["mark-preserving"].wer.value for system in found.sets[0].systems])


def test_samples_go_from_the_best_clip_to_the_worst(tiny_model: Any, tiny_processor: Any, adapters: list[LanguageAdapter]) -> None:
    found = compare(tiny_model, tiny_processor, [EvalSet(some_clips("set", 7), "cy")], adapters, num_samples=3).sets[0]
    assert [sample["which"] for sample in found.samples] == ["best", "50% are better", "worst"]
    last = found.systems[-1]
    rates = {text: score([text], [written]).cer for text, written in zip(found.references, last.hypotheses, strict=True)}
    shown = [rates[sample["reference"]] for sample in found.samples]
    assert shown == [min(rates.values()), sorted(rates.values())[3], max(rates.values())]


def test_a_full_disk_costs_no_figures_and_leaves_the_old_file(
    tiny_model: Any, tiny_processor: Any, adapters: list[LanguageAdapter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / FILES["json"]).write_text("earlier")

    def full(path: Path, *_: Any, **__: Any) -> int:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.Path, "write_text", full)
    with pytest.warns(UserWarning, match="No space left on device"):
        found = compare(tiny_model, tiny_processor, [EvalSet(some_clips("set", 2), "cy")], adapters, save_to=tmp_path)
    assert len(found.sets[0].systems) == 3
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [FILES["json"]]
    assert (tmp_path / FILES["json"]).read_bytes() == b"earlier"
    with pytest.raises(OSError, match="No space"):
        found.save(tmp_path)


def test_a_set_that_cannot_be_measured_is_told_and_the_others_go_on(tiny_model: Any, tiny_processor: Any) -> None:
    sets = [EvalSet(some_clips("empty", 2, "?!").select(lambda clip: True, ""), "de"), EvalSet(some_clips("good", 2), "fr")]
    silent = Clips([Clip(clip.samples, "?!") for clip in sets[0].clips.clips], "empty")
    found = compare(tiny_model, tiny_processor, [EvalSet(silent, "de"), sets[1]])
    assert [result.name for result in found.sets] == ["good"]
    assert found.problems[0].startswith("empty: No reference has a word in it")
    assert "## Not measured" in found.to_markdown()


def test_an_interrupted_run_has_saved_the_sets_before(
    tiny_model: Any, tiny_processor: Any, adapters: list[LanguageAdapter], tmp_path: Path
) -> None:
    seen: list[str] = []

    def stop(result: Any) -> None:
        seen.append(result.name)
        if len(seen) == 2:
            raise KeyboardInterrupt

    sets = [EvalSet(some_clips(name, 2), "cy") for name in ("first", "second")]
    with pytest.raises(KeyboardInterrupt):
        compare(tiny_model, tiny_processor, sets, adapters, save_to=tmp_path, on_set=stop)
    row = json.loads((tmp_path / FILES["json"]).read_text("utf-8"))
    assert [result["name"] for result in row["sets"]] == ["first"]
    assert not hasattr(tiny_model, "peft_config")


# ---- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_folder(tmp_path: Path) -> Path:
    """20 clips and metadata.csv, as somebody might have them."""
    import soundfile

    folder = tmp_path / "mine"
    folder.mkdir()
    lines = ["file_name,text"]
    for i in range(20):
        soundfile.write(folder / f"{i}.wav", tone(200 + 40 * i, 0.4), 16000)
        lines.append(f"{i}.wav,clip number {i}")
    (folder / "metadata.csv").write_text("\n".join(lines), "utf-8")
    return folder


def test_the_command_measures_a_folder_of_ones_own(
    tiny_folder: Path, own_folder: Path, adapters: list[LanguageAdapter], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from whisper_moe.cli import main

    options = f"--adapters {adapters[0].path} --model {tiny_folder} --device cpu --num-resamples 200"
    data = f"evaluate --data cy={own_folder} --old fr={own_folder} Welsh={own_folder} --old-adapters {adapters[1].path}"
    assert main([*data.split(), *options.split(), "--out", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "| base |" in out
    assert re.findall(r"\((\w+)\) \| (\w+) \| one \|.* identical to the last bit", out) == [("fr", "base"), ("cy", "two")]
    assert "14 train, 2 dev, 4 test" in err
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(FILES.values())
    assert main(["evaluate", "--data", f"cy={own_folder}", str(tmp_path / "gone"), *options.split(), "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["sets"][0]["language"] == "cy"
    assert "not measured:" in err
    assert main(["evaluate", "--data", f"Frensh={own_folder}", *options.split()]) == 2
    assert "French" in capsys.readouterr().err


def test_two_commands_make_an_evaluated_adapter_of_a_folder_of_ones_own(
    tiny_folder: Path, own_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from whisper_moe.cli import main

    data = f"--data {own_folder} --eval-data {own_folder} --dev-data {own_folder} --language cy --out {tmp_path / 'cy'}"
    size = "--method lora --rank 2 --max-steps 1 --batch-size 4 --num-workers 0 --base-id tests/tiny"
    assert main(["train", *data.split(), *size.split(), "--model", str(tiny_folder)]) == 0
    card = (tmp_path / "cy" / "README.md").read_text("utf-8")
    assert "mine/test" in card
    row = json.loads((tmp_path / "cy" / "language_adapter.json").read_text("utf-8"))
    assert (row["training"]["clips"], row["metrics"]["after"]["clips"]) == (14, 4)
    command = f"evaluate --data cy={own_folder} --adapters {tmp_path / 'cy'} --model {tiny_folder} --device cpu --num-resamples 200"
    assert main(command.split()) == 0
    assert "| cy |" in capsys.readouterr().out


# ---- Hugging Face's evaluate -------------------------------------------------------------------------------------------


def test_our_rates_are_a_metric_of_hugging_faces_evaluate(tmp_path: Path) -> None:
    pytest.importorskip("evaluate", reason="the metric needs the train extra: pip install peft-s2lora[train]")
    from whisper_moe.evaluate_metric import ErrorRates

    references, hypotheses = ["हिन्दी भाषा", "two"], ["हिन्दी", "two too"]
    metric = ErrorRates(cache_dir=str(tmp_path))
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        metric.add_batch(predictions=[hypothesis], references=[reference])
    assert metric.compute() == score(references, hypotheses).to_dict()
    basic = ErrorRates(cache_dir=str(tmp_path)).compute(predictions=hypotheses, references=references, normalizer="whisper-basic")
    assert basic == score(references, hypotheses, "whisper-basic").to_dict()
