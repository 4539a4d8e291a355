"""What one request may cost: bodies that are too large, recordings by address, and folders that stay behind. No model, no page."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import os
import threading
import time

import pytest
from conftest import run_async

from demo import bodies, uploads
from demo.page import Limits

LIMITS = Limits(max_upload_mb=3, max_files=2)
MB = 2**20


# ---- bodies ------------------------------------------------------------------------------------------------------------


class App:
    """Reads a body as servers do, and answers with its length; or, as Gradio does, with 400 when reading fails."""

    def __init__(self, is_patient: bool = False) -> None:
        self.came, self.is_patient = 0, is_patient

    async def __call__(self, scope, receive, send) -> None:
        try:
            while True:
                message = await receive()
                self.came += len(message["body"])
                if not message["more_body"]:
                    break
        except Exception as error:
            if not self.is_patient:
                raise RuntimeError("The body could not be read.") from error
            await self._answer(send, 400)
            return
        await self._answer(send, 200)

    async def _answer(self, send, status: int) -> None:
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def status_of(app: App, path: str, num_mb: float, *, is_announced: bool) -> int:
    chunks = [bytes(MB // 4)] * round(4 * num_mb)
    answers: list[dict] = []

    async def receive() -> dict:
        return {"type": "http.request", "body": chunks.pop() if chunks else b"", "more_body": bool(chunks)}

    async def send(message: dict) -> None:
        answers.append(message)

    headers = [(b"content-length", str(round(num_mb * MB)).encode())] if is_announced else []
    run_async(bodies.BodyLimit(app, LIMITS)({"type": "http", "path": path, "headers": headers}, receive, send))
    assert [each["type"] for each in answers] == ["http.response.start", "http.response.body"]
    return answers[0]["status"]


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/gradio_api/file=https://example.org/large.iso", 403),
        ("/whisper/gradio_api/file=HTTP://example.org/a", 403),
        ("/file/ftp://example.org/a", 403),
        ("/gradio_api/file=/tmp/uploads/answer-1/german.srt", 200),
        ("/gradio_api/file=C:/uploads/german.srt", 200),
    ],
)
def test_files_of_other_machines_are_not_passed_on(path: str, status: int) -> None:
    assert status_of(App(), path, 0, is_announced=True) == status


@pytest.mark.parametrize("is_announced", [True, False])
@pytest.mark.parametrize("is_patient", [True, False])
@pytest.mark.parametrize(
    ("path", "fits_mb", "too_large_mb"),
    [
        ("/gradio_api/component_server", 7, 9),
        ("/gradio_api/component_server/", 7, 9),
        ("/gradio_api/queue/join", 7, 9),
        ("/gradio_api/upload", 6, 8),  # two files of three
        ("/gradio_api/mcp/", 7, 9),
    ],
)
def test_a_body_is_taken_up_to_its_limit(path, fits_mb, too_large_mb, is_announced, is_patient):
    assert status_of(App(is_patient), path, fits_mb, is_announced=is_announced) == 200
    app = App(is_patient)
    assert status_of(app, path, too_large_mb, is_announced=is_announced) == 413
    assert app.came < too_large_mb * MB
    assert app.came == 0 or not is_announced


def test_a_recording_as_base64_fits_a_tool_call_where_the_file_would_be_taken():
    limits = Limits(max_upload_mb=100)
    assert bodies.most_bytes("/gradio_api/mcp", limits) >= 100 * MB * 4 / 3
    assert bodies.most_bytes("/gradio_api/upload", limits) >= 100 * MB * limits.max_files
    assert bodies.most_bytes("/gradio_api/component_server", limits) == bodies.JSON_MB * MB


def test_an_error_of_the_app_is_its_own():
    async def broken(scope, receive, send) -> None:
        raise RuntimeError("of the app")

    with pytest.raises(RuntimeError, match="of the app"):
        status_of(broken, "/", 0, is_announced=False)


# ---- recordings by address ---------------------------------------------------------------------------------------------


class Site(http.server.BaseHTTPRequestHandler):
    """/small: a file. /endless: one without an end. /packed: much, in few bytes. /slow: drop by drop."""

    sent = 0

    def do_GET(self) -> None:
        self.send_response(200)
        if self.path == "/packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            if self.path == "/small":
                self.wfile.write(b"sound" * 1000)
            elif self.path == "/packed":
                self.wfile.write(gzip.compress(bytes(30 * MB)))
            for _ in range(200 if self.path in ("/endless", "/slow") else 0):
                self.wfile.write(bytes(MB if self.path == "/endless" else 1))
                type(self).sent += MB
                time.sleep(0.02 if self.path == "/slow" else 0)
        except OSError:
            pass  # the other side has had enough

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://recordings.example:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def fetch(monkeypatch, tmp_path):
    """Gradio's own download of a recording, where a public name leads to this machine."""
    pytest.importorskip("gradio", reason="[demo] to run it: pip install peft-s2lora[demo]")
    from gradio import processing_utils

    resolve = processing_utils.sh.async_validate_url

    async def here(host: str) -> str:
        return "127.0.0.1" if host == "recordings.example" else await resolve(host)

    monkeypatch.setattr(processing_utils.sh, "async_validate_url", here)
    monkeypatch.setattr(processing_utils, "async_transport", None)
    bodies.limit_fetches(Limits(max_upload_mb=2))
    return lambda url: run_async(processing_utils.async_ssrf_protected_download(url, str(tmp_path)))


def test_a_recording_is_fetched_from_its_address(fetch, site):
    with open(fetch(f"{site}/small"), "rb") as file:
        assert file.read() == b"sound" * 1000


def test_what_is_too_large_is_let_go_of_while_it_comes_and_again_and_again(fetch, site, tmp_path):
    for _ in range(bodies.AT_ONCE + 2):
        Site.sent = 0
        with pytest.raises(Exception, match="more than 2 MB"):
            fetch(f"{site}/endless")
        assert Site.sent < 40 * MB, "sockets hold a few"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert fetch(f"{site}/small")


def test_what_would_unpack_itself_and_what_never_ends_is_refused(fetch, site, monkeypatch):
    for _ in range(bodies.AT_ONCE + 1):
        with pytest.raises(Exception, match="compressed"):
            fetch(f"{site}/packed")
    from gradio import processing_utils

    monkeypatch.setattr(processing_utils, "async_transport", bodies.transport(MB, fetch_s=0.3))
    started = time.monotonic()
    with pytest.raises(Exception, match=r"more than 0\.3 seconds"):
        fetch(f"{site}/slow")
    assert time.monotonic() - started < 2


def test_few_are_fetched_at_the_same_time(fetch, site, monkeypatch):
    from gradio import processing_utils

    transport = bodies.transport(MB, at_once=2)

    async def three() -> list:
        requests = [processing_utils.httpx.Request("GET", f"{site}/small") for _ in range(3)]
        answers = await asyncio.gather(*(transport.handle_async_request(each) for each in requests), return_exceptions=True)
        for each in answers:
            if not isinstance(each, Exception):
                await each.aclose()
        return answers

    refused = [each for each in run_async(three()) if isinstance(each, Exception)]
    assert len(refused) == 1
    assert "several others" in str(refused[0])
    assert sum(isinstance(each, Exception) for each in run_async(three())) == 1, "what was let in has left"


def test_an_address_of_this_machine_is_not_fetched(fetch, site):
    with pytest.raises(Exception, match="validation"):
        fetch(site.replace("recordings.example", "127.0.0.1") + "/small")


# ---- folders that stay behind --------------------------------------------------------------------------------------------


def test_folders_that_have_been_empty_for_a_while_go_and_no_others(tmp_path):
    for name in ("old", "new", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "text.srt").write_text("1")
    (tmp_path / "file").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "old", target_is_directory=True)
    long_ago = time.time() - 100
    for name in ("old", "full", "file"):
        os.utime(tmp_path / name, (long_ago, long_ago))
    assert uploads.remove_empty(tmp_path, empty_for_s=60) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"new", "full", "file", "link"}
    (tmp_path / "full" / "text.srt").unlink()  # emptied just now: a new file may be on its way
    assert uploads.remove_empty(tmp_path, empty_for_s=60) == 0
    assert uploads.remove_empty(tmp_path, empty_for_s=0) == 2
    assert uploads.remove_empty(tmp_path / "nowhere") == 0


def test_a_server_tidies_while_it_runs(tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="[demo] to run it: pip install peft-s2lora[demo]")
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    monkeypatch.setattr(uploads, "EMPTY_FOR_S", 0)
    made = uploads.new_folder("live")
    assert os.path.isdir(made)
    os.utime(made, (0, 0))

    async def run() -> None:
        async with uploads.tidying(0.01)(None):
            while os.path.isdir(made):
                await asyncio.sleep(0.01)

    run_async(asyncio.wait_for(run(), 5))
