"""The first tab: one recording, its text, and the decision behind it. What a click does is in handlers.py, how it looks in views.py."""

import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
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
# The text is read out when it is there. A live region has to be there before what it says: so it is the place, not what is put into it.
READ_OUT = """element.setAttribute("aria-live", "polite");"""
DOWNLOADS = {"txt": "Text (txt)", "srt": "Captions (srt)", "vtt": "Captions (vtt)", "json": "Data (json)"}


def build(page: Page) -> None:
    """Put the tab's widgets here and wire them."""
    gr = page.gr
    from gradio import Request  # page.gr is imported already; an annotation that Gradio reads

    stops = Stops()
    no_captions = gr.update(subtitles=[])
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
            text = gr.HTML(views.message(views.WAITING), elem_classes="wm", elem_id="text", js_on_load=READ_OUT)
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

    # Which of the visitor's requests this is. Kept by the browser, which sends it with the request; a `gr.State` would be read at its turn.
    ticket = gr.Textbox(visible="hidden", elem_id="ticket")

    def begin(request: Request) -> dict[Any, Any]:
        return {shown[name]: value for name, value in _emptied(gr).items()} | {ticket: stops.announce(request.session_hash or "")}

    def run(request: Request, *values: Any) -> Iterator[dict[Any, Any]]:
        with page.said_to_the_visitor():
            for news in _answer(page, stops, request.session_hash or "", *values):
                yield {shown[name]: value for name, value in news.items()}

    def fail(request: Request, ticket: str) -> tuple[Any, ...]:
        stops.withdraw(request.session_hash or "", ticket)  # the queue was full
        return views.message(views.NO_RESULT), "", gr.update(visible=False)

    def press_stop(request: Request) -> tuple[Any, ...]:
        if stops.stop(request.session_hash or ""):
            return gr.skip(), gr.skip()  # it says so when it has ended
        return views.stopped(None), gr.update(visible=False)

    stop.click(press_stop, None, [text, stop], **page.quick)
    gr.on([audio.clear, audio.upload, audio.stop_recording], lambda: no_captions, None, audio, **page.quick)  # they are another recording's
    every_press = {"trigger_mode": "multiple"}  # also while an earlier request is at work, which then ends
    for event in (button.click, examples.load_input_event.then):
        begun = event(begin, None, [ticket, *map(shown.get, _emptied(gr))], js=SHOW_RESULT, **every_press, **page.quick)
        done = begun.then(run, [ticket, audio, *controls], list(shown.values()), show_progress_on=text, **every_press, **page.heavy)
        done.failure(fail, ticket, [text, decision, stop], **page.quick)
        done.success(None, None, None, js=SHOW_RESULT, **page.quick)  # again: an empty answer may leave the page too short to scroll


def _emptied(gr: Any) -> dict[str, Any]:
    """The page as it is while a request waits."""
    hidden = gr.update(visible=False)
    empty = {"text": views.working(None), "decision": "", "as_json": None, "row": hidden, "helpers": hidden}
    return empty | {"stop": gr.update(visible=True), "audio": gr.update(subtitles=[])}  # None would leave them as they are


def _answer(page: Page, stops: Stops, session: str, ticket: str | None, audio: str | None, *values: Any) -> Iterator[dict[str, Any]]:
    """What the page shows, step by step, for as long as the visitor asks for nothing newer. `ticket`: from `Stops.announce`."""
    with stops.run(session, ticket) as run, closing(_steps(page, run, audio, *values)) as steps:
        try:
            for news in steps:
                if run.is_replaced:
                    return
                yield news
        except ValueError:
            if not run.is_replaced:
                raise


def _steps(page: Page, run: Run, audio: str | None, *values: Any) -> Generator[dict[str, Any], None, None]:
    """The text as it grows, the decision, and then what the base model alone writes."""
    *controls, compare = values
    progress: Progress | None = None
    written = _follow(page, run, partial(handlers.transcribe, page.transcriber, audio, *controls))
    try:
        run.check()
        yield _emptied(page.gr)  # again: an earlier request may have had the last word
        for progress in written:
            yield {"text": views.working(progress)}
    except StoppedError:
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
            yield from _alive(gr, following)
            base = following.result
        except StoppedError:
            base = "stopped"
        except ValueError:
            base = "failed"
        row = handlers.as_json(transcript, explanation, None if isinstance(base, str) else base)
        yield {"text": views.text(transcript, base), "as_json": row, "stop": gr.update(visible=False)}
    if is_mixture and base != "stopped":
        drawing = Following(lambda tell, show: heatmap.figure_html_for(page.transcriber, audio, transcript), run.check)
        try:
            yield from _alive(gr, drawing)
        except StoppedError:
            return
        if drawing.result is not None:
            yield {"heat": drawing.result, "helpers": gr.update(visible=True)}


def _alive(gr: Any, following: Following[Any]) -> Iterator[dict[str, Any]]:
    """Nothing new, for as long as work goes on: between two steps the server can end it, if the visitor has left."""
    for _ in following:
        yield {"stop": gr.update()}


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
