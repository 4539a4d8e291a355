"""Error rates against a plain edit distance, the normaliser's properties, and evaluation of a model against one clip at a time."""

from __future__ import annotations

import random
import re
import unicodedata

import numpy as np
import pytest
from conftest import tone
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe.data import Clip, Clips
from whisper_moe.evaluate import SCRIPTS_WITHOUT_SPACES, count_errors, evaluate_clips, normalize, score, show_errors, uses_bf16


def edit_distance(first: list[str], second: list[str]) -> int:
    """Levenshtein's recurrence, written out."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (left != right))
    return row[-1]


def clip(frequency: float, duration_s: float, text: str) -> Clip:
    return Clip((tone(frequency, duration_s) * 32767).astype(np.int16), text, "de")


# ---- scores ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_error_rates_equal_a_plain_edit_distance(seed: int) -> None:
    rng = random.Random(seed)
    texts = [[" ".join(rng.choices(["a", "bc", "def", "dé"], k=rng.randint(1, 6))) for _ in range(8)] for _ in range(2)]
    references, hypotheses = texts
    words = sum(edit_distance(r.split(), h.split()) for r, h in zip(references, hypotheses, strict=True))
    chars = sum(edit_distance(list(r), list(h)) for r, h in zip(references, hypotheses, strict=True))
    scores = score(references, hypotheses)
    assert scores.wer == pytest.approx(words / sum(len(r.split()) for r in references))
    assert scores.cer == pytest.approx(chars / sum(map(len, references)))
    assert scores.substitutions + scores.deletions + scores.insertions == words
    assert (scores.num_words, scores.num_chars) == (sum(len(r.split()) for r in references), sum(map(len, references)))


def test_text_written_for_an_empty_reference_counts_as_inserted() -> None:
    scores = score(["one two", ""], ["one two", "three"])
    assert (scores.wer, scores.insertions, scores.num_words) == (0.5, 1, 2)


def test_nothing_but_empty_references_is_refused() -> None:
    with pytest.raises(ValueError, match="undefined"):
        score(["", " ?! "], ["a", "b"])


def test_different_numbers_of_texts_are_refused() -> None:
    with pytest.raises(ValueError, match="2 references and 1 hypotheses"):
        score(["a", "b"], ["a"])


@pytest.mark.parametrize("language", sorted(SCRIPTS_WITHOUT_SPACES))
def test_spaces_do_not_count_in_scripts_without_spaces(language: str) -> None:
    scores = score(["我們 是 人"], ["我們是 人"], language=language)
    assert scores.cer == 0
    assert scores.headline == "cer"


def test_spaces_count_where_words_are_set_apart() -> None:
    scores = score(["ab cd"], ["abcd"], language="de")
    assert scores.cer == pytest.approx(1 / 5)
    assert scores.headline == "wer"


@given(st.lists(st.tuples(st.text("ab ", max_size=8), st.text("ab ", max_size=8)), min_size=1, max_size=6))
def test_errors_of_each_clip_are_its_own_edit_distance(pairs: list[tuple[str, str]]) -> None:
    references, hypotheses = [["x " + said for said, _ in pairs], [written for _, written in pairs]]
    for language in ("de", "th"):
        counts = count_errors(references, hypotheses, language=language)
        said, written = ([normalize(text) for text in texts] for texts in (references, hypotheses))
        assert counts.word_errors.tolist() == [edit_distance(r.split(), h.split()) for r, h in zip(said, written, strict=True)]
        assert counts.words.tolist() == [len(text.split()) for text in said]
        if language == "th":
            said, written = ([text.replace(" ", "") for text in texts] for texts in (said, written))
        assert counts.char_errors.tolist() == [edit_distance(list(r), list(h)) for r, h in zip(said, written, strict=True)]
        assert counts.chars.tolist() == [len(text) for text in said]
        assert counts.word_errors.sum() / counts.words.sum() == pytest.approx(counts.scores.wer)


@given(st.text("abc ", max_size=20), st.text("abc ", max_size=20))
def test_shown_errors_hold_both_texts_again(said: str, written: str) -> None:
    shown = show_errors(said, written)
    left = re.sub(r"\{\+.*?\+\}", " ", shown).replace("[-", " ").replace("-]", " ")
    right = re.sub(r"\[-.*?-\]", " ", shown).replace("{+", " ").replace("+}", " ")
    assert (left.split(), right.split()) == (said.split(), written.split())


def test_shown_errors_read_well() -> None:
    assert show_errors("Das ist ein Haus.", "das war ein großes Haus") == "das [-ist-]{+war+} ein {+großes+} haus"
    assert show_errors("我們是人", "我们是", language="zh") == "我[-們-]{+们+}是[-人-]"


# ---- normaliser --------------------------------------------------------------------------------------------------------


@settings(max_examples=500)
@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    once = normalize(text)
    assert normalize(once) == once


@settings(deadline=None)  # the first call imports Whisper's normaliser
@given(st.text())
def test_normalised_text_is_trimmed_with_single_spaces(text: str) -> None:
    for kind in ("mark-preserving", "whisper-basic"):
        assert normalize(text, kind) == " ".join(normalize(text, kind).split())


@settings(max_examples=300)
@given(st.text())
def test_the_same_text_in_another_unicode_form_is_the_same(text: str) -> None:
    forms = {normalize(unicodedata.normalize(form, text)) for form in ("NFC", "NFD")}
    assert len(forms) == 1


@given(st.text(st.characters(categories=["L", "M", "N"]), max_size=12))
def test_letters_marks_and_digits_are_never_lost(text: str) -> None:
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).lower())
    kept = "".join(char for char in folded if unicodedata.category(char)[0] in "LMN")
    assert normalize(text).replace(" ", "").replace("'", "") == kept


@pytest.mark.parametrize("word", ["हिन्दी", "ที่นี่", "தமிழ்", "မြန်မာ"])
def test_combining_marks_are_kept_by_default_and_lost_by_whispers_normaliser(word: str) -> None:
    assert normalize(f"«{word}»!") == word
    assert normalize(word, "whisper-basic") != word


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("L\u2019ami n\u02bcest 'pas' là.", "l'ami n'est pas là"),
        ("ＡＢＣ１２", "abc12"),
        ("Straße – 3,5 %", "straße 3 5"),
        ("e\u0301te\u0301", "été"),
        ("co\u00adoperate", "cooperate"),
        ("rock 'n' roll''s", "rock n roll''s"),
    ],
)
def test_what_the_default_normaliser_keeps(text: str, expected: str) -> None:
    assert normalize(text) == expected


def test_unknown_normaliser_error_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="mark-preserving, whisper-basic"):
        normalize("a", "nltk")


# ---- a model over clips ------------------------------------------------------------------------------------------------


def test_batched_transcripts_equal_those_of_single_clips(tiny_model, tiny_processor) -> None:
    clips = Clips([clip(f, d, "text") for f, d in ((200, 1.0), (900, 0.3), (500, 1.7), (1500, 0.9), (300, 1.2))])
    batched = evaluate_clips(tiny_model, tiny_processor, clips, prompt_language="de", batch_size=2, precision="fp32")
    for index, hypothesis in enumerate(batched.hypotheses):
        inputs = tiny_processor(clips[index]["audio"], sampling_rate=16000, return_tensors="pt")
        tokens = tiny_model.generate(**inputs, language="de", task="transcribe")
        assert hypothesis == tiny_processor.batch_decode(tokens, skip_special_tokens=True)[0].strip()
    assert batched.scores.num_clips == 5


def test_evaluation_leaves_the_models_mode_as_it_was(tiny_model, tiny_processor) -> None:
    tiny_model.train()
    evaluate_clips(tiny_model, tiny_processor, Clips([clip(300, 0.5, "a")]), prompt_language="de")
    assert tiny_model.training


def test_a_clip_longer_than_the_window_is_one_clip_written_in_pieces(tiny_model, tiny_processor) -> None:
    long = evaluate_clips(tiny_model, tiny_processor, Clips([clip(300, 5.0, "a b")]), prompt_language="de")
    assert long.scores.num_clips == len(long.hypotheses) == 1
    short = evaluate_clips(tiny_model, tiny_processor, Clips([clip(300, 2.0, "a b")]), prompt_language="de")
    assert len(long.hypotheses[0]) > len(short.hypotheses[0])


def test_unknown_precision_is_refused() -> None:
    assert uses_bf16("cpu", "bf16")
    assert not uses_bf16("cpu", "fp32")
    with pytest.raises(ValueError, match="auto, bf16, fp32"):
        uses_bf16("cpu", "fp8")
