"""The adapters tab as HTML: what is here, how far it can be trusted, and what the Hub offers. Everything from outside is escaped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING

from whisper_moe import language_name
from whisper_moe.explain import method, percent, size
from whisper_moe.languages import is_whisper_language

from . import cards

if TYPE_CHECKING:
    from hub_utils import FoundAdapter
    from whisper_moe import LanguageAdapter
    from whisper_moe.registry import AdapterSource

    from .catalogue import Fetching, Findings, Offer

NONE_FOUND = "Nothing was found for this language there."
_CHECKED = (
    "Numbers only: weights come as safetensors, a format that cannot carry a program. Nothing else is opened.",
    "Settings from a list: every field of its configuration is known and within bounds; nothing in it can name a file or another model.",
    "Exactly its own weights: the tensors that its settings ask for, no more, so that it cannot overwrite the base model.",
    "Its base: where its maker left a fingerprint of the base model, it is compared with the one that is loaded here.",
    "Its origin: from the Hub, one commit is fetched, by its number, and every file compared with the hash that the Hub gives.",
)
_NOT_CHECKED = (
    "Whether it writes well. The error rates are its maker's own; try it on recordings of which you know the words.",
    "Whether it writes the truth. An adapter can be trained to write other words than were said.",
    "Who its maker is, and on whose recordings it was trained.",
)


# ---- what is here --------------------------------------------------------------------------------------------------------


def installed(
    adapters: Sequence[LanguageAdapter],
    detectable: Sequence[str],
    problems: Sequence[str] = (),
    is_from_hub: Callable[[LanguageAdapter], bool] = lambda adapter: False,
) -> str:
    """A card for each adapter.

    Args:
        adapters: Those that are here.
        detectable: Languages that can be heard.
        problems: What could not be had at the start.
        is_from_hub: Whether an adapter's files were compared with the Hub's hashes. What its folder says of itself does not count.
    """
    lines = "".join(f'<p class="wm-warning" role="status">{escape(line)}</p>' for line in problems)
    if not adapters:
        nothing = "None is here yet, so the base model writes everything. Start the page with <code>--adapters</code>, or find one below."
        return f"<h2>Adapters that are here</h2>{lines}<p>{nothing}</p>"
    about = (
        "An adapter is a small file that teaches the base model one language, or one kind of speech. The base model itself stays as it is."
    )
    rows = "".join(_card(adapter, detectable, is_from_hub(adapter)) for adapter in adapters)
    return f'<h2>Adapters that are here</h2>{lines}<p>{about}</p><ul class="wm-adapters">{rows}</ul>'


def _card(adapter: LanguageAdapter, detectable: Sequence[str], is_from_hub: bool) -> str:
    facts = {
        "Used": escape(used(adapter, detectable)),
        "Measured on": escape(_measured_on(adapter)),
        "Kind": escape(f"{method(adapter.peft_type)}, {adapter.num_parameters:,} numbers, {size(adapter.num_bytes)}"),
        "Made for": escape(adapter.base),
        "Comes from": escape(adapter.source or "not known"),
        "Checked": escape(_trust(adapter, is_from_hub)),
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts.items())
    name = escape(adapter.name)
    return (
        f"<li><h3>{escape(purpose(adapter))} <code>{name}</code></h3>{_rates(adapter)}<dl>{rows}</dl>"
        f"<details><summary>Its card<span class='wm-unseen'> ({name})</span></summary>"
        f'<div class="wm-card">{cards.to_html(cards.card_of(adapter))}</div></details></li>'
    )


def purpose(adapter: LanguageAdapter | AdapterSource | FoundAdapter) -> str:
    """What an adapter is for: "Welsh", or "English, child"."""
    name = language_name(adapter.language)
    return name if adapter.domain is None else f"{name}, {adapter.domain}"


def used(adapter: LanguageAdapter, detectable: Sequence[str]) -> str:
    """When it writes."""
    by_name = "When you choose it by its name, under Options"
    if adapter.carrier is not None or not is_whisper_language(adapter.language) or adapter.language not in detectable:
        return f"{by_name}: the base model cannot hear this language"
    return by_name if adapter.domain is not None else f"When {language_name(adapter.language)} is heard, or chosen"


def _rates(adapter: LanguageAdapter) -> str:
    """Wrong words without and with the adapter, as figures and as two bars."""
    before, after = adapter.metrics.get("before") or {}, adapter.metrics.get("after") or {}
    if "wer" not in after:
        return "<p>Nobody has measured how well it writes.</p>"
    rows = [("without it", before["wer"])] if "wer" in before else []
    bars = "".join(
        f'<li><span>{label}</span><span class="wm-bar" aria-hidden="true"><i style="width:{min(100 * wer, 100):.1f}%"></i></span>'
        f'<span class="wm-figure">{escape(percent(wer))}</span></li>'
        for label, wer in [*rows, ("with it", after["wer"])]
    )
    return f'<p class="wm-bars-head">Wrong words</p><ul class="wm-bars">{bars}</ul>'


def _measured_on(adapter: LanguageAdapter) -> str:
    after = adapter.metrics.get("after") or {}
    parts = [f"{after['clips']} recordings of" if "clips" in after else "", str(adapter.metrics.get("test_set", "a test set"))[:200]]
    if "wer" not in after:
        return "nothing that is known"
    normalizer = adapter.metrics.get("normalizer")
    compared = "" if normalizer is None else f"; texts compared after the {str(normalizer)[:100]!r} normaliser"
    return f"{' '.join(filter(None, parts))}{compared}"


def _trust(adapter: LanguageAdapter, is_from_hub: bool) -> str:
    has_fingerprint = adapter.base_signature is not None
    fingerprint = "fingerprint of the base model agrees" if has_fingerprint else "no fingerprint of its base; it fits in size"
    if is_from_hub:
        return f"{fingerprint}; files agree with the Hub's hashes"
    return f"{fingerprint}; files of this machine, nothing to compare them with"


def expected(sources: Sequence[AdapterSource], can_fetch: bool) -> str:
    """The adapters that are named and not here."""
    if not sources:
        return ""
    rows = "".join(f"<li>{escape(purpose(source))} <code>{escape(source.source)}</code></li>" for source in sources)
    how = " or when you press the button below" if can_fetch else ""
    return f"<h2>Named, not here yet</h2><p>Fetched when the language is first heard or chosen{how}.</p><ul>{rows}</ul>"


def trust() -> str:
    """What is checked before an adapter is used, and what is not."""
    checked, not_checked = ("".join(f"<li>{line}</li>" for line in lines) for lines in (_CHECKED, _NOT_CHECKED))
    return (
        "<h2>Can an adapter be trusted?</h2><p>Each is looked over before it touches the model, and refused if anything is odd.</p>"
        f"<h3>What is checked</h3><ul>{checked}</ul><h3>What nobody can check for you</h3><ul>{not_checked}</ul>"
    )


# ---- what the Hub offers -------------------------------------------------------------------------------------------------


def finding(fetching: Fetching) -> str:
    """What the search does, or why there is none."""
    head = "<h2>Find one on the Hugging Face Hub</h2>"
    if not fetching.allowed:
        return f"{head}<p>Visitors cannot fetch adapters on this page. Its owner can: <code>--allow-fetch</code>.</p>"
    if fetching.base_model is None:
        return f"{head}<p>Not with this base model: it is a folder, and its name is not known. Start with <code>--base-model</code>.</p>"
    whom = " and ".join([*fetching.owners, *fetching.collections])
    among = f"Searched: {escape(whom)}." if whom else "All of the Hub is never searched: say whose adapters you want."
    return f"{head}<p>For the base model <code>{escape(fetching.base_model)}</code>. {among}</p>"


def findings(found: Findings) -> str:
    """What a search gave, apart from the list to choose from."""
    lines = "".join(f'<p class="wm-warning" role="status">{escape(line)}</p>' for line in found.problems)
    return lines + ("<p>Choose one to see more of it.</p>" if found.adapters else f'<p role="status">{NONE_FOUND}</p>')


def label(found: FoundAdapter) -> str:
    """A finding on one line, as plain text."""
    closed = ", private" if found.private else ", on request only" if found.gated else ""
    return f"{found.rank}. {found.repo_id}{'' if found.subfolder is None else f' ({found.subfolder})'}: {found.reason}{closed}"


def offer(offered: Offer) -> str:
    """What to know before a finding is fetched."""
    found = offered.found
    facts = {
        "By": offered.author,
        "Repository": f"{found.repo_id}" + ("" if found.subfolder is None else f", folder {found.subfolder}"),
        "Commit": found.sha,
        "Size": size(offered.num_bytes),
        "Downloads": f"{found.downloads:,}",
        "Kind": "not said" if found.peft_type is None else method(found.peft_type),
        "Its maker says": found.reason,
    }
    rows = "".join(f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in facts.items())
    taken = (
        f'<p class="wm-warning" role="status">{escape(language_name(found.language))} has the adapter '
        f"<code>{escape(offered.taken_by)}</code> already, so this one cannot be added.</p>"
        if offered.taken_by is not None
        else ""
    )
    closed = '<p class="wm-warning" role="status">Its maker lets in only some users.</p>' if found.gated or found.private else ""
    return f"<h3>{escape(purpose(found))}: fetch this one?</h3><dl>{rows}</dl>{taken}{closed}"


def added(adapter: LanguageAdapter) -> str:
    """What happened."""
    return (
        f'<p role="status">The adapter <code>{escape(adapter.name)}</code> for {escape(purpose(adapter))} is here now, for everybody on '
        "this page, until the server stops.</p>"
    )
