"""Training on a tiny random Whisper: only the adapter changes, a resumed run ends where an undisturbed one does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise, tone
from safetensors.torch import load_file
from transformers import TrainerCallback

from whisper_moe.data import Clip, Clips

pytest.importorskip("accelerate", reason="training needs the train extra: pip install peft-s2lora[train]")

from peft import LoraConfig, PeftModel

import peft_s2lora
from whisper_moe.train import CardNotes, TrainSettings, train_language_adapter

LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "fc1"])
FEW_STEPS = TrainSettings(max_steps=3, batch_size=2, learning_rate=1e-2, num_checkpoints=1, num_workers=0, precision="fp32")


def make_clips(count: int = 5, name: str = "tones/train") -> Clips:
    def samples(index: int) -> np.ndarray:
        duration_s = 0.4 + 0.2 * (index % 4)
        return ((tone(200 + 90 * index, duration_s) + noise(duration_s, 0.01, index)) * 32767).clip(-32768, 32767).astype(np.int16)

    return Clips([Clip(samples(index), f"word {chr(97 + index)}", "cy") for index in range(count)], name)


def train(base: Any, out: Path, data: Clips | None = None, **options: Any) -> Any:
    options = {"language": "cy", "base_id": "some/base", "settings": FEW_STEPS, "peft_config": LORA, "progress": False} | options
    return train_language_adapter(base, make_clips() if data is None else data, out=out, **options)


def weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def lora() -> dict[str, Any]:
    return {"peft_config": LORA}


def s2lora() -> dict[str, Any]:
    return {
        "peft_config": peft_s2lora.S2LoraConfig(r=4, target_modules=["q_proj", "v_proj", "fc1"], sparsity_weight=0.3),
        "callbacks": [peft_s2lora.S2LoraCallback()],
        "optimizer_parameter_groups": peft_s2lora.s2lora_param_groups,
    }


class Crash(TrainerCallback):
    """Stops a run as a power cut would, as far as files are concerned."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("power cut")


# ---- the base ----------------------------------------------------------------------------------------------------------


def test_training_changes_the_adapter_and_nothing_of_the_base(tiny_model, tiny_processor, tmp_path: Path) -> None:
    tiny_model.proj_out.weight.requires_grad_(False)
    before, names = weights_hash(tiny_model), list(tiny_model.state_dict())
    flags = [weight.requires_grad for weight in tiny_model.parameters()]
    config = tiny_model.config.to_dict()
    adapter = train((tiny_model, tiny_processor), tmp_path)
    assert (weights_hash(tiny_model), list(tiny_model.state_dict())) == (before, names)
    assert [weight.requires_grad for weight in tiny_model.parameters()] == flags
    assert tiny_model.config.to_dict() == config
    assert not tiny_model.training
    assert not hasattr(tiny_model, "peft_config")
    trained = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name for name in trained)
    assert all(tensor.abs().max() > 0 for name, tensor in trained.items() if "lora_B" in name)
    assert adapter.num_parameters == sum(tensor.numel() for tensor in trained.values())


def test_an_error_in_training_leaves_the_base_as_it_was(tiny_model, tiny_processor, tmp_path: Path) -> None:
    before, flags = weights_hash(tiny_model), [weight.requires_grad for weight in tiny_model.parameters()]
    with pytest.raises(RuntimeError, match="power cut"):
        train((tiny_model, tiny_processor), tmp_path, callbacks=[Crash(1)])
    assert weights_hash(tiny_model) == before
    assert [weight.requires_grad for weight in tiny_model.parameters()] == flags
    assert not any("lora" in name for name, _ in tiny_model.named_modules())


def test_biases_that_are_trained_with_the_adapter_are_given_back(tiny_model, tiny_processor, tmp_path: Path) -> None:
    before = weights_hash(tiny_model)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], bias="all")
    adapter = train((tiny_model, tiny_processor), tmp_path / "whole", peft_config=config, eval_data=make_clips(2))
    with pytest.raises(RuntimeError, match="power cut"):
        train((tiny_model, tiny_processor), tmp_path / "cut", peft_config=config, callbacks=[Crash(2)])
    assert weights_hash(tiny_model) == before
    saved = {name: tensor for name, tensor in load_file(tmp_path / "whole" / "adapter_model.safetensors").items() if name.endswith(".bias")}
    own = {f"base_model.model.{name}": weight for name, weight in tiny_model.named_parameters()}
    assert any(not torch.equal(tensor, own[name.replace(".base_layer", "")]) for name, tensor in saved.items()), "they were trained"
    assert adapter.num_parameters > sum(tensor.numel() for tensor in saved.values()) > 0


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_first_weight_that_changes_the_base_is_refused(tiny_model, tiny_processor, tmp_path: Path, init: str) -> None:
    before = weights_hash(tiny_model)
    with pytest.raises(ValueError, match="changes the base weights"):
        train((tiny_model, tiny_processor), tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=init))
    assert weights_hash(tiny_model) == before


def uneven_clips(count: int = 4) -> Clips:
    """Transcripts of very different lengths, each beside sound of another length."""
    clips = make_clips(count)
    return Clips([replace(clip, text="ab " * (1 + 5 * (at % 4))) for at, clip in enumerate(clips.clips)], clips.name)


class Look(TrainerCallback):
    """The gradients of the last optimizer step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        trained = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        self.gradients = {name: weight.grad.clone() for name, weight in trained if weight.grad is not None}


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_a_step_of_two_batches_has_the_gradient_of_one_with_all_their_clips(
    tiny_model, tiny_processor, tmp_path: Path, label_smoothing: float
) -> None:
    def pull(model: PeftModel) -> torch.Tensor:
        return 0.1 * sum(((weight - 1) ** 2).sum() for name, weight in model.named_parameters() if "lora_B" in name)

    found, losses = [], []
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 4)):
        look = Look()
        options = {"max_steps": 1, "augment": False, "extra_loss": pull, "callbacks": [look], "label_smoothing": label_smoothing}
        out = tmp_path / str(batch_size)
        train((tiny_model, tiny_processor), out, uneven_clips(), batch_size=batch_size, gradient_accumulation=accumulation, **options)
        found.append(look.gradients)
        losses.append(json.loads((out / "language_adapter.json").read_text())["training"]["last_loss"])
    for other in found[1:]:
        assert all(torch.allclose(gradient, other[name], rtol=1e-3, atol=1e-6) for name, gradient in found[0].items())
    assert losses == pytest.approx([losses[0]] * 3, abs=2e-4)


def test_a_plan_times_the_very_computation_that_training_does(tiny_model, tiny_processor, tmp_path: Path, monkeypatch: Any) -> None:
    from whisper_moe import train as module

    seen: list[tuple[Any, ...]] = []
    layer = tiny_model.model.decoder.layers[0]

    def note(fc1: Any, inputs: Any, output: torch.Tensor) -> None:
        if fc1.training:
            seen.append((output.dtype, layer.gradient_checkpointing))

    handle = layer.fc1.register_forward_hook(note)
    settings = replace(FEW_STEPS, precision="bf16", gradient_checkpointing=True)
    options = {"language": "cy", "base_id": "a/b", "peft_config": LORA, "settings": settings, "progress": False}
    module.plan_training((tiny_model, tiny_processor), make_clips(), out=tmp_path, **options)
    planned = set(seen)
    seen.clear()
    train_language_adapter((tiny_model, tiny_processor), make_clips(), out=tmp_path, **options)
    handle.remove()
    assert planned == set(seen) == {(torch.bfloat16, True)}
    assert not layer.gradient_checkpointing

    # A clock that only the training steps move: a whole window takes 10 s, a cropped one 2.
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    step = module.AdapterTrainer.training_step

    def slow(trainer: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        now[0] += 10.0 if inputs["input_features"].shape[-1] == 200 else 2.0
        return step(trainer, model, inputs, *rest)

    monkeypatch.setattr(module.AdapterTrainer, "training_step", slow)
    for share, seconds in ((0.0, 10.0), (0.75, 4.0), (1.0, 2.0)):
        cropped = options | {"settings": replace(FEW_STEPS, crop_share=share)}
        plan = module.plan_training((tiny_model, tiny_processor), make_clips(), out=tmp_path, **cropped)
        assert plan.seconds_per_step == pytest.approx(seconds)


def test_a_plan_of_one_of_several_processes_encodes_its_batch_by_itself(
    tiny_model, tiny_processor, tmp_path: Path, monkeypatch: Any
) -> None:
    from whisper_moe import train as module
    from whisper_moe.layouts import decoder_only

    monkeypatch.setattr(module, "in_processes", lambda: (0, 2))  # each has a folder of its own
    config = LoraConfig(r=2, target_modules=decoder_only(tiny_model, ["q_proj"]))
    options = {"augment": False, "cache_encoder_states": True, "storage": "model", "peft_config": config, "settings": FEW_STEPS}
    base = (tiny_model, tiny_processor)
    plan = module.plan_training(base, make_clips(), out=tmp_path, language="cy", base_id="a/b", progress=False, **options)
    assert plan.seconds_per_step > 0


def test_the_loss_falls(tiny_model, tiny_processor, tmp_path: Path) -> None:
    settings = TrainSettings(
        max_steps=40, batch_size=5, learning_rate=2e-2, num_checkpoints=10, num_workers=0, precision="fp32", augment=False, crop_share=0.5
    )
    losses = []

    class Losses(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    train((tiny_model, tiny_processor), tmp_path, settings=settings, callbacks=[Losses()])
    assert losses[-1] < 0.7 * losses[0]


def test_training_without_progress_says_nothing(tiny_model, tiny_processor, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    train((tiny_model, tiny_processor), tmp_path, max_steps=1)
    assert capsys.readouterr().out == ""


# ---- what is written ---------------------------------------------------------------------------------------------------


def test_the_saved_adapter_loads_with_peft_and_names_its_base_in_public(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import WhisperForConditionalGeneration

    evaluated = make_clips(3, "tones/test")
    notes = CardNotes(train_data="Tones of a sine.", license="cc0-1.0", command="make tones", limits="Knows no words.")
    adapter = train(str(tiny_folder), tmp_path, eval_data=evaluated, notes=notes)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/base"
    assert (adapter.name, adapter.language, adapter.base, adapter.carrier) == ("cy", "cy", "some/base", None)
    assert adapter.metrics["test_set"] == "tones/test"
    assert adapter.metrics["before"]["clips"] == adapter.metrics["after"]["clips"] == 3
    card = (tmp_path / "README.md").read_text()
    for said in ("Tones of a sine.", "cc0-1.0", "make tones", "Knows no words.", f"{adapter.metrics['after']['cer']:.1%}"):
        assert said in card
    assert str(tiny_folder) not in "".join(path.read_text() for path in tmp_path.glob("*.[jm]*") if path.suffix != ".safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "language_adapter.json",
    ]
    base = WhisperForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path).state_dict()
    for name, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        assert torch.equal(loaded[name.replace(".weight", ".default.weight")], tensor)


def test_the_scores_are_those_of_the_saved_adapter(tiny_model, tiny_processor, tmp_path: Path) -> None:
    from whisper_moe.evaluate import evaluate_clips

    evaluated = make_clips(3)
    adapter = train((tiny_model, tiny_processor), tmp_path, eval_data=evaluated)
    options = {"prompt_language": "cy", "precision": "fp32"}
    before = evaluate_clips(tiny_model, tiny_processor, evaluated, **options).scores
    after = evaluate_clips(PeftModel.from_pretrained(tiny_model, tmp_path), tiny_processor, evaluated, **options).scores
    assert (adapter.metrics["before"]["cer"], adapter.metrics["after"]["cer"]) == (before.cer, after.cer)


def test_a_local_base_without_a_public_name_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="base_id"):
        train(str(tiny_folder), tmp_path, base_id=None)


# ---- resuming ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "dev_data", "num_workers"), [(lora, make_clips(1), 0), (s2lora, None, 1)])
def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_one(
    tiny_folder: Path, tmp_path: Path, method: Any, dev_data: Clips | None, num_workers: int
) -> None:
    options = {"max_steps": 8, "num_checkpoints": 4, "crop_share": 0.5, "dev_data": dev_data, "num_workers": num_workers} | method()
    train(str(tiny_folder), tmp_path / "undisturbed", **options)
    # Five clips in batches of two: step 5 lies inside the second epoch, and the last checkpoint before it at its beginning.
    with pytest.raises(RuntimeError, match="power cut"):
        train(str(tiny_folder), tmp_path / "resumed", **(options | {"callbacks": [*options.get("callbacks", ()), Crash(5)]}))
    assert not (tmp_path / "resumed" / "language_adapter.json").exists()
    train(str(tiny_folder), tmp_path / "resumed", resume=True, **options)
    names = ("adapter_model.safetensors", "adapter_config.json")
    for name in names:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_a_checkpoint_cut_off_while_it_was_written_is_passed_over(tiny_folder: Path, tmp_path: Path) -> None:
    options = {"max_steps": 4, "num_checkpoints": 4}
    train(str(tiny_folder), tmp_path / "undisturbed", **options)
    with pytest.raises(RuntimeError, match="power cut"):
        train(str(tiny_folder), tmp_path / "resumed", callbacks=[Crash(4)], **options)
    (tmp_path / "resumed" / "checkpoints" / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3, "log_')
    train(str(tiny_folder), tmp_path / "resumed", resume=True, **options)
    weights = [(tmp_path / run / "adapter_model.safetensors").read_bytes() for run in ("undisturbed", "resumed")]
    assert weights[0] == weights[1]


def test_an_unfinished_run_is_not_overwritten_by_accident(tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="power cut"):
        train(str(tiny_folder), tmp_path, callbacks=[Crash(2)], max_steps=2, num_checkpoints=2)
    with pytest.raises(ValueError, match="resume=True"):
        train(str(tiny_folder), tmp_path)


# ---- what training is told ---------------------------------------------------------------------------------------------


def test_a_language_without_a_token_is_carried_by_the_one_heard_most(tiny_model, tiny_processor, tmp_path: Path) -> None:
    from whisper_moe.data import extract_features
    from whisper_moe.languages import language_posterior

    clips = make_clips()
    posteriors = language_posterior(tiny_model, extract_features(tiny_processor, [clips[index]["audio"] for index in range(5)]))
    means = {code: np.mean([p.probabilities[code] for p in posteriors]) for code in posteriors[0].probabilities}
    adapter = train((tiny_model, tiny_processor), tmp_path, clips, language="qug")
    assert (adapter.language, adapter.carrier) == ("qug", max(means, key=means.__getitem__))
    assert json.loads((tmp_path / "language_adapter.json").read_text())["training"]["carrier_chosen"].startswith("heard")


def test_a_named_carrier_is_used_and_an_impossible_one_refused(tiny_model, tiny_processor, tmp_path: Path) -> None:
    adapter = train((tiny_model, tiny_processor), tmp_path, language="qug", carrier="Spanish")
    assert (adapter.carrier, adapter.prompt_language) == ("es", "es")
    with pytest.raises(ValueError, match="no token"):
        train((tiny_model, tiny_processor), tmp_path, language="qug", carrier="chr")


def test_a_warm_start_begins_with_the_weights_of_its_source(tiny_model, tiny_processor, tmp_path: Path) -> None:
    train((tiny_model, tiny_processor), tmp_path / "source")
    options = {"peft_config": None, "start": "warm", "sources": [tmp_path / "source"], "max_steps": 1, "learning_rate": 1e-12}
    train((tiny_model, tiny_processor), tmp_path / "next", **options)
    source, following = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("source", "next"))
    assert source.keys() == following.keys()
    assert all(torch.allclose(source[name], following[name], atol=1e-6) for name in source)
    record = json.loads((tmp_path / "next" / "language_adapter.json").read_text())["start"]
    digest = hashlib.sha256((tmp_path / "source" / "adapter_model.safetensors").read_bytes()).hexdigest()
    assert (record["kind"], record["sources"][0]["sha256"]) == ("warm", digest)
    wider = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj", "fc1"])
    with pytest.raises(ValueError, match="rank and targets"):
        train((tiny_model, tiny_processor), tmp_path / "wider", **(options | {"peft_config": wider}))
    with pytest.raises(ValueError, match="cold start begins from nothing"):
        train((tiny_model, tiny_processor), tmp_path / "cold", sources=[tmp_path / "source"])
    assert not any("lora" in name for name, _ in tiny_model.named_modules())


@pytest.mark.parametrize("kind", ["stacked", "moe"])
def test_a_start_over_a_frozen_source_is_measured_as_it_is_saved(tiny_model, tiny_processor, tmp_path: Path, kind: str) -> None:
    from whisper_moe.evaluate import evaluate_clips

    train((tiny_model, tiny_processor), tmp_path / "source", name="source")
    before = weights_hash(tiny_model)
    options = {"peft_config": LORA, "start": kind, "sources": [tmp_path / "source"], "eval_data": make_clips(3), "crop_share": 0.5}
    adapter = train((tiny_model, tiny_processor), tmp_path / "next", **options)
    assert weights_hash(tiny_model) == before
    assert adapter.peft_type == {"stacked": "LORA", "moe": "LORAMOE"}[kind]
    loaded = PeftModel.from_pretrained(tiny_model, tmp_path / "next")
    scores = evaluate_clips(loaded, tiny_processor, make_clips(3), prompt_language="cy", precision="fp32").scores
    assert adapter.metrics["after"]["cer"] == pytest.approx(scores.cer)


def test_a_method_may_bring_its_parameter_groups_and_a_penalty(tiny_model, tiny_processor, tmp_path: Path) -> None:
    def groups(model: PeftModel, learning_rate: float) -> list[dict[str, Any]]:
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        return [
            {"params": [weight for name, weight in named if "lora_A" in name], "lr": 0.0},
            {"params": [weight for name, weight in named if "lora_B" in name], "lr": learning_rate},
        ]

    def pull_to_one(model: PeftModel) -> torch.Tensor:
        return 1e4 * sum(((weight - 1) ** 2).sum() for name, weight in model.named_parameters() if "lora_B" in name)

    torch.manual_seed(0)
    options = {"extra_loss": pull_to_one, "settings": FEW_STEPS, "max_steps": 30, "learning_rate": 0.1}
    train((tiny_model, tiny_processor), tmp_path / "pulled", optimizer_parameter_groups=groups, **options)
    train((tiny_model, tiny_processor), tmp_path / "one_step", optimizer_parameter_groups=groups, max_steps=1)
    pulled, one_step = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("pulled", "one_step"))
    assert all((tensor - 1).abs().max() < 0.5 for name, tensor in pulled.items() if "lora_B" in name)
    assert all(torch.equal(tensor, one_step[name]) for name, tensor in pulled.items() if "lora_A" in name)


def test_gradient_checkpointing_makes_the_same_adapter_and_is_switched_off_again(tiny_model, tiny_processor, tmp_path: Path) -> None:
    options = {"crop_share": 0.5, "augment": False}
    train((tiny_model, tiny_processor), tmp_path / "kept", **options)
    train((tiny_model, tiny_processor), tmp_path / "recomputed", gradient_checkpointing=True, **options)
    kept, recomputed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("kept", "recomputed"))
    assert all(torch.allclose(kept[name], recomputed[name], atol=1e-5) for name in kept)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in tiny_model.modules())


def test_the_error_rate_that_was_named_decides_what_is_kept(tiny_model, tiny_processor, tmp_path: Path) -> None:
    logged: list[dict[str, float]] = []

    class Rates(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
            logged.append(metrics)

    options = {"dev_data": make_clips(3), "max_steps": 6, "num_checkpoints": 3, "learning_rate": 0.1, "callbacks": [Rates()]}
    for metric in ("wer", "cer"):
        logged.clear()
        train((tiny_model, tiny_processor), tmp_path / metric, best_metric=metric, **options)
        training = json.loads((tmp_path / metric / "language_adapter.json").read_text())["training"]
        rates = [entry[f"eval_{metric}"] for entry in logged]
        assert len(rates) == 3
        assert (training["kept_step"], training[f"dev_{metric}"]) == (2 * (1 + rates.index(min(rates))), min(rates))


def test_a_card_is_rendered_from_the_folder_if_a_renderer_is_given(tiny_model, tiny_processor, tmp_path: Path) -> None:
    def render(folder: Path) -> str:
        return f"card of {json.loads((folder / 'language_adapter.json').read_text())['name']}"

    train((tiny_model, tiny_processor), tmp_path, render_card=render, max_steps=1)
    assert (tmp_path / "README.md").read_text() == "card of cy"


def test_a_card_is_asked_for_once_and_after_measuring(tiny_model, tiny_processor, tmp_path: Path) -> None:
    known = []

    def render(folder: Path) -> str:
        known.append(set(json.loads((folder / "language_adapter.json").read_text())["metrics"]))
        return "card"

    train((tiny_model, tiny_processor), tmp_path, render_card=render, max_steps=1, eval_data=make_clips(2))
    assert len(known) == 1
    assert {"before", "after"} <= known[0]


def test_clips_that_do_not_fit_are_counted_in_the_adapters_record(tiny_model, tiny_processor, tmp_path: Path) -> None:
    long = Clip((tone(300, 3.0) * 32767).astype(np.int16), "too long", "cy")
    clips = Clips([*make_clips(3).clips, long, Clip(make_clips(1).clips[0].samples, "x" * 80, "cy")])
    train((tiny_model, tiny_processor), tmp_path, clips)
    recorded = json.loads((tmp_path / "language_adapter.json").read_text())["training"]
    assert recorded["clips"] == 3
    assert recorded["left_out"] == "1 longer than the window of 2 s, 1 longer than 64 tokens"


def test_nothing_to_train_on_is_an_error_that_says_why(tiny_model, tiny_processor, tmp_path: Path) -> None:
    clips = Clips([Clip((tone(300, 3.0) * 32767).astype(np.int16), "too long", "cy")])
    with pytest.raises(ValueError, match="longer than the window"):
        train((tiny_model, tiny_processor), tmp_path, clips)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_epoch": 3}, "did you mean 'num_epochs'"),
        ({"start": "lukewarm"}, "cold, warm, stacked, moe"),
        ({"patience": 2}, "Pass dev_data"),
        ({"name": "../qug"}, "cannot be an adapter's name"),
        ({"language": "Klingonese"}, "no language known"),
        ({"peft_config": LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_2_SEQ_LM")}, "leave it out"),
    ],
)
def test_impossible_requests_are_refused(tiny_model, tiny_processor, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        train((tiny_model, tiny_processor), tmp_path, **options)


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("learning_rate", -1.0), ("crop_share", 1.5), ("max_steps", 0), ("precision", "fp8")]
)
def test_impossible_settings_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=str(value)):
        TrainSettings(**{name: value})
