"""Encoder states kept on disk: training on them is training with the encoder, and nothing stale, damaged or half written is ever read."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise, tone
from peft import LoraConfig, get_peft_model
from transformers import WhisperFeatureExtractor, WhisperProcessor

from whisper_moe import encoder_states
from whisper_moe.cropped_encoder import encode_cropped
from whisper_moe.data import Clip, Clips, Collator, extract_features
from whisper_moe.encoder_states import (
    StatesCollator,
    StatesView,
    cache_encoder_states,
    check_leaves_encoder_alone,
    plan_states,
)
from whisper_moe.layouts import decoder_only

POSITIONS, WIDTH = 100, 16  # of the tiny model: a window of two seconds


def make_clips(count: int = 5, name: str = "tones/train") -> Clips:
    def samples(index: int) -> np.ndarray:
        duration_s = 0.4 + 0.1 * (index % 4)
        return ((tone(200 + 90 * index, duration_s) + noise(duration_s, 0.01, index)) * 32767).clip(-32768, 32767).astype(np.int16)

    return Clips([Clip(samples(index), f"word {chr(97 + index)}", "cy") for index in range(count)], name)


def cache(model: Any, processor: Any, folder: Path, clips: Clips | None = None, **options: Any) -> Any:
    options = {"precision": "fp32", "storage": "model", "batch_size": 2} | options
    return cache_encoder_states(model, processor, make_clips() if clips is None else clips, folder, **options)


def decoder_lora(model: Any, **options: Any) -> Any:
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=decoder_only(model, ["q_proj", "v_proj", "fc1"]), **options))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.3)
    return adapted


def count_encoded(model: Any) -> list[int]:
    """The size of every batch that the encoder is given from now on."""
    sizes: list[int] = []
    model.get_encoder().register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    return sizes


# ---- the truth: the encoder itself --------------------------------------------------------------------------------------


def test_training_on_cached_states_is_training_with_the_encoder(tiny_model, tiny_processor, tmp_path: Path) -> None:
    clips, model = make_clips(), tiny_model.double()
    live, cached = decoder_lora(copy.deepcopy(model)).train(), decoder_lora(copy.deepcopy(model)).train()
    view = StatesView(clips, cache(cached, tiny_processor, tmp_path, clips))
    collators = Collator(tiny_processor, "cy", augment=False), StatesCollator(tiny_processor, "cy")
    optimizers = [torch.optim.AdamW([w for w in each.parameters() if w.requires_grad], lr=1e-2) for each in (live, cached)]
    for rows in ([0, 3], [4, 1], [2, 2]):
        batch = collators[0]([clips[row] | {"key": (0, row)} for row in rows])
        states = collators[1]([view[0, row] for row in rows])
        assert torch.equal(batch["labels"], states["labels"])
        losses = [
            live(input_features=batch["input_features"].double(), labels=batch["labels"]).loss,
            cached(encoder_outputs=(states["encoder_states"],), labels=states["labels"]).loss,
        ]
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
        gradients = [
            torch.autograd.grad(loss, optimizer.param_groups[0]["params"]) for loss, optimizer in zip(losses, optimizers, strict=True)
        ]
        assert max(float(gradient.abs().max()) for gradient in gradients[0]) > 1e-4
        for expected, found, weights in zip(*gradients, zip(*(o.param_groups[0]["params"] for o in optimizers), strict=True), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
            weights[0].grad, weights[1].grad = expected, found
        for optimizer in optimizers:
            optimizer.step()
    for (name, expected), (_, found) in zip(live.named_parameters(), cached.named_parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10, msg=name)


def test_half_precision_takes_half_the_room_and_is_the_same_to_three_digits(tiny_model, tiny_processor, tmp_path: Path) -> None:
    exact, half = (cache(tiny_model, tiny_processor, tmp_path, storage=storage) for storage in ("model", "float16"))
    assert half.plan.num_bytes * 2 == exact.plan.num_bytes == 5 * POSITIONS * WIDTH * 4
    for index in range(5):
        assert half[index].dtype == torch.float16
        torch.testing.assert_close(half[index].float(), exact[index], rtol=1e-3, atol=1e-3)


def test_a_cropped_window_ends_behind_the_longest_clip(tiny_model, tiny_processor, tmp_path: Path) -> None:
    clips = make_clips()
    states = cache(tiny_model, tiny_processor, tmp_path, clips, crop=True)
    assert states.plan.positions == 60  # 0.7 s and half a second of silence, at 20 ms
    features = extract_features(tiny_processor, [clips[3]["audio"]], int(1.2 * 16_000))
    with torch.no_grad():
        torch.testing.assert_close(states[3], encode_cropped(tiny_model, features)[0], rtol=1e-4, atol=1e-5)


def test_an_adapter_that_is_at_work_and_the_training_mode_leave_no_trace(tiny_model, tiny_processor, tmp_path: Path) -> None:
    expected = cache(copy.deepcopy(tiny_model), tiny_processor, tmp_path / "bare")
    adapted = decoder_lora(tiny_model).train()
    found = cache(adapted, tiny_processor, tmp_path / "adapted")
    assert adapted.training
    assert [file.name for file in found.plan.files] == [file.name for file in expected.plan.files]
    assert all(torch.equal(found[index], expected[index]) for index in range(5))
    assert not adapted.base_model.model.model.decoder.layers[0].fc1.disable_adapters


# ---- never stale -------------------------------------------------------------------------------------------------------


def other_weights(model: Any, processor: Any) -> tuple[Any, Any, Clips, dict[str, Any]]:
    with torch.no_grad():
        model.get_encoder().layers[1].fc2.bias[3] += 1e-6
    return model, processor, make_clips(), {}


def other_features(model: Any, processor: Any) -> tuple[Any, Any, Clips, dict[str, Any]]:
    extractor = WhisperFeatureExtractor(chunk_length=2, sampling_rate=16_000, n_fft=512)
    return model, WhisperProcessor(extractor, processor.tokenizer), make_clips(), {}


def other_sound(model: Any, processor: Any) -> tuple[Any, Any, Clips, dict[str, Any]]:
    changed = [Clip(clip.samples + np.int16(1), clip.text, clip.language) for clip in make_clips().clips]
    return model, processor, Clips(changed), {}


def other_precision(model: Any, processor: Any) -> tuple[Any, Any, Clips, dict[str, Any]]:
    return model, processor, make_clips(), {"precision": "bf16"}


def other_window(model: Any, processor: Any) -> tuple[Any, Any, Clips, dict[str, Any]]:
    return model, processor, make_clips(), {"crop": True}


@pytest.mark.parametrize("change", [other_weights, other_features, other_sound, other_precision, other_window])
def test_states_of_something_else_are_not_used(tiny_model, tiny_processor, tmp_path: Path, change: Any) -> None:
    cache(tiny_model, tiny_processor, tmp_path)
    options = {"precision": "fp32", "storage": "model"}
    assert plan_states(tiny_model, tiny_processor, make_clips(), tmp_path, **options).missing == ()
    model, processor, clips, changed = change(tiny_model, tiny_processor)
    assert len(plan_states(model, processor, clips, tmp_path, **{**options, **changed}).missing) == 5


def test_texts_may_change_and_equal_clips_are_encoded_once(tiny_model, tiny_processor, tmp_path: Path) -> None:
    cache(tiny_model, tiny_processor, tmp_path)
    sizes = count_encoded(tiny_model)
    corrected = Clips([Clip(clip.samples, "corrected", "cy") for clip in make_clips().clips] * 2)
    assert len(cache(tiny_model, tiny_processor, tmp_path, corrected)) == 10
    assert sizes == []


# ---- whole or not at all -------------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_where_it_was(tiny_model, tiny_processor, tmp_path: Path) -> None:
    batches: list[int] = []

    def stop_at_the_second(*_: Any) -> None:
        batches.append(1)
        if len(batches) == 2:
            raise KeyboardInterrupt

    hook = tiny_model.get_encoder().register_forward_pre_hook(stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        cache(tiny_model, tiny_processor, tmp_path)
    hook.remove()
    sizes = count_encoded(tiny_model)
    states = cache(tiny_model, tiny_processor, tmp_path)
    assert sum(sizes) == 3  # two were there
    assert states[4].shape == (POSITIONS, WIDTH)


def test_the_parts_of_several_processes_are_the_whole(tiny_model, tiny_processor, tmp_path: Path) -> None:
    sizes = count_encoded(tiny_model)
    first = cache(tiny_model, tiny_processor, tmp_path, part=(0, 2))
    with pytest.raises(ValueError, match="clip 1 are not in the cache"):
        first[1]
    cache(tiny_model, tiny_processor, tmp_path, part=(1, 2))  # which finds that the other is ready
    assert sum(sizes) == 5
    assert all(first[index].shape == (POSITIONS, WIDTH) for index in range(5))


def test_two_writers_of_one_folder_do_not_disturb_each_other(tiny_model, tiny_processor, tmp_path: Path) -> None:
    expected = cache(tiny_model, tiny_processor, tmp_path / "alone")
    models, outcomes = [copy.deepcopy(tiny_model) for _ in range(2)], {}
    begin = threading.Barrier(2)

    def work(number: int) -> None:
        begin.wait()
        outcomes[number] = cache(models[number], tiny_processor, tmp_path / "both", batch_size=1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == [0, 1]
    assert not list((tmp_path / "both").rglob("*.part"))
    for states in outcomes.values():
        for index in range(5):
            torch.testing.assert_close(states[index], expected[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_file_is_told_deleted_and_made_again(tiny_model, tiny_processor, tmp_path: Path, damage: str) -> None:
    states = cache(tiny_model, tiny_processor, tmp_path)
    before, file = states[2].clone(), states.plan.files[2]  # what is read is the file, mapped into memory
    content = bytearray(file.read_bytes())
    content[-5] ^= 0xFF
    file.write_bytes(content[:-9] if damage == "cut" else content)
    with pytest.raises(ValueError, match=r"clip 2 .*deleted.*Start again"):
        states[2]
    assert not file.exists()
    torch.testing.assert_close(cache(tiny_model, tiny_processor, tmp_path)[2], before, rtol=1e-4, atol=1e-5)


def test_a_disk_that_is_full_is_told_and_what_was_written_stays(tiny_model, tiny_processor, tmp_path: Path, monkeypatch) -> None:
    write, written = Path.write_bytes, []

    def full_after_three(path: Path, content: bytes) -> int:
        if path.suffix == ".part" and "safetensors" in path.name:
            if len(written) == 3:
                write(path, content[:10])
                raise OSError(28, "No space left on device")
            written.append(path)
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full_after_three)
    with pytest.raises(OSError, match=r"No space left.*what is there stays"):
        cache(tiny_model, tiny_processor, tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.part"))
    assert len(plan_states(tiny_model, tiny_processor, make_clips(), tmp_path, precision="fp32", storage="model").missing) == 2


# ---- the size, before ----------------------------------------------------------------------------------------------------


def test_the_plan_says_the_size_before_and_it_is_what_the_disk_then_holds(tiny_model, tiny_processor, tmp_path: Path) -> None:
    plan = plan_states(tiny_model, tiny_processor, make_clips(), tmp_path, precision="fp32")
    assert "100 positions x 16 x 2 bytes x 5 clips = 0.0 MB" in str(plan)
    assert not list(tmp_path.iterdir())
    cache(tiny_model, tiny_processor, tmp_path, storage="float16")
    held = sum(file.stat().st_size for file in tmp_path.rglob("*.safetensors"))
    assert plan.num_bytes <= held <= plan.num_bytes + 5 * 300


def test_a_limit_or_a_small_disk_is_respected_before_anything_is_computed(tiny_model, tiny_processor, tmp_path: Path, monkeypatch) -> None:
    sizes = count_encoded(tiny_model)
    with pytest.raises(ValueError, match=r"may hold 0.0 MB.*crop=True"):
        cache(tiny_model, tiny_processor, tmp_path, max_bytes=20_000)
    monkeypatch.setattr(encoder_states.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 31_999}))
    with pytest.raises(ValueError, match=r"the disk has 0\.0 MB left"):
        cache(tiny_model, tiny_processor, tmp_path / "not" / "there")
    assert sizes == []
    monkeypatch.setattr(encoder_states.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 32_000}))
    cache(tiny_model, tiny_processor, tmp_path, max_bytes=40_000)


# ---- refused -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj"], r".*encoder\.layers\.1\.fc1", "all-linear"])
def test_an_adapter_that_touches_the_encoder_is_refused(tiny_model, tiny_processor, tmp_path: Path, targets: Any) -> None:
    adapted = get_peft_model(tiny_model, LoraConfig(r=2, target_modules=targets))
    with pytest.raises(ValueError, match="touches the encoder"):
        cache(adapted, tiny_processor, tmp_path)


def test_a_module_of_the_encoder_that_is_trained_whole_is_refused(tiny_model) -> None:
    check_leaves_encoder_alone(decoder_lora(copy.deepcopy(tiny_model), modules_to_save=["proj_out"]))
    with pytest.raises(ValueError, match="touches the encoder"):
        check_leaves_encoder_alone(decoder_lora(tiny_model, modules_to_save=["conv1"]))


def test_an_encoder_that_is_not_the_same_twice_is_refused(tiny_model, tiny_processor, tmp_path: Path) -> None:
    tiny_model.config.dropout = 0.1
    with pytest.raises(ValueError, match=r"dropout=0\.1"):
        cache(tiny_model, tiny_processor, tmp_path)


def test_augmentation_is_refused(tiny_processor) -> None:
    with pytest.raises(ValueError, match="augment to false"):
        StatesCollator(tiny_processor, "cy", augment=True)


def test_a_clip_longer_than_the_window_is_refused(tiny_model, tiny_processor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"3.0 s does not fit in the window of 2 s"):
        cache(tiny_model, tiny_processor, tmp_path, Clips([Clip(np.zeros(48_000, np.int16), "a")]))


def test_a_state_too_large_for_half_precision_is_refused(tiny_model, tiny_processor, tmp_path: Path) -> None:
    with torch.no_grad():
        tiny_model.get_encoder().layer_norm.weight.fill_(1e6)
    with pytest.raises(ValueError, match="storage='model'"):
        cache(tiny_model, tiny_processor, tmp_path, storage="float16")
    cache(tiny_model, tiny_processor, tmp_path, storage="model")


def test_states_of_other_clips_are_refused(tiny_model, tiny_processor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="5 clips and the states of 4"):
        StatesView(make_clips(), cache(tiny_model, tiny_processor, tmp_path, make_clips(4)))
