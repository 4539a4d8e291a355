"""The first tab: one recording, its text, and the decision behind it. What a click does is in handlers.py, how it looks in views.py."""

from __future__ import annotations

from typing import Any

from . import handlers, views
from .page import Page

# On a phone the answer stands below the controls: bring it into view, and only then.
SHOW_RESULT = """() => {
    const result = document.getElementById("result");
    if (result.getBoundingClientRect().top > window.innerHeight / 2) result.scrollIntoView();
}"""


def build(page: Page) -> None:
    """Put the tab's widgets here and wire them."""
    gr, transcriber = page.gr, page.transcriber
    with gr.Row():
        with gr.Column(scale=5, min_width=320):
            audio = gr.Audio(label="Recording", sources=["upload", "microphone"], type="filepath", buttons=["download"], elem_id="audio")
            button = gr.Button("Transcribe", variant="primary", elem_id="transcribe")
            below_button = gr.Column()
            controls = _controls(page)
            with below_button:
                language, adapter, *_ = controls
                examples = _examples(page, [audio, language, adapter])
        with gr.Column(scale=6, min_width=320):
            result = gr.HTML(views.message(views.WAITING), elem_classes="wm", elem_id="result")
            with gr.Accordion("JSON", open=False, elem_id="json"):
                as_json = gr.JSON(show_label=False, max_height=400)

    def run(*values: Any, progress: Any = gr.Progress()) -> tuple[str, dict]:  # noqa: B008 - Gradio finds it by this default
        with page.said_to_the_visitor():
            transcript = handlers.transcribe(transcriber, *values, max_duration_s=page.limits.max_duration_s, on_progress=progress)
        wrote = None if transcript.adapter is None else transcriber.registry[transcript.adapter]
        return views.result(transcript, wrote), transcript.to_dict()

    for event in (button.click, examples.load_input_event.then):
        emptied = event(lambda: ("", None), None, [result, as_json], js=SHOW_RESULT, **page.quick)
        done = emptied.then(run, [audio, *controls], [result, as_json], show_progress_on=result, **page.heavy)
        done.failure(lambda: views.message(views.NO_RESULT), None, result, **page.quick)
        done.success(None, None, None, js=SHOW_RESULT, **page.quick)  # again: an empty answer may leave the page too short to scroll


def _controls(page: Page) -> list:
    """Language, adapter, candidates, threshold: in the order of `handlers.transcribe`."""
    gr, transcriber = page.gr, page.transcriber
    with gr.Accordion("Options", open=False, elem_id="options"):
        return [
            gr.Dropdown(handlers.language_choices(transcriber), value=handlers.AUTO, label="Language", elem_id="language"),
            gr.Dropdown(handlers.adapter_choices(transcriber), value=handlers.AUTO, label="Adapter", elem_id="adapter"),
            gr.Dropdown(
                handlers.candidate_choices(transcriber),
                value=[],
                multiselect=True,
                label="Candidates",
                info="Only these languages may be heard. Empty: all of them.",
                elem_id="candidates",
            ),
            gr.Slider(0, 1, value=0.5, step=0.05, label="Threshold", info="Less sure than this: no adapter.", elem_id="threshold"),
        ]


def _examples(page: Page, inputs: list) -> Any:
    """One-click examples: the recording, language automatic, and the adapter where the example is about one."""
    rows = handlers.examples(page.transcriber)
    return page.gr.Examples(
        [[row["path"], handlers.AUTO, row["adapter"]] for row in rows],
        inputs,
        example_labels=[row["label"] for row in rows],
        label="Examples: one click transcribes",
        examples_per_page=len(rows),
        cache_examples=False,
        api_visibility="private",
        elem_id="examples",
    )
