"""The page's API: named endpoints for `gradio_client`, curl and MCP, which answer with the JSON of `whisper-moe transcribe --json`.

What an endpoint does is a plain function here; `build` gives it to Gradio under its name. Signatures and docstrings of the functions in
`build` are what the API page and an MCP client show, so they speak to people who see nothing else. No `from __future__ import
annotations`: Gradio reads the types.
"""

import json
import math
from collections.abc import Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from whisper_moe import language_name
from whisper_moe.engine import is_noise

from . import handlers
from .page import Page

if TYPE_CHECKING:
    from collections.abc import Iterator

    from whisper_moe import LanguageAdapter, Transcriber, Transcript
    from whisper_moe.registry import AdapterSource

NUM_SHOWN = 8  # languages in an answer of `detect`, as many as in a transcript


class _Meta(TypedDict):
    _type: Literal["gradio.FileData"]


class Recording(TypedDict, total=False):
    """A file as Gradio's clients send it, by the path at which it was uploaded, or by the address from which it is to be fetched."""

    path: str
    orig_name: str
    meta: _Meta


def build(page: Page) -> None:
    """Register the endpoints."""
    gr, transcriber = page.gr, page.transcriber
    from gradio.utils import get_upload_folder  # page.gr is here already

    uploads = Path(get_upload_folder())
    work = page.heavy | {"api_visibility": "public"}
    look = {"queue": False}

    def transcribe(
        audio: Recording,
        language: str = handlers.AUTO,
        adapter: str = handlers.AUTO,
        allowed: list[str] = [],  # noqa: B006 - shown as the default, never changed
        threshold: float = 0.5,
        switching: bool = False,
        compare: bool = False,
        two_best: bool = False,
    ) -> dict[str, Any]:
        """
        Write down what is said in a recording, in the language that is heard, with the adapter that was trained for it.

        Args:
            audio: The recording: wav, flac, mp3, ogg, opus, m4a or webm.
            language: Code or name of the language that is spoken, such as "cy" or "Welsh". "auto": it is detected.
            adapter: Name of the adapter that writes, whatever is heard. "none": the base model alone. "auto": by language.
            allowed: Codes of the languages that may be heard, such as ["en", "cy"]. Empty: all.
            threshold: Probability from 0 to 1. A language heard with less is uncertain, and the base model writes without an adapter.
            switching: Whether the language may change within the recording.
            compare: Whether the base model alone shall write the recording as well, for comparison.
            two_best: Whether an uncertain language is settled by writing the beginning in the two likeliest.

        Returns:
            JSON: text, segments with times, language, probabilities, adapter, reason, warnings.
            decision: the same choice explained, with the adapter's measured error rates.
            base: with compare, what the base model alone wrote; null if no adapter wrote the text.
        """
        with _said_in_the_answer(gr):
            return answer(
                transcriber,
                received(audio, uploads, page.limits.max_upload_mb),
                language=language,
                adapter=adapter,
                allowed=allowed,
                threshold=threshold,
                switching=switching,
                compare=compare,
                two_best=two_best,
                max_duration_s=page.limits.max_duration_s,
            )

    def detect(audio: Recording, allowed: list[str] = []) -> dict[str, Any]:  # noqa: B006 - shown as the default, never changed
        """
        Hear which language is spoken in a recording, without writing it down.

        Args:
            audio: The recording: wav, flac, mp3, ogg, opus, m4a or webm.
            allowed: Codes of the languages that may be heard, such as ["en", "cy"]. Empty: all.

        Returns:
            JSON: language, language_name and probability, null if nobody speaks; probabilities of the likeliest languages;
            no_speech: probability that nobody speaks.
        """
        with _said_in_the_answer(gr):
            return detected(
                transcriber, received(audio, uploads, page.limits.max_upload_mb), allowed, max_duration_s=page.limits.max_duration_s
            )

    def languages() -> dict[str, Any]:
        """
        List the languages that can be heard and those that can be written.

        Returns:
            JSON: heard and written, each a list of code and name; written ones name the adapter that is used when the language is heard.
        """
        return listed_languages(transcriber)

    def adapters() -> list[dict[str, Any]]:
        """
        List the adapters that are installed, and those that are fetched when they are first needed.

        Returns:
            JSON: a list of name, language, method, size, error rates before and after, where it came from, and when it is used.
        """
        return listed_adapters(transcriber)

    for function, options in ((transcribe, work), (detect, work), (languages, look), (adapters, look)):
        gr.api(function, api_name=function.__name__, **options)


def expect_mcp() -> None:
    """Raise `ValueError` if the libraries for MCP are not installed. Gradio would start without it."""
    if find_spec("mcp") is None:
        raise ValueError("--mcp needs the extra `mcp`, which is not installed: pip install 'peft-s2lora[demo,mcp]'.")


def tend_mcp(app: Any) -> None:
    """Have the tools of a launched page answer in JSON, and delete the recordings that they are sent as base64 as uploads are deleted.

    Gradio by itself writes an object as Python does, and keeps the file that it makes of base64 for good.
    """
    server = app.mcp_server_obj
    as_content, as_files = server.postprocess_output_data, server.convert_strings_to_filedata

    def in_json(data: list, root_url: str) -> list:
        content: list = as_content([json.dumps(each, ensure_ascii=False) for each in data], root_url)
        return content

    def deleted_in_time(arguments: dict[str, Any], places: list) -> dict[str, Any]:
        given: dict[str, Any] = as_files(arguments, places)
        app.upload_file_set.update(each["path"] for each in given.values() if isinstance(each, dict))
        return given

    server.postprocess_output_data, server.convert_strings_to_filedata = in_json, deleted_in_time


@contextmanager
def _said_in_the_answer(gr: Any) -> "Iterator[None]":
    """A `ValueError` inside becomes the answer's error message, in plain text: no page shows it. What else goes wrong is for the log."""
    try:
        yield
    except ValueError as error:
        raise gr.Error(str(error), print_exception=False) from error
    except Exception as error:
        raise gr.Error("The server failed to do this; its log says why.") from error


# ---- what comes in -----------------------------------------------------------------------------------------------------


def received(audio: Any, uploads: Path, max_upload_mb: float) -> str:
    """The path of a recording that a client sent.

    Only a file that Gradio has put into its folder of uploads is one: whatever else has a path could be any file of this machine. A file
    that Gradio fetched from an address, or made of base64, has passed no limit yet.
    """
    expected = "a file: handle_file(PATH) with gradio_client, {'path': ..., 'meta': {'_type': 'gradio.FileData'}} otherwise"
    if not isinstance(audio, dict) or not isinstance(audio.get("path"), str):
        raise ValueError(f"audio is {expected}; got {'nothing' if audio is None else type(audio).__name__}.")
    path = Path(audio["path"]).resolve()
    if not path.is_relative_to(uploads.resolve()) or not path.is_file():
        raise ValueError(f"audio is {expected}; the file that it names was not uploaded here. Upload it first.")
    if path.stat().st_size > max_upload_mb * 2**20:
        raise ValueError(
            f"The file is {path.stat().st_size / 2**20:.0f} MB; {max_upload_mb:g} MB are allowed. Send a shorter or compressed recording."
        )
    return str(path)


# ---- what goes out -----------------------------------------------------------------------------------------------------


def answer(
    transcriber: "Transcriber",
    audio: str,
    *,
    language: str = handlers.AUTO,
    adapter: str = handlers.AUTO,
    allowed: Sequence[str] = (),
    threshold: float = 0.5,
    switching: bool = False,
    compare: bool = False,
    two_best: bool = False,
    max_duration_s: float | None = None,
) -> dict[str, Any]:
    """A transcript as JSON, with its `decision` explained; with `compare`, what the base model alone wrote as `base`."""
    _check_number("threshold", threshold)
    options: dict[str, Any] = {"switching": switching, "max_duration_s": max_duration_s}
    transcript = transcriber.transcribe(
        audio,
        language=None if language == handlers.AUTO else language,
        adapter=None if adapter == handlers.AUTO else adapter,
        allowed=_codes(allowed),
        threshold=threshold,
        if_unsure="two-best" if two_best else "base",
        **options,
    )
    row = _row(transcript)
    if compare:
        base = None
        if _has_adapter(transcript):
            told = None if switching else (transcript.adapter_info or {}).get("carrier") or transcript.language
            base = _row(transcriber.transcribe(audio, language=told, adapter=handlers.BASE_ONLY, **options))
        row["base"] = base
    return row


def _row(transcript: "Transcript") -> dict[str, Any]:
    from whisper_moe.explain import explain

    return transcript.to_dict() | {"decision": explain(transcript).to_dict()}


def _has_adapter(transcript: "Transcript") -> bool:
    return transcript.adapter is not None or any(part.adapter is not None for part in transcript.segments)


def _codes(allowed: Sequence[str] | None) -> list[str] | None:
    """A list, also of a single language or of nothing."""
    return [allowed] if isinstance(allowed, str) else list(allowed or ()) or None


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} is a number; got {value!r}.")


def detected(transcriber: "Transcriber", audio: str, allowed: Sequence[str] = (), *, max_duration_s: float | None = None) -> dict[str, Any]:
    """What the base model hears, as `transcribe` would judge it, and nothing written."""
    heard = transcriber.detect(audio, allowed=_codes(allowed) or None, max_duration_s=max_duration_s)
    nobody = heard is None or is_noise(heard)
    code, share = (None, None) if heard is None or nobody else heard.best
    return {
        "language": code,
        "language_name": "" if code is None else language_name(code),
        "probability": share,
        "probabilities": {} if heard is None else heard.top(NUM_SHOWN),
        "no_speech": None if heard is None else heard.no_speech,
    }


def listed_languages(transcriber: "Transcriber") -> dict[str, Any]:
    """Languages that can be heard and written, with the adapters that write each when it is heard."""
    writers: dict[str, list[str]] = {}
    for row in listed_adapters(transcriber):
        if row["domain"] is None:
            writers.setdefault(row["language"], []).append(row["name"])
    heard = [{"code": code, "name": language_name(code)} for code in sorted(transcriber.detectable_languages, key=language_name)]
    codes = sorted({*transcriber.base_languages, *writers}, key=language_name)
    return {"heard": heard, "written": [{"code": code, "name": language_name(code), "adapters": writers.get(code, [])} for code in codes]}


def listed_adapters(transcriber: "Transcriber") -> list[dict[str, Any]]:
    """Every adapter that can be asked for by name, installed or not fetched yet; what is not known before it is fetched is null."""
    heard, registry = transcriber.detectable_languages, transcriber.registry
    return [
        *(
            _adapter_row(each, each.name, heard, each.carrier, each.source)
            | {
                "installed": True,
                "method": each.peft_type,
                "num_parameters": each.num_parameters,
                "num_bytes": each.num_bytes,
                "metrics": each.metrics,
            }
            for each in registry
        ),
        *(
            _adapter_row(each, each.key, heard, None, each.where)
            | {"installed": False, "method": None, "num_parameters": None, "num_bytes": None, "metrics": None}
            for each in registry.expected
        ),
    ]


def _adapter_row(
    adapter: "LanguageAdapter | AdapterSource", name: str, heard: Sequence[str], carrier: str | None, source: str | None
) -> dict[str, Any]:
    """What is known of an adapter in either state. `name`: what to ask for it by; `heard`: languages that can be detected."""
    by_language = adapter.domain is None and carrier is None and adapter.language in heard
    return {
        "name": name,
        "language": adapter.language,
        "language_name": language_name(adapter.language),
        "domain": adapter.domain,
        "carrier": carrier,
        "used": "when its language is heard" if by_language else "when it is asked for by name",
        "source": source,
    }
