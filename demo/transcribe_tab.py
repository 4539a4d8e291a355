"""The first tab: one recording, its text, and the decision behind it. What a click does is in handlers.py, how it looks in views.py."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import captions, handlers, heatmap, views
from .follow import Following, Progress
from .page import Page
from .stops import Run, StoppedError, Stops

if TYPE_CHECKING:
    from whisper_moe import Transcript
    from whisper_moe.explain import Explanation

# On a phone the answer stands below the controls: bring it into view, and only then.
SHOW_RESULT = """() => {
    const result = document.getElementById("result");
    if (result.getBoundingClientRect().top > window.innerHeight / 2) result.scrollIntoView();
}"""

# A click on a segment's time plays the recording from there. The switch for captions gets the name that Gradio's player forgot.
PLAYER = """
element.addEventListener("click", event => {
    const time = event.target.closest("[data-seek]");
    const host = [...document.querySelectorAll("#audio *")].find(each => each.shadowRoot);
    const sound = host && host.shadowRoot.querySelector("audio");
    if (!time || !sound) return;
    sound.currentTime = Number(time.dataset.seek);
    sound.play();
});
const nameCaptions = () => document.querySelectorAll("[data-testid=subtitles-toggle]:not([aria-label])")
    .forEach(button => button.setAttribute("aria-label", "Captions"));
new MutationObserver(nameCaptions).observe(document.body, {childList: true, subtree: true});
"""
DOWNLOADS = {"txt": "Text (txt)", "srt": "Captions (srt)", "vtt": "Captions (vtt)", "json": "Data (json)"}


def build(page: Page) -> None:
    """Put the tab's widgets here and wire them."""
    gr = page.gr
    from gradio import Request  # page.gr is imported already; an annotation that Gradio reads

    visitors = _Visitors()
    no_captions = gr.update(subtitles=[])  # None would leave them as they are
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            audio = gr.Audio(label="Recording", sources=["upload", "microphone"], type="filepath", buttons=["download"], elem_id="audio")
            with gr.Row(elem_id="start"):
                button = gr.Button("Transcribe", variant="primary", elem_id="transcribe", scale=3)
                stop = gr.Button("Stop", variant="stop", elem_id="stop", visible=False, scale=1, min_width=90)
            below_button = gr.Column()
            controls = _controls(page)
            with below_button:
                language, adapter, *_ = controls
                examples = _examples(page, [audio, language, adapter])
        with gr.Column(scale=6, min_width=320, elem_id="result"):
            text = gr.HTML(views.message(views.WAITING), elem_classes="wm", elem_id="text")
            with gr.Row(elem_id="downloads", visible=False) as row:
                downloads = {
                    kind: gr.DownloadButton(label, size="sm", min_width=90, elem_id=f"download-{kind}") for kind, label in DOWNLOADS.items()
                }
            decision = gr.HTML("", elem_classes="wm", elem_id="decision", js_on_load=PLAYER)
            with gr.Accordion("Who helped, and when", open=False, visible=False, elem_id="helpers") as helpers:
                heat = gr.HTML("", elem_classes="wm")
            with gr.Accordion("JSON", open=False, elem_id="json"):
                as_json = gr.JSON(show_label=False, max_height=400)
    shown = {"text": text, "row": row, "decision": decision, "helpers": helpers, "heat": heat, "as_json": as_json, "stop": stop}
    shown |= {"audio": audio, **downloads}

    def emptied() -> dict[Any, Any]:
        empty = {text: views.working(None), decision: "", as_json: None, stop: gr.update(visible=True), audio: no_captions}
        return empty | {row: gr.update(visible=False), helpers: gr.update(visible=False)}

    def run(request: Request, *values: Any) -> Iterator[dict[Any, Any]]:
        with page.said_to_the_visitor():
            for news in _answer(page, visitors, request.session_hash or "", *values):
                yield {shown[name]: value for name, value in news.items()}

    def fail() -> dict[Any, Any]:
        return {text: views.message(views.NO_RESULT), decision: "", stop: gr.update(visible=False)}

    def press_stop(request: Request) -> None:
        visitors.stops.stop(request.session_hash or "")

    stop.click(press_stop, None, None, **page.quick)
    gr.on([audio.clear, audio.upload, audio.stop_recording], lambda: no_captions, None, audio, **page.quick)  # they are another recording's
    for event in (button.click, examples.load_input_event.then):
        begun = event(emptied, None, [text, decision, as_json, stop, row, helpers, audio], js=SHOW_RESULT, **page.quick)
        done = begun.then(run, [audio, *controls], list(shown.values()), show_progress_on=text, **page.heavy)
        done.failure(fail, None, [text, decision, stop], **page.quick)
        done.success(None, None, None, js=SHOW_RESULT, **page.quick)  # again: an empty answer may leave the page too short to scroll


class _Visitors:
    """Who has work here. `newest`: by session, the request whose steps the page shows; an earlier one ends without a word."""

    def __init__(self) -> None:
        self.stops = Stops()
        self.newest: dict[str, Run] = {}

    @contextmanager
    def request(self, session: str) -> Iterator[Run]:
        """A request, for as long as the `with` block takes. It ends the visitor's earlier ones."""
        self.stops.stop(session)
        with self.stops.run(session) as run:
            self.newest[session] = run
            try:
                yield run
            finally:
                if self.newest.get(session) is run:
                    del self.newest[session]


def _answer(page: Page, visitors: _Visitors, session: str, audio: str | None, *values: Any) -> Iterator[dict[str, Any]]:
    """What the page shows, step by step: the text as it grows, the decision, and then what the base model alone writes."""
    *controls, compare = values
    with visitors.request(session) as run:
        progress: Progress | None = None
        written = _follow(page, run, partial(handlers.transcribe, page.transcriber, audio, *controls))
        try:
            for progress in written:
                yield {"text": views.working(progress)}
        except StoppedError:
            if visitors.newest.get(session) is run:
                yield {"text": views.stopped(progress), "stop": page.gr.update(visible=False)}
            return
        assert audio is not None  # else nothing was written
        yield from _explain(page, run, audio, written.result, *controls, compare=compare)


def _follow(page: Page, run: Run, work: Callable[..., "Transcript"]) -> Following["Transcript"]:
    """Work of the model within the page's limits, which Stop ends."""
    limits = {"max_duration_s": page.limits.max_duration_s}
    return Following(lambda tell, show: work(on_progress=tell, on_segments=show, **limits), run.check)


def _explain(page: Page, run: Run, audio: str, transcript: "Transcript", *controls: Any, compare: bool) -> Iterator[dict[str, Any]]:
    """The answer, and then, without keeping anybody from reading it: the base model's text, and who helped."""
    gr = page.gr
    _, _, allowed, threshold, switching, _ = controls
    explanation = handlers.explained(transcript, allowed, threshold)
    is_mixture = (transcript.adapter_info or {}).get("peft_type") == "LORAMOE"
    base: views.BaseText = "pending" if compare and transcript.text.strip() and handlers.has_adapter(transcript) else None
    yield {
        "text": views.text(transcript, base),
        "decision": views.decision(transcript, explanation),
        "as_json": handlers.as_json(transcript, explanation),
        "audio": gr.update(subtitles=handlers.captions(transcript.segments)),
        "stop": gr.update(visible=base is not None),
        **(_downloads(gr, transcript, explanation, audio) if transcript.text.strip() else {}),
    }
    if base is not None:
        work = partial(handlers.transcribe_by_base, page.transcriber, audio, transcript, allowed, switching=switching)
        following = _follow(page, run, work)
        try:
            for _ in following:
                pass
            base = following.result
        except StoppedError:
            base = "stopped"
        except ValueError:
            base = "failed"
        row = handlers.as_json(transcript, explanation, None if isinstance(base, str) else base)
        yield {"text": views.text(transcript, base), "as_json": row, "stop": gr.update(visible=False)}
    if is_mixture and base != "stopped":
        figure = heatmap.figure_html_for(page.transcriber, audio, transcript)
        if figure is not None:
            yield {"heat": figure, "helpers": gr.update(visible=True)}


def _downloads(gr: Any, transcript: "Transcript", explanation: "Explanation", audio: str) -> dict[str, Any]:
    """The buttons with their files, in a folder that Gradio empties (`delete_cache`)."""
    from gradio.utils import get_upload_folder

    uploads = Path(get_upload_folder())
    uploads.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(dir=uploads, prefix="answer-")
    files = captions.write_files(transcript, folder, Path(audio).stem, decision=explanation)
    return {"row": gr.update(visible=True), **{kind: gr.update(value=str(files[kind])) for kind in DOWNLOADS}}


def _controls(page: Page) -> list[Any]:
    """Language, adapter, candidates, threshold, switching, two best: in the order of `handlers.transcribe`; then: compare."""
    gr, transcriber = page.gr, page.transcriber
    with gr.Accordion("Options", open=False, elem_id="options"):
        return [
            page.offers(
                gr.Dropdown(handlers.language_choices(transcriber), value=handlers.AUTO, label="Language", elem_id="language"),
                handlers.language_choices,
            ),
            page.offers(
                gr.Dropdown(handlers.adapter_choices(transcriber), value=handlers.AUTO, label="Adapter", elem_id="adapter"),
                handlers.adapter_choices,
            ),
            gr.Dropdown(
                handlers.candidate_choices(transcriber),
                value=[],
                multiselect=True,
                label="Candidates",
                info="Only these languages may be heard. Empty: all of them.",
                elem_id="candidates",
            ),
            gr.Slider(0, 1, value=0.5, step=0.05, label="Threshold", info="Less sure than this: no adapter.", elem_id="threshold"),
            gr.Checkbox(label="The language may change", info="Each piece between pauses is listened to by itself.", elem_id="switching"),
            gr.Checkbox(
                label="Unsure? Try the two best languages",
                info="Below the threshold, the beginning is written in both, and the likelier text is kept.",
                elem_id="two-best",
            ),
            gr.Checkbox(
                True,
                label="Compare with the base model",
                info="Where an adapter wrote, show what would stand there without it.",
                elem_id="compare",
            ),
        ]


def _examples(page: Page, inputs: Sequence[Any]) -> Any:
    """One-click examples: the recording, language automatic, and the adapter where the example is about one."""
    rows = handlers.examples(page.transcriber)
    return page.gr.Examples(
        [[row["path"], handlers.AUTO, row["adapter"]] for row in rows],
        list(inputs),
        example_labels=[row["label"] for row in rows],
        label="Examples: one click transcribes",
        examples_per_page=len(rows),
        cache_examples=False,
        api_visibility="private",
        elem_id="examples",
    )
