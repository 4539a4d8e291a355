"""The page without a browser: what a click asks of the transcriber, what the widgets offer, and what the HTML says.

The transcriber is a fake that writes down how it was asked; adapters, registry and transcripts are the real classes.
"""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import soundfile

from demo import handlers, views
from whisper_moe import AdapterRegistry, AudioError, LanguageAdapter, Segment, Transcript

METRICS = {
    "test_set": "held-out sentences",
    "normalizer": "mark-preserving",
    "before": {"wer": 1.04, "cer": 0.61, "clips": 100},
    "after": {"wer": 0.18, "cer": 0.05, "clips": 100},
}


def make_adapter(name: str, language: str, *, domain: str | None = None, carrier: str | None = None, **values) -> LanguageAdapter:
    known = {
        "peft_type": "S2LORA",
        "base": "pocket",
        "base_signature": None,
        "num_parameters": 18432,
        "num_bytes": 41300,
        "metrics": METRICS,
    }
    return LanguageAdapter(name=name, path=Path(name), language=language, domain=domain, carrier=carrier, **known | values)


WELSH = make_adapter("cy", "cy")
CHILD = make_adapter("en-child", "en", domain="child", peft_type="LORA")
KICHWA = make_adapter("qug", "qug", carrier="es")


def make_transcript(**values) -> Transcript:
    """A transcript of a Welsh recording, with some values changed."""
    known = {
        "text": "Bore da.",
        "segments": (Segment(0.0, 2.4, "Bore"), Segment(62.4, 72.34, "da.")),
        "language": "cy",
        "language_name": "Welsh",
        "probability": 0.913,
        "probabilities": {"cy": 0.913, "br": 0.083, "en": 0.004},
        "no_speech": 0.01,
        "adapter": "cy",
        "adapter_info": None,
        "reason": "Welsh was heard.",
        "warnings": (),
        "duration_s": 72.34,
        "model": "pocket",
        "elapsed_s": 0.4,
    }
    return Transcript(**known | values)


class FakeTranscriber:
    """Answers every recording with one transcript, or one error, and keeps the keywords it was asked with."""

    def __init__(self, adapters=(WELSH, CHILD, KICHWA), error: Exception | None = None) -> None:
        self.registry = AdapterRegistry(adapters)
        self.name = "pocket"
        tokens = {f"<|{code}|>": index for index, code in enumerate(("cy", "de", "en", "fi"))}
        config = SimpleNamespace(lang_to_id=tokens, written_languages=["de", "en"])
        self.model = SimpleNamespace(generation_config=config, device="cpu", dtype="torch.float32", num_parameters=lambda: 8_600_000)
        self.error, self.asked = error, None

    def transcribe(self, audio, **keywords) -> Transcript:
        self.asked = {"audio": audio, **keywords}
        if self.error is not None:
            raise self.error
        return make_transcript()


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data) -> None:
        self.words.append(data)


def words_of(html: str) -> str:
    """What a reader sees; fails on tags that do not match."""
    parser = _Text()
    parser.feed(html)
    parser.close()
    assert not parser.open, f"left open: {parser.open}"
    return re.sub(r"\s+", " ", " ".join(parser.words))


# ---- what a click asks -----------------------------------------------------------------------------------------------


def test_automatic_controls_leave_every_choice_to_the_model():
    fake = FakeTranscriber()
    handlers.transcribe(fake, "a.wav", "auto", "auto", [], 0.5)
    assert fake.asked["audio"] == "a.wav"
    assert (fake.asked["language"], fake.asked["adapter"], fake.asked["allowed"], fake.asked["threshold"]) == (None, None, None, 0.5)


def test_controls_that_are_set_reach_the_model():
    fake, progress = FakeTranscriber(), []
    handlers.transcribe(fake, "a.wav", "cy", "none", ["cy", "en"], 0.0, max_duration_s=600, on_progress=progress.append)
    assert fake.asked == {
        "audio": "a.wav",
        "language": "cy",
        "adapter": "none",
        "allowed": ["cy", "en"],
        "threshold": 0.0,
        "max_duration_s": 600,
        "on_progress": progress.append,
    }


def test_no_recording_is_said_before_the_model_is_asked():
    fake = FakeTranscriber()
    with pytest.raises(ValueError, match="no recording yet"):
        handlers.transcribe(fake, None)
    assert fake.asked is None


def test_a_message_about_the_sound_passes_unchanged():
    fake = FakeTranscriber(error=AudioError("The recording is empty."))
    with pytest.raises(AudioError, match=r"^The recording is empty\.$"):
        handlers.transcribe(fake, "a.wav")


# ---- what the widgets offer ------------------------------------------------------------------------------------------


def test_languages_offered_are_those_that_somebody_writes():
    choices = handlers.language_choices(FakeTranscriber())
    assert choices[0][1] == "auto"
    assert [value for _, value in choices[1:]] == ["en", "de", "qug", "cy"]  # English, German, Kichwa, Welsh
    assert {value: label for label, value in choices}["cy"] == "Welsh (adapter cy)"
    assert {value: label for label, value in choices}["en"] == "English", "a domain adapter does not write its language by default"


def test_two_adapters_for_one_language_do_not_keep_the_page_from_opening():
    labels = [label for label, _ in handlers.language_choices(FakeTranscriber(adapters=(WELSH, make_adapter("cy2", "cy"))))]
    assert "Welsh (adapter cy, cy2)" in labels


def test_a_base_that_does_not_say_what_it_writes_offers_all_it_has_tokens_for():
    fake = FakeTranscriber(adapters=())
    fake.model.generation_config.written_languages = None
    assert handlers.written_languages(fake) == ["en", "fi", "de", "cy"]
    fake.model.generation_config.is_multilingual = False
    assert handlers.written_languages(fake) == ["en"]
    assert handlers.candidate_choices(fake) == []


def test_the_base_model_is_described_by_name_size_and_place():
    assert handlers.base_description(FakeTranscriber()) == "pocket, 8.6 million parameters, on cpu in float32"


def test_adapters_offered_are_all_that_are_installed_and_the_base_alone():
    assert [value for _, value in handlers.adapter_choices(FakeTranscriber())] == ["auto", "none", "cy", "en-child", "qug"]
    assert "English, domain child" in {value: label for label, value in handlers.adapter_choices(FakeTranscriber())}["en-child"]


def test_candidates_are_the_languages_that_can_be_heard():
    assert handlers.candidate_choices(FakeTranscriber()) == [("English", "en"), ("Finnish", "fi"), ("German", "de"), ("Welsh", "cy")]


def test_an_example_about_an_adapter_is_left_out_where_the_adapter_is_missing():
    with_child = {row["adapter"] for row in handlers.examples(FakeTranscriber())}
    without = {row["adapter"] for row in handlers.examples(FakeTranscriber(adapters=()))}
    assert with_child == {"auto", "en-child"}
    assert without == {"auto"}


def test_examples_offer_only_adapters_that_can_be_chosen():
    transcriber = FakeTranscriber()
    transcriber.registry.expect("en", lambda: Path("nowhere"), where="alice/c@0", domain="child")
    offered = {value for _, value in handlers.adapter_choices(transcriber)}
    assert "en/child" in offered
    assert {row["adapter"] for row in handlers.examples(transcriber)} == {"auto"} <= offered


def test_examples_are_short_small_and_readable_and_speak_five_languages():
    rows = handlers.examples(FakeTranscriber())
    assert len({row["language"] for row in rows}) >= 5
    for row in rows:
        assert 1 < soundfile.info(row["path"]).duration < 20, row["file"]
        assert Path(row["path"]).stat().st_size < 200_000, row["file"]
    assert {path.name for path in handlers.EXAMPLES.iterdir()} == {row["file"] for row in rows} | {"examples.json"}


@pytest.mark.shared
def test_examples_say_sentences_that_are_kept_from_training():
    from recipes.make_demo_examples import EXAMPLES, check_held_out

    listed = {row["file"]: row["text"] for row in json.loads((handlers.EXAMPLES / "examples.json").read_text("utf-8"))}
    assert listed == {example.file: " ".join(example.sentences) for example in EXAMPLES}
    for example in EXAMPLES:
        check_held_out(example, Path(__file__).parents[2] / "shared" / "text")


# ---- what the page says ----------------------------------------------------------------------------------------------


def test_the_decision_names_language_probability_adapter_method_size_and_error_rate():
    words = words_of(views.result(make_transcript(), WELSH))
    for said in ("Bore da.", "Welsh", "91 %", "adapter cy", "S2-LoRA, 41 kB", "18 % word errors", "104 % without it", "Welsh was heard."):
        assert said in words, said


def test_without_an_adapter_the_base_model_is_named_and_no_figure_is_claimed():
    words = words_of(views.result(make_transcript(adapter=None, warnings=("No adapter for Welsh.",)), None))
    assert "the base model" in words
    assert "No adapter for Welsh." in words
    assert "word errors" not in words


def test_a_given_language_is_not_called_heard():
    words = words_of(views.result(make_transcript(probability=None, probabilities={}), WELSH))
    assert "given, not detected" in words
    assert "%" not in words.split("Written by")[0]


def test_silence_gives_a_sentence_and_not_an_empty_page():
    silence = make_transcript(text="", segments=(), language=None, language_name="", probability=None, adapter=None, reason="It is silent.")
    words = words_of(views.result(silence, None))
    assert "Nothing was written down. It is silent." in words
    assert "The decision" not in words


def test_what_was_said_is_never_taken_for_html():
    evil = "<script>alert(1)</script>"
    transcript = make_transcript(text=evil, segments=(Segment(0, 1, evil),), reason=evil, warnings=(evil,), language_name=evil, model=evil)
    adapter = make_adapter("<b>", "cy", peft_type="<i>", metrics=METRICS | {"test_set": evil})
    for html in (views.result(transcript, adapter), views.result(transcript, None), views.adapters([adapter], [evil]), views.header(evil)):
        assert "<script" not in html
        assert "<b>" not in html


def test_bars_stand_in_order_and_leave_out_what_is_unlikely():
    html = views.bars(make_transcript(probabilities={"cy": 0.91, "br": 0.083, "en": 0.004, "de": 0.003}))
    assert re.findall(r"width:([\d.]+)%", html) == ["91.0", "8.3", "0.4"]
    assert words_of(html).endswith("Welsh 91 % Breton 8 % English < 1 %")
    close = views.bars(make_transcript(probabilities={"cy": 0.4, "br": 0.3, "en": 0.2, "de": 0.09, "fi": 0.01}))
    assert close.count("<li>") == 5


def test_segments_carry_their_times():
    words = words_of(views.segments(make_transcript()))
    assert "0:00.0 0:02.4 Bore" in words
    assert "1:02.4 1:12.3 da." in words


def test_the_list_of_adapters_says_how_each_is_chosen():
    html = views.adapters([WELSH, CHILD, KICHWA], ["Welsh", "English, domain child", "Kichwa"])
    welsh, child, kichwa = [words_of(card + "</ul></li>") for card in re.findall(r"<li><h3>.*?(?=</ul></li>)", html)]
    assert "used when its language is heard" in welsh
    assert "only when you choose it" in child
    assert "told it is Spanish" in kichwa


def test_no_adapters_is_said_with_the_way_to_some():
    assert "--adapters" in words_of(views.adapters([], []))


def test_an_adapter_without_figures_says_so():
    assert views.measured(make_adapter("x", "cy", metrics={}))[0] == "not measured"


@pytest.mark.parametrize(
    ("share", "said"), [(0, "0 %"), (0.001, "< 1 %"), (0.006, "1 %"), (0.913, "91 %"), (0.999, "> 99 %"), (1, "100 %"), (1.04, "104 %")]
)
def test_shares_are_rounded_but_never_to_nothing_or_to_certainty(share, said):
    assert views.percent(share) == said.replace(" ", "\u00a0")


@pytest.mark.parametrize(("seconds", "said"), [(0, "0:00.0"), (59.96, "1:00.0"), (72.34, "1:12.3"), (3605.5, "60:05.5")])
def test_times_are_written_as_minutes_and_seconds(seconds, said):
    assert views.clock(seconds) == said


# ---- the wiring ------------------------------------------------------------------------------------------------------


def test_everything_that_touches_the_model_waits_in_one_queue():
    pytest.importorskip("gradio", reason="to run it: pip install peft-s2lora[demo]")
    from demo.app import build_app
    from demo.page import MODEL_QUEUE, Limits

    limits = Limits(max_at_once=7, max_waiting=9)
    app = build_app(FakeTranscriber(), limits)
    queued = [fn for fn in app.fns.values() if fn.fn is not None and fn.queue is not False]
    assert queued
    assert {(fn.concurrency_id, fn.concurrency_limit) for fn in queued} == {(MODEL_QUEUE, 7)}
    assert app._queue.max_size == 9
