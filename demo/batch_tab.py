"""The batch tab: many files, a table that fills while they are written, and one zip with every text.

What happens to the files is in batch.py, how it looks in views_batch.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from . import handlers, views_batch
from .batch import Batch, write_zip
from .page import Page
from .stops import Stops

# On a phone the table stands below the controls: bring it into view, and only then.
SHOW_TABLE = """() => {
    const table = document.getElementById("batch-table");
    if (table.getBoundingClientRect().top > window.innerHeight / 2) table.scrollIntoView();
}"""


def build(page: Page) -> None:
    """Put the tab's widgets here and wire them."""
    gr, transcriber, limits = page.gr, page.transcriber, page.limits
    stops = Stops()
    with gr.Row():
        with gr.Column(scale=4, min_width=320):
            files = gr.File(label="Recordings", file_count="multiple", height=220, elem_id="batch-files")
            with gr.Column(visible=False) as place_of_more:
                more = gr.UploadButton("Add more files", file_count="multiple", size="sm", elem_id="batch-more")
            gr.HTML(views_batch.limits(limits), elem_classes="wm")
            with gr.Row():
                start = gr.Button("Transcribe all", variant="primary", elem_id="batch-start")
                stop = gr.Button("Stop", variant="stop", visible=False, elem_id="batch-stop")
            with gr.Accordion("Options for all files", open=False, elem_id="batch-options"):
                language = gr.Dropdown(
                    handlers.language_choices(transcriber), value=handlers.AUTO, label="Language of all files", elem_id="batch-language"
                )
                adapter = gr.Dropdown(
                    handlers.adapter_choices(transcriber), value=handlers.AUTO, label="Adapter for all files", elem_id="batch-adapter"
                )
                page.offers(language, handlers.language_choices)
                page.offers(adapter, handlers.adapter_choices)
        with gr.Column(scale=7, min_width=320):
            table = gr.HTML(views_batch.message(views_batch.WAITING), elem_classes="wm", elem_id="batch-table")
            download = gr.DownloadButton("Download all texts (zip)", visible=False, variant="primary", elem_id="batch-zip")

    # Gradio's own ways to read an upload leave an empty file behind for each. These two are never updated: that would make them anew.
    files.preprocess = more.preprocess = lambda uploaded: [] if uploaded is None else uploaded.root

    ticket = gr.Textbox(visible="hidden")  # which of the visitor's requests this is; see transcribe_tab.py

    def run(request: Any, ticket: str, chosen: list[Any], language: str, adapter: str) -> Iterator[tuple[str, Any]]:
        options: dict[str, Any] = {
            "names": [file.orig_name or Path(file.path).name for file in chosen],
            "max_files": limits.max_files,
            "language": None if language == handlers.AUTO else language,
            "adapter": None if adapter == handlers.AUTO else adapter,
            "max_duration_s": limits.max_duration_s,
        }
        with page.said_to_the_visitor(), stops.run(request.session_hash, ticket) as watched, TemporaryDirectory() as folder:
            with closing(Batch(transcriber, [file.path for file in chosen], watched, **options).rounds()) as rounds:
                for progress in rounds:
                    if watched.is_replaced:  # it was stopped while it waited, and another one asked for
                        return
                    yield views_batch.batch(progress), gr.skip()
            if progress.count("done"):
                path = Path(folder) / "transcripts.zip"
                write_zip(progress.items, path)
                yield gr.skip(), gr.DownloadButton(value=str(path), visible=True)  # Gradio makes a copy, which it deletes in time

    def press_stop(request: Any) -> tuple[Any, ...]:
        if stops.stop(request.session_hash):
            return gr.skip(), gr.Button("Stopping ...", interactive=False), gr.skip()
        return *end(request), views_batch.message("Stopped before any file was begun.")  # it was still waiting for its turn

    def begin(request: Any) -> tuple[Any, ...]:
        shown = (
            gr.Button(interactive=False),
            gr.Button("Stop", visible=True, interactive=True),
            gr.DownloadButton(visible=False, value=None),
        )
        return stops.announce(request.session_hash), *shown

    def end(request: Any) -> tuple[Any, ...]:
        if stops.is_busy(request.session_hash):  # with another, since this one was stopped
            return gr.skip(), gr.skip()
        return gr.Button(interactive=True), gr.Button(visible=False)

    def fail(request: Any, ticket: str) -> tuple[Any, ...]:
        stops.withdraw(request.session_hash, ticket)  # the queue was full
        return end(request)

    for function in (run, press_stop, begin, end, fail):
        function.__annotations__["request"] = gr.Request  # by which Gradio knows what to pass

    files.change(lambda chosen: gr.Column(visible=bool(chosen)), files, place_of_more, **page.quick)
    more.upload(lambda old, new: [file.path for file in (*old, *new)], [files, more], files, **page.quick)
    began = start.click(begin, None, [ticket, start, stop, download], js=SHOW_TABLE, **page.quick)
    done = began.then(
        run,
        [ticket, files, language, adapter],
        [table, download],
        show_progress="hidden",
        trigger_mode="multiple",  # one that was stopped may still wait for its turn
        **page.heavy,
    )
    done.success(end, None, [start, stop], **page.quick)
    done.failure(fail, ticket, [start, stop], **page.quick)
    stop.click(press_stop, None, [start, stop, table], **page.quick)
