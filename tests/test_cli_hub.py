"""The Hub's commands, called as the shell does, in fresh processes with nothing but the environment to tell them where the Hub is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_adapters import write_run
from loopback_hub import LoopbackHub, hub_fixture, online_fixture  # noqa: F401

from hub_utils import publish_adapter
from whisper_moe.cli import main

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The registry file that commands of this process use."""
    monkeypatch.setenv("WHISPER_MOE_REGISTRY", str(tmp_path / "adapters.json"))
    return tmp_path / "adapters.json"


@pytest.fixture
def shell(hub: LoopbackHub, tmp_path: Path) -> Shell:
    """Run a command in a process of its own, as alice; (exit code, output, errors)."""

    def run(*arguments: str, token: str = "hf_alice") -> tuple[int, str, str]:
        environment = hub.environment(token, WHISPER_MOE_REGISTRY=str(tmp_path / "adapters.json"))
        command = [sys.executable, "-m", "whisper_moe.cli", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    return run


def test_publish_find_add_fetch_and_update_in_fresh_processes(hub: LoopbackHub, shell: Shell, tmp_path: Path) -> None:
    code, out, err = shell("publish", str(write_run(tmp_path / "run")), "--tag", "v1")
    assert (code, err) == (0, "")
    repo, first = "alice/whisper-small-s2lora-cy", hub.commit("alice/whisper-small-s2lora-cy").sha
    assert out == f"Published {repo}@{first}\n{hub.endpoint}/{repo}\n"
    assert "Welsh (`cy`)" in hub.read(repo, "README.md").decode()
    code, out, _ = shell("adapters", "find", "Welsh", "--base", "openai/whisper-small", "--owners", "alice")
    assert (code, out) == (0, f"1. {repo}@{first} (S2LORA): WER 21.0% on held-out voices, 0 downloads\n")
    assert shell("adapters", "add", repo)[:2] == (0, f"cy: {repo}@{first}\n")
    code, out, _ = shell("adapters", "fetch")
    assert code == 0
    assert out.splitlines()[0].startswith("cy: fetched, 0.0 MB, ")
    assert out.splitlines()[1] == "1 of 1 adapters are here, 0.0 MB."
    second = hub.put(repo, {"notes.txt": b"more"})
    assert shell("adapters", "update")[:2] == (0, f"cy: {first} -> {second}\n")


def test_the_registry_is_kept_by_add_list_and_remove(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "run", language="qug", carrier="es")
    assert main(["adapters", "add", str(folder)]) == 0
    assert capsys.readouterr().out == f"qug: {folder}\n"
    assert json.loads(here.read_text())["adapters"] == {"qug": "./run"}
    assert main(["adapters"]) == 0
    assert f"qug: {folder} (in {here})" in capsys.readouterr().out
    assert main(["adapters", "add", str(write_run(tmp_path / "other", language="qug", carrier="es"))]) == 2
    assert "spoken for by ./run" in capsys.readouterr().err
    assert main(["adapters", "add", str(tmp_path / "other"), "--replace"]) == 0
    assert main(["adapters", "remove", "qug"]) == 0
    assert json.loads(here.read_text())["adapters"] == {}
    assert main(["adapters", "remove", "qug"]) == 2
    assert "has no 'qug'" in capsys.readouterr().err


@pytest.mark.usefixtures("online", "here")
def test_an_update_with_a_problem_ends_with_1_and_says_which(
    hub: LoopbackHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
    publish_adapter(write_run(tmp_path / "run"), "alice/a", api=hub.api("hf_alice"))
    assert main(["adapters", "add", "alice/a"]) == 0
    hub.put("alice/a", {"README.md": b"gone"})
    assert main(["adapters", "update"]) == 1
    assert "cy: stays at" in capsys.readouterr().err
    hub.stop()
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert main(["adapters", "fetch"]) == 1
    out, err = capsys.readouterr()
    assert err.startswith("cy: ")
    assert out == "0 of 1 adapters are here, 0.0 MB.\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["publish", "nowhere"], "no adapter folder 'nowhere'"),
        (["adapters", "add"], "Name a repository or a folder"),
        (["adapters", "remove"], "Name a language"),
        (["adapters", "find", "cy", "--base", "openai/whisper-small"], "Say where to look"),
        (["adapters", "find", "Frensh", "--base", "openai/whisper-small"], "French"),
        (["adapters", "fetch", "cy"], "has no 'cy'"),
        (["adapters", "add", "alice/a"], "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_request_that_cannot_be_met_ends_with_2_and_a_plain_line(
    here: Path, capsys: pytest.CaptureFixture[str], command: list[str], says: str
) -> None:
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("whisper-moe: ")
    assert says in err


def test_help_names_every_action_and_loads_no_client(capsys: pytest.CaptureFixture[str]) -> None:
    code = (
        "import sys\nfrom whisper_moe.cli import main\n"
        "try:\n    main(['adapters', '--help'])\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'peft', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(action in done.stdout for action in ("list", "add", "remove", "update", "fetch", "find"))
    assert done.stdout.splitlines()[-1] == "0 []"
