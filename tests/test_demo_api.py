"""The page's API, asked as its clients ask: `gradio_client`, curl, plain HTTP and MCP, at a real server with the shipped pocket."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from browser import EXAMPLES, READABLE, ROOT, ROWS, character_errors, served
from conftest import run_async

pytestmark = pytest.mark.pocket
pytest.importorskip("gradio_client", reason="[demo] to run it: pip install peft-s2lora[demo]")

from gradio_client import Client, handle_file  # noqa: E402
from gradio_client.exceptions import AppError  # noqa: E402

from demo import api  # noqa: E402

PAGE = (ROOT / "docs" / "demo_api.md").read_text("utf-8")
WELSH, LONG = EXAMPLES / "welsh.ogg", EXAMPLES / "german_long.ogg"
VOLATILE = {"elapsed_s"}


@pytest.fixture(scope="module")
def client(server: str) -> Client:
    return Client(server, verbose=False)


@pytest.fixture(scope="module")
def transcriber() -> Any:
    """The same model and adapters in this process, asked directly."""
    import peft_s2lora  # noqa: F401 - registers S2-LoRA
    from whisper_moe import Transcriber

    return Transcriber.from_pretrained()


def steady(row: dict) -> dict:
    """Without what differs from run to run, and rounded: other batches sum in another order."""
    rounded = json.loads(json.dumps(row), parse_float=lambda figure: round(float(figure), 4))
    return {key: value for key, value in rounded.items() if key not in VOLATILE}


# ---- what there is -----------------------------------------------------------------------------------------------------


def test_exactly_our_endpoints_are_offered_with_their_parameters(client):
    offered = client.view_api(return_format="dict", print_info=False)
    parameters = {
        name: {each["parameter_name"]: each["parameter_default"] for each in endpoint["parameters"]}
        for name, endpoint in offered["named_endpoints"].items()
    }
    assert parameters == {
        "/transcribe": {
            "audio": None,
            "language": "auto",
            "adapter": "auto",
            "allowed": [],
            "threshold": 0.5,
            "switching": False,
            "compare": False,
            "two_best": False,
        },
        "/detect": {"audio": None, "allowed": []},
        "/languages": {},
        "/adapters": {},
    }
    assert offered["unnamed_endpoints"] == {}
    assert all(endpoint["description"] for endpoint in offered["named_endpoints"].values())


def test_an_event_of_the_page_cannot_be_called_from_outside(client, server):
    config = json.load(urllib.request.urlopen(server + "config"))
    private = [each for each in config["dependencies"] if each["api_visibility"] == "private" and each["backend_fn"]]
    assert private, "the page has events of its own"
    with pytest.raises(ValueError, match="Invalid function index"):
        client.predict(fn_index=private[0]["id"])


def test_every_list_of_languages_learns_of_new_adapters(server):
    """Those of the live tab, too: each is looked up anew when a page is opened."""
    config = json.load(urllib.request.urlopen(server + "config"))
    ids = {each["props"].get("elem_id"): each["id"] for each in config["components"]}
    opened = [each["outputs"] for each in config["dependencies"] if any(event == "load" for _, event in each["targets"])]
    for name in ("language", "batch-language", "live-language"):
        assert any(ids[name] in outputs for outputs in opened), name


@pytest.mark.parametrize("route", ["run", "api"])
def test_what_has_to_wait_in_the_queue_cannot_be_called_past_it(server, route):
    config = json.load(urllib.request.urlopen(server + "config"))
    queued = [each for each in config["dependencies"] if each["queue"] is not False and each["backend_fn"]]
    names = {each["api_name"] for each in queued}
    assert names >= {"transcribe", "detect"}
    assert len(queued) > 4, "the page's own, too"
    for each in queued:
        for body in ({"data": [], "fn_index": each["id"]}, {"data": [], "fn_index": each["id"], "session_hash": "me"}):
            assert status(f"{server}gradio_api/{route}/{each['api_name']}", json.dumps(body).encode()) == (404, "join the queue")
    # what only looks something up has no queue to get past
    assert status(f"{server}gradio_api/{route}/languages", b'{"data": []}')[0] == 200


def status(url: str, body: bytes | Iterator[bytes]) -> tuple[int, str]:
    """Of a POST of JSON by plain HTTP; what matters of its words."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # an iterator: in chunks of unknown number
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, ""
    except urllib.error.HTTPError as error:
        said = error.read().decode()
        return error.code, next((words for words in ("join the queue", "8 MB are allowed") if words in said), said)


@pytest.mark.parametrize("path", ["component_server", "queue/join"])
def test_a_request_that_is_too_large_is_refused_before_it_is_held(server, path):
    url = f"{server}gradio_api/{path}"
    assert status(url, b'{"data": ["' + b"A" * 9 * 2**20 + b'"]}') == (413, "8 MB are allowed")

    def endless() -> Iterator[bytes]:
        yield b'{"data": ["'
        for _ in range(300):
            sent.append(None)
            yield bytes(2**20)

    sent: list[None] = []
    with contextlib.suppress(OSError):  # the server hangs up while we are still speaking
        assert status(url, endless()) == (413, "8 MB are allowed")
    assert len(sent) < 150, "it took all of it"


# ---- transcribing ------------------------------------------------------------------------------------------------------


def test_an_answer_is_the_transcript_with_its_decision_and_with_what_the_base_wrote(client, transcriber):
    from whisper_moe.explain import explain

    direct = transcriber.transcribe(WELSH)
    answer = client.predict(handle_file(WELSH), compare=True, api_name="/transcribe")
    base = answer.pop("base")
    assert steady(answer) == steady(direct.to_dict() | {"decision": explain(direct).to_dict()})
    assert answer["adapter"] == "cy"
    alone = transcriber.transcribe(WELSH, language="cy", adapter="none")
    assert (base["text"], base["adapter"], base["language"]) == (alone.text, None, "cy")
    assert base["text"] != answer["text"]


def test_without_an_adapter_there_is_nothing_to_compare(client):
    answer = client.predict(handle_file(EXAMPLES / "german.ogg"), compare=True, api_name="/transcribe")
    assert (answer["adapter"], answer["base"]) == (None, None)
    assert character_errors(ROWS["German"]["text"], answer["text"]) <= READABLE


def test_the_base_is_told_the_language_that_stands_in_for_one_it_cannot_hear():
    """The adapter of Kichwa writes under the token of Spanish; so must the base, or the two could not be compared."""
    asked = []

    def transcribe(audio: str, **options: Any) -> Any:
        asked.append(options)
        return types.SimpleNamespace(adapter="qug", adapter_info={"carrier": "es"}, language="qug", segments=(), to_dict=dict)

    class Explained:
        to_dict = dict

    explained = types.SimpleNamespace(explain=lambda transcript: Explained())
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "whisper_moe.explain", explained)
        api.answer(types.SimpleNamespace(transcribe=transcribe), "recording.wav", adapter="qug", compare=True)
    assert [(each["language"], each["adapter"]) for each in asked] == [(None, "qug"), ("es", "none")]


def test_options_reach_the_model(client):
    given = client.predict(handle_file(WELSH), language="Welsh", adapter="none", api_name="/transcribe")
    assert (given["language"], given["adapter"], given["probability"]) == ("cy", None, None)
    unsure = client.predict(handle_file(WELSH), threshold=1, api_name="/transcribe")
    assert unsure["adapter"] is None
    both = client.predict(handle_file(WELSH), threshold=1, two_best=True, api_name="/transcribe")
    assert "cy" in both["scores"]
    assert len(both["scores"]) == 2
    allowed = client.predict(handle_file(WELSH), allowed=["sv", "tr"], api_name="/transcribe")
    assert set(allowed["probabilities"]) == {"sv", "tr"}
    pieces = client.predict(handle_file(LONG), switching=True, api_name="/transcribe")
    assert len(pieces["segments"]) >= 2
    assert all(part["probabilities"] for part in pieces["segments"])


def test_eight_clients_at_once_each_get_their_own_text(server, client):
    names = ["english.wav", "german.ogg", "spanish.flac", "french.ogg", "italian.ogg", "polish.ogg", "welsh.ogg", "german_long.ogg"]
    alone = [client.predict(handle_file(EXAMPLES / name), api_name="/transcribe")["text"] for name in names]
    assert len(set(alone)) == len(names)

    def ask(name: str) -> str:
        return Client(server, verbose=False).predict(handle_file(EXAMPLES / name), api_name="/transcribe")["text"]

    with ThreadPoolExecutor(len(names)) as pool:
        assert list(pool.map(ask, names)) == alone


# ---- hearing, listing --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noise_first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a minute of noise, and then somebody speaks: what is judged first holds no language."""
    samples, rate = soundfile.read(WELSH)
    noise = np.random.default_rng(0).normal(0, 0.05, 30 * rate)
    path = tmp_path_factory.mktemp("noise") / "noise_first.wav"
    soundfile.write(path, np.concatenate([noise, samples]), rate)
    return path


@pytest.mark.parametrize(
    ("recording", "allowed"), [(WELSH, []), (LONG, []), (WELSH, ["sv", "tr"]), (None, [])], ids=["short", "long", "allowed", "noise first"]
)
def test_what_is_heard_is_what_a_transcription_would_hear(transcriber, noise_first, recording, allowed):
    recording = noise_first if recording is None else recording
    transcript = transcriber.transcribe(recording, allowed=allowed or None)
    heard = transcriber.detect(str(recording), allowed=allowed or None)
    assert heard.top(8) == pytest.approx(transcript.probabilities, abs=1e-5)
    assert heard.no_speech == pytest.approx(transcript.no_speech, abs=1e-5)


def test_the_language_is_heard_and_nothing_in_silence(client, tmp_path):
    heard = client.predict(handle_file(WELSH), api_name="/detect")
    assert (heard["language"], heard["language_name"]) == ("cy", "Welsh")
    assert heard["probability"] == max(heard["probabilities"].values())
    soundfile.write(tmp_path / "silence.wav", np.zeros(32_000), 16_000)
    heard = client.predict(handle_file(tmp_path / "silence.wav"), api_name="/detect")
    assert (heard["language"], heard["probability"], heard["probabilities"]) == (None, None, {})


def test_languages_and_adapters_are_those_of_the_registry(client, transcriber):
    listed = {row["name"]: row for row in client.predict(api_name="/adapters")}
    assert set(listed) == {adapter.name for adapter in transcriber.registry}
    assert (listed["cy"]["used"], listed["cy"]["num_bytes"]) == ("when its language is heard", transcriber.registry["cy"].num_bytes)
    assert listed["qug"]["used"] == listed["en-child"]["used"] == "when it is asked for by name"
    languages = client.predict(api_name="/languages")
    assert {row["code"] for row in languages["heard"]} == set(transcriber.detectable_languages)
    written = {row["code"]: row["adapters"] for row in languages["written"]}
    assert set(written) == {*transcriber.base_languages, "cy", "qug"}
    assert (written["cy"], written["de"], written["en"]) == (["cy"], [], [])  # that for children's English is asked for by name


def test_listing_fetches_nothing_and_names_those_for_a_domain_by_their_key():
    from whisper_moe import AdapterRegistry

    def fetch() -> str:
        raise AssertionError("it was fetched")

    registry = AdapterRegistry()
    registry.expect("br", fetch, where="somebody/whisper-lora-br@1234567")
    registry.expect("en", fetch, where="somebody/whisper-lora-en-child@1234567", domain="child")
    asked = types.SimpleNamespace(registry=registry, detectable_languages=["br", "en"], base_languages=["en"])
    breton, child = api.listed_adapters(asked)
    assert (breton["name"], breton["installed"], breton["source"]) == ("br", False, "somebody/whisper-lora-br@1234567")
    assert (breton["used"], child["used"]) == ("when its language is heard", "when it is asked for by name")
    assert child["name"] == "en/child"
    written = {row["code"]: row["adapters"] for row in api.listed_languages(asked)["written"]}
    assert written == {"br": ["br"], "en": []}  # the one for children's English is not used when English is heard


# ---- what is wrong -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"audio": handle_file(ROOT / "README.md")}, "not a recording that can be read"),
        ({"audio": None}, "audio is a file.*got nothing"),
        ({"audio": "/etc/passwd"}, "audio is a file.*got str"),
        ({"language": "xx"}, "'xx' is no language known here"),
        ({"adapter": "fr"}, "There is no adapter 'fr'. Known: cy"),
        ({"allowed": ["xx"]}, "'xx' is no language known here"),
        ({"threshold": 3}, "threshold is a probability, 0 to 1; got 3"),
        ({"threshold": "high"}, "threshold is a number; got 'high'"),
        ({"language": "cy", "switching": True}, "switching"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_what_is_wrong_is_said_in_plain_words(client, options, said):
    with pytest.raises(AppError, match=said) as caught:
        client.predict(**({"audio": handle_file(WELSH)} | options), api_name="/transcribe")
    assert "Traceback" not in str(caught.value)
    assert "&#" not in str(caught.value)


def test_a_recording_that_is_too_long_or_too_large_is_refused(client, tmp_path):
    soundfile.write(tmp_path / "long.flac", np.zeros(11 * 60 * 4000), 4000)
    for name in ("/transcribe", "/detect"):
        with pytest.raises(AppError, match=r"10 minutes|longer"):
            client.predict(handle_file(tmp_path / "long.flac"), api_name=name)
    (tmp_path / "large.wav").write_bytes(bytes(8_500_000))
    with pytest.raises(Exception, match=r"413|size|large"):
        client.predict(handle_file(tmp_path / "large.wav"), api_name="/transcribe")


@pytest.mark.parametrize("meta", [{}, {"meta": {"_type": "gradio.FileData"}}], ids=["bare", "marked as a file"])
def test_a_file_of_the_server_that_nobody_uploaded_is_not_read(server, meta):
    said = post(server, "transcribe", {"audio": {"path": str(WELSH)} | meta})
    assert "not uploaded" in said
    assert "capel" not in said


def test_a_file_that_came_without_an_upload_has_the_same_limit(tmp_path):
    """By address or as base64, which pass no check of the upload's size."""
    (tmp_path / "fetched.wav").write_bytes(bytes(1_100_000))
    with pytest.raises(ValueError, match="1 MB are allowed"):
        api.received({"path": str(tmp_path / "fetched.wav")}, tmp_path, 1)
    assert api.received({"path": str(tmp_path / "fetched.wav")}, tmp_path, 2) == str((tmp_path / "fetched.wav").resolve())


def test_a_link_out_of_the_folder_of_uploads_is_not_followed(tmp_path):
    (tmp_path / "link.wav").symlink_to(WELSH)
    for path in (tmp_path / "link.wav", tmp_path / ".." / tmp_path.name / ".." / "other.wav", tmp_path):
        with pytest.raises(ValueError, match="not uploaded"):
            api.received({"path": str(path)}, tmp_path, 2)


def test_a_fault_of_our_own_is_not_told_to_strangers():
    class Error(Exception):
        def __init__(self, message: str, **options: Any) -> None:
            super().__init__(message)

    with pytest.raises(Error) as caught, api._said_in_the_answer(types.SimpleNamespace(Error=Error)):
        raise RuntimeError("a secret of the server")
    assert "secret" not in str(caught.value)


def post(server: str, name: str, body: dict) -> str:
    """Call an endpoint by plain HTTP, and read the whole answer."""
    request = urllib.request.Request(f"{server}gradio_api/call/v2/{name}", json.dumps(body).encode(), {"Content-Type": "application/json"})
    event = json.load(urllib.request.urlopen(request))["event_id"]
    return urllib.request.urlopen(f"{server}gradio_api/call/{name}/{event}").read().decode()


# ---- the documentation -------------------------------------------------------------------------------------------------


def blocks(language: str, word: str) -> list[str]:
    return [code for code in re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL) if word in code]


@pytest.fixture
def with_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(EXAMPLES / "english.wav", tmp_path / "recording.wav")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_python_example_runs(server, with_recording):
    (code,) = blocks("python", "gradio_client")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code.replace("http://127.0.0.1:7860/", server), {})
    text, sentence, *segments, heard, refused = printed.getvalue().strip().splitlines()
    assert character_errors(ROWS["English"]["text"], text) <= READABLE
    assert "English" in sentence
    assert segments
    assert heard.startswith("English ")
    assert refused.startswith("'Klingonese' is no language known here")


@pytest.mark.skipif(shutil.which("curl") is None, reason="to run it: install curl")
def test_the_curl_example_runs(server, with_recording):
    (code,) = blocks("bash", "curl")
    said = subprocess.run(
        ["bash", "-e", "-c", code.replace("http://127.0.0.1:7860/", server)], capture_output=True, text=True, check=True, cwd=with_recording
    ).stdout
    event, data = said.strip().splitlines()[:2]
    assert event == "event: complete"
    (answer,) = json.loads(data.removeprefix("data: "))
    assert character_errors(ROWS["English"]["text"], answer["text"]) <= READABLE


# ---- MCP ---------------------------------------------------------------------------------------------------------------


def test_without_the_libraries_for_mcp_the_way_to_them_is_said(monkeypatch):
    monkeypatch.setattr(api, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'peft-s2lora\[demo,mcp\]'"):
        api.expect_mcp()


@pytest.mark.skipif(importlib.util.find_spec("mcp") is None, reason="[mcp] to run it: pip install peft-s2lora[demo,mcp]")
def test_language_models_can_use_the_tools(tmp_path):

    from mcp import ClientSession
    from mcp.client.streamable_http import streamable_http_client

    async def use(url: str) -> tuple[Any, ...]:
        async with streamable_http_client(url) as (read, write, _), ClientSession(read, write) as session:
            await session.initialize()
            tools = (await session.list_tools()).tools
            recording = "data:audio/ogg;base64," + base64.b64encode(WELSH.read_bytes()).decode()
            heard = await session.call_tool("transcribe", {"audio": recording})
            listed = await session.call_tool("languages", {})
            refused = await session.call_tool("transcribe", {"audio": recording, "language": "xx"})
            return tools, heard, listed, refused

    with served(tmp_path, "--mcp") as server:
        tools, heard, listed, refused = run_async(use(server + "gradio_api/mcp/"))
    assert {tool.name for tool in tools} == {"transcribe", "detect", "languages", "adapters"}
    described = next(tool for tool in tools if tool.name == "transcribe").inputSchema["properties"]
    assert all(described[name].get("description") for name in ("audio", "language", "adapter", "allowed", "threshold"))
    answer = json.loads(heard.content[0].text)
    assert (answer["adapter"], answer["decision"]["adapter"]) == ("cy", "cy")
    assert json.loads(listed.content[0].text)["heard"]
    assert refused.isError
    assert "'xx' is no language known here" in refused.content[0].text
