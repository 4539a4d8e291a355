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
from demo.follow import Progress
from whisper_moe import AdapterRegistry, AudioError, LanguageAdapter, Segment, Transcript
from whisper_moe.explain import explain

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
        self.detectable_languages = ["cy", "de", "en", "fi"]
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
    handlers.transcribe(fake, "a.wav", "auto", "none", ["cy", "en"], 0.0, True, True, max_duration_s=600, on_progress=progress.append)
    assert fake.asked == {
        "audio": "a.wav",
        "language": None,
        "adapter": "none",
        "allowed": ["cy", "en"],
        "threshold": 0.0,
        "switching": True,
        "if_unsure": "two-best",
        "max_duration_s": 600,
        "on_progress": progress.append,
    }


@pytest.mark.parametrize(("language", "adapter"), [("cy", "auto"), ("auto", "cy")])
def test_a_language_that_may_change_cannot_be_given(language, adapter):
    fake = FakeTranscriber()
    with pytest.raises(ValueError, match="The language may change"):
        handlers.transcribe(fake, "a.wav", language, adapter, [], 0.5, True)
    assert fake.asked is None


@pytest.mark.parametrize(("info", "told"), [(None, "cy"), ({"carrier": None}, "cy"), ({"carrier": "es"}, "es")])
def test_the_base_model_alone_is_told_the_same_language(info, told):
    fake = FakeTranscriber()
    handlers.transcribe_by_base(fake, "a.wav", make_transcript(adapter_info=info), ["cy"], max_duration_s=600)
    assert fake.asked == {"audio": "a.wav", "language": told, "adapter": "none", "max_duration_s": 600}


def test_the_base_model_alone_listens_again_where_the_language_changes():
    fake = FakeTranscriber()
    handlers.transcribe_by_base(fake, "a.wav", make_transcript(), ["cy", "en"], switching=True)
    assert fake.asked == {"audio": "a.wav", "adapter": "none", "allowed": ["cy", "en"], "switching": True}


def test_an_adapter_of_any_segment_counts_as_one():
    base, adapted = Segment(0, 1, "Hello.", "en"), Segment(1, 2, "Bore.", "cy", "cy")
    assert handlers.has_adapter(make_transcript(adapter=None, segments=(base, adapted)))
    assert not handlers.has_adapter(make_transcript(adapter=None, segments=(base,)))


def test_the_json_holds_the_decision_and_the_other_text():
    transcript, base = make_transcript(), make_transcript(text="Bwrdd a.", adapter=None)
    row = json.loads(json.dumps(handlers.as_json(transcript, handlers.explained(transcript, ["cy"], 0.4), base)))
    assert (row["text"], row["base"]["text"], row["decision"]["allowed"], row["decision"]["threshold"]) == (
        "Bore da.",
        "Bwrdd a.",
        ["cy"],
        0.4,
    )
    given = make_transcript(probability=None, probabilities={})
    assert handlers.explained(given, [], 0.4).threshold is None, "it had no say"


def test_captions_have_the_players_form_and_leave_out_what_is_empty():
    parts = [Segment(0.0, 2.4, "Bore"), Segment(3.0, 4.0, " "), Segment(62.4, 72.34, "da.")]
    assert [(part["text"], part["timestamp"], part["start"], part["end"]) for part in handlers.captions(parts)] == [
        ("Bore", [0.0, 2.4], 0.0, 2.4),
        ("da.", [62.4, 72.34], 62.4, 72.34),
    ]


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


INFO = {"name": "cy", "peft_type": "S2LORA", "num_bytes": 41300, "carrier": None, "source": "alice/cy@4f0c1aa", "metrics": METRICS}


def decided(transcript: Transcript, **options) -> str:
    return views.decision(transcript, explain(transcript, **options))


def test_the_decision_names_language_probability_adapter_method_size_source_and_error_rate():
    words = words_of(decided(make_transcript(adapter_info=INFO)))
    said = "Welsh 91 % (Breton 8 %) → adapter cy , S2-LoRA, 41 kB, from alice/cy@4f0c1aa, WER 18 % on held-out sentences, 104 % without it."
    assert said in words.replace("\u00a0", " ")
    assert "Welsh was heard." in words
    assert "100 recordings kept out of training" in words


def test_without_an_adapter_the_base_model_is_named_and_no_figure_is_claimed():
    words = words_of(decided(make_transcript(adapter=None, warnings=("No adapter for Welsh.",), fallback="no-adapter")))
    assert "the base model pocket: no adapter for Welsh is at hand." in words
    assert "No adapter for Welsh." in words
    assert "WER" not in words


def test_a_given_language_is_not_called_heard():
    words = words_of(decided(make_transcript(probability=None, probabilities={}), threshold=None))
    assert "given, not detected" in words
    assert "%" not in words.split("→")[0]
    assert "threshold" not in words


def test_silence_gives_a_sentence_and_not_an_empty_page():
    silence = make_transcript(text="", segments=(), language=None, language_name="", probability=None, adapter=None, reason="It is silent.")
    assert "Nothing was written down." in words_of(views.text(silence))
    assert words_of(decided(silence)) == "It is silent."


def test_what_was_said_is_never_taken_for_html():
    evil = "<script>alert(1)</script>\"'"
    part = Segment(0, 1, evil, evil, evil, {evil: 0.5})
    said = {"text": evil, "segments": (part, Segment(1, 2, evil, "cy")), "reason": evil, "warnings": (evil,), "language_name": evil}
    info = INFO | {"name": evil, "peft_type": evil, "source": evil, "metrics": METRICS | {"test_set": evil, "normalizer": evil}}
    known = {"language": evil, "adapter": evil, "adapter_info": info, "model": evil, "probabilities": {evil: 0.5}, "scores": {evil: -1.0}}
    transcript = make_transcript(**said, **known)
    progress = Progress(0.5, evil, 3.0, (part,))
    pages = [
        decided(transcript, allowed=[evil], threshold=0.5),
        views.text(transcript),
        views.text(transcript, transcript),
        views.text(transcript, make_transcript(segments=(Segment(0, 1, "<b>other"),))),
        views.working(progress),
        views.stopped(progress),
        views.message(evil),
        views.header(evil),
    ]
    for html in pages:
        assert words_of(html)
        assert "<script" not in html
        assert "<b>other" not in html
        assert not re.search(r'="[^"]*<', html), "an attribute was left"


# ---- the text and its rival ------------------------------------------------------------------------------------------


def test_the_adapters_text_stands_before_the_base_models_and_differences_are_marked_by_elements():
    ours = make_transcript(segments=(Segment(0, 2, "Bore da."), Segment(3, 5, "Sut wyt ti?")))
    theirs = make_transcript(segments=(Segment(0, 2, "Bore ta."), Segment(3, 5, "Sut wyt ti?")), adapter=None)
    html = views.text(ours, theirs)
    assert html.index("With the adapter cy") < html.index("The base model alone")
    assert "Bore <ins>da.</ins> Sut wyt ti?" in html
    assert "Bore <del>ta.</del> Sut wyt ti?" in html
    assert "1 of 5 words differ" in words_of(html)


def test_two_equal_texts_are_called_the_same():
    html = views.text(make_transcript(), make_transcript(adapter=None))
    assert "Both wrote the same" in words_of(html)
    assert "<ins>" not in html


@pytest.mark.parametrize(("state", "said"), [("pending", "It is writing"), ("stopped", "Stopped before"), ("failed", "could not write")])
def test_a_rival_that_is_not_there_says_why_and_the_text_stands_where_it_will_stay(state, said):
    html = views.text(make_transcript(), state)
    assert said in words_of(html)
    assert 'class="wm-text"' in html


def test_a_text_without_a_rival_stands_alone():
    assert "base model" not in words_of(views.text(make_transcript()))


def test_every_place_for_a_text_finds_its_own_direction():
    arabic, hebrew = Segment(0, 2, "صباح الخير", "ar", "ar", {"ar": 0.9}), Segment(2, 4, "בוקר טוב", "he", None, {"he": 0.8})
    transcript = make_transcript(text="صباح الخير בוקר טוב", segments=(arabic, hebrew), language="ar", language_name="Arabic")
    html = (
        views.text(transcript, make_transcript(segments=(hebrew,)))
        + views.segments(transcript)
        + views.working(Progress(0, "", None, (arabic,)))
    )
    for place in re.findall(r"<[^>]*>(?=[^<]*(?:<(?:ins|del)>)?[\u0590-\u06ff])", html):
        assert 'dir="auto"' in place or place in ("<ins>", "<del>", "</ins>", "</del>"), place
    assert html.count('dir="auto"') == 5


# ---- while it works --------------------------------------------------------------------------------------------------


def test_while_it_works_the_page_says_how_far_it_is_and_what_is_written():
    words = words_of(views.working(Progress(0.4, "Writing, 3 of 9 parts done", 18.0, (Segment(0, 1, "Bore"), Segment(1, 2, "da")))))
    assert "Writing, 3 of 9 parts done, about 20 s left" in words.replace("\u00a0", " ")
    assert "Bore da" in words
    assert "left" not in words_of(views.working(Progress(0.0, "Reading the recording", None, ())))
    assert "Waiting" in words_of(views.working(None))


def test_after_stop_the_text_so_far_stays():
    words = words_of(views.stopped(Progress(0.4, "Writing", None, (Segment(0, 1, "Bore"),))))
    assert words.index("Bore") < words.index("Stopped")
    assert "before anything was written" in words_of(views.stopped(None))


@pytest.mark.parametrize(
    ("seconds", "said"), [(3.2, "a few seconds left"), (33, "about 35 s left"), (57, "about 55 s left"), (130, "about 2 min left")]
)
def test_time_left_is_rough(seconds, said):
    assert views.time_left(seconds).replace("\u00a0", " ") == said


# ---- languages and segments ------------------------------------------------------------------------------------------


def test_the_threshold_is_a_line_on_every_bar_and_candidates_are_named():
    transcript = make_transcript()
    html = views.bars(transcript, explain(transcript, allowed=["cy", "br", "en"], threshold=0.35))
    assert re.findall(r"left:([\d.]+)%", html) == ["35.0"] * 3
    assert "Only your candidates could be heard (Welsh, Breton, English)" in words_of(html)
    assert "wm-threshold" not in views.bars(transcript, explain(transcript, threshold=0.0)), "there is none"


def test_two_languages_that_were_tried_show_their_scores_the_likelier_first():
    words = words_of(views.scores(make_transcript(scores={"br": -0.912, "cy": -0.41})))
    assert words.index("Welsh -0.41 kept") < words.index("Breton -0.91")
    assert views.scores(make_transcript()) == ""


def test_a_recording_in_two_languages_has_a_chip_a_segment_and_a_strip_over_time():
    parts = (Segment(0, 3, "Bore da.", "cy", "cy", {"cy": 0.91, "en": 0.09}), Segment(4, 6, "Hello.", "en", None, {"en": 0.8, "cy": 0.2}))
    html = views.segments(make_transcript(segments=parts, duration_s=10.0))
    words = words_of(html).replace("\u00a0", " ")
    assert "cy Welsh 91 %, adapter cy" in words
    assert "en English 80 %, base model" in words
    assert re.findall(r"left:([\d.]+)%;width:([\d.]+)%", html) == [("0.00", "30.00"), ("40.00", "20.00")]
    assert 'aria-label="Welsh from 0:00.0 to 0:03.0, English from 0:04.0 to 0:06.0"' in html
    assert len(set(re.findall(r"wm-language-\d", html))) == 2


def test_a_recording_in_one_language_needs_no_chips():
    assert "wm-chip" not in views.segments(make_transcript())


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
    assert {fn.concurrency_limit for fn in queued if fn.concurrency_id == MODEL_QUEUE} == {7}
    without_model = {fn.name for fn in queued if fn.concurrency_id != MODEL_QUEUE}
    assert without_model <= {"fetch_expected", "find", "look", "show", "add", "languages", "adapters"}, without_model
    assert app._queue.max_size == 9
