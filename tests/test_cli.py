"""The command line, called as the shell does: what it prints, what it returns, and that one bad file does not stop the others."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from conftest import SAMPLE_RATE, silence, tone

from peft_s2lora import S2LoraConfig
from whisper_moe.cli import main


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    soundfile.write(path, tone(300), SAMPLE_RATE)
    return path


@pytest.fixture
def options(tiny_folder: Path, make_adapter: Callable[..., Path]) -> list[str]:
    """Flags for the tiny model with a Welsh LoRA and a Kichwa S2-LoRA."""
    folder = make_adapter("cy").parent
    make_adapter("qug", carrier="es", peft_config=S2LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_weights=False))
    return ["--model", str(tiny_folder), "--adapters", str(folder), "--device", "cpu"]


# ---- transcribe --------------------------------------------------------------------------------------------------------


def test_a_transcript_names_language_adapter_and_reason(recording: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transcribe", str(recording), *options, "--language", "Kichwa"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == str(recording)
    assert "decision: Kichwa (given, not detected) → adapter qug, S2-LoRA, " in out
    assert "because:  You said it is Kichwa; the adapter 'qug' writes it." in out


def test_json_is_one_object_a_file_and_nothing_else(recording: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transcribe", str(recording), str(recording), *options, "--json", "--allowed", "cy", "fr"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["file"] for row in rows] == [str(recording)] * 2
    assert set(rows[0]["probabilities"]) == {"cy", "fr"}
    assert rows[0]["decision"]["allowed"] == ["cy", "fr"]
    assert rows[0]["decision"]["fallback"] == rows[0]["fallback"]
    assert rows[0] | {"elapsed_s": 0} == rows[1] | {"elapsed_s": 0}


def test_segments_are_listed_if_there_are_several(tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "long.wav"
    soundfile.write(path, np.concatenate([tone(300, 0.5), silence(61), tone(500, 0.5)]), SAMPLE_RATE)
    assert main(["transcribe", str(path), *options, "--language", "cy"]) == 0
    assert "  1:01." in capsys.readouterr().out


def test_transcripts_are_written_as_files_and_none_over_another(
    recording: Path, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin, folder = tmp_path / "twin" / "Speech.flac", tmp_path / "new" / "folder"
    twin.parent.mkdir()
    soundfile.write(twin, tone(500), SAMPLE_RATE)
    arguments = ["transcribe", str(recording), str(twin), *options, "--json", "--allowed", "cy", "--write", str(folder)]
    assert main([*arguments, "--formats", "vtt", "json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(path.name for path in folder.iterdir()) == ["Speech (2).json", "Speech (2).vtt", "speech.json", "speech.vtt"]
    for row, name in zip(rows, ("speech.json", "Speech (2).json"), strict=True):
        assert {"file": row["file"], **json.loads((folder / name).read_text("utf-8"))} == row
    (tmp_path / "taken").write_text("a file, not a folder")
    assert main([*arguments[:-1], str(tmp_path / "taken")]) == 2
    assert not capsys.readouterr().out, "said before the work"


def test_a_bad_file_is_told_and_the_others_go_on(
    recording: Path, tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    letter = tmp_path / "letter.txt"
    letter.write_text("Dear sir, " * 100)
    assert main(["transcribe", str(letter), str(tmp_path / "gone.wav"), str(recording), *options, "--adapter", "cy"]) == 1
    out, err = capsys.readouterr()
    assert f"{letter}: This is not a recording" in err
    assert "There is no file" in err
    assert "→ adapter cy" in out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--language", "Frensh"], "fr (French)"),
        (["--language", "chr"], "no adapter writes it"),
        (["--adapter", "klingon"], "no adapter 'klingon'"),
        (["--threshold", "2"], "threshold"),
    ],
)
def test_a_request_that_makes_no_sense_ends_with_2_and_a_plain_line(
    recording: Path, options: list[str], capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert main(["transcribe", str(recording), *options, *flags]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("whisper-moe: ")
    assert words in err
    assert "Traceback" not in err


def test_no_recording_at_all_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["transcribe"]) == 2
    assert "at least one recording" in capsys.readouterr().err


def test_adapters_of_another_base_are_refused_at_once(
    recording: Path, tmp_path: Path, options: list[str], tiny_processor: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from conftest import build_tiny_model

    build_tiny_model(tiny_processor, seed=3).save_pretrained(tmp_path / "other")
    tiny_processor.save_pretrained(tmp_path / "other")
    assert main(["transcribe", str(recording), *options, "--model", str(tmp_path / "other")]) == 2
    assert "was made for 'tiny-whisper', not for 'other'" in capsys.readouterr().err


# ---- adapters ----------------------------------------------------------------------------------------------------------


def test_adapters_are_listed_with_their_figures(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    folder = options[3]
    assert main(["adapters", "list", folder]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("cy: Welsh; LORA for tiny-whisper, ")
    assert lines[0].endswith("WER 150.0% -> 50.0%; CER 90.0% -> 25.0%")
    assert lines[1].startswith("qug: Kichwa, under the token of Spanish; S2LORA")
    assert main(["adapters", "list", folder, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["cy", "qug"]
    assert main(["adapters", "list", str(Path(folder) / "gone")]) == 2


# ---- the door ----------------------------------------------------------------------------------------------------------


def test_help_names_the_commands_and_loads_no_model_library() -> None:
    code = (
        "import sys\nfrom whisper_moe.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n"
        "    print(end.code, sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in result.stdout for command in ("transcribe", "train", "adapters"))
    assert result.stdout.splitlines()[-1] == "0 []"


def test_an_unknown_flag_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["transcribe", "a.wav", "--langauge", "cy"])
    assert end.value.code == 2
    assert "--language" in capsys.readouterr().err
