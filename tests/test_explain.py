"""The decision as a sentence and as data: what it says of every kind of transcript, and that no transcript can break it."""

from __future__ import annotations

import json
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe import AdapterRegistry, LanguageAdapter, LanguagePosterior, Segment, Transcript
from whisper_moe.explain import explain, measured, phrases

WELSH = {
    "name": "cy",
    "language": "cy",
    "domain": None,
    "carrier": None,
    "peft_type": "S2LORA",
    "base": "pocket",
    "num_parameters": 18432,
    "num_bytes": 41300,
    "metrics": {
        "test_set": "held-out sentences",
        "normalizer": "mark-preserving",
        "before": {"wer": 0.24, "cer": 0.09, "clips": 100},
        "after": {"wer": 0.18, "cer": 0.05, "clips": 100},
    },
    "touches_encoder": True,
    "source": "alice/whisper-cy@4f0c1aa",
}


def make_transcript(**values) -> Transcript:
    known = {
        "text": "Bore da.",
        "segments": (Segment(0.0, 2.4, "Bore da.", "cy", "cy"),),
        "language": "cy",
        "language_name": "Welsh",
        "probability": 0.913,
        "probabilities": {"cy": 0.913, "br": 0.042, "en": 0.031, "de": 0.014},
        "no_speech": 0.01,
        "adapter": "cy",
        "adapter_info": WELSH,
        "reason": "Welsh was heard.",
        "warnings": (),
        "duration_s": 2.5,
        "model": "pocket",
        "elapsed_s": 0.4,
    }
    return Transcript(**known | values)


# ---- the sentence ----------------------------------------------------------------------------------------------------


def test_the_sentence_names_language_rivals_adapter_method_size_source_and_error_rates():
    assert explain(make_transcript()).sentence == (
        "Welsh 91 % (Breton 4 %, English 3 %) → adapter cy, S2-LoRA, 41 kB, from alice/whisper-cy@4f0c1aa, "
        "WER 18 % on held-out sentences, 24 % without it."
    )


def test_what_is_not_known_of_an_adapter_is_left_out():
    bare = {"name": "cy", "peft_type": "LORA", "num_bytes": 2_000_000, "metrics": {"after": {"wer": 0.5}}}
    assert explain(make_transcript(adapter_info=bare, probabilities={"cy": 0.913})).sentence == (
        "Welsh 91 % → adapter cy, LoRA, 2.0 MB, WER 50 %."
    )
    assert explain(make_transcript(adapter_info=None, probabilities={})).sentence == "Welsh 91 % → adapter cy."


def test_an_adapter_that_came_with_the_package_is_not_said_to_come_from_that():
    assert ", shipped with the pocket, " in explain(make_transcript(adapter_info=WELSH | {"source": "shipped with the pocket"})).sentence


def test_a_script_without_spaces_is_measured_by_letters():
    thai = make_transcript(language="th", language_name="Thai", adapter_info=WELSH | {"language": "th"})
    assert "CER 5 % on held-out sentences, 9 % without it" in explain(thai).sentence
    assert "WER" not in explain(thai).sentence


def test_certainty_is_said_in_words_beside_a_name():
    assert explain(make_transcript(probability=0.999, probabilities={"cy": 0.999})).sentence.startswith("Welsh over 99 % → ")
    close = explain(make_transcript(probability=0.003, probabilities={"cy": 0.003}))
    assert close.sentence.startswith("Welsh under 1 % → ")


def test_a_language_that_was_given_is_not_called_heard():
    said = explain(make_transcript(probability=None, probabilities={}), allowed=["cy"], threshold=0.5).sentence
    assert said.startswith("Welsh (given, not detected) → adapter cy")


def test_a_list_of_candidates_is_named():
    allowed = explain(make_transcript(probabilities={"cy": 0.913, "en": 0.087}), allowed=["cy", "en"])
    assert allowed.sentence.startswith("Welsh 91 % (English 9 %, 2 allowed) → ")
    assert explain(make_transcript(probabilities={"cy": 1.0}, probability=1.0), allowed=["cy"]).sentence.startswith(
        "Welsh 100 % (no other allowed) → "
    )


def test_several_languages_are_named_with_their_lengths_and_writers():
    segments = (
        Segment(0.0, 2.0, "Bore da.", "cy", "cy"),
        Segment(2.5, 3.5, "Hello.", "en", None),
        Segment(4.0, 5.5, "Shwmae.", "cy", "cy"),
        Segment(6.0, 6.5, "Salut.", "fr", "fr"),
    )
    said = explain(make_transcript(segments=segments))
    assert said.sentence.startswith("Welsh 3.5 s → adapter cy, S2-LoRA")
    assert said.sentence.endswith("; English 1.0 s → the base model pocket; French 0.5 s → adapter fr.")
    assert [(part.language, part.seconds, part.adapter) for part in said.parts] == [("cy", 3.5, "cy"), ("en", 1.0, None), ("fr", 0.5, "fr")]


# ---- why the base model writes: asked of the registry, which decides ----------------------------------------------------

ADAPTER = LanguageAdapter("cy", None, "cy", None, None, "S2LORA", "pocket", None, 18432, 41300, {})  # type: ignore[arg-type]
SURE, UNSURE = LanguagePosterior({"cy": 0.9, "en": 0.1}, 0.0), LanguagePosterior({"cy": 0.4, "en": 0.35, "de": 0.25}, 0.0)


@pytest.mark.parametrize(
    ("adapters", "posterior", "options", "fallback", "said"),
    [
        ([ADAPTER], SURE, {}, None, "→ adapter cy."),
        ([ADAPTER], UNSURE, {}, "below-threshold", "too unsure for an adapter, below the threshold of 50 %"),
        ([ADAPTER], SURE, {"adapter": "none"}, "asked-for-base", "the base model pocket, as you asked"),
        ([ADAPTER], UNSURE, {"adapter": "none"}, "asked-for-base", "the base model pocket, as you asked"),
        ([ADAPTER], None, {"language": "cy", "adapter": "none"}, "asked-for-base", "as you asked"),
        ([], SURE, {"written": ["en"]}, "no-adapter", "no adapter for Welsh is at hand"),
        ([], SURE, {}, "not-needed", "which writes Welsh itself"),
        ([], SURE, {"written": ["cy"]}, "not-needed", "which writes Welsh itself"),
        ([], None, {"language": "cy", "written": ["cy"]}, "not-needed", "which writes Welsh itself"),
        ([], None, {"language": "cy", "written": ["en"]}, "no-adapter", "no adapter for Welsh is at hand"),
    ],
)
def test_the_reason_for_the_base_model_is_a_word_for_programs_and_a_phrase_for_people(adapters, posterior, options, fallback, said):
    decision = AdapterRegistry(adapters).choose(posterior, **options)
    assert decision.fallback == fallback
    transcript = make_transcript(
        adapter=None if decision.adapter is None else decision.adapter.name,
        adapter_info=None,
        probability=decision.probability,
        fallback=decision.fallback,
    )
    assert said in explain(transcript, threshold=0.5).sentence


def test_an_adapter_that_cannot_be_fetched_is_an_adapter_that_is_missing():
    def fetch():
        raise OSError("no network")

    registry = AdapterRegistry()
    registry.expect("cy", fetch, where="alice/cy@0")
    assert registry.choose(SURE).fallback == "no-adapter"


def test_silence_is_said_as_such():
    silent = make_transcript(
        text="", segments=(), language=None, language_name="", probability=None, probabilities={}, adapter=None, adapter_info=None
    )
    assert explain(silent).sentence == "Nobody speaks → nothing was written."


# ---- the data --------------------------------------------------------------------------------------------------------


def test_the_data_hold_every_figure_of_the_sentence():
    row = json.loads(json.dumps(explain(make_transcript(), allowed=["cy", "br"], threshold=0.5).to_dict()))
    assert row["sentence"].startswith("Welsh 91 %")
    assert row["alternatives"][0] == {"language": "br", "language_name": "Breton", "probability": 0.042}
    assert row["measured"] == {
        "wer_before": 0.24,
        "wer_after": 0.18,
        "cer_before": 0.09,
        "cer_after": 0.05,
        "clips": 100,
        "test_set": "held-out sentences",
        "normalizer": "mark-preserving",
    }
    kept = ("method", "num_bytes", "source", "adapter", "fallback", "allowed", "threshold")
    assert [row[name] for name in kept] == ["S2-LoRA", 41300, "alice/whisper-cy@4f0c1aa", "cy", None, ["cy", "br"], 0.5]


def test_a_second_language_that_was_kept_has_the_first_among_its_rivals():
    kept = explain(make_transcript(language="br", language_name="Breton", probability=0.042))
    assert [each.language for each in kept.alternatives] == ["cy", "en", "de"]


def test_figures_that_are_no_numbers_are_no_figures():
    assert measured({"after": {"wer": math.nan, "cer": math.inf}}) is None
    for hostile in (10**400, -(10**400), 1e300, -0.5, True, "0.2", [0.2]):
        assert measured({"after": {"wer": hostile, "cer": hostile}}) is None, hostile
    assert measured({}) is None
    assert measured({"before": {"wer": 0.5}}) is None


def test_what_else_is_no_figure_and_no_name_is_left_out():
    found = measured({"after": {"wer": 0.2, "clips": math.nan}, "test_set": {"a": 1}, "normalizer": "x" * 5000})
    assert (found.wer_after, found.clips, found.test_set, len(found.normalizer)) == (0.2, None, None, 200)
    assert measured({"after": {"wer": 0.2, "clips": 10**400}}).clips is None


WORDS = st.sampled_from(["", "a set", "<b>", "ع", "a\nb"])
ANYTHING = st.one_of(  # that JSON can say, as Python reads it: numbers without end, and NaN
    st.floats(),
    st.integers(),
    st.just(10**400),
    st.just(-0.5),
    st.just(1e300),
    st.booleans(),
    st.none(),
    st.text(),
    st.lists(st.integers()),
)
RATES = st.none() | st.fixed_dictionaries({}, optional=dict.fromkeys(("wer", "cer", "clips"), ANYTHING))
INFO = st.fixed_dictionaries(
    {},
    optional={
        "peft_type": st.sampled_from(["S2LORA", "LORA", "NEW"]),
        "num_bytes": st.integers(0, 10**12),
        "source": st.none() | WORDS,
        "metrics": st.fixed_dictionaries(
            {}, optional={"before": RATES, "after": RATES, "test_set": WORDS | ANYTHING, "normalizer": WORDS | ANYTHING}
        ),
    },
)
CODES = st.sampled_from(["cy", "en", "th", "qug", "xyz"])
SEGMENTS = st.lists(
    st.builds(Segment, st.floats(0, 100), st.floats(100, 200), st.text(), st.none() | CODES, st.none() | st.just("cy")), max_size=4
)


@settings(deadline=None)
@given(
    info=st.none() | INFO,
    adapter=st.none() | st.text(min_size=1),
    language=st.none() | CODES,
    probabilities=st.dictionaries(CODES, st.floats(0, 1)),
    segments=SEGMENTS,
    fallback=st.sampled_from([None, "asked-for-base", "below-threshold", "no-adapter", "not-needed", "no-speech"]),
    allowed=st.none() | st.lists(CODES),
    threshold=st.none() | st.floats(0, 1),
)
def test_whatever_a_transcript_holds_it_is_explained_in_one_sentence_and_in_json(
    info, adapter, language, probabilities, segments, fallback, allowed, threshold
):
    transcript = make_transcript(
        adapter_info=info,
        adapter=adapter,
        language=language,
        probability=probabilities.get(language),
        probabilities=probabilities,
        segments=tuple(segments),
        fallback=fallback,
    )
    explanation = explain(transcript, allowed=allowed, threshold=threshold)
    row = json.loads(json.dumps(explanation.to_dict(), allow_nan=False))  # NaN is no JSON
    assert row["sentence"] == "".join(text for _, text in phrases(explanation))
    assert row["sentence"].endswith(".")
    assert not re.search(r"\b(nan|inf|None)\b", row["sentence"].replace(str(adapter), ""))
    assert language is None or language not in [each["language"] for each in row["alternatives"]]
