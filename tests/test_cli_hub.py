"""The Hub's commands, called as the shell does, in fresh processes with nothing but the environment to tell them where the Hub is."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from conftest import SAMPLE_RATE, build_tiny_model, silence, tone
from hub_adapters import write_run
from loopback_hub import LoopbackHub, hub_fixture, online_fixture  # noqa: F401
from peft import PeftModel, VeraConfig
from safetensors.torch import load_file, save_file

from hub_utils import check_adapter, load_adapter, publish_adapter
from peft_s2lora import S2LoraConfig
from whisper_moe import AdapterRegistry, Transcriber
from whisper_moe.cli import main
from whisper_moe.cli_hub import expect_registry

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


# ---- the registry file and a transcriber -------------------------------------------------------------------------------


@pytest.fixture
def transcriber(make_adapter: Callable[..., Path], tiny_model: Any, tiny_processor: Any) -> Any:
    """With an adapter for Welsh at hand."""
    return Transcriber(tiny_model, tiny_processor, AdapterRegistry([make_adapter("cy", name="at-hand")]))


def registry_of(path: Path, **sources: Path) -> Path:
    path.write_text(json.dumps({"format": 1, "adapters": {key: str(source) for key, source in sources.items()}}))
    return path


def test_the_registry_goes_before_what_is_shipped_and_after_what_the_command_names(
    transcriber: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    file = registry_of(tmp_path / "a.json", cy=make_adapter("cy", name="registered"), fr=make_adapter("fr"))
    expect_registry(transcriber, file, None, folders_first=True)
    assert [source.key for source in transcriber.registry.expected] == ["fr"]
    assert transcriber.registry.choose(None, language="cy").adapter.name == "at-hand"
    other = Transcriber(transcriber.model, transcriber.processor, AdapterRegistry([make_adapter("cy", name="shipped")]))
    expect_registry(other, file, None)
    assert other.registry.choose(None, language="cy").adapter.name == "registered"


def test_the_users_own_registry_is_read_if_there_is_one_and_a_named_one_must_be_there(
    transcriber: Any, here: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    expect_registry(transcriber, None, None)
    assert transcriber.registry.expected == []
    registry_of(here, fr=make_adapter("fr"))
    expect_registry(transcriber, None, None)
    assert [source.where for source in transcriber.registry.expected] == [str(tmp_path / "adapters" / "fr")]
    with pytest.raises(ValueError, match=r"There is no registry file .*gone.json. .whisper-moe adapters add"):
        expect_registry(transcriber, tmp_path / "gone.json", None)


def test_an_adapter_of_another_base_or_method_is_not_used_and_the_transcript_says_why(
    transcriber: Any, tiny_processor: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    other = make_adapter("fr", model=build_tiny_model(tiny_processor, seed=5))
    vera = make_adapter("de", peft_config=VeraConfig(r=2, target_modules=["q_proj"]))
    odd, empty = make_adapter("it"), make_adapter("pl")
    for folder, signature in ((odd, 5), (empty, {"format": 1})):
        row = json.loads((folder / "language_adapter.json").read_text())
        (folder / "language_adapter.json").write_text(json.dumps(row | {"base_signature": signature}))
    sources = {"fr": other, "de": vera, "es": tmp_path / "gone", "it": odd, "pl": empty}
    expect_registry(transcriber, registry_of(tmp_path / "a.json", **sources), None)
    messages = {
        "fr": "'fr' was made for 'tiny-whisper', not for",
        "de": "peft_type 'VERA'",
        "es": "no adapter folder",
        "it": "a fingerprint of its base that cannot be read",
        "pl": "a fingerprint of its base that cannot be read",
    }
    for language, says in messages.items():
        transcript = transcriber.transcribe(tone(300), language=language)
        assert transcript.adapter is None
        assert transcript.text
        assert says in transcript.warnings[0]


def test_an_adapter_that_does_not_fit_is_refused_before_it_displaces_the_one_at_hand(
    transcriber: Any, tiny_processor: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    file, bad = registry_of(tmp_path / "a.json", cy=tmp_path / "adapters" / "bad"), make_adapter("cy", name="bad")
    weights = bad / "adapter_model.safetensors"
    good = load_file(weights)
    first = next(iter(good))
    spoilt = {
        "holds numbers from nan": good | {first: good[first] * math.nan},
        "lacks 1 tensor": {name: tensor for name, tensor in good.items() if name != first},
        "holds 1 tensor": good | {"base_model.model.model.encoder.conv1.bias": torch.ones(16)},
    }
    for says, tensors in spoilt.items():
        save_file(tensors, weights)
        fresh = Transcriber(transcriber.model, tiny_processor, AdapterRegistry([tmp_path / "adapters" / "at-hand"]), load=load_adapter)
        expect_registry(fresh, file, None)
        decision = fresh.registry.choose(None, language="cy")
        assert decision.adapter.name == "at-hand"
        assert says in decision.warning
        assert [source.key for source in fresh.registry.expected] == ["cy"]
    save_file(good, weights)
    assert fresh.registry["cy"].name == "bad"


def test_a_pooled_adapter_without_its_pool_is_refused_before_it_displaces_the_one_at_hand(
    transcriber: Any, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    pool = make_adapter("en", name="pool", peft_config=S2LoraConfig(r=4, target_modules=["q_proj"]))
    trained = PeftModel.from_pretrained(copy.deepcopy(transcriber.model), str(pool), adapter_name="pool")
    trained.add_adapter("pooled", S2LoraConfig(pool="pool"))
    trained.save_pretrained(str(tmp_path), selected_adapters=["pooled"], save_embedding_layers=False)
    row = json.loads((pool / "language_adapter.json").read_text())
    (tmp_path / "pooled" / "language_adapter.json").write_text(json.dumps(row | {"name": "pooled", "language": "cy"}))
    expect_registry(transcriber, registry_of(tmp_path / "a.json", cy=tmp_path / "pooled"), None)
    decision = transcriber.registry.choose(None, language="cy")
    assert decision.adapter.name == "at-hand"
    assert "its pool is not here" in decision.warning
    check_adapter(tmp_path / "pooled", trained)  # on a model that has the pool it is good


def test_a_broken_adapter_ends_its_own_recording_and_the_others_are_written(
    make_adapter: Callable[..., Path], tiny_folder: Path, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = make_adapter("cy")
    (broken / "adapter_config.json").write_text((broken / "adapter_config.json").read_text().replace('"r": 2', '"r": 3'))
    for name, sound in (("a", tone(300)), ("b", silence(1)), ("c", tone(900))):
        soundfile.write(tmp_path / f"{name}.wav", sound, SAMPLE_RATE)
    files = [str(tmp_path / f"{name}.wav") for name in "abc"]
    command = ["transcribe", *files, "--model", str(tiny_folder), "--adapters", str(broken), "--device", "cpu", "--json"]
    assert main([*command, "--language", "cy"]) == 1
    out, err = capsys.readouterr()
    assert [json.loads(line)["file"] for line in out.splitlines()] == files[1:2]  # silence needs no adapter
    assert [line.partition(": ")[0] for line in err.splitlines()] == [files[0], files[2]]
    assert main([*command, "--threshold", "7"]) == 2  # makes no sense for any recording: said once
    assert capsys.readouterr().err.count("threshold") == 1


def test_the_page_offers_what_can_be_fetched(transcriber: Any, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    from demo import handlers

    file = registry_of(tmp_path / "a.json", cy=make_adapter("cy", name="registered"), **{"en/child": make_adapter("en", domain="child")})
    expect_registry(transcriber, file, None)
    assert dict(map(reversed, handlers.language_choices(transcriber)))["cy"] == "Welsh (adapter cy, fetched when it is needed)"
    named = dict(map(reversed, handlers.adapter_choices(transcriber)))
    assert set(named) == {"auto", "none", "cy", "en/child"}  # the shipped Welsh one makes room
    assert named["en/child"] == "en/child: English, domain child, fetched when it is needed"
    transcript = handlers.transcribe(transcriber, tone(300), adapter="en/child")
    assert transcriber.registry[transcript.adapter].domain == "child"
    assert handlers.transcribe(transcriber, tone(300), language="cy").adapter == "registered"
    assert transcriber.registry.expected == []


def test_a_command_can_fetch_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command runs where experts of the Hub are fetched by `hub_utils`, checked and pinned."""
    from whisper_moe import cli, expert_sources

    asked = []
    monkeypatch.setattr("hub_utils.fetch_experts", lambda experts, base: asked.append((dict(experts), base)) or {"br": "here"})
    source = f"alice/tiny-lora-br@{'0' * 40}"
    monkeypatch.setattr(cli.ListAdapters, "run", lambda self: len(expert_sources.fetched_experts({"br": source}, "tests/tiny")))
    assert main(["adapters"]) == 1
    assert asked == [({"br": source}, "tests/tiny")]
    with pytest.raises(ValueError, match="nobody was named"):
        expert_sources.fetched_experts({"br": source}, None)


def test_transcribing_loads_adapters_as_those_of_strangers(
    make_adapter: Callable[..., Path], tiny_folder: Path, here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vera = make_adapter("cy", peft_config=VeraConfig(r=2, target_modules=["q_proj"]))
    soundfile.write(tmp_path / "a.wav", tone(300), SAMPLE_RATE)
    command = ["transcribe", str(tmp_path / "a.wav"), "--model", str(tiny_folder), "--adapters", str(vera), "--device", "cpu"]
    assert main([*command, "--language", "cy"]) == 1
    assert "has peft_type 'VERA'; trusted are LORA, S2LORA, LORAMOE" in capsys.readouterr().err


def test_the_page_loads_adapters_as_those_of_strangers_and_reads_the_registry(
    transcriber: Any, make_adapter: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from demo import app

    asked: dict[str, Any] = {}
    monkeypatch.setattr(Transcriber, "from_pretrained", lambda *arguments, **options: asked.update(options) or transcriber)
    monkeypatch.setattr(app, "build_app", lambda *arguments, **options: (_ for _ in ()).throw(InterruptedError))
    file = registry_of(tmp_path / "a.json", fr=make_adapter("fr"), cy=make_adapter("cy", name="other"))
    with pytest.raises(InterruptedError):
        app.serve(registry=file, adapters=("somewhere",))
    assert asked["load"] is load_adapter
    assert [source.key for source in transcriber.registry.expected] == ["fr"]
