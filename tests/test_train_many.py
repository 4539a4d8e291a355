"""Many languages in one run: each learns what it would have learnt alone, whatever else is in the batch."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import noise, tone
from torch.nn import functional

from whisper_moe.data import IGNORED, Clip, Clips, Collator

pytest.importorskip("accelerate", reason="training needs the train extra: pip install peft-s2lora[train]")

from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import get_linear_schedule_with_warmup

import peft_s2lora
from whisper_moe import train_many
from whisper_moe.evaluate import score
from whisper_moe.layouts import decoder_only
from whisper_moe.row_training import AdaptedWeight, LoraVectors, RowAdapters, group_size, token_losses
from whisper_moe.train_many import LanguageData, LanguageOrder, ManySettings, train_many_languages

LANGUAGES = ("cy", "fr", "br")
LORA = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "fc1"], rank_pattern={"fc1": 3})
QUICK = ManySettings(
    max_steps=4, batch_size=5, learning_rate=1e-2, num_checkpoints=2, num_workers=0, precision="fp32", augment=False, warmup_share=0.25
)


def make_clips(language: str, count: int) -> Clips:
    def samples(index: int) -> np.ndarray:
        duration_s = 0.4 + 0.2 * (index % 4)
        pitch = 200 + 90 * index + 37 * LANGUAGES.index(language)
        return ((tone(pitch, duration_s) + noise(duration_s, 0.01, index)) * 32767).clip(-32768, 32767).astype(np.int16)

    return Clips(
        [Clip(samples(index), f"{language} {chr(97 + index) * (1 + index)}", language) for index in range(count)], f"{language}/train"
    )


DATA = {language: make_clips(language, count) for language, count in zip(LANGUAGES, (6, 3, 2), strict=True)}


def train(base: Any, out: Path, languages: Any = DATA, **options: Any) -> Any:
    options = {"base_id": "some/base", "settings": QUICK, "peft_config": LORA, "progress": False} | options
    return train_many_languages(base, languages, out=out, **options)


def weights_hash(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def random_vectors(adapted: Any, count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [0.2 * torch.randn(adapted.vectors.num_numbers, generator=generator, dtype=torch.float64) for _ in range(count)]


def batch_of(model: Any, rows: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, 200, (len(rows), 7), generator=generator)
    for row in range(len(rows)):
        labels[row, 3 + row % 5 :] = IGNORED
    features = torch.randn(len(rows), 80, 200, generator=generator, dtype=torch.float64)
    return {"input_features": features, "labels": labels, "languages": torch.tensor(rows)}


def pool_folder(model: Any, folder: Path, **options: Any) -> Path:
    """An S2-LoRA that owns its A and B; fc1 and fc2 share none, q and v do."""
    torch.manual_seed(5)
    config = peft_s2lora.S2LoraConfig(r=4, s2lora_alpha=2, target_modules=["q_proj", "v_proj", "fc1"], init_weights=False, **options)
    pool = get_peft_model(copy.deepcopy(model), config, adapter_name="shared")
    pool.save_pretrained(str(folder), save_embedding_layers=False)
    return folder / "shared"


# ---- one batch -----------------------------------------------------------------------------------------------------------


def loss_of(run: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss that `_Run._step` has: the mean over each language's tokens, summed over the languages."""
    losses, rows = run.token_losses(batch)
    language = batch["languages"][rows]
    return sum(losses[language == which].mean() for which in language.unique())


def make_run(model: Any, processor: Any, adapted: Any, vectors: list[torch.Tensor], tmp_path: Path) -> Any:
    tasks = [train_many._Task(name, name, None, {}, 1.0, DATA[name], None, None) for name in LANGUAGES]
    run = train_many._Run(model, processor, tasks, adapted, QUICK, tmp_path / "checkpoints", None, False)
    for parameter, vector in zip(run.adapters.parameters, vectors, strict=True):
        parameter.data.copy_(vector)
    return run


@pytest.mark.parametrize("rows", [[0, 0, 1, 2, 2, 2], [2, 0, 1], [1, 1, 1, 0, 0, 0], [1, 1]], ids=str)
@pytest.mark.parametrize("method", ["lora", "pool"])
def test_the_gradient_of_each_language_is_the_one_it_has_alone(
    tiny_model, tiny_processor, tmp_path: Path, rows: list[int], method: str
) -> None:
    model = tiny_model.double()
    pool = pool_folder(model, tmp_path / "pool")
    adapted = train_many._lora(model, LORA) if method == "lora" else train_many._pooled(model, pool, None)
    vectors = random_vectors(adapted, 3)
    run = make_run(model, tiny_processor, adapted, vectors, tmp_path)
    batch = batch_of(model, rows)
    with run.adapters.attached(), run.adapters.rows(rows):
        loss = loss_of(run, batch)
        loss.backward()
    gradients = [parameter.grad for parameter in run.adapters.parameters]
    total = 0.0
    for language in range(3):
        mine = [at for at, of in enumerate(rows) if of == language]
        if not mine:
            assert gradients[language] is None
            continue
        alone = alone_through_peft(model, adapted, vectors[language], pool)
        one = alone(input_features=batch["input_features"][mine], labels=batch["labels"][mine]).loss
        one.backward()
        total += float(one.detach())
        expected = {name: weight.grad for name, weight in alone.named_parameters() if weight.requires_grad}
        found = adapted.vectors.tensors(gradients[language])
        assert len(found) == len(expected) > 0
        for name, tensor in found.items():
            [at] = [full for full in expected if full.replace(".default", "").replace(".fr", "").endswith(name)]
            torch.testing.assert_close(tensor, expected[at], rtol=1e-8, atol=1e-12, msg=name)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-10)


def alone_through_peft(model: Any, adapted: Any, vector: torch.Tensor, pool: Path) -> Any:
    """One language's adapter on a copy of the base, as PEFT trains it."""
    tensors = adapted.vectors.tensors(vector)
    if adapted.peft_type == "LORA":
        alone = get_peft_model(copy.deepcopy(model), copy.deepcopy(LORA), autocast_adapter_dtype=False)
    else:
        alone = PeftModel.from_pretrained(copy.deepcopy(model), str(pool), adapter_name="shared", autocast_adapter_dtype=False)
        alone.add_adapter("fr", peft_s2lora.S2LoraConfig(pool="shared"), autocast_adapter_dtype=False)
        alone.set_adapter("fr")
    with torch.no_grad():
        for name, weight in alone.named_parameters():
            if weight.requires_grad:
                weight.copy_(tensors[name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".fr")])
    return alone


def test_a_row_in_a_mixed_batch_goes_through_its_own_adapter_alone(tiny_model, tiny_processor, tmp_path: Path) -> None:
    model = tiny_model.double()
    adapted = train_many._lora(model, LORA)
    vectors = random_vectors(adapted, 3)
    run = make_run(model, tiny_processor, adapted, vectors, tmp_path)
    batch = batch_of(model, [0, 1, 2])
    inputs = {"input_features": batch["input_features"], "decoder_input_ids": torch.tensor([[3, 4, 5]] * 3)}
    with torch.no_grad(), run.adapters.attached():
        base = model(**inputs).logits
        with run.adapters.rows([0, 2, 2]):
            mixed = model(**inputs).logits
        for row, which in enumerate([0, 2, 2]):
            with run.adapters.all_rows(vectors[which]):
                torch.testing.assert_close(model(**inputs).logits[row], mixed[row], rtol=1e-9, atol=1e-9)
        assert (mixed - base).abs().amax((1, 2)).min() > 1e-2
        torch.testing.assert_close(model(**inputs).logits, base, rtol=0, atol=0)
        with run.adapters.rows([0, 1]), pytest.raises(ValueError, match=r"2 rows, but .* was called with 3"):
            model(**inputs)


def test_rows_are_grouped_where_they_lie_together() -> None:
    assert [group_size(rows) for rows in ([4], [1, 1, 1], [0, 0, 1, 1], [0, 0, 1, 1, 1, 1], [0, 0, 1], [0, 1, 0], [3] * 4 + [5] * 6)] == [
        1, 3, 2, 2, 1, 1, 2
    ]  # fmt: skip


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("at_once", [1, 70, 10**9])
def test_the_loss_without_logits_is_cross_entropy(smoothing: float, at_once: int, monkeypatch) -> None:
    monkeypatch.setattr("whisper_moe.row_training._LOGITS_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(0)
    hidden = [torch.randn(9, 5, generator=generator, dtype=torch.float64).requires_grad_()]
    hidden.append(hidden[0].detach().clone().requires_grad_())
    head, weights = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((23, 5), (9,)))
    targets = torch.randint(0, 23, (9,), generator=generator)
    expected = functional.cross_entropy(hidden[0] @ head.T, targets, reduction="none", label_smoothing=smoothing)
    found = token_losses(hidden[1], head, targets, smoothing)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for losses in (expected, found):
        (losses * weights).sum().backward()
    torch.testing.assert_close(hidden[1].grad, hidden[0].grad, rtol=1e-11, atol=1e-12)


def test_the_loss_of_states_that_need_no_gradient_has_none() -> None:
    losses = token_losses(torch.randn(3, 4), torch.randn(7, 4), torch.tensor([1, 2, 3]))
    assert not losses.requires_grad
    assert losses.shape == (3,)


# ---- a whole run ---------------------------------------------------------------------------------------------------------


def one_after_another(
    model: Any, processor: Any, vectors: LoraVectors, settings: ManySettings, config: LoraConfig
) -> list[dict[str, torch.Tensor]]:
    """A plain loop over languages, each with PEFT's LoRA, torch's AdamW and transformers' schedule, on the rows the run gives it."""
    order = LanguageOrder([len(clips) for clips in DATA.values()], settings.batch_size * settings.gradient_accumulation, seed=settings.seed)
    trained, norms = [], list[float]()
    for which, (language, clips) in enumerate(DATA.items()):
        alone = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
        first = vectors.tensors(vectors.initial(torch.Generator().manual_seed(settings.seed + which)))
        named = {
            name.removeprefix("base_model.model.").replace(".default", ""): w for name, w in alone.named_parameters() if w.requires_grad
        }
        assert named.keys() == first.keys()
        with torch.no_grad():
            for name, weight in named.items():
                weight.copy_(first[name])
        optimizer = torch.optim.AdamW(named.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
        schedule = get_linear_schedule_with_warmup(optimizer, 1, settings.max_steps)
        collator = Collator(processor, language, augment=False)
        for rows in order.steps(0, settings.max_steps):
            mine = [key for at, key in rows if at == which]
            if mine:
                batch = collator([clips[index] | {"key": (turn, index)} for turn, index in mine])
                alone(**batch).loss.backward()
                norms.append(float(torch.nn.utils.clip_grad_norm_(list(named.values()), settings.max_grad_norm)))
                optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        trained.append({name: weight.detach() for name, weight in named.items()})
    assert max(norms) > 2 * settings.max_grad_norm  # or clipping would not be seen
    return trained


@pytest.mark.parametrize(("rows", "accumulation"), [(5, 1), (5, 5), (2, 1)])
def test_a_run_ends_where_one_language_after_another_ends(tiny_model, tiny_processor, tmp_path: Path, rows: int, accumulation: int) -> None:
    settings = replace(
        QUICK,
        weight_decay=0.1,
        max_grad_norm=0.2,
        max_steps=5,
        warmup_share=0.2,
        batch_size=rows // accumulation,
        gradient_accumulation=accumulation,
    )
    steps = [{language for language, _ in step} for step in LanguageOrder([6, 3, 2], rows).steps(0, 5)]
    passed_over = any(language in earlier and language not in later for earlier, later in pairwise(steps) for language in range(3))
    assert passed_over  # a language with momentum that must stay where it is
    expected = one_after_another(tiny_model, tiny_processor, train_many._lora(tiny_model, LORA).vectors, settings, LORA)
    train((tiny_model, tiny_processor), tmp_path, settings=settings)
    for language, tensors in zip(LANGUAGES, expected, strict=True):
        found = load_file(tmp_path / language / "adapter_model.safetensors")
        assert len(found) == len(tensors)
        for name, tensor in tensors.items():
            torch.testing.assert_close(found[f"base_model.model.{name}"], tensor, rtol=2e-3, atol=2e-5, msg=f"{language} {name}")
            assert found[f"base_model.model.{name}"].abs().max() > 1e-4


def test_cached_encoder_states_end_there_too(tiny_model, tiny_processor, tmp_path: Path) -> None:
    settings = replace(QUICK, cache_encoder_states=True, storage="model")
    config = LoraConfig(r=2, lora_alpha=2, target_modules=decoder_only(tiny_model, ["k_proj", "v_proj", "fc2"]))
    train((tiny_model, tiny_processor), tmp_path / "live", peft_config=config)
    encoded = []
    hook = tiny_model.get_encoder().register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    train((tiny_model, tiny_processor), tmp_path / "cached", peft_config=config, settings=settings, cache_folder=tmp_path / "states")
    hook.remove()
    assert sum(encoded) == sum(map(len, DATA.values()))  # each clip once
    for language in LANGUAGES:
        live, cached = (load_file(tmp_path / how / language / "adapter_model.safetensors") for how in ("live", "cached"))
        for name, tensor in live.items():
            torch.testing.assert_close(cached[name], tensor, rtol=2e-3, atol=2e-5, msg=name)
    assert len(list((tmp_path / "states").rglob("*.safetensors"))) == 11
    assert not (tmp_path / "cached" / "encoder_states").exists()


def test_the_base_is_as_it_was_also_after_an_error(tiny_model, tiny_processor, tmp_path: Path, monkeypatch) -> None:
    tiny_model.proj_out.weight.requires_grad_(False)
    before, layers = weights_hash(tiny_model), [(name, type(module)) for name, module in tiny_model.named_modules()]
    flags, config = [weight.requires_grad for weight in tiny_model.parameters()], tiny_model.config.to_dict()

    def unchanged() -> bool:
        return (
            weights_hash(tiny_model) == before
            and [(name, type(module)) for name, module in tiny_model.named_modules()] == layers
            and [weight.requires_grad for weight in tiny_model.parameters()] == flags
            and tiny_model.config.to_dict() == config
            and not tiny_model.training
            and all(weight.grad is None for weight in tiny_model.parameters())
        )

    train((tiny_model, tiny_processor), tmp_path / "whole")
    assert unchanged()
    monkeypatch.setattr(train_many._Run, "_step", lambda *_: (_ for _ in ()).throw(RuntimeError("power cut")))
    with pytest.raises(RuntimeError, match="power cut"):
        train((tiny_model, tiny_processor), tmp_path / "broken")
    assert unchanged()


def test_adapters_are_folders_that_peft_and_the_registry_load(tiny_model, tiny_processor, tmp_path: Path) -> None:
    adapters = train((tiny_model, tiny_processor), tmp_path, {**DATA, "fr": DATA["fr"]})
    assert [(adapter.name, adapter.language, adapter.base) for adapter in adapters] == [(each, each, "some/base") for each in LANGUAGES]
    inputs = {"input_features": torch.randn(1, 80, 200), "decoder_input_ids": torch.tensor([[3, 4, 5]])}
    with torch.no_grad():
        base = tiny_model(**inputs).logits
        for adapter in adapters:
            loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_model), str(adapter.path))
            logits = loaded(**inputs).logits
            assert (logits - base).abs().max() > 1e-3
            vectors = train_many._lora(tiny_model, LORA).vectors
            tensors = load_file(adapter.path / "adapter_model.safetensors")
            pieces = [tensors[f"base_model.model.{w.name}.lora_{which}.weight"] for w in vectors.weights for which in "AB"]
            vector = torch.cat([piece.flatten() if at % 2 == 0 else piece.T.flatten() for at, piece in enumerate(pieces)])
            rows = RowAdapters(tiny_model, vectors, [vector])
            with rows.attached(), rows.all_rows(vector):
                torch.testing.assert_close(tiny_model(**inputs).logits, logits, rtol=1e-4, atol=1e-4)
            assert adapter.num_parameters == vector.numel()
    record = json.loads((tmp_path / "br" / "language_adapter.json").read_text("utf-8"))
    assert record["training"]["together_with"] == ["cy", "fr"]
    assert record["training"]["clips"] == 2
    assert (tmp_path / "br" / "README.md").read_text("utf-8").count("Breton") >= 1
    assert not (tmp_path / "checkpoints").exists()


def test_a_pool_gives_each_language_coefficients_that_load_beside_it(tiny_model, tiny_processor, tmp_path: Path) -> None:
    pool = pool_folder(tiny_model, tmp_path / "pool")
    adapters = train((tiny_model, tiny_processor), tmp_path, peft_config=None, pool=pool)
    assert [adapter.peft_type for adapter in adapters] == ["S2LORA"] * 3
    assert adapters[0].num_parameters == 4 * (2 * 3 + 2 * 5)  # r for q, v and fc1 of each layer, and q and v of the cross-attention
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_model), str(pool), adapter_name="shared")
    vectors = train_many._pooled(tiny_model, pool, None).vectors
    inputs = {"input_features": torch.randn(1, 80, 200), "decoder_input_ids": torch.tensor([[3, 4, 5]])}
    for adapter in adapters:
        loaded.load_adapter(str(adapter.path), adapter.name)
        loaded.set_adapter(adapter.name)
        tensors = load_file(adapter.path / "adapter_model.safetensors")
        assert max(float(tensor.abs().max()) for tensor in tensors.values()) > 1e-3
        vector = torch.cat([tensors[f"base_model.model.{weight.name}.s2lora_coefficients"] for weight in vectors.weights])
        rows = RowAdapters(tiny_model, vectors, [vector])
        with torch.no_grad():
            expected = loaded(**inputs).logits
            with rows.attached(), rows.all_rows(vector):
                torch.testing.assert_close(tiny_model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)


def test_of_a_pool_the_decoder_alone_may_be_used(tiny_model, tiny_processor, tmp_path: Path) -> None:
    pool = pool_folder(tiny_model, tmp_path / "pool")
    config = LoraConfig(target_modules=decoder_only(tiny_model, ["q_proj", "v_proj"]))
    settings = replace(QUICK, cache_encoder_states=True)
    adapters = train((tiny_model, tiny_processor), tmp_path, peft_config=config, pool=pool, settings=settings)
    tensors = load_file(adapters[0].path / "adapter_model.safetensors")
    assert len(tensors) == 8
    assert all("decoder" in name and "fc1" not in name for name in tensors)
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny_model), str(pool), adapter_name="shared")
    loaded.load_adapter(str(adapters[0].path), "cy")


def test_many_languages_go_on_only_with_the_base_the_pool_and_the_test_clips_they_began_with(
    tiny_model, tiny_processor, tmp_path: Path, monkeypatch
) -> None:
    from conftest import build_tiny_model

    test = make_clips("cy", 2)
    corrected = Clips([replace(clip, text="as it was really said") for clip in test.clips], test.name)
    pools = [pool_folder(tiny_model, tmp_path / "one")]
    pools.append(pool_folder(build_tiny_model(tiny_processor, seed=3), tmp_path / "two" / "x", share_scope="module_type"))
    settings = replace(QUICK, max_steps=2)
    step = train_many._Run._step

    def crash(self: Any, batches: Any) -> None:
        if self.step == 1:
            raise RuntimeError("power cut")
        step(self, batches)

    def go(base: Any = tiny_model, eval_data: Any = test, pool: Path = pools[0], **options: Any) -> Any:
        languages = [LanguageData("cy", DATA["cy"], eval_data=eval_data)]
        return train((base, tiny_processor), tmp_path / "out", languages, pool=pool, peft_config=None, settings=settings, **options)

    monkeypatch.setattr(train_many._Run, "_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        go()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="differs: base"):
        go(build_tiny_model(tiny_processor, seed=7).eval(), resume=True)
    with pytest.raises(ValueError, match=r"languages\.cy\.test"):
        go(eval_data=corrected, resume=True)
    with pytest.raises(ValueError, match=r"method\."):
        go(pool=pools[1], resume=True)
    assert go(resume=True)[0].metrics["before"]["clips"] == 2


# ---- going on ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crash_at", [1, 3])
def test_a_resumed_run_ends_where_the_undisturbed_one_does(tiny_model, tiny_processor, tmp_path: Path, monkeypatch, crash_at: int) -> None:
    settings = replace(QUICK, max_steps=5, num_checkpoints=5, augment=True, crop_share=0.5)
    train((tiny_model, tiny_processor), tmp_path / "whole", settings=settings)
    step = train_many._Run._step

    def crash(self: Any, batches: Any) -> None:
        if self.step == crash_at:
            raise RuntimeError("power cut")
        step(self, batches)

    monkeypatch.setattr(train_many._Run, "_step", crash)
    with pytest.raises(RuntimeError, match="power cut"):
        train((tiny_model, tiny_processor), tmp_path / "broken", settings=settings)
    monkeypatch.undo()
    kept = sorted(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir())
    assert kept == [f"step-{number}" for number in range(max(1, crash_at - 1), crash_at + 1)]  # two at most
    with pytest.raises(ValueError, match="holds an unfinished run"):
        train((tiny_model, tiny_processor), tmp_path / "broken", settings=settings)
    with pytest.raises(ValueError, match=r"differs: settings\.seed 0, now 1"):
        train((tiny_model, tiny_processor), tmp_path / "broken", settings=replace(settings, seed=1), resume=True)
    with pytest.raises(ValueError, match=r"languages\.br\.clips"):
        train(
            (tiny_model, tiny_processor),
            tmp_path / "broken",
            {"cy": DATA["cy"], "fr": DATA["fr"], "br": DATA["cy"]},
            settings=settings,
            resume=True,
        )
    steps: list[int] = []
    monkeypatch.setattr(train_many._Run, "_step", lambda self, batches: (steps.append(self.step), step(self, batches)))
    train((tiny_model, tiny_processor), tmp_path / "broken", settings=settings, resume=True)
    assert steps == list(range(crash_at, 5))
    for language in LANGUAGES:
        whole, resumed = ((tmp_path / how / language / "adapter_model.safetensors").read_bytes() for how in ("whole", "broken"))
        assert whole == resumed


def test_ctrl_c_saves_the_step_under_way(tiny_model, tiny_processor, tmp_path: Path, monkeypatch) -> None:
    import os
    import signal

    before, step = signal.signal(signal.SIGINT, signal.default_int_handler), train_many._Run._step

    def press(self: Any, batches: Any) -> None:
        step(self, batches)
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train_many._Run, "_step", press)
    try:
        with pytest.raises(KeyboardInterrupt):
            train((tiny_model, tiny_processor), tmp_path, settings=replace(QUICK, max_steps=9, num_checkpoints=1))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(tiny_model, tiny_processor, tmp_path: Path, monkeypatch) -> None:
    import safetensors.torch

    save, calls = safetensors.torch.save_file, []

    def full(tensors: Any, path: Path, *rest: Any) -> None:
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="checkpoint of step 4 could not be written"):
        train((tiny_model, tiny_processor), tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-2"]


def test_the_best_of_each_language_is_kept(tiny_model, tiny_processor, tmp_path: Path, monkeypatch) -> None:
    rates = {"cy": iter([9, 1, 5, 7]), "fr": iter([9, 6, 4, 2])}  # before, and at each of three checkpoints; then what is saved is measured
    vectors: dict[str, list[torch.Tensor]] = {"cy": [], "fr": []}

    def scripted(self: Any, task: Any, clips: Clips) -> Any:
        errors = next(rates[task.name], 3)
        vectors[task.name].append(self.adapters.parameters[self.tasks.index(task)].detach().clone())
        return score(["a" * 20], ["a" * (20 - errors)])

    monkeypatch.setattr(train_many._Run, "_scores", scripted)
    languages = [LanguageData(name, DATA[name], dev_data=DATA[name]) for name in ("cy", "fr")]
    adapters = train((tiny_model, tiny_processor), tmp_path, languages, settings=replace(QUICK, max_steps=6, num_checkpoints=3))
    kept = {"cy": (2, 0.05, 1), "fr": (6, 0.1, 3)}
    layout = train_many._lora(tiny_model, LORA).vectors
    for adapter in adapters:
        step, rate, measurement = kept[adapter.name]
        record = json.loads((adapter.path / "language_adapter.json").read_text("utf-8"))
        assert (record["training"]["kept_step"], record["training"]["dev_cer"]) == (step, pytest.approx(rate))
        assert record["metrics"]["before"]["cer"] == pytest.approx(0.45)
        assert record["metrics"]["after"]["cer"] == pytest.approx(0.15)
        saved = load_file(adapter.path / "adapter_model.safetensors")
        for name, tensor in layout.tensors(vectors[adapter.name][measurement]).items():
            assert torch.equal(saved[f"base_model.model.{name}"], tensor)


# ---- who is in which batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "weights", "shares"),
    [
        (1, None, [0.8, 0.15, 0.05]),
        (float("inf"), None, [1 / 3] * 3),
        (2, None, [0.558, 0.242, 0.140 / 0.70]),
        (1, [1, 2, 16], [0.421, 0.158, 0.421]),
    ],
)
def test_languages_have_their_share_of_the_rows(temperature: float, weights: Any, shares: list[float]) -> None:
    sizes = [80, 15, 5]
    order = LanguageOrder(sizes, 8, temperature=temperature, weights=weights, seed=3)
    powers = np.array(weights or [1, 1, 1]) * np.array(sizes) ** (1 / temperature)
    expected = powers / powers.sum()
    if temperature == 1:
        assert expected == pytest.approx(shares, abs=1e-3)
    counts = np.zeros(3)
    for number, rows in enumerate(order.steps(0, 200), start=1):
        assert len(rows) == 8
        assert [language for language, _ in rows] == sorted(language for language, _ in rows)
        counts += np.bincount([language for language, _ in rows], minlength=3)
        assert np.abs(counts - number * 8 * expected).max() < 3  # at every moment, not only on average
    assert counts / counts.sum() == pytest.approx(expected, abs=2e-3)


def test_every_clip_comes_once_in_a_pass_and_the_order_changes() -> None:
    order = LanguageOrder([7, 3], 4, seed=1)
    rows = [row for step in order.steps(0, 50) for row in step]
    for language, size in enumerate((7, 3)):
        keys = [key for which, key in rows if which == language]
        passes = [[index for turn, index in keys if turn == number] for number in range(len(keys) // size)]
        assert len(passes) > 5
        assert all(Counter(each) == Counter(range(size)) for each in passes)
        assert len({tuple(each) for each in passes}) > 1
    assert list(order.steps(20, 50)) == list(order.steps(0, 50))[20:]
    assert list(LanguageOrder([7, 3], 4, seed=2).steps(0, 5)) != list(order.steps(0, 5))


def test_more_languages_than_rows_take_turns() -> None:
    steps = list(LanguageOrder([5] * 7, 2, temperature=float("inf")).steps(0, 21))
    counts = Counter(language for rows in steps for language, _ in rows)
    assert set(counts.values()) == {6}


# ---- refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout=0.1"),
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"modules_to_save": ["proj_out"]}, "modules_to_save"),
        ({"target_modules": ["embed_tokens"]}, "is a Embedding"),
        ({"target_modules": ["conv1"]}, "is a Conv1d"),
    ],
)
def test_what_is_not_plain_lora_is_refused(tiny_model, tiny_processor, tmp_path: Path, config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train((tiny_model, tiny_processor), tmp_path, peft_config=LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **config}))
    assert not tmp_path.joinpath("cy").exists()


def test_every_lora_that_peft_makes_from_plain_fields_is_laid_out_as_peft_does(tiny_model) -> None:
    options: dict[str, Any] = {"exclude_modules": r".*encoder_attn.*", "layers_to_transform": [1], "layers_pattern": "layers"}
    config = LoraConfig(r=4, lora_alpha=3, use_rslora=True, alpha_pattern={"fc1": 8}, target_modules=["q_proj", "fc1"], **options)
    found = {weight.name: weight for weight in train_many._lora(tiny_model, config).vectors.weights}
    adapted = get_peft_model(copy.deepcopy(tiny_model), copy.deepcopy(config)).get_base_model()
    expected = {name: module for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert found.keys() == expected.keys()
    for name, module in expected.items():
        assert found[name] == AdaptedWeight(name, module.out_features, module.in_features, module.r["default"], module.scaling["default"])


@pytest.mark.parametrize(
    ("languages", "said"),
    [
        ({}, "no language to train"),
        ([LanguageData("cy", DATA["cy"]), LanguageData("Welsh", DATA["cy"])], "Two adapters would be called cy"),
        ([LanguageData("cy", DATA["cy"], name="checkpoints")], "folder of the run itself"),
        ({"xx-nobody": DATA["cy"]}, "xx-nobody"),
    ],
)
def test_languages_that_cannot_work_are_refused(tiny_model, tiny_processor, tmp_path: Path, languages: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        train((tiny_model, tiny_processor), tmp_path, languages)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": 0}, "temperature is 0"),
        ({"max_grad_norm": -1}, "max_grad_norm"),
        ({"storage": "int8"}, "storage is 'int8'"),
        ({"patience": 3}, "patience cannot be used"),
        ({"cache_encoder_states": True, "augment": True}, "augment changes the recordings"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(QUICK, **changes)


def test_a_weight_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="weight of 'cy' is 0"):
        LanguageData("cy", DATA["cy"], weight=0)


def test_cached_states_under_an_adapter_of_the_encoder_are_refused(tiny_model, tiny_processor, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="touches the encoder"):
        train((tiny_model, tiny_processor), tmp_path, settings=replace(QUICK, cache_encoder_states=True))


def test_what_is_no_pool_of_this_base_is_refused(tiny_model, tiny_processor, tmp_path: Path) -> None:
    [lora, *_] = train((tiny_model, tiny_processor), tmp_path / "lora")
    with pytest.raises(ValueError, match="is no pool"):
        train((tiny_model, tiny_processor), tmp_path / "out", peft_config=None, pool=lora.path)
    pool = pool_folder(tiny_model, tmp_path / "pool")
    with pytest.raises(ValueError, match="names no weight of the pool"):
        train((tiny_model, tiny_processor), tmp_path / "out", peft_config=LoraConfig(target_modules=["out_proj"]), pool=pool)


# ---- the command ---------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, clips: Clips) -> Path:
    """A user's folder: recordings and metadata.csv, with a split in it."""
    import soundfile

    folder.mkdir(parents=True)
    lines = ["file_name,text,split"]
    for index, clip in enumerate(clips.clips):
        soundfile.write(folder / f"{index}.wav", clip.samples, 16_000)
        lines.append(f"{index}.wav,{clip.text},{'train' if index else 'dev'}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def test_the_command_makes_adapters_of_a_recipe(tiny_folder, tmp_path: Path, capsys) -> None:
    from whisper_moe.cli import main

    folders = {language: write_folder(tmp_path / "data" / language, clips) for language, clips in DATA.items() if len(clips) > 2}
    recipe = tmp_path / "recipe.yaml"
    lines = [f"languages: [{', '.join(f'{language}={folder}' for language, folder in folders.items())}]"]
    lines += [
        f"dev_data: [cy={folders['cy']}]",
        "weights: [fr=2]",
        f"model: {tiny_folder}",
        "base_id: some/base",
        "rank: 2",
        "part: decoder",
    ]
    lines += ["cache_encoder_states: true", "max_steps: 9", "batch_size: 4", "num_checkpoints: 1", "num_workers: 0", "learning_rate: 1e-2"]
    recipe.write_text("\n".join(lines) + "\n", "utf-8")
    assert main(["train-many", str(recipe), "--out", str(tmp_path / "out"), "--max-steps", "2"]) == 0
    printed = capsys.readouterr().out
    assert "encoder states: 100 positions x 16 x 2 bytes x 7 clips" in printed
    record = json.loads((tmp_path / "out" / "fr" / "language_adapter.json").read_text("utf-8"))
    assert record["training"]["steps"] == 2
    assert record["training"]["share_of_rows"] == pytest.approx(4 / 9, abs=1e-4)
    assert set(json.loads((tmp_path / "out" / "cy" / "language_adapter.json").read_text("utf-8"))["metrics"]) >= {"before", "after"}
    assert "library_name: peft" in (tmp_path / "out" / "fr" / "README.md").read_text("utf-8")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["cy", "fr"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--languages", "cy"], "'cy' is not of the form language=value"),
        (["--languages", "cy=a", "cy=b"], "cy stands twice"),
        (["--languages", "cy=a", "--dev-data", "fr=b"], "fr is not among the languages that are trained: cy"),
        (["--languages", "cy=a", "--weights", "cy=much"], "cy=much is no number"),
        (["--languages", "cy=a", "--pool", "p", "--rank", "3"], "rank are the pool's"),
        ([], "languages is missing"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(flags: list[str], said: str, tmp_path: Path, capsys) -> None:
    from whisper_moe.cli import main

    assert main(["train-many", "--out", str(tmp_path / "out"), *flags]) == 2
    assert said in capsys.readouterr().err
