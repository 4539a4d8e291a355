"""`whisper-moe train` from the shell's side: recipe and flags to an adapter, its plan, and the two commands of the guide."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import ROOT

pytest.importorskip("accelerate", reason="training needs the train extra: pip install peft-s2lora[train]")

from safetensors import safe_open
from test_train import make_clips

from whisper_moe.cli import main
from whisper_moe.cli_train import Train
from whisper_moe.registry import LanguageAdapter

GUIDE = ROOT / "docs" / "adding_a_language.md"


def write_folder(folder: Path, count: int) -> Path:
    """A user's own folder: recordings, and a table beside them."""
    folder.mkdir(parents=True)
    lines = ["file_name,text"]
    for index, clip in enumerate(make_clips(count).clips):
        soundfile.write(folder / f"{index}.wav", clip.samples, 16_000)
        lines.append(f"{index}.wav,{clip.text}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def recipe(tiny_folder: Path, tmp_path: Path) -> Path:
    """A recipe that trains the tiny model for two steps."""
    data = write_folder(tmp_path / "clips", 10)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model: {tiny_folder}\nbase_id: tests/tiny\ndata: {data}\neval_data: {data}\ndev_data: {data}\nlanguage: Welsh\n"
        f"out: {tmp_path / 'adapter'}\nrank: 4\nmax_steps: 2\nbatch_size: 2\nnum_workers: 0\nlearning_rate: 1e-2\nlicense: cc0-1.0\n"
    )
    return path


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "language_adapter.json").read_text())
    return found


@pytest.mark.parametrize("method", ["s2lora", "lora"])
def test_a_recipe_makes_an_adapter_that_transcribes(
    recipe: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    out = tmp_path / "adapter"
    assert main(["train", str(recipe), "--method", method, "--max-steps", "3"]) == 0
    adapter = LanguageAdapter.load(out)
    assert (adapter.language, adapter.peft_type, adapter.base) == ("cy", method.upper(), "tests/tiny")
    assert record(out)["training"]["steps"] == 3
    assert adapter.metrics["before"]["clips"] == 2
    card = (out / "README.md").read_text("utf-8")
    assert "cc0-1.0" in card
    assert "Welsh" in card
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"cy: Welsh; {method.upper()} for tests/tiny")
    speech = tmp_path / "clips" / "0.wav"
    assert main(["transcribe", str(speech), "--model", str(tiny_folder), "--adapters", str(out), "--language", "cy"]) == 0
    assert "→ adapter cy" in capsys.readouterr().out


def test_a_dry_run_tells_the_plan_and_writes_nothing(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert main(["train", str(recipe), "--language", "qug", "--method", "lora", "--target-modules", "q_proj", "--dry-run"]) == 0
    assert sorted(tmp_path.rglob("*")) == before
    plan = dict(re.findall(r"^(\w+): +(.+)$", capsys.readouterr().out, re.MULTILINE))
    assert plan["adapter"].startswith("qug: Kichwa under the token of ")
    assert "heard in the training clips" in plan["carrier"]
    assert plan["train"].startswith("clips/train: 7 clips, 0.00 h, none left out")
    # Six attentions of width 16, rank 4: A and B.
    assert plan["method"].startswith(f"LORA, {6 * 4 * (16 + 16):,} parameters trained")
    assert plan["steps"] == "2 of 2 clips, 0.6 passes; cpu, float32" or "bf16" in plan["steps"]
    assert re.match(r"about [\d.]+ minutes of training \([\d.e-]+ s a step", plan["cost"])


def test_a_decoder_adapter_trains_on_states_that_were_computed_once(recipe: Path, tmp_path: Path) -> None:
    flags = ["--method", "lora", "--part", "decoder", "--no-augment", "--precision", "fp32", "--max-steps", "6"]
    assert main(["train", str(recipe), *flags, "--out", str(tmp_path / "live")]) == 0
    assert main(["train", str(recipe), *flags, "--cache-encoder-states", "--out", str(tmp_path / "cached")]) == 0
    live, cached = (safe_open(tmp_path / name / "adapter_model.safetensors", "pt") for name in ("live", "cached"))
    assert set(live.keys()) == set(cached.keys())
    assert not any("encoder.layers" in name for name in live.keys())  # noqa: SIM118, a file and not a dict
    for name in live.keys():  # noqa: SIM118
        expected = live.get_tensor(name)
        assert (expected - cached.get_tensor(name)).norm() < 0.03 * expected.norm().clamp(min=0.01), name  # states are kept in 16 bits
    exact = ["--cache-encoder-states", "--storage", "model", "--out", str(tmp_path / "exact")]
    assert main(["train", str(recipe), *flags, *exact]) == 0
    exact_weights = safe_open(tmp_path / "exact" / "adapter_model.safetensors", "pt")
    for name in live.keys():  # noqa: SIM118
        expected = live.get_tensor(name)
        assert (expected - exact_weights.get_tensor(name)).norm() < 1e-4 * expected.norm().clamp(min=0.01), name
    said = record(tmp_path / "exact")["training"]
    assert (said["storage"], said["crop_states"]) == ("model", False)
    assert "storage" not in record(tmp_path / "live")["training"]
    assert not (tmp_path / "cached" / "checkpoints").exists()


def test_a_cache_of_states_is_refused_for_an_adapter_in_the_encoder(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", str(recipe), "--no-augment", "--cache-encoder-states"]) == 2
    assert "touches the encoder" in capsys.readouterr().err
    assert not (tmp_path / "adapter" / "language_adapter.json").exists()


def test_several_sources_are_mixed_by_their_weights(recipe: Path, tmp_path: Path) -> None:
    other = write_folder(tmp_path / "other", 6)
    flags = ["--data", str(tmp_path / "clips"), str(other / "metadata.csv"), "--weights", "1", "3"]
    assert main(["train", str(recipe), *flags, "--max-steps", "1"]) == 0
    assert record(tmp_path / "adapter")["train_data"] == "25% clips/train + 75% other/metadata"


def test_a_stream_trains_as_many_steps_as_it_is_told(recipe: Path, tmp_path: Path) -> None:
    assert main(["train", str(recipe), "--stream", "--shuffle-buffer", "4"]) == 0
    assert record(tmp_path / "adapter")["training"]["clips_read"] >= 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--weights", "1", "2"], "1 sources in data and 2 weights"),
        (["--shuffle-buffer", "3"], "shuffle_buffer is for a stream"),
        (["--log-to", "wandb"], "pip install wandb"),
        (["--start", "warm"], "sources"),
        (["--method", "lora", "--sparsity", "0.1"], "sparsity is S2-LoRA's"),
        (["--peft-config", "x", "--rank", "3"], "leave out rank"),
        (["--language", "Klingonese"], "no language known"),
        (["--data", "gone"], "nothing at gone"),
    ],
)
def test_a_request_that_makes_no_sense_ends_with_2_before_anything_is_written(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    if "wandb" in flags:
        import importlib.util

        if importlib.util.find_spec("wandb"):
            pytest.skip("wandb is installed")
    assert main(["train", str(recipe), *flags]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("whisper-moe: ")
    assert words in err
    assert not (tmp_path / "adapter").exists()


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--language", "cy"]) == 2
    assert "data is missing: give --data" in capsys.readouterr().err


def test_b_of_a_lora_learns_faster_by_the_multiplier(tiny_model: Any) -> None:
    import copy

    import torch
    from peft import LoraConfig, get_peft_model

    from peft_s2lora import S2LoraConfig

    asked = Train(lr_multiplier=16.0, weight_decay=0.1)
    adapted = get_peft_model(copy.deepcopy(tiny_model), LoraConfig(r=2, target_modules=["q_proj"]))
    rates = {id(weight): group["lr"] for group in asked._parameter_groups(adapted, 1e-3) for weight in group["params"]}
    trained = {name: rates.pop(id(weight)) for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert not rates
    assert {rate for name, rate in trained.items() if "lora_B" in name} == {16e-3}
    assert {rate for name, rate in trained.items() if "lora_A" in name} == {1e-3}
    sparse = get_peft_model(copy.deepcopy(tiny_model), S2LoraConfig(r=2, target_modules=["q_proj"], coefficient_lr_multiplier=4.0))
    groups = Train()._parameter_groups(sparse, 1e-3)
    assert sorted(group["lr"] for group in groups) == [1e-3, 4e-3]
    groups = asked._parameter_groups(sparse, 1e-3)
    assert sorted(group["lr"] for group in groups) == [1e-3, 16e-3]
    assert asked._peft_config() is not None
    assert Train(lr_multiplier=7.0)._peft_config().coefficient_lr_multiplier == 7.0
    plain = Train()._parameter_groups(adapted, 1e-3)
    assert sum(weight.numel() for weight in plain[0]["params"]) == sum(w.numel() for w in adapted.parameters() if w.requires_grad)
    assert torch.is_tensor(plain[0]["params"][0])


def make_pool(model: Any, folder: Path) -> Path:
    """An S2-LoRA with A and B of its own, shared by module type."""
    import copy

    import torch
    from peft import get_peft_model

    from peft_s2lora import S2LoraConfig

    torch.manual_seed(3)
    config = S2LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], share_scope="module_type", init_weights=False)
    get_peft_model(copy.deepcopy(model), config, "shelf").save_pretrained(str(folder), save_embedding_layers=False)
    return folder / "shelf"


def test_a_pool_is_trained_over_without_more_words(recipe: Path, tiny_model: Any, tmp_path: Path) -> None:
    import hashlib

    pool = make_pool(tiny_model, tmp_path)
    text = recipe.read_text().replace("rank: 4\n", "")
    recipe.write_text(text)
    assert main(["train", str(recipe), "--pool", str(pool)]) == 0
    out = tmp_path / "adapter"
    tensors = safe_open(out / "adapter_model.safetensors", "pt")
    assert {name.rpartition(".")[2] for name in tensors.keys()} == {"s2lora_coefficients"}  # noqa: SIM118
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["pool"], config["r"], config["share_scope"]) == ("shelf", 4, "module_type")
    digest = hashlib.sha256((pool / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert record(out)["start"]["pool_sha256"] == digest
    fewer = ["--pool", str(pool), "--part", "decoder", "--target-modules", "q_proj", "--out", str(tmp_path / "fewer")]
    assert main(["train", str(recipe), *fewer]) == 0
    names = list(safe_open(tmp_path / "fewer" / "adapter_model.safetensors", "pt").keys())
    assert len(names) == 2 * tiny_model.config.decoder_layers
    assert all("decoder.layers" in name and "q_proj" in name for name in names)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rank", "4"], "rank are the pool's"),
        (["--alpha", "4"], "alpha are the pool's"),
        (["--method", "lora"], "leave out the pool"),
        (["--target-modules", "out_proj"], "adapts no weight"),
        (["--start", "auto"], "A pool was given"),
    ],
)
def test_what_is_not_the_adapters_to_say_over_a_pool_is_refused(
    recipe: Path, tiny_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    recipe.write_text(recipe.read_text().replace("rank: 4\n", ""))
    assert main(["train", str(recipe), "--pool", str(make_pool(tiny_model, tmp_path)), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "adapter" / "language_adapter.json").exists()


def test_coefficients_of_a_warm_start_learn_faster_by_the_multiplier(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["train", str(recipe), "--out", str(tmp_path / "source")]) == 0
    rates: list[list[float]] = []
    groups = Train._parameter_groups

    def note(asked: Train, model: Any, lr: float) -> Any:
        found = groups(asked, model, lr)
        rates.append([group["lr"] / lr for group in found])
        return found

    monkeypatch.setattr(Train, "_parameter_groups", note)
    recipe.write_text(recipe.read_text().replace("rank: 4\n", ""))
    warm = ["--sources", str(tmp_path / "source"), "--start", "warm", "--lr-multiplier", "4"]
    assert main(["train", str(recipe), *warm]) == 0
    assert rates[-1] == [1.0, 4.0]
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["coefficient_lr_multiplier"] == 4.0


def test_b_of_a_new_lora_over_experts_learns_faster_and_the_frozen_ones_not_at_all(tiny_model: Any, tmp_path: Path) -> None:
    import copy

    from peft import LoraConfig, get_peft_model

    from whisper_moe.starts import choose_start

    source = get_peft_model(copy.deepcopy(tiny_model), LoraConfig(r=2, target_modules=["q_proj"]))
    source.save_pretrained(str(tmp_path / "source"), save_embedding_layers=False)
    adapted = choose_start("stacked", [tmp_path / "source"]).attach(copy.deepcopy(tiny_model))
    rates = {id(weight): group["lr"] for group in Train(lr_multiplier=16.0)._parameter_groups(adapted, 1e-3) for weight in group["params"]}
    quick = {name for name, weight in adapted.named_parameters() if rates.get(id(weight)) == 16e-3}
    assert quick == {name for name, weight in adapted.named_parameters() if "loramoe_B.default" in name}
    assert len(rates) == sum(weight.requires_grad for weight in adapted.parameters())


def test_a_multiplier_for_what_has_no_b_is_refused_before_anything_is_measured(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from whisper_moe.trainer import Measure

    monkeypatch.setattr(Measure, "__call__", lambda *_: pytest.fail("the base was measured"))
    (tmp_path / "ia3").mkdir()
    config = {"peft_type": "IA3", "target_modules": ["q_proj", "fc1"], "feedforward_modules": ["fc1"]}
    (tmp_path / "ia3" / "adapter_config.json").write_text(json.dumps(config))
    recipe.write_text(recipe.read_text().replace("rank: 4\n", ""))
    assert main(["train", str(recipe), "--peft-config", str(tmp_path / "ia3"), "--lr-multiplier", "4"]) == 2
    assert "no LoRA whose B could learn faster" in capsys.readouterr().err


def test_every_argument_of_training_can_be_given_to_the_command() -> None:
    import inspect

    from whisper_moe.train import CardNotes, TrainSettings, train_language_adapter

    known = {*(each.name for part in (Train, TrainSettings, CardNotes) for each in fields(part)), "model"}
    code_only = {"base", "settings", "notes", "overrides", "callbacks", "extra_loss", "optimizer_parameter_groups", "render_card"}
    quiet = {"progress", "command"}  # the command shows its progress, and knows how it was called
    asked = {
        *inspect.signature(train_language_adapter).parameters,
        *(each.name for part in (TrainSettings, CardNotes) for each in fields(part)),
    }
    assert asked - code_only - quiet <= known


# ---- the guide ---------------------------------------------------------------------------------------------------------


@pytest.mark.pocket
def test_twenty_clips_become_an_evaluated_adapter_by_the_two_commands_of_the_guide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = GUIDE.read_text("utf-8")
    block = re.search(r"<!-- two commands -->\n```bash\n(.*?)```", text, re.DOTALL)
    assert block is not None
    first, second = block[1].strip().splitlines()
    write_folder(tmp_path / "my_language", 20)
    monkeypatch.chdir(tmp_path)
    quick = ["--max-steps", "1", "--num-workers", "0", "--num-checkpoints", "1", "--batch-size", "2"]
    assert main([*shlex.split(first)[1:], *quick]) == 0
    adapter = LanguageAdapter.load(tmp_path / "adapters" / "cy")
    assert set(adapter.metrics) == {"test_set", "normalizer", "before", "after"}
    assert "## Error rates" in (adapter.path / "README.md").read_text()
    assert main([*shlex.split(second)[1:], "--num-resamples", "100"]) == 0
    assert {path.name for path in (tmp_path / "results").iterdir()} >= {"evaluation.json", "evaluation.md", "evaluation.png"}
    assert "cy" in capsys.readouterr().out
