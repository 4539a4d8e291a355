"""The page on a Space: its settings, the folder that is uploaded, that folder as a process, and the model in ZeroGPU's forks."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from browser import EXAMPLES, READABLE, ROOT, ROWS, START_S, answers, character_errors

from demo.page import Limits
from demo.space import serve
from demo.space.make import PACKAGES, make_space
from demo.space.settings import Settings, is_zero_gpu
from demo.space.zero import ForkedTranscriber

FOLDER = ROOT / "demo" / "space"
STAND_IN = Path(__file__).parent / "zero_gpu"
WELSH, LONG = EXAMPLES / "welsh.ogg", EXAMPLES / "german_long.ogg"
CARD = (FOLDER / "README.md").read_text("utf-8")


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


# ---- settings ----------------------------------------------------------------------------------------------------------

GIVEN = {
    "MODEL": ("openai/whisper-small", lambda settings: settings.model, "openai/whisper-small"),
    "ADAPTERS": (" a/b, c/d@1234567\ne/f ", lambda settings: settings.adapters, ("a/b", "c/d@1234567", "e/f")),
    "REGISTRY": ("adapters.json", lambda settings: settings.registry, Path("adapters.json")),
    "BASE_MODEL": ("me/base", lambda settings: settings.base_model, "me/base"),
    "DEVICE": ("cpu", lambda settings: settings.device, "cpu"),
    "DTYPE": ("bfloat16", lambda settings: settings.dtype, "bfloat16"),
    "MAX_MINUTES": ("2.5", lambda settings: settings.limits.max_duration_s, 150),
    "MAX_UPLOAD_MB": ("7", lambda settings: settings.limits.max_upload_mb, 7),
    "MAX_FILES": ("3", lambda settings: settings.limits.max_files, 3),
    "MAX_AT_ONCE": ("4", lambda settings: settings.limits.max_at_once, 4),
    "MAX_WAITING": ("5", lambda settings: settings.limits.max_waiting, 5),
    "GPU_SECONDS": ("30", lambda settings: settings.gpu_seconds, 30),
    "MCP": ("True", lambda settings: settings.mcp, True),
    "PORT": ("8000", lambda settings: settings.port, 8000),
}


@pytest.mark.parametrize("name", GIVEN)
def test_a_variable_sets_what_it_names(name):
    value, read, expected = GIVEN[name]
    settings = Settings.from_environment({name: value})
    assert read(settings) == expected
    assert read(Settings()) != expected


def test_without_variables_or_with_empty_ones_there_are_the_defaults():
    assert Settings.from_environment({}) == Settings.from_environment(dict.fromkeys(GIVEN, " ")) == Settings()
    assert Settings().limits == Limits()
    assert Settings.from_environment({"ADAPTERS": " , "}).adapters == ()
    assert not Settings.from_environment({"MCP": "False"}).mcp
    assert Settings.from_environment({"ADAPTERS": "a/b; c/d"}).adapters == ("a/b", "c/d")
    assert Settings.from_environment({"DEVICE": "CUDA:1", "DTYPE": "Float16"}).device == "cuda:1"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_MINUTES", "ten"),
        ("MAX_MINUTES", "-1"),
        ("MAX_MINUTES", "inf"),
        ("MAX_MINUTES", "1e300"),
        ("MAX_FILES", "2.5"),
        ("MAX_AT_ONCE", "0"),
        ("MAX_AT_ONCE", "1e15"),
        ("GPU_SECONDS", "100000"),
        ("MCP", "perhaps"),
        ("PORT", "99999"),
        ("PORT", "0"),
        ("DEVICE", "gpu"),
        ("DTYPE", "half"),
    ],
)
def test_a_variable_that_cannot_be_read_is_named(name, value):
    with pytest.raises(ValueError, match=rf"variable {name} .*{re.escape(value)}"):
        Settings.from_environment({name: value})


def test_the_platform_says_whether_it_is_zero_gpu():
    assert is_zero_gpu({"SPACES_ZERO_GPU": "true"})
    assert not is_zero_gpu({"SPACES_ZERO_GPU": "false"})
    assert not is_zero_gpu({})


def test_the_card_lists_every_variable_with_its_default():
    rows = re.findall(r"^\| (`.*?) \| (.*?) \|", CARD, re.MULTILINE)
    listed = {
        name: value
        for names, values in rows
        for name, value in zip(re.findall(r"`(\w+)`", names), re.split(", (?=\\d)", values) * 2, strict=False)
    }
    assert set(listed) == set(GIVEN) - {"PORT"} | {"HF_TOKEN"}  # a Space chooses the port
    limits = Limits()
    for name in ("MAX_MINUTES", "MAX_UPLOAD_MB", "MAX_FILES", "MAX_AT_ONCE", "MAX_WAITING"):
        assert float(listed[name]) == getattr(limits, name.lower())
    assert int(listed["GPU_SECONDS"]) == Settings().gpu_seconds


# ---- the folder --------------------------------------------------------------------------------------------------------


def test_the_requirements_are_those_of_the_package():
    if sys.version_info < (3, 11):
        pytest.skip("to run it: Python 3.11, which reads pyproject.toml")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = (FOLDER / "requirements.txt").read_text("utf-8").splitlines()
    assert {line for line in lines if not line.startswith(("#", "--"))} == {
        *project["dependencies"],
        *project["optional-dependencies"]["demo"],
    }


def test_the_card_is_one_that_the_hub_reads():
    card = front_matter(CARD)
    assert (card["sdk"], card["app_file"], card["license"]) == ("gradio", "app.py", "apache-2.0")
    assert (ROOT / "demo" / "space" / card["app_file"]).is_file()
    assert re.fullmatch(r"6\.\d+\.\d+", card["sdk_version"])
    assert isinstance(card["python_version"], str), "3.10 would be read as 3.1"
    assert len(card["short_description"]) <= 60


def test_a_made_folder_holds_packages_card_and_requirements(tmp_path):
    out = tmp_path / "space"
    chosen = {"model": "openai/whisper-small", "adapters": ("me/small-lora-cy@1234567",), "title": "Mine: a Space"}
    commands = make_space(out, hardware="zero", **chosen)
    assert {path.name for path in out.iterdir()} == {*PACKAGES, "app.py", "README.md", "requirements.txt", ".gitattributes"}
    assert not [path for path in out.rglob("*") if path.name == "__pycache__"]
    for package in PACKAGES:
        theirs = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*") if path.is_file() and "__pycache__" not in path.parts}
        assert {path.relative_to(out) for path in (out / package).rglob("*") if path.is_file()} == theirs
    card = front_matter((out / "README.md").read_text("utf-8"))
    assert card["title"] == "Mine: a Space"
    assert card["models"] == ["openai/whisper-small", "me/small-lora-cy"]
    assert card["suggested_hardware"] == "zero-a10g"
    assert "whl/cpu" not in (out / "requirements.txt").read_text()
    assert any("MODEL=openai/whisper-small" in line and "ADAPTERS=me/small-lora-cy@1234567" in line for line in commands)


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    with pytest.raises(ValueError, match="there already"):
        make_space(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


@pytest.mark.parametrize(
    "options", [{"model": "/a/folder"}, {"adapters": ("no-owner",)}, {"title": 'a "quoted" one'}, {"title": "two\nlines"}]
)
def test_what_a_space_could_not_use_is_refused_before_anything_is_written(tmp_path, options):
    with pytest.raises(ValueError, match=r"^A (Space fetches|title is)"):
        make_space(tmp_path / "space", **options)
    assert not (tmp_path / "space").exists()


# ---- the container -----------------------------------------------------------------------------------------------------


def test_the_image_is_built_from_all_that_the_wheel_is_made_of_and_nothing_else():
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert let_in == {*PACKAGES, "pyproject.toml", "README.md", "LICENSE", "NOTICE", "constraints-cpu.txt"}
    assert all((ROOT / name).exists() for name in let_in)


def test_the_image_listens_where_it_says():
    text = (ROOT / "Dockerfile").read_text()
    ports = {int(port) for port in re.findall(r"(?:PORT=|EXPOSE |-p |7860:)(\d+)", text)}
    assert ports == {Settings().port}
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)


# ---- the folder as a process -------------------------------------------------------------------------------------------


@contextmanager
def running(space: Path, **variables: str) -> Iterator[tuple[str, Path]]:
    """A made Space as its platform runs it: its address, and its log."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hidden = {name: value for name, value in os.environ.items() if name not in GIVEN and name != "PYTHONPATH"}
    environment = hidden | {"PORT": str(port), "GRADIO_TEMP_DIR": str(space.parent / "uploads")} | variables
    log = space.parent / "log.txt"
    with log.open("w") as written:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stdout=written, stderr=written)
        try:
            deadline = time.monotonic() + START_S
            while not answers(f"http://127.0.0.1:{port}/"):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}/", log
        finally:
            process.terminate()
            process.wait(20)


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made folder: the copies in it are what is run."""
    out = tmp_path_factory.mktemp("space") / "space"
    make_space(out)
    return out


@pytest.mark.pocket
@pytest.mark.parametrize("is_zero", [False, True], ids=["cpu", "ZeroGPU"])
def test_a_made_space_starts_and_answers(space, is_zero):
    pytest.importorskip("gradio_client", reason="[demo] to run it: pip install peft-s2lora[demo]")
    from gradio_client import Client, handle_file

    zero = {"SPACES_ZERO_GPU": "true", "PYTHONPATH": str(STAND_IN)} if is_zero else {}
    with running(space, MAX_MINUTES="0.1", **zero) as (url, log):
        client = Client(url, verbose=False)
        answer = client.predict(handle_file(WELSH), compare=True, api_name="/transcribe")
        assert (answer["adapter"], answer["base"]["adapter"]) == ("cy", None)
        assert character_errors(ROWS["Welsh"]["text"], answer["text"]) <= READABLE
        assert client.predict(handle_file(WELSH), api_name="/detect")["language"] == "cy"
        with pytest.raises(Exception, match="longer"):
            client.predict(handle_file(LONG), api_name="/transcribe")
        del client
    assert ("ZeroGPU stand-in: process" in log.read_text()) == is_zero


def test_a_wrong_variable_ends_the_start_in_one_line():
    with pytest.raises(SystemExit) as ended:
        serve.main({"MAX_MINUTES": "ten"})
    assert str(ended.value) == "The page cannot start: The variable MAX_MINUTES is a number above 0, and at most 1,440; got 'ten'."


@pytest.mark.parametrize("error", [RuntimeError("CUDA\n  is not here"), ImportError("CUDA is not here"), ValueError("CUDA\nis not here")])
def test_whatever_ends_the_start_is_said_in_one_line_and_the_base_is_passed_on(monkeypatch, error):
    from demo import app

    asked = {}

    def fail(*arguments, **options):
        asked.update(options)
        raise error

    monkeypatch.setattr(app, "load", fail)
    with pytest.raises(SystemExit) as ended:
        serve.main({"BASE_MODEL": "me/base"})
    assert str(ended.value) == "The page cannot start: CUDA is not here"
    assert asked["base_model"] == "me/base"


# ---- ZeroGPU -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stand_in() -> Iterator[Any]:
    """The stand-in for ZeroGPU's package, imported as that would be."""
    sys.path.insert(0, str(STAND_IN))
    try:
        import spaces

        yield spaces
        spaces.end_all()
    finally:
        sys.path.remove(str(STAND_IN))


@pytest.fixture(scope="module")
def both(stand_in: Any) -> tuple[Any, ForkedTranscriber]:
    """The pocket, and the same in forks. The first is never used before the second has forked."""
    import peft_s2lora  # noqa: F401 - registers S2-LoRA
    from whisper_moe import Transcriber

    transcriber = Transcriber.from_pretrained()
    return transcriber, ForkedTranscriber(transcriber, stand_in.GPU, seconds=45)


@pytest.mark.pocket
class TestForks:
    """In this order: the first call forks, the later ones use the same fork."""

    def test_the_model_works_in_another_process_and_what_it_says_arrives_here(self, both, stand_in):
        transcriber, forked = both
        told, written = [], []
        transcript = forked.transcribe(str(LONG), on_progress=lambda *news: told.append(news), on_segments=written.extend)
        assert transcriber.engine.num_batches == 0
        assert stand_in.decorated[-1][1] == 45
        assert os.getpid() not in stand_in.pids
        assert told[0][0] == 0
        assert told[-1][0] == 1
        assert sorted(written, key=lambda part: part.start_s) == list(transcript.segments)
        assert len(written) >= 2

    def test_an_adapter_that_came_after_the_fork_is_known_there(self, both, stand_in, tmp_path):
        transcriber, forked = both
        shutil.copytree(transcriber.registry["cy"].path, tmp_path / "late")
        from whisper_moe import LanguageAdapter

        late = replace(LanguageAdapter.load(tmp_path / "late"), name="late")
        forked.add_adapter(late)
        assert forked.transcribe(str(WELSH), adapter="late").adapter == "late"
        transcriber.registry.remove("late")
        with pytest.raises(ValueError, match="There is no adapter 'late'"):
            forked.transcribe(str(WELSH), adapter="late")
        assert len(set(stand_in.pids)) == 1

    def test_an_adapter_that_was_fetched_there_is_known_here(self, both, stand_in, tmp_path):
        transcriber, _ = both
        transcriber.registry.expect("tr", fetch_as(transcriber, "tr", tmp_path), where="me/tr@1234567")
        fresh = ForkedTranscriber(transcriber, stand_in.GPU, seconds=1)
        assert fresh.transcribe(str(WELSH), language="tr").adapter == "tr"
        assert [source.key for source in transcriber.registry.expected] == []
        assert transcriber.registry["tr"].language == "tr"

    def test_what_is_refused_there_is_refused_here_in_the_same_words(self, both):
        transcriber, forked = both
        for options in ({"language": "xx"}, {"adapter": "nobody"}, {"max_duration_s": 0.5}):
            with pytest.raises(ValueError) as here:
                transcriber.transcribe(str(WELSH), **options)
            with pytest.raises(ValueError) as there:
                forked.transcribe(str(WELSH), **options)
            assert str(there.value) == str(here.value)

    def test_who_stops_here_stops_it_there_and_the_next_call_works(self, both, stand_in):
        _, forked = both

        class Stopped(Exception):
            pass

        def stop(share: float, what: str) -> None:
            if share > 0.1:
                raise Stopped

        with pytest.raises(Stopped):
            forked.transcribe(str(LONG), on_progress=stop)
        assert forked.transcribe(str(WELSH)).adapter == "cy"
        assert stand_in.pids[-1] == stand_in.pids[0], "the fork is still alive"

    def test_answers_are_those_of_the_transcriber_itself(self, both):
        transcriber, forked = both
        recordings = [str(WELSH), str(EXAMPLES / "german.ogg"), "no such file"]
        here, there = transcriber.transcribe_many(recordings), forked.transcribe_many(recordings)
        assert [each.text for each in there[:2]] == [each.text for each in here[:2]]
        assert [each.adapter for each in there[:2]] == ["cy", None]
        assert str(there[2]) == str(here[2])
        heard = forked.detect(str(WELSH))
        assert heard.top(3) == pytest.approx(transcriber.detect(str(WELSH)).top(3), abs=1e-6)
        forked.load(transcriber.registry["en-child"])
        assert (forked.name, forked.detectable_languages) == (transcriber.name, transcriber.detectable_languages)

    def test_a_fault_there_is_a_fault_here(self, both):
        _, forked = both
        with pytest.raises(RuntimeError, match="TypeError"):
            forked.transcribe(str(WELSH), no_such_option=1)

    def test_a_fork_that_is_made_while_the_page_fetches_answers(self, both, stand_in, tmp_path):
        """Locks that are held then are held in the fork by nobody; nor are torch's threads there."""
        import torch

        transcriber, _ = both
        fetch, page, is_fetching, go_on = fetch_as(transcriber, "fi", tmp_path), os.getpid(), threading.Event(), threading.Event()

        def slowly() -> Path:
            assert torch.ones(1_000_000).isfinite().all()  # as the checks of an adapter do
            if os.getpid() == page:
                is_fetching.set()
                assert go_on.wait(60)
            return fetch()

        def write(language: str) -> None:
            assert torch.ones(1_000_000).isfinite().all()  # the thread that forks has used torch's threads, as after another fetch
            answers.append(fresh.transcribe(str(WELSH), language=language).adapter)

        threads, answers, calls = torch.get_num_threads(), [], len(stand_in.pids)
        torch.set_num_threads(2)
        try:
            transcriber.registry.expect("fi", slowly, where="me/fi@1234567")
            transcriber.registry.expect("et", lambda: slowly() and fetch_as(transcriber, "et", tmp_path)(), where="me/et@1234567")
            fresh = ForkedTranscriber(transcriber, stand_in.GPU, seconds=1)
            fetching = threading.Thread(target=lambda: transcriber.registry["fi"])
            fetching.start()
            assert is_fetching.wait(20)
            with transcriber.registry._changing:  # and something is being added just now
                ask = threading.Thread(target=write, args=("fi",), daemon=True)
                ask.start()
                deadline = time.monotonic() + 20
                while len(stand_in.pids) == calls and time.monotonic() < deadline:  # until it has forked
                    time.sleep(0.02)
            go_on.set()
            fetching.join(60)
            ask.join(30)
            assert answers == ["fi"]
            transcriber.registry["et"]  # the page has it now, and the same fork fetches it from the disk
            ask = threading.Thread(target=write, args=("et",), daemon=True)
            ask.start()
            ask.join(30)
            assert answers == ["fi", "et"]
        finally:
            go_on.set()
            torch.set_num_threads(threads)
            for name in ("fi", "et"):
                with suppress(ValueError):
                    transcriber.registry.remove(name)

    def test_whose_minutes_a_call_takes_is_known_however_the_page_makes_it(self, both, stand_in, monkeypatch):
        from demo import live
        from demo.batch import Batch
        from demo.follow import Following
        from demo.stops import Run

        _, forked = both
        stand_in.visitors.clear()
        heard = []
        monkeypatch.setattr(live.LiveSession, "serve", lambda self: heard.append(stand_in.visitor.get()))

        def ask():
            stand_in.visitor.set("ann")
            following = Following(lambda tell, show: forked.transcribe(str(WELSH), on_progress=tell))
            for _ in following:
                pass
            for _ in Batch(forked, [str(WELSH)] * 2, Run(), max_files=5).rounds():
                pass
            forked.transcribe_many([str(WELSH)])
            sessions = live.LiveSessions(forked)
            sessions.hear("s", 16_000, np.zeros(16_000, np.int16))
            deadline = time.monotonic() + 10
            while not heard and time.monotonic() < deadline:
                time.sleep(0.02)

        copy_context().run(ask)
        assert stand_in.visitors == ["ann"] * 4
        assert heard[:1] == ["ann"]


def fetch_as(transcriber: Any, language: str, folder: Path) -> Any:
    """Fetches a copy of the Welsh adapter that says it writes another language. The page and a fork may do so at the same time."""

    def fetch() -> Path:
        out = folder / language
        if not out.exists():
            part = Path(tempfile.mkdtemp(dir=folder)) / language
            shutil.copytree(transcriber.registry["cy"].path, part)
            row = part / "language_adapter.json"
            row.write_text(
                row.read_text().replace('"language": "cy"', f'"language": "{language}"').replace('"name": "cy"', f'"name": "{language}"')
            )
            with suppress(OSError):  # the other one was first
                part.rename(out)
        return out

    return fetch
