"""`whisper-moe export`: what it writes computes what base and adapter compute, in programs that know nothing of this package.

The truth is the model with the adapter on it, a dense sum of matrices, or Transformers where CTranslate2 runs. Whatever is
refused leaves the disk as it was.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import soundfile
import torch
from conftest import SAMPLE_RATE, SHARED, tone, write_adapter
from fresh_process import run_python
from peft import LoraConfig, PeftModel, VeraConfig
from safetensors.torch import load_file
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from peft_s2lora import S2LoraConfig
from whisper_moe.cli import main
from whisper_moe.export import export_adapter
from whisper_moe.registry import LanguageAdapter
from whisper_moe.transcribe import Transcriber

if TYPE_CHECKING:
    from faster_whisper import WhisperModel


# ---- what the tests share ----------------------------------------------------------------------------------------------


@pytest.fixture
def lora(make_adapter: Callable[..., Path]) -> Path:
    """A LoRA whose scaling is not 1."""
    return make_adapter("cy", peft_config=LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj", "fc1"]))


@pytest.fixture
def s2lora(make_adapter: Callable[..., Path]) -> Path:
    """An S2-LoRA for a language that needs a carrier."""
    config = S2LoraConfig(r=4, s2lora_alpha=6, target_modules=["q_proj", "v_proj", "fc2"], init_weights=False)
    return make_adapter("qug", carrier="es", peft_config=config)


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    soundfile.write(path, tone(300), SAMPLE_RATE)
    return path


def export(adapter: Path | str, to: Path, format: str, *flags: str | Path) -> int:
    return main(["export", str(adapter), "--to", str(to), "--format", format, *map(str, flags)])


def some_input(model: WhisperForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Sound and tokens, the same at every call."""
    generator = torch.Generator().manual_seed(7)
    frames = 2 * model.config.max_source_positions
    features = torch.randn(2, model.config.num_mel_bins, frames, generator=generator, dtype=torch.float64)
    return {"input_features": features, "decoder_input_ids": torch.randint(300, (2, 5), generator=generator)}


def logits(model: Any) -> torch.Tensor:
    """(2, 5, vocabulary) of `some_input`. In double precision: what differs then are the weights, not the rounding of the products."""
    with torch.no_grad():
        return model.eval().double()(**some_input(model)).logits


def adapter_on(base: str | Path, adapter: str | Path) -> torch.Tensor:
    """The logits of the base with the adapter at work."""
    model = WhisperForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    alone = logits(model)
    adapted = logits(PeftModel.from_pretrained(model, str(adapter)))
    assert (adapted - alone).abs().max() > 0.1, "the adapter does nothing, so nothing is tested"
    return adapted


def everything_below(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, every folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


# ---- lora --------------------------------------------------------------------------------------------------------------


def test_a_process_without_this_package_computes_the_same_from_each_export(
    tiny_folder: Path, lora: Path, s2lora: Path, tmp_path: Path
) -> None:
    assert export(lora, tmp_path / "cy", "lora", "--model", tiny_folder) == 0
    assert export(s2lora, tmp_path / "qug", "lora", "--model", tiny_folder) == 0
    assert export(s2lora, tmp_path / "merged", "merged", "--model", tiny_folder) == 0
    expected = {"cy": adapter_on(tiny_folder, lora), "qug": adapter_on(tiny_folder, s2lora)}
    inputs = some_input(WhisperForConditionalGeneration.from_pretrained(tiny_folder))
    torch.save({"expected": expected | {"merged": expected["qug"]}, "inputs": inputs}, tmp_path / "expected.pt")
    result = run_python(
        f"""
import torch
from transformers import WhisperForConditionalGeneration
saved, base = torch.load("expected.pt"), {str(tiny_folder)!r}
def check(name, model):
    with torch.no_grad():
        difference = (model.eval().double()(**saved["inputs"]).logits - saved["expected"][name]).abs().max()
    assert difference < 1e-5, (name, difference)
check("merged", WhisperForConditionalGeneration.from_pretrained("merged"))
from peft import LoraConfig, PeftModel
for name in ("cy", "qug"):
    model = PeftModel.from_pretrained(WhisperForConditionalGeneration.from_pretrained(base), name)
    assert type(model.peft_config["default"]) is LoraConfig
    check(name, model)
assert not [name for name in sys.modules if name.startswith(("peft_s2lora", "whisper_moe"))]
print("equal")
""",
        tmp_path,
    )
    assert result.stdout.strip().endswith("equal"), result.stderr[-3000:]


def test_the_exported_lora_is_a_language_adapter_that_writes_the_same(
    tiny_folder: Path, s2lora: Path, recording: Path, tmp_path: Path
) -> None:
    out = tmp_path / "plain"
    assert export(s2lora, out, "lora", "--model", tiny_folder) == 0
    before, after = LanguageAdapter.load(s2lora), LanguageAdapter.load(out)
    assert (before.peft_type, after.peft_type) == ("S2LORA", "LORA")
    for field in ("name", "language", "domain", "carrier", "base", "base_signature", "metrics"):
        assert getattr(after, field) == getattr(before, field)
    assert after.num_parameters == sum(tensor.numel() for tensor in load_file(out / "adapter_model.safetensors").values())
    texts = [
        Transcriber.from_pretrained(tiny_folder, adapters=folder, device="cpu").transcribe(recording, language="qug")
        for folder in (s2lora, out)
    ]
    assert texts[0].text == texts[1].text != ""
    assert [text.adapter for text in texts] == ["qug", "qug"]


def test_the_card_of_a_converted_adapter_is_that_of_a_lora(tiny_folder: Path, s2lora: Path, tmp_path: Path) -> None:
    (s2lora / "README.md").write_text("Needs `import peft_s2lora`.")
    out = tmp_path / "plain"
    assert export(s2lora, out, "lora", "--model", tiny_folder) == 0
    card = (out / "README.md").read_text("utf-8")
    assert "# qug: LoRA language adapter for Whisper" in card
    assert "Kichwa" in card
    assert f"exported from | S2LORA, {LanguageAdapter.load(s2lora).num_parameters:,} trained parameters" in card
    assert "import peft_s2lora" not in card


def test_the_exported_lora_names_its_base_as_the_adapter_did(tiny_folder: Path, s2lora: Path, tmp_path: Path) -> None:
    known = json.loads((s2lora / "adapter_config.json").read_text()) | {"base_model_name_or_path": "somebody/whisper"}
    (s2lora / "adapter_config.json").write_text(json.dumps(known))
    assert export(s2lora, tmp_path / "plain", "lora", "--model", tiny_folder) == 0
    written = json.loads((tmp_path / "plain" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "somebody/whisper"
    assert written["auto_mapping"] == known["auto_mapping"] != None  # noqa: E711, all three in one comparison
    assert str(tmp_path) not in json.dumps(written)


def test_a_lora_is_exported_as_it_is(tiny_folder: Path, lora: Path, tmp_path: Path) -> None:
    (lora / "README.md").write_text("My card.")
    (lora / "notes.txt").write_text("not part of the adapter")
    assert export(lora, tmp_path / "copy", "lora", "--model", tiny_folder) == 0
    expected = everything_below(lora)
    expected.pop("notes.txt")
    assert everything_below(tmp_path / "copy") == expected


def test_a_method_without_an_exact_way_to_lora_is_refused(
    tiny_folder: Path, make_adapter: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vera = make_adapter("cy", peft_config=VeraConfig(r=2, target_modules=["q_proj"]))
    assert export(vera, tmp_path / "out", "lora", "--model", tiny_folder) == 2
    assert "VERA to plain LoRA is known, only from: LORA, S2LORA. Export it as 'merged'" in capsys.readouterr().err
    assert export(vera, tmp_path / "out", "merged", "--model", tiny_folder) == 0
    merged = logits(WhisperForConditionalGeneration.from_pretrained(tmp_path / "out"))
    assert torch.allclose(merged, adapter_on(tiny_folder, vera), atol=1e-5)


# ---- merged ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "s2lora", "modules_to_save", "dora"])
def test_the_merged_checkpoint_computes_what_base_and_adapter_computed(
    tiny_folder: Path, make_adapter: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    config = {
        "lora": LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "k_proj"]),
        "s2lora": S2LoraConfig(r=4, target_modules=["k_proj", "fc1"], share_scope="global", init_weights=False),
        "modules_to_save": LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["encoder.layer_norm"]),
        "dora": LoraConfig(r=2, target_modules=["out_proj"], use_dora=True),
    }[kind]
    adapter = make_adapter("cy", peft_config=config)
    assert export(adapter, tmp_path / "out", "merged", "--model", tiny_folder) == 0
    merged = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(merged), adapter_on(tiny_folder, adapter), atol=1e-5)
    base = load_file(tiny_folder / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: tensor.shape for name, tensor in written.items()} == {name: tensor.shape for name, tensor in base.items()}


def test_the_merged_folder_transcribes_as_the_adapter_did(
    tiny_folder: Path, s2lora: Path, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(s2lora, tmp_path / "out", "merged", "--model", tiny_folder) == 0
    assert "qug as merged" in capsys.readouterr().out
    expected = Transcriber.from_pretrained(tiny_folder, adapters=s2lora, device="cpu").transcribe(recording, language="qug")
    # Merged, the adapter speaks under its carrier's token.
    found = Transcriber.from_pretrained(tmp_path / "out", device="cpu").transcribe(recording, language="es", adapter="none")
    assert found.text == expected.text != ""
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "Pass `language='es'`: Kichwa has no token" in card


def test_a_base_kept_in_half_precision_is_merged_in_single(tiny_folder: Path, lora: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    WhisperForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float16).save_pretrained(half)
    WhisperProcessor.from_pretrained(tiny_folder).save_pretrained(half)
    assert export(lora, tmp_path / "single", "merged", "--model", half, "--dtype", "float32") == 0
    single = WhisperForConditionalGeneration.from_pretrained(tmp_path / "single", dtype="auto")
    assert single.dtype == torch.float32
    assert torch.allclose(logits(single), adapter_on(half, lora), atol=1e-5)

    assert export(lora, tmp_path / "as-the-base", "merged", "--model", half) == 0
    written, base = load_file(tmp_path / "as-the-base" / "model.safetensors"), load_file(half / "model.safetensors")
    parts = load_file(lora / "adapter_model.safetensors")
    adapted = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in parts if key.endswith("lora_A.weight")}
    assert adapted
    for module in adapted:
        A, B = (parts[f"base_model.model.{module}.lora_{letter}.weight"] for letter in "AB")  # (2, d_in), (d_out, 2)
        exact = base[f"{module}.weight"].float() + (3 / 2) * (B @ A)
        # Rounded once, at the end: next to no element is off by a step. Merged in half precision, about one in six is.
        assert (written[f"{module}.weight"] != exact.half()).float().mean() < 0.01
    untouched = base.keys() - {f"{module}.weight" for module in adapted}
    assert all(torch.equal(written[name], base[name]) for name in untouched)


def test_a_weight_that_half_precision_cannot_hold_is_refused(
    tiny_folder: Path, lora: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    weights = {name: 300 * tensor for name, tensor in load_file(lora / "adapter_model.safetensors").items()}
    save_file(weights, lora / "adapter_model.safetensors")
    assert export(lora, tmp_path / "out", "merged", "--model", tiny_folder, "--dtype", "float16") == 2
    assert "too much for float16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export(lora, tmp_path / "out", "merged", "--model", tiny_folder, "--dtype", "bfloat16") == 0


def test_an_adapter_of_the_embedding_cannot_be_merged_and_says_so(
    tiny_folder: Path, make_adapter: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Whisper's output layer is its embedding: a merged change would act twice.
    adapter = make_adapter("cy", peft_config=LoraConfig(r=2, target_modules=["embed_tokens"]))
    assert export(adapter, tmp_path / "out", "merged", "--model", tiny_folder) == 2
    assert "cannot be merged" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lists_what_it_writes_lists_the_new_language(tiny_folder: Path, lora: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "base")
    settings = tmp_path / "base" / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"written_languages": ["en"]}))
    assert export(lora, tmp_path / "out", "merged", "--model", tmp_path / "base") == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["written_languages"] == ["en", "cy"]


def test_cards_of_base_and_adapter_travel_with_the_merged_model(tiny_folder: Path, lora: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "base")
    (tmp_path / "base" / "README.md").write_text("Whose voices the base heard.")
    assert export(lora, tmp_path / "out", "merged", "--model", tmp_path / "base") == 0
    assert (tmp_path / "out" / "README.base.md").read_text() == "Whose voices the base heard."
    assert (tmp_path / "out" / "README.adapter.md").read_bytes() == (lora / "README.md").read_bytes()
    assert export(lora, tmp_path / "again", "merged", "--model", tiny_folder) == 0  # a base without a card
    assert "The base came without a card" in (tmp_path / "again" / "README.md").read_text()
    assert not (tmp_path / "again" / "README.base.md").exists()


@pytest.mark.pocket
def test_a_shipped_adapter_is_known_by_name_and_finds_its_base(tmp_path: Path) -> None:
    from whisper_moe import export as module
    from whisper_moe import pocket
    from whisper_moe.train import POCKET_ID

    assert module._POCKET == POCKET_ID
    assert export("en-child", tmp_path / "out", "merged", "--dtype", "float32") == 0
    merged = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.allclose(logits(merged), adapter_on(pocket.MODEL, pocket.ADAPTERS / "en-child"), atol=1e-5)


# ---- refusals, and nothing half-written --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "to", "flags", "words"),
    [
        ("klingon", "out", ["--format", "lora"], "no adapter folder 'klingon', and no shipped adapter of that name. Shipped:"),
        ("adapters", "out", ["--format", "lora"], "is no language adapter"),
        ("adapters/cy", "full", ["--format", "merged"], "exists and is not empty"),
        ("adapters/cy", "full", ["--format", "merged", "--overwrite"], "does not look like an earlier export"),
        ("adapters/cy", "deep", ["--format", "merged", "--overwrite"], "does not look like an earlier export"),
        ("adapters/cy", "adapters/cy", ["--format", "lora", "--overwrite"], "in the folder of the adapter 'cy'"),
        ("adapters/cy", "adapters/cy/lora", ["--format", "lora"], "in the folder of the adapter 'cy'"),
        ("adapters/cy", "adapters", ["--format", "lora", "--overwrite"], "in the folder of the adapter 'cy'"),
        ("adapters/cy", "base/merged", ["--format", "merged"], "in the folder of the base"),
        ("adapters/cy", "full/letter.txt", ["--format", "lora"], "is a file"),
        ("adapters/cy", "here", ["--format", "lora"], "the folder you are in"),
        ("adapters/cy", "out", ["--format", "lora", "--dtype", "float16"], "dtype is the precision of a merged checkpoint"),
        ("adapters/cy", "out", ["--format", "merged", "--quantization", "int8"], "quantization is for the format 'ct2'"),
        ("adapters/cy", "out", ["--format", "merged", "--model", "other"], "was made for 'tiny-whisper', not for 'other'"),
        ("adapters/cy", "out", ["--format", "lora", "--model", "other"], "was made for 'tiny-whisper', not for 'other'"),
        ("adapters/cy", "out", ["--format", "merged", "--model", "quantized"], "is quantized"),
        ("adapters/cy", "out", ["--format", "merged", "--model", "nowhere/whisper"], "The base 'nowhere/whisper' cannot be loaded"),
    ],
)
def test_what_makes_no_sense_is_refused_and_the_disk_stays_as_it_was(
    tiny_folder: Path,
    tiny_processor: WhisperProcessor,
    lora: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    adapter: str,
    to: str,
    flags: list[str],
    words: str,
) -> None:
    from conftest import build_tiny_model

    shutil.copytree(tiny_folder, tmp_path / "base")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("Dear sir")
    (tmp_path / "deep" / "photos").mkdir(parents=True)
    (tmp_path / "deep" / "config.json").write_text("{}")
    if "other" in flags:
        build_tiny_model(tiny_processor, seed=3).save_pretrained(tmp_path / "other")
        tiny_processor.save_pretrained(tmp_path / "other")
    if "quantized" in flags:
        shutil.copytree(tiny_folder, tmp_path / "quantized")
        config = json.loads((tiny_folder / "config.json").read_text()) | {"quantization_config": {"quant_method": "bitsandbytes"}}
        (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = everything_below(tmp_path)
    flags = [str(tmp_path / flag) if flag in ("other", "quantized") else flag for flag in flags]
    named = adapter if adapter == "klingon" else str(tmp_path / adapter)
    with_base = [] if "--model" in flags else ["--model", str(tmp_path / "base")]
    assert main(["export", named, "--to", str(tmp_path / to), *flags, *with_base]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("whisper-moe: ")
    assert words in err
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_on_the_way_leaves_nothing_behind_and_the_earlier_export_in_place(
    tiny_folder: Path, s2lora: Path, tmp_path: Path, overwrite: bool
) -> None:
    from peft_s2lora import to_lora

    def full_disk(folder: Path) -> str:
        assert (folder / "adapter_model.safetensors").is_file()  # half of it is there
        raise OSError("No space left on device")

    out = tmp_path / "out"
    if overwrite:
        assert export(s2lora, out, "merged", "--model", tiny_folder) == 0
    before = everything_below(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        export_adapter(s2lora, out, "lora", model=tiny_folder, overwrite=overwrite, to_lora={"S2LORA": to_lora}, render_card=full_disk)
    assert everything_below(tmp_path) == before


def test_an_earlier_export_comes_back_if_the_new_one_cannot_take_its_place(
    tiny_folder: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    out, rename = tmp_path / "out", os.rename
    assert export(lora, out, "merged", "--model", tiny_folder) == 0
    before = everything_below(tmp_path)

    def stubborn(source: Path, to: Path) -> None:
        if Path(source).name == "new":
            raise PermissionError("not allowed")
        rename(source, to)

    monkeypatch.setattr(os, "rename", stubborn)
    assert export(lora, out, "lora", "--model", tiny_folder, "--overwrite") == 2
    assert everything_below(tmp_path) == before


def test_an_earlier_export_is_replaced_whole_and_an_empty_folder_is_taken(
    tiny_folder: Path, lora: Path, s2lora: Path, tmp_path: Path
) -> None:
    out = tmp_path / "exports" / "out"
    out.mkdir(parents=True)
    assert export(s2lora, out, "merged", "--model", tiny_folder) == 0
    assert export(lora, out, "lora", "--model", tiny_folder, "--overwrite") == 0
    assert everything_below(out) == everything_below(lora)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_exporting_leaves_adapter_and_base_as_they_were(tiny_folder: Path, s2lora: Path, tmp_path: Path) -> None:
    before = everything_below(s2lora), everything_below(tiny_folder)
    for format in ("lora", "merged"):
        assert export(s2lora, tmp_path / format, format, "--model", tiny_folder) == 0
    assert (everything_below(s2lora), everything_below(tiny_folder)) == before


def test_others_may_read_what_is_written(tiny_folder: Path, s2lora: Path, tmp_path: Path) -> None:
    (tmp_path / "usual").write_text("")
    for format in ("lora", "merged"):
        assert export(s2lora, tmp_path / format, format, "--model", tiny_folder) == 0
        assert {file.stat().st_mode for file in (tmp_path / format).iterdir()} == {(tmp_path / "usual").stat().st_mode}


# ---- ct2 ---------------------------------------------------------------------------------------------------------------


def test_without_ctranslate2_the_error_names_the_extra(
    tiny_folder: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ctranslate2", None)
    monkeypatch.setitem(sys.modules, "ctranslate2.converters", None)
    assert export(lora, tmp_path / "out", "ct2", "--model", tiny_folder) == 2
    assert "pip install 'peft-s2lora[ct2]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_whisper_of_another_form_is_refused_before_it_fails_in_faster_whisper(
    tiny_folder: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    package = ModuleType("ctranslate2.converters")
    package.TransformersConverter = None  # type: ignore[attr-defined] # never called
    monkeypatch.setitem(sys.modules, "ctranslate2", ModuleType("ctranslate2"))
    monkeypatch.setitem(sys.modules, "ctranslate2.converters", package)
    assert export(lora, tmp_path / "out", "ct2", "--model", tiny_folder) == 2
    error = capsys.readouterr().err
    assert "a window of 200 frames of 10 ms, not 3000 frames of 10 ms" in error
    assert "room for 64 tokens, not 448" in error
    assert "language tokens in a vocabulary of 364" in error
    assert not (tmp_path / "out").exists()


STANDARD_SIZES = {  # of the width alone: window, positions and vocabulary are Whisper's own
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "init_std": 0.15,
}


@pytest.fixture(scope="module")
def standard_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Whisper with OpenAI's window, positions, vocabulary and tokenizer."""
    from transformers import GenerationConfig

    source, folder = SHARED / "whisper-base", tmp_path_factory.mktemp("standard_whisper")
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(source, **STANDARD_SIZES))
    with torch.no_grad():  # else it writes one word again and again
        model.model.decoder.embed_positions.weight.normal_(std=1.0)
    model.generation_config = GenerationConfig.from_pretrained(source)
    model.save_pretrained(folder)
    WhisperProcessor.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def standard_adapter(standard_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = WhisperForConditionalGeneration.from_pretrained(standard_folder)
    config = S2LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], init_weights=False)
    folder = tmp_path_factory.mktemp("adapter") / "cy"
    write_adapter(folder, model, "cy", peft_config=config)
    return folder


@pytest.fixture(scope="module")
def swell() -> np.ndarray:
    """(samples,) 30 s of sound: no silence to be filled in, which faster-whisper does in another way than Transformers."""
    return tone(300, 30.0) + tone(1700, 30.0, level=0.05)


def load_faster_whisper(folder: Path) -> WhisperModel:
    from faster_whisper import WhisperModel

    return WhisperModel(str(folder), device="cpu", compute_type="float32", cpu_threads=1)


needs_ct2 = pytest.mark.skipif(
    not (find_spec("ctranslate2") and find_spec("faster_whisper")), reason="to run it: pip install 'peft-s2lora[ct2]'"
)


@pytest.mark.shared
@needs_ct2
def test_ctranslate2_and_faster_whisper_write_what_the_adapter_wrote(
    standard_folder: Path, standard_adapter: Path, swell: np.ndarray, tmp_path: Path
) -> None:
    import ctranslate2

    assert export(standard_adapter, tmp_path / "out", "ct2", "--model", standard_folder) == 0
    processor = WhisperProcessor.from_pretrained(standard_folder)
    base = WhisperForConditionalGeneration.from_pretrained(standard_folder).eval()
    features = processor.feature_extractor(swell, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features  # (1, 80, 3000)
    alone = base.generate(features, language="cy", task="transcribe", max_new_tokens=16)[0].tolist()
    adapted = PeftModel.from_pretrained(base, str(standard_adapter)).eval()
    with torch.no_grad():
        states = adapted.get_encoder()(features).last_hidden_state  # (1, 1500, 64)
    expected = adapted.generate(features, language="cy", task="transcribe", max_new_tokens=16)[0].tolist()
    assert len(set(expected)) > 8
    assert expected != alone

    model = ctranslate2.models.Whisper(str(tmp_path / "out"), compute_type="float32", intra_threads=1)
    assert model.is_multilingual
    sound = ctranslate2.StorageView.from_array(features.numpy())
    assert np.allclose(np.array(model.encode(sound)), states.numpy(), atol=1e-4)
    prompt = processor.tokenizer.convert_tokens_to_ids(["<|startoftranscript|>", "<|cy|>", "<|transcribe|>", "<|notimestamps|>"])
    written = model.generate(sound, [prompt], beam_size=1, max_length=2 * (16 + len(prompt)))[0].sequences_ids[0]
    assert written[:16] == expected

    segments, info = load_faster_whisper(tmp_path / "out").transcribe(
        swell,
        language="cy",
        beam_size=1,
        temperature=0.0,
        without_timestamps=True,
        suppress_tokens=base.generation_config.suppress_tokens,
        no_speech_threshold=None,
        log_prob_threshold=None,
        compression_ratio_threshold=None,
    )
    tokens = next(iter(segments)).tokens
    assert tokens[:16] == expected
    assert info.language == "cy"


@pytest.mark.shared
@needs_ct2
def test_quantized_weights_are_smaller_and_hear_nearly_the_same(
    standard_folder: Path, standard_adapter: Path, swell: np.ndarray, tmp_path: Path
) -> None:
    states, sizes = {}, {}
    for quantization in ("float32", "int8"):
        out = tmp_path / quantization
        assert export(standard_adapter, out, "ct2", "--model", standard_folder, "--quantization", quantization) == 0
        model = load_faster_whisper(out)
        model.model.load_model()
        states[quantization] = np.array(model.encode(model.feature_extractor(swell)[:, :3000]))
        sizes[quantization] = (out / "model.bin").stat().st_size
    assert sizes["int8"] < 0.4 * sizes["float32"]
    error = np.linalg.norm(states["int8"] - states["float32"]) / np.linalg.norm(states["float32"])
    assert 0 < error < 0.1


@pytest.mark.shared
@needs_ct2
def test_a_half_precision_base_gives_half_precision_for_ctranslate2(standard_folder: Path, standard_adapter: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    WhisperForConditionalGeneration.from_pretrained(standard_folder, dtype=torch.float16).save_pretrained(half)
    WhisperProcessor.from_pretrained(standard_folder).save_pretrained(half)
    sizes = []
    for name, base in (("single", standard_folder), ("half", half)):
        assert export(standard_adapter, tmp_path / "out" / name, "ct2", "--model", base) == 0
        sizes.append((tmp_path / "out" / name / "model.bin").stat().st_size)
    assert sizes[1] < 0.55 * sizes[0]
    assert {path.name for path in (tmp_path / "out" / "half").iterdir()} >= {"model.bin", "tokenizer.json", "preprocessor_config.json"}
