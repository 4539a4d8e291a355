"""The page put together, and `whisper-moe-demo`, which serves it. Each tab is built in its own file."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import adapters_tab, api, batch_tab, handlers, live_tab, page, transcribe_tab, views
from .page import Limits

if TYPE_CHECKING:
    import gradio

    from whisper_moe import Transcriber

TABS = {"Transcribe": transcribe_tab, "Live": live_tab, "Many files": batch_tab, "Adapters": adapters_tab}


def build_app(transcriber: Transcriber, limits: Limits = Limits()) -> gradio.Blocks:  # noqa: B008 - frozen
    """The page for this transcriber. Launch it with `launch_options()`."""
    gr = page.gradio()
    here = page.Page(gr, transcriber, limits)
    with gr.Blocks(title="Whisper, one adapter per language", delete_cache=(300, limits.keep_uploads_s)) as app:
        gr.HTML(views.header(handlers.base_description(transcriber)), elem_classes="wm")
        with gr.Tabs():
            for label, tab in TABS.items():
                with gr.Tab(label, id=label):
                    tab.build(here)
        api.build(here)
    return app.queue(max_size=limits.max_waiting)


def launch_options(limits: Limits = Limits()) -> dict[str, Any]:  # noqa: B008 - frozen
    """Look and limits, which Gradio takes at launch."""
    gr = page.gradio()
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
        "max_file_size": f"{limits.max_upload_mb}mb",
        "max_threads": limits.max_at_once + 16,  # every request in work has a thread, and others are left for the rest
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
    limits = Limits(max_minutes=max_minutes, max_upload_mb=max_upload_mb)
    app = build_app(transcriber, limits)
    place = {"server_name": host, "server_port": port}
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **place, **launch_options(limits))
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
