"""Repository names of adapters: writing and reading undo each other, and the Hub would accept every name that is made."""

import pytest
from huggingface_hub.utils import validate_repo_id
from hypothesis import example, given
from hypothesis import strategies as st

from hub_utils import METHODS, AdapterName

part = st.text("abcXYZ019-._", min_size=1, max_size=40)
anything = st.one_of(part, st.sampled_from(["whisper-small", "whisper-large-v3-turbo", "lora", "a-lora-en", "x.git", "é", ""]))
languages = st.one_of(st.from_regex(r"[a-z]{2,3}", fullmatch=True), st.sampled_from(["EN", "english", "e", "no", "pt-br"]))
domains = st.one_of(st.none(), st.from_regex(r"[a-z0-9]+(-[a-z0-9]+){0,2}", fullmatch=True), part)


@given(base=anything, method=st.sampled_from(METHODS), language=languages, domain=domains)
@example(base="whisper-small", method="s2lora", language="no", domain=None)
@example(base="whisper-lora-fr", method="s2lora", language="cy", domain=None)
@example(base="whisper", method="lora", language="fr", domain="s2lora-cy")
@example(base="whisper", method="lora", language="en", domain="lora")
def test_a_name_is_refused_or_reads_back_as_what_it_was_made_of(base, method, language, domain):
    try:
        name = AdapterName(base, method, language, domain)
    except ValueError:
        return
    assert AdapterName.parse(str(name)) == name
    assert AdapterName.parse(name.repo_id("some-owner")) == name
    validate_repo_id(name.repo_id("some-owner"))


@given(st.one_of(st.text(max_size=60), st.from_regex(r"[a-z.-]{1,20}-(lora|s2lora)-[a-z]{1,4}(-[a-z-]{0,9})?", fullmatch=True)))
@example("whisper-lora-en-")
@example("whisper-lora-en\n")
@example("-lora-en")
def test_whatever_is_read_is_written_back_unchanged(text):
    try:
        name = AdapterName.parse(text)
    except ValueError:
        return
    assert str(name) == text.rpartition("/")[2]


def test_the_documented_names():
    assert str(AdapterName.of("openai/whisper-small", "S2LORA", "qug")) == "whisper-small-s2lora-qug"
    assert str(AdapterName.of("openai/whisper-large-v3", "LORA", "en", "child")) == "whisper-large-v3-lora-en-child"
    assert AdapterName.parse("me/whisper-small-lora-pt-radio-play") == AdapterName("whisper-small", "lora", "pt", "radio-play")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("whisper-small", "vera", "cy"), "lora, s2lora, loramoe"),
        (("whisper-small", "lora", "pt-BR"), "region"),
        (("whisper-small", "lora", "Welsh"), "two or three"),
        (("whisper-small", "lora", "en", "Child"), "lower-case"),
        (("whisper--small", "lora", "en"), "--"),
        (("x" * 90, "lora", "en"), "96"),
        (("openai/whisper-small", "lora", "en"), "last part"),
        (("", "lora", "en"), "last part"),
        (("my-lora-whisper", "s2lora", "en"), "two ways"),
    ],
)
def test_a_bad_part_is_refused_with_what_was_expected(arguments, says):
    with pytest.raises(ValueError, match=says):
        AdapterName(*arguments)


@pytest.mark.parametrize("base", ["./whisper", "/models/whisper", "runs/pocket/model", "whisper-small", "C:\\whisper"])
def test_a_path_is_not_taken_for_a_hub_model(base):
    with pytest.raises(ValueError, match="owner/name"):
        AdapterName.of(base, "LORA", "cy")


@pytest.mark.parametrize("text", ["whisper-small", "a/b/whisper-lora-en", "whisper-lora-en-", "lora-en", "whisper-lora", "x-lora-english"])
def test_other_repositories_are_not_read_as_adapters(text):
    with pytest.raises(ValueError):
        AdapterName.parse(text)


def test_an_owner_the_hub_refuses_is_named():
    with pytest.raises(ValueError, match="'me/you' cannot own"):
        AdapterName("whisper-small", "lora", "en").repo_id("me/you")
