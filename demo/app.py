"""Widgets and wiring of the page; `whisper-moe-demo` starts here. What a click does is in handlers.py, how it looks in views.py."""

from __future__ import annotations

import os
import signal
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import handlers, views

if TYPE_CHECKING:
    import gradio

    from whisper_moe import Transcriber

MODEL_QUEUE = "model"  # one `concurrency_id` for everything that touches the model: one request at a time
MAX_WAITING = 32  # requests in the queue; the next one is refused with a message
KEEP_UPLOADS_S = 1800  # uploads and recordings older than this are deleted; the rest when the server stops

# On a phone the answer stands below the controls: bring it into view, and only then.
SHOW_RESULT = """() => {
    const result = document.getElementById("result");
    if (result.getBoundingClientRect().top > window.innerHeight / 2) result.scrollIntoView();
}"""


def _gradio() -> Any:
    """Gradio, imported late (seconds) and without its usage statistics, so that nothing leaves this machine."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    import gradio

    return gradio


def build_app(transcriber: Transcriber, *, max_minutes: float = 10) -> gradio.Blocks:
    """The page for this transcriber. Launch it with `launch_options()`."""
    gr = _gradio()
    with gr.Blocks(title="Whisper, one adapter per language", delete_cache=(300, KEEP_UPLOADS_S)) as app:
        gr.HTML(views.header(handlers.base_description(transcriber)), elem_classes="wm")
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                audio = gr.Audio(
                    label="Recording", sources=["upload", "microphone"], type="filepath", buttons=["download"], elem_id="audio"
                )
                button = gr.Button("Transcribe", variant="primary", elem_id="transcribe")
                below_button = gr.Column()
                controls = _controls(gr, transcriber)
                with below_button:
                    language, adapter, *_ = controls
                    examples = _examples(gr, transcriber, [audio, language, adapter])
            with gr.Column(scale=6, min_width=320):
                result = gr.HTML(views.message(views.WAITING), elem_classes="wm", elem_id="result")
                with gr.Accordion("JSON", open=False, elem_id="json"):
                    as_json = gr.JSON(show_label=False, max_height=400)
        installed = list(transcriber.registry)
        gr.HTML(views.adapters(installed, [handlers.spoken_by(one) for one in installed]), elem_classes="wm", elem_id="adapters")

        def run(*values: Any, progress: Any = gr.Progress()) -> tuple[str, dict]:  # noqa: B008 - Gradio finds it by this default
            try:
                transcript = handlers.transcribe(transcriber, *values, max_duration_s=60 * max_minutes, on_progress=progress)
            except ValueError as error:
                raise gr.Error(escape(str(error)), duration=20, print_exception=False) from error
            wrote = None if transcript.adapter is None else transcriber.registry[transcript.adapter]
            return views.result(transcript, wrote), transcript.to_dict()

        quick = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        for event in (button.click, examples.load_input_event.then):
            emptied = event(lambda: ("", None), None, [result, as_json], js=SHOW_RESULT, **quick)
            done = emptied.then(
                run,
                [audio, *controls],
                [result, as_json],
                concurrency_id=MODEL_QUEUE,
                concurrency_limit=1,
                show_progress_on=result,
                api_visibility="private",
            )
            done.failure(lambda: views.message(views.NO_RESULT), None, result, **quick)
            done.success(None, None, None, js=SHOW_RESULT, **quick)  # again: an empty answer may leave the page too short to scroll
    return app.queue(max_size=MAX_WAITING)


def _controls(gr: Any, transcriber: Transcriber) -> list:
    """Language, adapter, candidates, threshold: in the order of `handlers.transcribe`."""
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


def _examples(gr: Any, transcriber: Transcriber, inputs: list) -> Any:
    """One-click examples: the recording, language automatic, and the adapter where the example is about one."""
    rows = handlers.examples(transcriber)
    return gr.Examples(
        [[row["path"], handlers.AUTO, row["adapter"]] for row in rows],
        inputs,
        example_labels=[row["label"] for row in rows],
        label="Examples: one click transcribes",
        examples_per_page=len(rows),
        cache_examples=False,
        api_visibility="private",
        elem_id="examples",
    )


def launch_options() -> dict[str, Any]:
    """Look and limits, which Gradio takes at launch."""
    gr = _gradio()
    theme = gr.themes.Default(primary_hue="blue", secondary_hue="blue", neutral_hue="slate", text_size="lg").set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        input_placeholder_color="*neutral_600",
        input_placeholder_color_dark="*neutral_300",
    )
    return {
        "theme": theme,
        "css_paths": Path(__file__).parent / "style.css",
        "footer_links": ["settings", "gradio"],
        "run_history": False,
        "show_error": True,
        "share": False,
    }


def serve(
    model: str | None = None,
    adapters: tuple[str, ...] = (),
    registry: Path | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_minutes: float = 10,
    max_upload_mb: int = 100,
) -> None:
    """Serve the page: a recording becomes text, with the adapter chosen by the detected language.

    Args:
        model: folder or Hub id of a Whisper model, e.g. openai/whisper-small. Default: the pocket that comes with the package.
        adapters: folders of adapters, or of one adapter each. Default: those that come with the pocket; none for another model.
        registry: registry file; an adapter that it names is fetched when its language is first heard. Default: $WHISPER_MOE_REGISTRY, or
            adapters.json in the user's settings.
        host: address to listen on; 0.0.0.0 for every network interface.
        port: port to listen on. Default: the first free one from 7860.
        device: auto (an NVIDIA GPU where there is one), cpu, cuda, mps.
        dtype: auto (half precision on a GPU), float32, float16, bfloat16.
        max_minutes: longest recording that is accepted.
        max_upload_mb: largest file that is accepted.
    """
    print("Loading the model ...", flush=True)
    import peft_s2lora  # noqa: F401 - registers S2-LoRA with PEFT, so that such adapters load
    from hub_utils import load_adapter
    from whisper_moe import LoraMoeConfig, Transcriber  # noqa: F401 - the first registers mixtures
    from whisper_moe.cli_hub import expect_registry

    transcriber = Transcriber.from_pretrained(model, adapters or None, device=device, dtype=dtype, load=load_adapter)
    expect_registry(transcriber, registry, model, folders_first=bool(adapters))
    print(f"{handlers.base_description(transcriber)}; starting the page ...", flush=True)
    app = build_app(transcriber, max_minutes=max_minutes)
    limits = {"server_name": host, "server_port": port, "max_file_size": f"{max_upload_mb}mb"}
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **limits, **launch_options())
    print(f"Open {url} in a browser; Ctrl-C ends the page.", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being stopped ends like Ctrl-C: uploads are deleted
    app.block_thread()


def main() -> None:
    """The console script `whisper-moe-demo`."""
    import tyro

    try:
        tyro.cli(serve, prog="whisper-moe-demo")
    except (ValueError, OSError) as error:  # no such model, no such adapter, port in use: said in one line, not as a traceback
        raise SystemExit(f"whisper-moe-demo: {error}") from error


if __name__ == "__main__":
    main()
