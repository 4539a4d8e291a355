"""Training on streams and mixtures: bad clips are counted and passed over, and a resumed run reads what the undisturbed one would have."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import soundfile
from conftest import tone
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="training needs the train extra: pip install peft-s2lora[train]")

from test_train import Crash, make_clips, train

from whisper_moe.data import ClipStream, EndlessStream, Filters, StreamMixture, stream_clips

STEPS: dict[str, Any] = {"max_steps": 7, "num_checkpoints": 4, "batch_size": 2, "crop_share": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six good clips among one that is no sound, one without a transcript, one too long for the window and one for the decoder."""
    folder = tmp_path_factory.mktemp("clips")
    lines = ["file_name,text"]
    for index, clip in enumerate(make_clips(6).clips):
        soundfile.write(folder / f"{index}.wav", clip.samples, 16_000)
        lines.append(f"{index}.wav,{clip.text}")
    (folder / "torn.wav").write_bytes((folder / "0.wav").read_bytes()[:30])
    soundfile.write(folder / "long.wav", tone(300, 3.0), 16_000)
    lines[3:3] = ["torn.wav,torn", "1.wav,  ", "long.wav,too long", f"2.wav,{'x' * 80}"]
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    return folder


def stream(folder: Path, **options: Any) -> ClipStream:
    return stream_clips(folder / "train.csv", filters=Filters("cy"), shuffle_buffer=3, **options)


def left_out(out: Path) -> dict[str, int]:
    said = json.loads((out / "language_adapter.json").read_text())["training"]["left_out"]
    return {words.split(" ", 1)[1]: int(words.split(" ", 1)[0]) for words in said.split(", ")}


@pytest.mark.filterwarnings("ignore:.*passed over")
def test_bad_clips_in_a_stream_are_counted_and_the_run_goes_on(tiny_model, tiny_processor, folder: Path, tmp_path: Path) -> None:
    adapter = train((tiny_model, tiny_processor), tmp_path, stream(folder), eval_data=make_clips(2), **(STEPS | {"max_steps": 3}))
    training = json.loads((tmp_path / "language_adapter.json").read_text())["training"]
    assert training["steps"] == 3
    assert training["clips_read"] >= 6
    reasons = ("not decodable", "without a transcript", "longer than the window of 2 s", "longer than 64 tokens")
    assert left_out(tmp_path) == dict.fromkeys(reasons, left_out(tmp_path)["not decodable"])
    assert "num_epochs" not in training
    assert adapter.metrics["after"]["clips"] == 2


@pytest.mark.filterwarnings("ignore:.*passed over")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_over_streams_ends_with_the_weights_of_an_undisturbed_one(
    tiny_folder: Path, folder: Path, tmp_path: Path, num_workers: int
) -> None:
    def mixture() -> Any:
        return StreamMixture([stream(folder), stream(folder, seed=5)], [3, 1])

    options = STEPS | {"num_workers": num_workers}
    train(str(tiny_folder), tmp_path / "undisturbed", mixture(), **options)
    with pytest.raises(RuntimeError, match="power cut"):  # in the second pass or later
        train(str(tiny_folder), tmp_path / "resumed", mixture(), callbacks=[Crash(5)], **options)
    train(str(tiny_folder), tmp_path / "resumed", mixture(), resume=True, **options)
    weights = [load_file(tmp_path / run / "adapter_model.safetensors") for run in ("undisturbed", "resumed")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])


@pytest.mark.filterwarnings("ignore:.*passed over")
def test_two_processes_read_every_clip_of_a_pass_once_between_them(folder: Path) -> None:
    whole = sorted(item["text"] for item in stream(folder))
    parts = []
    for process in (0, 1):
        part = stream(folder)
        part.share_of(process, 2)
        parts.append([item["text"] for item in part])
    assert sorted(parts[0] + parts[1]) == whole
    assert len(parts[0]) > 1 < len(parts[1])


@pytest.mark.filterwarnings("ignore:.*passed over")
def test_every_pass_of_an_endless_stream_has_its_own_order_and_draws(folder: Path) -> None:
    good = len(list(stream(folder)))
    items = list(islice(EndlessStream(stream(folder)), 2 * good))
    passes = [items[:good], items[good:]]
    assert sorted(item["text"] for item in passes[0]) == sorted(item["text"] for item in passes[1])
    assert [item["text"] for item in passes[0]] != [item["text"] for item in passes[1]]
    assert not {item["key"] for item in passes[0]} & {item["key"] for item in passes[1]}
    assert [item["key"] for item in islice(EndlessStream(stream(folder)), 2 * good)] == [item["key"] for item in items]


@pytest.mark.filterwarnings("ignore:.*passed over")
def test_a_stream_says_what_it_needs_and_what_is_wrong_with_it(tiny_model, tiny_processor, folder: Path, tmp_path: Path) -> None:
    base = (tiny_model, tiny_processor)
    with pytest.raises(ValueError, match="max_steps=1000"):
        train(base, tmp_path / "a", stream(folder), max_steps=None)
    with pytest.raises(ValueError, match="eval_data is a stream"):
        train(base, tmp_path / "b", eval_data=stream(folder))
    with pytest.raises(ValueError, match="more than once"):
        train(base, tmp_path / "c", stream(folder), augment=False, cache_encoder_states=True)
    only_bad = folder / "bad.csv"
    only_bad.write_text("file_name,text\ntorn.wav,torn\n1.wav,  \n")
    with pytest.raises(ValueError, match="1 not decodable"):
        train(base, tmp_path / "d", stream_clips(only_bad, filters=Filters("cy")))
    assert not any("lora" in name for name, _ in tiny_model.named_modules())


@pytest.mark.filterwarnings("ignore:.*passed over")
def test_what_was_only_listened_to_is_not_counted_as_read(tiny_model, tiny_processor, folder: Path, tmp_path: Path) -> None:
    train((tiny_model, tiny_processor), tmp_path / "source", max_steps=1, language="fr")
    options = STEPS | {"max_steps": 2, "start": "warm", "sources": [tmp_path / "source"], "peft_config": None}
    for run, options_of_run in (("warm", options), ("cold", STEPS | {"max_steps": 2})):
        clips = stream_clips(folder / "train.csv", filters=Filters("cy"))
        train((tiny_model, tiny_processor), tmp_path / run, clips, **options_of_run)
    warm, cold = (json.loads((tmp_path / run / "language_adapter.json").read_text())["training"] for run in ("warm", "cold"))
    assert (warm["clips_read"], warm["left_out"]) == (cold["clips_read"], cold["left_out"])
