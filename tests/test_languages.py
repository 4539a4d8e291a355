"""Languages by any name people use, and the language posterior against Transformers' own detection and a plain softmax."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from conftest import SAMPLE_RATE, base_hash, build_tiny_model, tone
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from whisper_moe.languages import (
    LanguagePosterior,
    adapters_off,
    is_whisper_language,
    language_code,
    language_name,
    language_posterior,
)

# ---- codes and names ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code"),
    [
        *[(text, "fr") for text in ("fr", "FR", "French", " french ", "fra", "fre", "fr-FR", "fr_CA", "<|fr|>")],
        *[("jv", "jw"), ("jav", "jw"), ("Javanese", "jw"), ("nb-NO", "no"), ("nno", "nn"), ("iw", "he"), ("in", "id")],
        *[("fil", "tl"), ("cmn_hans_cn", "zh"), ("zh-TW", "zh"), ("yue-HK", "yue"), ("haw", "haw"), ("Farsi", "fa")],
        *[("qug", "qug"), ("Kichwa", "qug"), ("chr", "chr"), ("gle", "ga"), ("Irish", "ga"), ("eo", "eo"), ("tpi", "tpi")],
        *[("Luba-Katanga", "lu"), ("Haitian Creole", "ht"), ("Bokmål", "no"), ("Kinyarwanda", "rw")],
    ],
)
def test_names_and_codes_of_every_kind_are_understood(text: str, code: str) -> None:
    assert language_code(text) == code


def test_the_table_of_whispers_languages_is_whispers() -> None:
    assert {code for code in LANGUAGES if is_whisper_language(code)} == set(LANGUAGES)
    assert not any(is_whisper_language(code) for code in ("qug", "ga", "xx", "", "French"))
    for name, code in TO_LANGUAGE_CODE.items():
        assert language_code(name) == code
        assert language_code(language_name(code)) == code


@pytest.mark.parametrize(
    ("text", "hint"),
    [("Frensh", r"fr \(French\)"), ("germn", r"de \(German\)"), ("xx", "a code such as"), ("", "a code such as"), ("12", "such as")],
)
def test_an_unknown_language_is_refused_with_the_nearest_names(text: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        language_code(text)


@settings(max_examples=300)
@given(st.one_of(st.text(max_size=12), st.from_regex(r"[A-Za-z]{2,3}([-_][A-Za-z0-9]{2,8}){0,3}", fullmatch=True)))
def test_whatever_is_said_is_a_code_that_means_itself_or_is_refused(text: str) -> None:
    try:
        code = language_code(text)
    except ValueError as error:
        assert repr(text) in str(error)  # noqa: PT017, most examples do not raise
        return
    assert re.fullmatch("[a-z]{2,3}", code)
    assert language_code(code) == code


@given(st.sampled_from(sorted(LANGUAGES)), st.sampled_from(["", "-419", "_XX", "-Latn", "-Hant-HK", "_hans_cn"]), st.booleans())
def test_script_and_region_do_not_change_a_language(code: str, tail: str, upper: bool) -> None:
    assert language_code((code.upper() if upper else code) + tail) == code
    assert language_code(f"<|{code}|>") == code


def test_every_iso_code_of_a_whisper_language_leads_to_it() -> None:
    """Terminological and bibliographic three-letter codes, where the two differ, and a sample of the others."""
    table = "en eng|de deu|de ger|fr fra|fr fre|zh zho|zh chi|ja jpn|ar ara|hi hin|cs ces|cs cze|sq sqi|sq alb|hy hye|hy arm|eu eus"
    table += "|eu baq|my mya|my bur|ka kat|ka geo|el ell|el gre|nl nld|nl dut|is isl|is ice|mk mkd|mk mac|mi mri|mi mao|ms msa|ms may"
    table += "|fa fas|fa per|ro ron|ro rum|sk slk|sk slo|bo bod|bo tib|cy cym|cy wel|jw jav|tl tgl|haw haw|yue yue|nn nno|no nor|no nob"
    for code, other in (pair.split() for pair in table.split("|")):
        assert language_code(other) == code


@pytest.mark.parametrize("value", [False, True, None, 7, 1.5, ["fr"], b"fr"])
def test_what_is_no_text_is_refused_as_a_language(value: Any) -> None:
    with pytest.raises(ValueError, match="given as text") as caught:
        language_code(value)
    assert ('"no", in quotes' in str(caught.value)) == (value is False)


def test_a_language_without_a_known_name_goes_by_its_code() -> None:
    assert [language_name(code) for code in ("cy", "qug", "tpi")] == ["Welsh", "Kichwa", "tpi"]


# ---- the posterior -----------------------------------------------------------------------------------------------------


@pytest.fixture
def features(tiny_processor: Any) -> torch.Tensor:
    """(3, n_mels, frames): three different sounds."""
    waves = [tone(200), tone(900, 1.5), tone(3000, 0.5)]
    return tiny_processor.feature_extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features


def first_logits(model: Any, features: torch.Tensor) -> torch.Tensor:
    """(batch, vocabulary) right after start-of-transcript."""
    start = torch.full((len(features), 1), model.generation_config.decoder_start_token_id)
    with torch.no_grad():
        return model(input_features=features, decoder_input_ids=start).logits[:, 0]


def test_the_best_language_is_the_one_that_transformers_detects(tiny_model: Any, features: torch.Tensor) -> None:
    detected = tiny_model.detect_language(features).tolist()
    tokens = tiny_model.generation_config.lang_to_id
    assert [tokens[f"<|{posterior.best[0]}|>"] for posterior in language_posterior(tiny_model, features)] == detected


def test_the_posterior_is_the_softmax_over_language_tokens(tiny_model: Any, features: torch.Tensor) -> None:
    tokens = tiny_model.generation_config.lang_to_id
    for row, posterior in zip(first_logits(tiny_model, features), language_posterior(tiny_model, features), strict=True):
        total = sum(row[index].exp() for index in tokens.values())
        expected = {token.strip("<|>"): float(row[index].exp() / total) for token, index in tokens.items()}
        assert posterior.probabilities == pytest.approx(expected, abs=1e-6)
        assert list(posterior.probabilities.values()) == sorted(posterior.probabilities.values(), reverse=True)


def test_no_speech_is_the_probability_of_its_token_in_the_whole_vocabulary(
    tiny_model: Any, tiny_processor: Any, features: torch.Tensor
) -> None:
    token = tiny_processor.tokenizer.convert_tokens_to_ids("<|nospeech|>")
    expected = first_logits(tiny_model, features).softmax(-1)[:, token].tolist()
    assert [posterior.no_speech for posterior in language_posterior(tiny_model, features)] == pytest.approx(expected)


def test_an_allow_list_renormalises_and_keeps_the_odds(tiny_model: Any, features: torch.Tensor) -> None:
    every = language_posterior(tiny_model, features)[0]
    some = language_posterior(tiny_model, features, allowed=["Welsh", "es", "fr-FR"])[0]
    total = sum(every.probabilities[code] for code in ("cy", "es", "fr"))
    assert some.probabilities == pytest.approx({code: every.probabilities[code] / total for code in ("cy", "es", "fr")}, rel=1e-4)
    assert some.no_speech == pytest.approx(every.no_speech)


@pytest.mark.parametrize(("allowed", "words"), [(["qug"], "no language token for 'qug'"), ([], "empty"), (["Frensh"], "French")])
def test_an_allow_list_that_cannot_be_heard_is_refused(tiny_model: Any, features: torch.Tensor, allowed: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        language_posterior(tiny_model, features, allowed=allowed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_precision_are_taken(tiny_model: Any, features: torch.Tensor, dtype: torch.dtype) -> None:
    expected = [posterior.best[1] for posterior in language_posterior(tiny_model, features)]
    found = [posterior.best[1] for posterior in language_posterior(tiny_model, features.to(dtype))]
    assert found == pytest.approx(expected, rel=0.2)
    assert len(language_posterior(tiny_model.to(torch.bfloat16), features)) == 3


def test_encoder_states_give_the_same_answer_as_features(tiny_model: Any, features: torch.Tensor) -> None:
    with torch.no_grad():
        states = tiny_model.get_encoder()(features)
    assert language_posterior(tiny_model, None, encoder_outputs=states) == language_posterior(tiny_model, features)


def test_an_english_only_model_answers_english(tiny_model: Any, features: torch.Tensor) -> None:
    tiny_model.generation_config.is_multilingual = False
    del tiny_model.generation_config.lang_to_id
    assert [posterior.probabilities for posterior in language_posterior(tiny_model, features)] == [{"en": 1.0}] * 3
    with pytest.raises(ValueError, match="no language token for 'de'"):
        language_posterior(tiny_model, features, allowed=["de"])


def test_the_mean_weighs_by_the_weights() -> None:
    parts = [LanguagePosterior({"fr": 0.9, "de": 0.1}, 0.2), LanguagePosterior({"de": 0.7, "fr": 0.3}, 0.6)]
    mean = LanguagePosterior.mean(parts, [1.0, 3.0])
    assert mean.probabilities == pytest.approx({"de": 0.55, "fr": 0.45})
    assert list(mean.probabilities) == ["de", "fr"]
    assert mean.no_speech == pytest.approx(0.5)
    assert mean.top(1) == {"de": pytest.approx(0.55)}
    assert LanguagePosterior.mean([parts[0], LanguagePosterior({"fr": 1.0, "de": 0.0}, None)], [1, 1]).no_speech is None


# ---- adapters off ------------------------------------------------------------------------------------------------------


def adapted(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    peft_model = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "fc1"], **options))
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.5)
    return peft_model.eval()


@pytest.mark.parametrize("wrapping", ["PeftModel", "base with wrapped layers"])
def test_an_active_adapter_does_not_colour_the_detection(tiny_model: Any, features: torch.Tensor, wrapping: str) -> None:
    peft_model = adapted(tiny_model)
    model = peft_model if wrapping == "PeftModel" else peft_model.get_base_model()
    assert not torch.allclose(first_logits(model, features), first_logits(tiny_model, features), atol=0.1)
    assert language_posterior(model, features) == language_posterior(tiny_model, features)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["conv1"]}, {"lora_dropout": 0.1}])
def test_after_adapters_off_all_is_as_before(tiny_model: Any, features: torch.Tensor, options: dict[str, Any]) -> None:
    peft_model, names = adapted(tiny_model, **options), set(tiny_model.state_dict())
    peft_model.set_adapter("default")
    before = first_logits(peft_model, features), {name: p.requires_grad for name, p in peft_model.named_parameters()}
    assert base_hash(peft_model, names) == base_hash(tiny_model, names)
    with adapters_off(peft_model):
        assert torch.equal(first_logits(peft_model, features), first_logits(tiny_model, features))
    with pytest.raises(KeyboardInterrupt), adapters_off(peft_model):
        raise KeyboardInterrupt
    assert torch.equal(first_logits(peft_model, features), before[0])
    assert {name: p.requires_grad for name, p in peft_model.named_parameters()} == before[1]


def test_adapters_that_were_off_stay_off(tiny_model: Any, features: torch.Tensor) -> None:
    peft_model = adapted(tiny_model)
    with peft_model.disable_adapter():
        with adapters_off(peft_model):
            pass
        assert torch.equal(first_logits(peft_model, features), first_logits(tiny_model, features))


def test_a_frozen_adapter_stays_frozen(tiny_model: Any) -> None:
    peft_model = adapted(tiny_model)
    peft_model.set_adapter("default", inference_mode=True)
    with adapters_off(peft_model):
        pass
    assert not any(parameter.requires_grad for parameter in peft_model.parameters())


def test_another_model_hears_otherwise(tiny_processor: Any, tiny_model: Any, features: torch.Tensor) -> None:
    assert language_posterior(build_tiny_model(tiny_processor, seed=1), features) != language_posterior(tiny_model, features)
