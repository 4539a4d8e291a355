"""Similarity against a plain loop over single clips: the posterior's mean, states without padding, tokens counted by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tone

from whisper_moe.data import Clip, Clips
from whisper_moe.registry import AdapterSwitch, LanguageAdapter
from whisper_moe.similarity import Similarity, language_similarity, save_similarity, similarity_matrix, token_coverage


def some_clips(name: str, frequency: float, number: int = 5, text: str = "abc") -> Clips:
    return Clips(
        [Clip((tone(frequency + 170 * i, 0.3 + 0.25 * i) * 32767).astype(np.int16), f"{text} {i}") for i in range(number)],
        name,
    )


def plain(model: Any, processor: Any, clips: Clips) -> tuple[dict[str, list[float]], np.ndarray]:
    """Code -> posterior of each clip, and the mean over clips of each one's mean state; a clip at a time, with Transformers alone."""
    tokens = model.generation_config.lang_to_id
    start = torch.tensor([[model.generation_config.decoder_start_token_id]])
    shares: dict[str, list[float]] = {token.strip("<|>"): [] for token in tokens}
    states = []
    with torch.no_grad():
        for i in range(len(clips)):
            features = processor(clips[i]["audio"], sampling_rate=16000, return_tensors="pt").input_features
            encoded = model.get_encoder()(features).last_hidden_state[0]
            positions = -(-len(clips[i]["audio"]) // 320)
            states.append(encoded[:positions].mean(0).numpy())
            weights = model(features, decoder_input_ids=start).logits[0, -1][list(tokens.values())].softmax(-1).tolist()
            for token, weight in zip(tokens, weights, strict=True):
                shares[token.strip("<|>")].append(weight)
    return shares, np.mean(states, axis=0)


def measure(model: Any, processor: Any, clips: Clips, **options: Any) -> Similarity:
    return language_similarity(model, processor, clips, batch_size=2, precision="fp32", **options)


def test_the_table_is_the_renormalised_mean_of_single_posteriors(tiny_model: Any, tiny_processor: Any) -> None:
    clips = some_clips("set", 200)
    shares, _ = plain(tiny_model, tiny_processor, clips)
    means = {code: np.mean(values) for code, values in shares.items() if code != "cy"}
    found = measure(tiny_model, tiny_processor, clips, language="Welsh")
    assert {row.language: row.probability for row in found.rows} == pytest.approx(
        {c: m / sum(means.values()) for c, m in means.items()}, rel=1e-4
    )
    assert [row.probability for row in found.rows] == sorted((row.probability for row in found.rows), reverse=True)
    assert found.own == pytest.approx(np.mean(shares["cy"]), rel=1e-4)
    assert found.share == pytest.approx(sum(means.values()), rel=1e-4)
    assert sum(row.heard for row in found.rows) == pytest.approx(1)
    for row in found.rows[:3]:
        of_each = [value / sum(shares[c][i] for c in means) for i, value in enumerate(shares[row.language])]
        assert row.spread == pytest.approx(np.std(of_each), rel=1e-3)
        assert row.low <= row.probability <= row.high


def test_some_candidates_are_ranked_among_themselves(tiny_model: Any, tiny_processor: Any) -> None:
    clips = some_clips("set", 200)
    shares, _ = plain(tiny_model, tiny_processor, clips)
    found = measure(tiny_model, tiny_processor, clips, language="cy", among=["fr", "Spanish", "cy"])
    means = {code: np.mean(shares[code]) for code in ("fr", "es")}
    assert {row.language: row.probability for row in found.rows} == pytest.approx(
        {c: m / sum(means.values()) for c, m in means.items()}, rel=1e-4
    )
    assert found.is_weak == (sum(means.values()) < 0.1)


def test_adapters_at_work_do_not_colour_the_table(tiny_model: Any, tiny_processor: Any, make_adapter: Callable[..., Path]) -> None:
    clips = some_clips("set", 200, 3)
    before = measure(tiny_model, tiny_processor, clips, language="cy")
    with AdapterSwitch(tiny_model).active(LanguageAdapter.load(make_adapter("cy"))) as active:
        assert measure(active, tiny_processor, clips, language="cy") == before


def test_cosine_and_coverage_stand_beside_the_posterior(tiny_model: Any, tiny_processor: Any) -> None:
    sets = {"qug": some_clips("kichwa", 200), "de": some_clips("german", 900, text="abd"), "fr": some_clips("french", 2500, 4, text="x")}
    states = {code: plain(tiny_model, tiny_processor, clips)[1] for code, clips in sets.items()}
    middle = np.mean(list(states.values()), axis=0)

    def angle(first: np.ndarray, second: np.ndarray) -> float:
        return float(first @ second / np.linalg.norm(first) / np.linalg.norm(second))

    adapters = {"de-a": "German", "de-b": "de", "other": "es"}
    found = measure(tiny_model, tiny_processor, sets["qug"], language="qug", others={"de": sets["de"], "fr": sets["fr"]}, adapters=adapters)
    rows = {row.language: row for row in found.rows}
    assert found.centred
    for code in ("de", "fr"):
        assert rows[code].cosine == pytest.approx(angle(states["qug"] - middle, states[code] - middle), abs=1e-3)
    assert rows["es"].cosine is None
    assert (rows["de"].adapters, rows["es"].adapters) == (("de-a", "de-b"), ("other",))
    assert rows["de"].coverage == pytest.approx(5 * 5 / (6 * 5))  # of " abc 0": all but c is in " abd 0"
    alone = measure(tiny_model, tiny_processor, sets["qug"], language="qug", others={"de": sets["de"]})
    assert not alone.centred
    assert {row.language: row.cosine for row in alone.rows}["de"] == pytest.approx(angle(states["qug"], states["de"]), abs=1e-4)


def test_a_language_without_a_token_is_compared_by_its_clips(tiny_model: Any, tiny_processor: Any) -> None:
    found = measure(
        tiny_model,
        tiny_processor,
        some_clips("new", 300),
        among=["qug", "de"],
        others={"qug": some_clips("kichwa", 310), "de": some_clips("de", 900)},
    )
    assert [row.language for row in found.rows] == ["de", "qug"]
    assert found.rows[1].probability is None
    assert found.rows[1].cosine is not None
    assert "Kichwa (qug)" in found.to_markdown()


def test_tokens_are_counted_with_their_repetitions(tiny_processor: Any) -> None:
    # bytes are the tiny tokenizer's tokens; each line opens with a space
    assert token_coverage(tiny_processor, ["aab"], ["a"]) == pytest.approx(3 / 4)
    assert token_coverage(tiny_processor, ["aab"], ["c"]) == pytest.approx(1 / 4)
    assert token_coverage(tiny_processor, ["ab"], ["ba", "x"]) == 1
    with pytest.raises(ValueError, match="no text"):
        token_coverage(tiny_processor, [], ["a"])


def test_the_same_seed_listens_to_the_same_clips(tiny_model: Any, tiny_processor: Any) -> None:
    clips = some_clips("set", 200, 8)
    first, again, other = (measure(tiny_model, tiny_processor, clips, num_utterances=3, seed=seed) for seed in (0, 0, 2))
    assert first == again
    assert first.num_utterances == 3
    assert first.rows != other.rows


def test_the_matrix_holds_the_three_views_of_all_pairs(tiny_model: Any, tiny_processor: Any) -> None:
    sets = {"qug": some_clips("kichwa", 200), "German": some_clips("german", 900, text="abd"), "fr": some_clips("french", 2500, text="x")}
    matrix = similarity_matrix(tiny_model, tiny_processor, sets, batch_size=2, precision="fp32")
    assert matrix.languages == ("qug", "de", "fr")
    assert np.isnan(matrix.posterior[:, 0]).all()
    for row, clips in enumerate(sets.values()):
        shares, _ = plain(tiny_model, tiny_processor, clips)
        assert matrix.posterior[row, 1:].tolist() == pytest.approx([np.mean(shares["de"]), np.mean(shares["fr"])], rel=1e-4)
    assert np.diag(matrix.cosine) == pytest.approx(np.ones(3))
    assert np.allclose(matrix.cosine, matrix.cosine.T)
    assert np.diag(matrix.coverage).tolist() == [1, 1, 1]
    assert matrix.to_dict()["posterior"][0][0] is None


def test_requests_that_make_no_sense_are_refused(tiny_model: Any, tiny_processor: Any) -> None:
    clips = some_clips("set", 200, 2)
    with pytest.raises(ValueError, match="no language token for 'qug'"):
        measure(tiny_model, tiny_processor, clips, among=["qug"])
    with pytest.raises(ValueError, match="no language to compare with"):
        measure(tiny_model, tiny_processor, clips, language="cy", among=["cy"])
    with pytest.raises(ValueError, match="two languages or more"):
        similarity_matrix(tiny_model, tiny_processor, {"cy": clips, "Welsh": clips})
    with pytest.raises(ValueError, match="no clips"):
        measure(tiny_model, tiny_processor, Clips([], "none"))


def test_table_figures_and_json_are_written(tiny_model: Any, tiny_processor: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="figures need the train extra: pip install peft-s2lora[train]")
    clips = some_clips("set", 200, 3)
    found = measure(tiny_model, tiny_processor, clips, language="cy")
    matrix = similarity_matrix(tiny_model, tiny_processor, {"cy": clips, "de": some_clips("de", 900, 3)})
    save_similarity(tmp_path, found, matrix)
    row = json.loads((tmp_path / "similarity.json").read_text("utf-8"))
    assert row["rows"][0]["language"] == found.nearest.language
    assert row["matrix"]["languages"] == ["cy", "de"]
    assert (tmp_path / "similarity.md").read_text("utf-8").count("\n| ") >= 10
    for name in ("similarity.png", "similarity_matrix.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    bars = [bar.get_width() for bar in found.figure().axes[0].patches]
    assert bars == pytest.approx([100 * row.probability for row in found.rows[:10]])


# ---- the command -------------------------------------------------------------------------------------------------------


def test_the_command_ranks_languages_and_compares_several(
    tiny_folder: Path, make_adapter: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import soundfile

    from whisper_moe.cli import main

    adapters = make_adapter("cy").parent
    for name, frequency in (("a", 200), ("b", 900)):
        (tmp_path / name).mkdir()
        for i in range(3):
            soundfile.write(tmp_path / name / f"{i}.wav", tone(frequency + 50 * i, 0.4), 16000)
        rows = "\n".join(f"{i}.wav,text {i}" for i in range(3))
        (tmp_path / name / "train.csv").write_text("file_name,text\n" + rows, "utf-8")
    options = ["--model", str(tiny_folder), "--adapters", str(adapters), "--device", "cpu"]
    assert main(["similar", "--data", f"qug={tmp_path / 'a'}", f"de={tmp_path / 'b'}", *options, "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "What a/train sounds like" in out
    assert (tmp_path / "out" / "similarity_matrix.png").is_file()
    assert main(["similar", "--data", str(tmp_path / "a"), *options, "--only-with-adapter", "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert [(each["language"], each["adapters"]) for each in row["rows"]] == [("cy", ["cy"])]
    assert main(["similar", "--data", str(tmp_path / "a"), str(tmp_path / "b"), *options]) == 2
    assert "each needs its language" in capsys.readouterr().err
