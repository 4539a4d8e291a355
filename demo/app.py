"""The page put together, and `whisper-moe-demo`, which serves it. Each tab is built in its own file."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, arg

from . import adapters_tab, api, batch_tab, bodies, handlers, live_tab, page, transcribe_tab, uploads, views
from .catalogue import Catalogue, Fetching
from .named_adapters import NamedAdapters, add_named
from .page import Limits
from .visitors import is_loopback

if TYPE_CHECKING:
    import gradio

    from whisper_moe import Transcriber

TABS = {"Transcribe": transcribe_tab, "Live": live_tab, "Many files": batch_tab, "Adapters": adapters_tab}


def build_app(transcriber: Transcriber, limits: Limits = Limits(), catalogue: Catalogue | None = None) -> gradio.Blocks:  # noqa: B008 - frozen
    """The page for this transcriber. Launch it with `launch_options()`.

    Args:
        transcriber: Made with `hub_utils.load_adapter` and `hub_utils.check_adapter`: the page says that adapters are looked over.
        limits: What visitors may ask for.
        catalogue: Its adapters; by default visitors fetch none.
    """
    gr = page.gradio()
    here = page.Page(gr, transcriber, limits, Catalogue(transcriber) if catalogue is None else catalogue)
    tabs = []
    with gr.Blocks(title="Whisper, one adapter per language", delete_cache=(min(300, limits.keep_uploads_s), limits.keep_uploads_s)) as app:
        gr.HTML(views.header(handlers.base_description(transcriber)), elem_classes="wm")
        with gr.Tabs():
            for label, tab in TABS.items():
                with gr.Tab(label, id=label) as opened:
                    tab.build(here)
                tabs.append(opened)
        here.connect(app, tabs)
        api.build(here)
    bodies.limit_fetches(limits)
    return app.queue(max_size=limits.max_waiting, api_open=False)  # closed: what has to wait cannot be called past the queue


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
        "footer_links": ["api", "settings", "gradio"],
        "run_history": False,
        "show_error": True,
        "share": False,
        "max_file_size": f"{limits.max_upload_mb}mb",
        "app_kwargs": {
            "middleware": [(bodies.BodyLimit, (), {"limits": limits})],
            "lifespan": uploads.tidying(min(300, limits.keep_uploads_s)),
        },
        "max_threads": limits.max_at_once + 16,  # every request in work has a thread, and others are left for the rest
    }


def serve(
    model: str | None = None,
    adapters: tuple[str, ...] = (),
    registry: Path | None = None,
    base_model: str | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
    limits: Annotated[Limits, arg(name="")] = Limits(),  # noqa: B008 - frozen
    allow_fetch: Annotated[bool, FlagCreatePairsOff] = False,
    no_allow_fetch: Annotated[bool, FlagCreatePairsOff] = False,
    owners: tuple[str, ...] = (),
    max_fetch_mb: float = 500,
    mcp: bool = False,
) -> None:
    """Serve the page: a recording becomes text, with the adapter chosen by the detected language.

    Args:
        model: folder or Hub id of a Whisper model, e.g. openai/whisper-small. Default: the pocket that comes with the package.
        adapters: any of: a folder of adapters or of one; a registry file (.json); a repository of the Hub (owner/name, with @commit or
            /subfolder behind it), fetched at once; owner:NAME or collection:OWNER/SLUG, all of theirs that are for the base, each fetched
            when its language is first heard. Default: those that come with the pocket; none for another model.
        registry: registry file; an adapter that it names is fetched when its language is first heard. Default: $WHISPER_MOE_REGISTRY, or
            adapters.json in the user's settings.
        base_model: the base's name on the Hub, if --model is a folder: adapters are looked for by it.
        host: address to listen on; 0.0.0.0 for every network interface.
        port: port to listen on. Default: the first free one from 7860.
        device: auto (an NVIDIA GPU where there is one), cpu, cuda, mps.
        dtype: auto (half precision on a GPU), float32, float16, bfloat16.
        limits: what visitors may ask for.
        allow_fetch: visitors may fetch adapters of --owners, and of owners and collections named in --adapters, and use them at once.
            Default: only whose browser runs on this machine, who may name any owner.
        no_allow_fetch: nobody may.
        owners: users and organisations of the Hub whose adapters may be looked for on the page.
        max_fetch_mb: what visitors may fetch, all together.
        mcp: offer the page's API as tools to language models, too (extra `mcp`).
    """
    if mcp:
        api.expect_mcp()
    fetching = _fetching(model, base_model, adapters, owners, host, allow_fetch, no_allow_fetch, max_fetch_mb)
    problems: list[str] = []
    transcriber = load(model, adapters, registry, base_model=base_model, device=device, dtype=dtype, problems=problems)
    run(transcriber, limits, Catalogue(transcriber, fetching, problems=tuple(problems)), host=host, port=port, mcp=mcp)


def _fetching(
    model: str | None,
    base_model: str | None,
    adapters: tuple[str, ...],
    owners: tuple[str, ...],
    host: str,
    allow: bool,
    forbid: bool,
    max_mb: float,
) -> Fetching:
    """What visitors may fetch. On a network, strangers are not to choose what this machine loads, unless its owner says so."""
    from whisper_moe.cli_hub import base_id

    if allow and forbid:
        raise ValueError("Say --allow-fetch or --no-allow-fetch, not both.")
    named = NamedAdapters.sort(adapters)
    is_own = _is_own_machine(host)
    return Fetching(
        allowed=not forbid and (allow or is_own),
        base_model=base_id(model) if base_model is None else base_model,
        owners=tuple(dict.fromkeys([*owners, *named.of("owner")])),
        collections=tuple(named.of("collection")),
        any_owner=is_own,
        only_here=is_own and not allow,  # a proxy of this machine may bring strangers
        max_mb=max_mb,
    )


def _is_own_machine(host: str) -> bool:
    """Whether only programs of this machine reach the address; a proxy among them."""
    return is_loopback(host)


def load(
    model: str | None = None,
    adapters: tuple[str, ...] = (),
    registry: Path | None = None,
    *,
    base_model: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    problems: list[str] | None = None,
) -> Transcriber:
    """The model with its adapters, as `serve` describes them. `problems` receives what could not be had from the Hub, and why."""
    print("Loading the model ...", flush=True)
    import peft_s2lora  # noqa: F401 - registers S2-LoRA with PEFT, so that such adapters load
    from hub_utils import check_adapter, load_adapter
    from whisper_moe import LoraMoeConfig, Transcriber  # noqa: F401 - the first registers mixtures
    from whisper_moe.cli_hub import base_id, expect_registry

    named = NamedAdapters.sort(adapters)
    folders = named.of("folder") if adapters else None
    transcriber = Transcriber.from_pretrained(model, folders, device=device, dtype=dtype, load=load_adapter, check=check_adapter)
    base = model if base_model is None else base_model
    if named.on_hub:
        print("Asking the Hub ...", flush=True)
    missing = add_named(transcriber, named, base_id(base))
    for line in missing:
        print(f"Left out: {line}", file=sys.stderr, flush=True)
    if problems is not None:
        problems += missing
    for path in (*map(Path, named.of("registry")), registry):
        expect_registry(transcriber, path, base, folders_first=bool(adapters))
    return transcriber


def run(
    transcriber: Transcriber,
    limits: Limits,
    catalogue: Catalogue | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    mcp: bool = False,
) -> None:
    """Serve the page until somebody ends it."""
    print(f"{handlers.base_description(transcriber)}; starting the page ...", flush=True)
    app = build_app(transcriber, limits, catalogue)
    place = {"server_name": host, "server_port": port, "mcp_server": mcp}
    _, url, _ = app.launch(prevent_thread_lock=True, quiet=True, **place, **launch_options(limits))
    if mcp:
        api.tend_mcp(app)
        print(f"Tools for language models (MCP): {url}gradio_api/mcp/", flush=True)
    print(f"Open {url} in a browser; Ctrl-C ends the page.", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being stopped ends like Ctrl-C: uploads are deleted
    try:
        app.block_thread()
    finally:
        # Gradio does this too, but not while a visitor's page is still open.
        from gradio.route_utils import delete_files_created_by_app

        delete_files_created_by_app(app, age=None)
        uploads.remove_empty(uploads.folder(), empty_for_s=0)


def main() -> None:
    """The console script `whisper-moe-demo`."""
    import tyro

    try:
        tyro.cli(serve, prog="whisper-moe-demo")
    except (ValueError, OSError) as error:  # no such model, no such adapter, port in use: said in one line, not as a traceback
        raise SystemExit(f"whisper-moe-demo: {error}") from error


if __name__ == "__main__":
    main()
