"""Codes and names of languages against tables that are not ours: ISO 639, NLLB, FLEURS, Whisper; and what holds of any spelling."""

from __future__ import annotations

import re
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB_CODES
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from whisper_moe.languages import is_whisper_language, language_code, language_name
from whisper_moe.sources import FLEURS, FLEURS_LOCALES, known_config

# ISO 639: the code of two letters, that of three, and the bibliographic one where it differs.
ISO_639 = """
aa aar|ab abk|ae ave|af afr|ak aka|am amh|an arg|ar ara|as asm|av ava|ay aym|az aze|ba bak|be bel|bg bul|bi bis|bm bam
bn ben|bo bod tib|br bre|bs bos|ca cat|ce che|ch cha|co cos|cr cre|cs ces cze|cu chu|cv chv|cy cym wel|da dan|de deu ger
dv div|dz dzo|ee ewe|el ell gre|en eng|eo epo|es spa|et est|eu eus baq|fa fas per|ff ful|fi fin|fj fij|fo fao|fr fra fre
fy fry|ga gle|gd gla|gl glg|gn grn|gu guj|gv glv|ha hau|he heb|hi hin|ho hmo|hr hrv|ht hat|hu hun|hy hye arm|hz her
ia ina|id ind|ie ile|ig ibo|ii iii|ik ipk|io ido|is isl ice|it ita|iu iku|ja jpn|jv jav|ka kat geo|kg kon|ki kik|kj kua
kk kaz|kl kal|km khm|kn kan|ko kor|kr kau|ks kas|ku kur|kv kom|kw cor|ky kir|la lat|lb ltz|lg lug|li lim|ln lin|lo lao
lt lit|lu lub|lv lav|mg mlg|mh mah|mi mri mao|mk mkd mac|ml mal|mn mon|mr mar|ms msa may|mt mlt|my mya bur|na nau|nb nob
nd nde|ne nep|ng ndo|nl nld dut|nn nno|no nor|nr nbl|nv nav|ny nya|oc oci|oj oji|om orm|or ori|os oss|pa pan|pi pli
pl pol|ps pus|pt por|qu que|rm roh|rn run|ro ron rum|ru rus|rw kin|sa san|sc srd|sd snd|se sme|sg sag|sh hbs|si sin
sk slk slo|sl slv|sm smo|sn sna|so som|sq sqi alb|sr srp|ss ssw|st sot|su sun|sv swe|sw swa|ta tam|te tel|tg tgk|th tha
ti tir|tk tuk|tl tgl|tn tsn|to ton|tr tur|ts tso|tt tat|tw twi|ty tah|ug uig|uk ukr|ur urd|uz uzb|ve ven|vi vie|vo vol
wa wln|wo wol|xh xho|yi yid|yo yor|za zha|zh zho chi|zu zul
"""
ISO_ROWS = [row.split() for row in re.split(r"[|\n]", ISO_639.strip()) if row.split()[0] != "sh"]  # withdrawn: bs, hr or sr is meant
WHISPERS_OWN = {"jv": "jw", "nb": "no"}  # where Whisper's code is not ISO's
NAMES = sorted({language_name(code) for code, *_ in ISO_ROWS if code not in WHISPERS_OWN} | {name.title() for name in TO_LANGUAGE_CODE})
SLIPS = ("drop", "double", "swap", "other")  # of a letter


def test_every_two_letter_code_of_iso_639_is_known_and_its_three_letter_codes_mean_the_same() -> None:
    assert len(ISO_ROWS) == 183
    for code, *others in ISO_ROWS:
        assert language_code(code) == WHISPERS_OWN.get(code, code)
        for other in others:
            assert language_code(other) == WHISPERS_OWN.get(code, code), other


def test_languages_that_iso_639_tells_apart_stay_apart() -> None:
    codes = [language_code(code) for code, *_ in ISO_ROWS if code != "nb"]
    assert len(set(codes)) == len(codes)


def test_every_code_of_nllb_is_understood_with_its_script() -> None:
    """Two hundred languages as translation models write them: "fra_Latn". An individual language may stand for the one it belongs to."""
    two_letters = {other: WHISPERS_OWN.get(code, code) for code, *others in ISO_ROWS for other in others}
    for tagged in NLLB_CODES:
        three = tagged.split("_")[0]
        code = language_code(tagged)
        assert code == language_code(three)
        if three in two_letters:
            assert code == two_letters[three]
        else:
            assert code == three or is_whisper_language(code) or code == "or", tagged


def test_each_locale_of_fleurs_is_a_language_of_its_own_and_leads_back() -> None:
    codes = {locale: language_code(locale) for locale in FLEURS_LOCALES}
    assert len(FLEURS_LOCALES) == len(set(codes.values())) == 102
    for locale, code in codes.items():
        assert known_config(FLEURS, code) == locale
        assert known_config(FLEURS, locale) == locale
        assert known_config(FLEURS, language_name(code)) == locale
    assert {code for code in codes.values() if is_whisper_language(code)} <= set(LANGUAGES)


TAGS = st.tuples(
    st.sampled_from([code for row in ISO_ROWS for code in row] + sorted(LANGUAGES)),
    st.lists(st.sampled_from(["Latn", "Hans", "Arab", "419", "US", "hant", "cn", "valencia", "x-private", "u-nu-latn"]), max_size=3),
    st.sampled_from("-_"),
    st.sampled_from([str.lower, str.upper, str.title, str]),
    st.sampled_from(["{}", " {} ", "<|{}|>", "\t{}\n"]),
)


@settings(max_examples=300)
@given(TAGS)
def test_a_bcp_47_tag_is_its_language_in_any_spelling(tag: tuple[str, list[str], str, type[str], str]) -> None:
    base, subtags, dash, case, frame = tag
    written = frame.format(case(dash.join([base, *subtags])))
    code = language_code(written)
    assert code == language_code(base)
    assert language_code(code) == code


@settings(max_examples=200)
@given(st.sampled_from(NAMES), st.sampled_from([str.lower, str.upper, str.title]), st.sampled_from(["{}", "  {}", "{} "]))
def test_a_name_and_its_code_lead_to_each_other(name: str, case: type[str], frame: str) -> None:
    code = language_code(frame.format(case(name)))
    assert code == language_code(name)
    assert language_code(language_name(code)) == code
    assert language_name(language_code(language_name(code))) == language_name(code)


@settings(max_examples=300)
@given(st.sampled_from([name for name in NAMES if len(name) >= 6]), st.integers(0, 30), st.sampled_from(SLIPS))
def test_a_name_with_one_wrong_letter_is_understood_or_refused_with_the_right_one(name: str, at: int, kind: str) -> None:
    at %= len(name) - 1
    wrong = {
        "drop": name[:at] + name[at + 1 :],
        "double": name[:at] + name[at] + name[at:],
        "swap": name[:at] + name[at + 1] + name[at] + name[at + 2 :],
        "other": name[:at] + "q" + name[at + 1 :],
    }[kind]
    try:
        assert language_code(wrong)
    except ValueError as error:
        assert f"{language_code(name)} ({language_name(language_code(name))})" in str(error)  # noqa: PT017, some are another's name


def test_codes_of_two_letters_that_are_nobodys_are_refused_and_all_others_mean_themselves() -> None:
    known = {code for code, *_ in ISO_ROWS} | set(LANGUAGES) | {"iw", "in", "mo"}  # the last three: withdrawn, still in use
    for code in map("".join, product("abcdefghijklmnopqrstuvwxyz", repeat=2)):
        if code in known:
            assert language_code(language_code(code)) == language_code(code)
        else:
            with pytest.raises(ValueError, match=f"^'{code}' is no language known here"):
                language_code(code)
