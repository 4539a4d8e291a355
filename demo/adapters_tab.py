"""The adapters tab: what is here, from where, how good and how far trusted; and the way to fetch one more while the page runs."""

from __future__ import annotations

from typing import Any

from . import views_adapters as views
from .page import Page
from .visitors import is_at_this_machine

FETCHING_QUEUE = "fetching"  # apart from the model's: who waits for a download holds up nobody


def build(page: Page) -> None:
    """Put the tab's widgets here and wire them."""
    gr, catalogue = page.gr, page.catalogue
    here = gr.HTML(_installed(page), elem_classes="wm", elem_id="adapters")
    named, key, fetch_named = _named(page)
    about, column, search = _search(page)
    gr.HTML(views.trust(), elem_classes="wm", elem_id="adapters-trust")
    page.when_adapters_change([here], lambda _: [_installed(page)])
    page.when_adapters_change([named, key, fetch_named], lambda is_own: _expected(page, is_own))
    page.when_adapters_change([about, column], lambda is_own: [_finding(page, is_own), gr.update(visible=_may_search(page, is_own))])

    def fetch_expected(chosen: str | None, request: Any = None) -> None:
        with page.said_to_the_visitor():
            if not chosen:
                raise ValueError("Choose one of the adapters first.")
            catalogue.fetch_expected(chosen, is_own=is_at_this_machine(request))

    waits = {"concurrency_id": FETCHING_QUEUE, "concurrency_limit": 2, "api_visibility": "private"}
    page.adapters_changed(fetch_named.click(page.knows_visitor(fetch_expected), key, None, show_progress_on=named, **waits))
    _wire_search(page, waits, *search)


def _installed(page: Page) -> str:
    transcriber, catalogue = page.transcriber, page.catalogue
    return views.installed(list(transcriber.registry), transcriber.detectable_languages, catalogue.problems, catalogue.is_from_hub)


def _finding(page: Page, is_own: bool) -> str:
    return views.finding(page.catalogue.fetching.of_visitor(is_own))


def _may_search(page: Page, is_own: bool) -> bool:
    fetching = page.catalogue.fetching.of_visitor(is_own)
    return fetching.allowed and fetching.base_model is not None


def _expected(page: Page, is_own: bool) -> tuple[Any, Any, Any]:
    """What is named and not here: the list, the choice, and the button."""
    gr, sources, allowed = page.gr, page.transcriber.registry.expected, page.catalogue.fetching.of_visitor(is_own).allowed
    choices = [(f"{views.purpose(source)} ({source.key})", source.key) for source in sources]
    is_shown = bool(sources) and allowed
    return (
        views.expected(sources, allowed),
        gr.update(choices=choices, value=choices[0][1] if choices else None, visible=is_shown),
        gr.update(visible=is_shown),
    )


def _named(page: Page) -> tuple[Any, Any, Any]:
    gr = page.gr
    text, choice, button = _expected(page, is_own=False)  # until the page is open, and who looks at it known
    named = gr.HTML(text, elem_classes="wm", elem_id="adapters-named")
    with gr.Row(elem_classes="wm-fetch-row"):
        key = gr.Dropdown(
            choice["choices"], value=choice["value"], label="Adapter to fetch", visible=choice["visible"], scale=3, elem_id="expected"
        )
        fetch = gr.Button("Fetch now", visible=button["visible"], scale=1, elem_id="fetch-expected")
    return named, key, fetch


def _search(page: Page) -> tuple[Any, Any, tuple[Any, ...]]:
    """What the search does, its column, and in that: language, owner, the search, its findings, what is known of the one that is chosen,
    and the button that fetches it. What a stranger sees; more is shown when it is known who looks."""
    gr, fetching = page.gr, page.catalogue.fetching
    what = gr.HTML(_finding(page, is_own=False), elem_classes="wm", elem_id="adapters-find")
    with gr.Column(visible=_may_search(page, is_own=False)) as column:
        with gr.Row(elem_classes="wm-fetch-row"):
            language = gr.Textbox(label="For which language", placeholder="Breton, or br", max_length=60, scale=2, elem_id="find-language")
            whose = "Empty: everybody named above." if fetching.owners or fetching.collections else "A user or an organisation of the Hub."
            owner = gr.Textbox(label="Whose adapters", placeholder=whose, max_length=96, scale=2, elem_id="find-owner")
            button = gr.Button("Find", scale=1, elem_id="find")
        findings = gr.Radio([], label="Found, the best first", visible=False, elem_id="findings")
        about = gr.HTML("", elem_classes="wm", elem_id="finding")
        fetch = gr.Button("Fetch and add", variant="primary", visible=False, elem_id="fetch-finding")
    return what, column, (language, owner, button, findings, about, fetch)


def _wire_search(page: Page, waits: dict[str, Any], language: Any, owner: Any, button: Any, findings: Any, about: Any, fetch: Any) -> None:
    gr, catalogue = page.gr, page.catalogue
    nothing = (gr.update(choices=[], value=None, visible=False), "", gr.update(visible=False))

    def find(said: str, whose: str, request: Any = None) -> tuple[Any, Any, Any]:
        with page.said_to_the_visitor():
            found = catalogue.search(said, whose, is_own=is_at_this_machine(request))
        choices = [(views.label(each), each.source) for each in found.adapters]
        return gr.update(choices=choices, value=None, visible=bool(choices)), views.findings(found), nothing[2]

    def show(source: str | None, request: Any = None) -> tuple[str, Any]:
        if not source:
            return "", gr.update(visible=False)
        with page.said_to_the_visitor():
            offer = catalogue.offer(source, is_own=is_at_this_machine(request))
        return views.offer(offer), gr.update(visible=offer.taken_by is None)

    def add(source: str | None, request: Any = None, progress: Any = gr.Progress()) -> tuple[Any, str, Any]:  # noqa: B008 - Gradio finds it
        with page.said_to_the_visitor():
            adapter = catalogue.fetch(source or "", progress, is_own=is_at_this_machine(request))
        return nothing[0], views.added(adapter), nothing[2]

    shown = [findings, about, fetch]
    for function in (find, show, add):
        page.knows_visitor(function)
    looks = waits | {"concurrency_id": "searching", "concurrency_limit": 4}
    for event in (button.click, language.submit, owner.submit):
        event(lambda: nothing, None, shown, **page.quick).then(find, [language, owner], shown, show_progress_on=about, **looks)
    findings.input(show, findings, [about, fetch], show_progress_on=about, **looks)
    page.adapters_changed(fetch.click(add, findings, shown, show_progress_on=about, **waits | {"concurrency_limit": 2}))
