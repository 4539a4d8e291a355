"""The core of the experiments: which clips come when, the loss, what a method trains, what is kept on disk, and who does a run."""

from __future__ import annotations

import multiprocessing
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tone
from torch.nn import functional

pytest.importorskip("datasets", reason="the recipes need the train extra: pip install peft-s2lora[train]")

from evidence_rows import settings

from recipes.evidence import child_speech
from recipes.evidence.fitting import NUM_PROMPT, Schedule, fit, order, token_loss
from recipes.evidence.ground import Data, Ground, Item
from recipes.evidence.measuring import write
from recipes.evidence.methods import ATTENTION, Method, attach
from recipes.evidence.runs import Context
from recipes.evidence.store import Store
from whisper_moe.data import Clip, Clips

WORDS = ("a", "bcd", "ef gh", "ijklm no", "p", "qr st u")


def clips(count: int = 6) -> Clips:
    """Tones of different pitch and length, each with its text."""
    found = [Clip(tone(200.0 * (at + 1), 0.4 + 0.2 * at), WORDS[at], "en", f"speaker {at % 3}") for at in range(count)]
    return Clips(found, "tones")


@pytest.fixture(scope="module")
def frozen(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Ground:
    """A ground whose encoder has spoken once."""
    return Ground("tiny", tiny_folder, True, Data(work=tmp_path_factory.mktemp("states")))


@pytest.fixture(scope="module")
def whole(frozen: Ground) -> Ground:
    """The same base, encoder and all."""
    return frozen.with_frozen_encoder(False)


# ---- order -------------------------------------------------------------------------------------------------------------


def items_called(prefix: str, count: int) -> list[Item]:
    return [Item(torch.zeros(2 + at % 5, 1), 1.0, f"{prefix}{at}", "en", "en", None, (0,)) for at in range(count)]


def test_sets_of_different_size_give_the_same_number_of_clips_and_none_comes_twice_before_the_others() -> None:
    small, large = items_called("small ", 5), items_called("large ", 40)
    plan = Schedule(num_steps=10, batch_size=6)
    drawn = [item.text for batch in order([small, large], plan) for item in batch]
    seen = Counter(drawn)
    assert len(drawn) == 60
    assert sum(count for text, count in seen.items() if text.startswith("small")) == 30
    assert {seen[item.text] for item in small} == {6}  # 30 draws of 5
    assert max(seen[item.text] for item in large) == 1


def test_a_seed_gives_the_same_batches_again_and_another_seed_others() -> None:
    items, plan = items_called("", 30), Schedule(num_steps=6, batch_size=4, seed=3)

    def texts(plan: Schedule) -> list[list[str]]:
        return [[item.text for item in batch] for batch in order([items], plan)]

    assert texts(plan) == texts(plan)
    assert texts(plan) != texts(replace(plan, seed=4))


def test_the_rate_rises_to_one_and_falls_to_nothing() -> None:
    plan = Schedule(num_steps=20, warmup_share=0.1)
    rates = [plan.rate(step) for step in range(20)]
    assert rates[0] == 0.5
    assert max(rates) == rates[1] == 1.0
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert 0 < rates[-1] < 0.1


# ---- loss and errors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ["frozen", "whole"])
def test_the_loss_of_a_batch_is_that_of_its_clips_one_by_one(encoder: str, request: pytest.FixtureRequest) -> None:
    ground: Ground = request.getfixturevalue(encoder)
    one = ground.hear(clips(1), "en", "en")[0]
    # Of equal length, so that no clip hears another's padding; texts of different length are padded.
    items = [replace(one, labels=item.labels) for item in ground.hear(clips(4), "en", "en")]
    total, tokens = 0.0, 0
    for item in items:
        states = ground.encoder_states(ground.base, [item])
        # transformers' own loss: it shifts the labels itself, and leaves out -100.
        labels = torch.tensor([[-100] * NUM_PROMPT + list(item.labels[NUM_PROMPT:])])
        inputs = torch.tensor([[ground.base.config.decoder_start_token_id, *item.labels[:-1]]])
        found = ground.base(encoder_outputs=(states,), decoder_input_ids=inputs, labels=labels).loss
        count = len(item.labels) - NUM_PROMPT
        total, tokens = total + found.item() * count, tokens + count
    assert len({len(item.labels) for item in items}) > 1
    torch.testing.assert_close(token_loss(ground.base, ground, items).item(), total / tokens, rtol=0.02, atol=0.01)


def test_transcripts_come_in_the_order_of_the_clips(whole: Ground) -> None:
    # Of equal length, so that no clip hears another's padding; prompted differently, so that they come in several batches.
    tones = Clips([Clip(tone(200.0 * (at + 1), 0.6), WORDS[at], "en") for at in range(6)], "tones")
    items = [item for pair in zip(whole.hear(tones, "en", "en"), whole.hear(tones, "de", "de"), strict=True) for item in pair]
    together = write(whole.base, whole, items, batch_size=4)
    assert together == [write(whole.base, whole, [item])[0] for item in items]
    assert len(set(together)) > 3


# ---- ground ------------------------------------------------------------------------------------------------------------


def test_states_from_the_disk_are_those_of_a_fresh_encoder(frozen: Ground, whole: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    frozen.hear(clips(), "en", "en")
    monkeypatch.setattr(frozen, "_encoded", lambda clips: pytest.fail("the encoder spoke again"))
    kept = frozen.hear(clips(), "en", "en")
    for item, fresh in zip(kept, whole.hear(clips(), "en", "en"), strict=True):
        states = whole.encoder_states(whole.base, [fresh])[0]
        assert item.heard.dtype == torch.float16
        # Encoded in batches, with more silence behind the shorter ones: the positions of the clip itself are compared.
        positions = min(len(states), len(item.heard))
        cosine = functional.cosine_similarity(states[:positions], item.heard[:positions].float(), dim=1)
        assert float(cosine.detach().mean()) > 0.9


def test_another_encoder_has_states_of_its_own(frozen: Ground, tiny_folder: Path) -> None:
    other = Ground("other", tiny_folder, True, frozen.data)
    with torch.no_grad():
        other.base.model.encoder.conv1.weight.add_(0.1)
    first, second = (ground.hear(clips(1), "en", "en")[0].heard for ground in (frozen, other))
    assert frozen.digest != other.digest
    assert not torch.equal(first, second)


def test_shorter_clips_are_filled_up_with_their_last_position(frozen: Ground) -> None:
    (short,), long = frozen.hear(clips(1), "en", "en"), frozen.hear(clips(), "en", "en")[-1]
    batch = frozen.encoder_states(frozen.base, [short, long])
    assert batch.shape == (2, len(long.heard), long.heard.shape[1])
    assert len(short.heard) < len(long.heard)
    assert torch.equal(batch[0, : len(short.heard)], short.heard.float())
    assert (batch[0, len(short.heard) :] == short.heard[-1].float()).all()


# ---- methods -----------------------------------------------------------------------------------------------------------

# Of the tiny base: d = 16, ffn = 32, two layers a side. Matrices of a layer: 4 of attention, 4 more in the decoder, fc1 and fc2.
ATTENTION_MATRICES, FFN_MATRICES = 2 * 4 + 2 * 8, 2 * 2 + 2 * 2
DECODER_ATTENTION, DECODER_FFN = 2 * 8, 2 * 2


@pytest.mark.parametrize(
    ("method", "decoder_only", "expected"),
    [
        (Method("lora", rank=3), False, 3 * (ATTENTION_MATRICES * 32 + FFN_MATRICES * 48)),
        (Method("lora", rank=3), True, 3 * (DECODER_ATTENTION * 32 + DECODER_FFN * 48)),
        (Method("lora", rank=1, modules=("q_proj", "v_proj")), False, 12 * 32),
        # r (d_in + d_out) for each shape, of which fc1's and fc2's are two, and r for every weight.
        (Method("s2lora", rank=4), False, 4 * (32 + 48 + 48 + ATTENTION_MATRICES + FFN_MATRICES)),
        (Method("s2lora", rank=4, modules=ATTENTION), True, 4 * (32 + DECODER_ATTENTION)),
        # One vector of r for every weight, and one as long as its output.
        (Method("vera", rank=5, modules=ATTENTION), True, DECODER_ATTENTION * (5 + 16)),
        # AdaLoRA begins with one and a half times the rank: A, B and a coefficient for each direction.
        (Method("adalora", rank=4), True, 6 * (DECODER_ATTENTION * (32 + 1) + DECODER_FFN * (48 + 1))),
    ],
    ids=lambda value: value.kind if isinstance(value, Method) else None,
)
def test_a_method_trains_as_many_numbers_as_its_formula_says(whole: Ground, method: Method, decoder_only: bool, expected: int) -> None:
    trained = attach(whole.fresh(), method, decoder_only=decoder_only, num_steps=20)
    assert trained.num_trained == expected
    assert sum(weight.numel() for weight in trained.model.parameters() if weight.requires_grad) == expected


def test_bitfit_trains_the_biases_alone_and_full_everything_but_the_encoders_sinusoids(whole: Ground) -> None:
    base = whole.fresh()
    biases = sum(weight.numel() for name, weight in base.named_parameters() if name.endswith("bias"))
    positions = base.model.encoder.embed_positions.weight.numel()
    everything = sum(weight.numel() for weight in base.parameters())
    assert attach(whole.fresh(), Method("bitfit"), decoder_only=False, num_steps=2).num_trained == biases
    assert attach(whole.fresh(), Method("full"), decoder_only=False, num_steps=2).num_trained == everything - positions
    decoder = sum(weight.numel() for weight in base.model.decoder.parameters())
    assert attach(whole.fresh(), Method("full"), decoder_only=True, num_steps=2).num_trained == decoder


KINDS = {
    "full": Method("full", learning_rate=1e-2),
    "bitfit": Method("bitfit", learning_rate=1e-2),
    "lora": Method("lora", rank=2, learning_rate=1e-2),
    "adalora": Method("adalora", rank=2, learning_rate=5e-2),
    "vera": Method("vera", rank=4, learning_rate=1e-1),
    "s2lora": Method("s2lora", rank=4, learning_rate=1e-2, sparsity=0.01),
}


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_before_the_first_step_then_the_loss_falls_and_a_frozen_encoder_stays(frozen: Ground, kind: str) -> None:
    items = frozen.hear(clips(), "en", "en")
    trained = attach(frozen.fresh(), KINDS[kind], decoder_only=True, num_steps=20)
    trained.model.eval()
    with torch.no_grad():
        at_start = token_loss(trained.model, frozen, items)
        assert torch.equal(at_start, token_loss(frozen.base, frozen, items))
    before = {name: weight.clone() for name, weight in trained.model.named_parameters() if ".encoder." in name}
    fit(frozen, trained, [items], Schedule(num_steps=20, batch_size=3))
    with torch.no_grad():
        assert token_loss(trained.model, frozen, items) < at_start
    assert before
    assert all(torch.equal(weight, before[name]) for name, weight in trained.model.named_parameters() if ".encoder." in name)


def test_the_orthogonality_of_adalora_is_the_term_that_peft_adds_to_the_loss_of_the_model(frozen: Ground) -> None:
    trained = attach(frozen.fresh(), Method("adalora", rank=2), decoder_only=True, num_steps=20)
    items = frozen.hear(clips(2), "en", "en")
    states = frozen.encoder_states(frozen.base, items[:1])
    labels = torch.tensor([items[0].labels])
    # PEFT's own model adds it; `PeftModel.forward` without a task type would go round it.
    outputs = trained.model.base_model(encoder_outputs=(states,), labels=labels)
    alone = functional.cross_entropy(outputs.logits[0], labels[0])
    assert float(trained.extra_loss()) > 0
    torch.testing.assert_close(trained.extra_loss(), outputs.loss - alone, rtol=1e-4, atol=1e-4)


def test_an_unknown_method_is_refused_by_name(whole: Ground) -> None:
    with pytest.raises(ValueError, match=r"'dora'.*adalora"):
        attach(whole.fresh(), Method("dora"), decoder_only=False, num_steps=1)


# ---- store -------------------------------------------------------------------------------------------------------------


def test_a_run_is_made_by_one_process_and_never_twice(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.claimed("child/lora-s0") as mine, store.claimed("child/lora-s0") as also_mine, store.claimed("child/full-s0") as other:
        assert (mine, also_mine, other) == (True, False, True)
        store.write("child/lora-s0", {"arm": "lora"})
    with store.claimed("child/lora-s0") as mine:
        assert not mine
    assert store.rows() == {"child/lora-s0": {"arm": "lora"}}


def _claim_and_die(folder: Path) -> None:
    with Store(folder).claimed("child/lora-s0") as mine:
        os._exit(7 if mine else 1)


def test_a_run_whose_process_died_is_made_again(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=_claim_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 7
    assert (tmp_path / "child" / "lora-s0.lock").exists()
    with Store(tmp_path).claimed("child/lora-s0") as mine:
        assert mine


# ---- learning rates ----------------------------------------------------------------------------------------------------


def test_the_rate_with_the_fewest_wrong_words_is_taken_and_untried_ones_are_named(tmp_path: Path, whole: Ground) -> None:
    context = Context(settings(tmp_path), whole, Store(tmp_path / "rows"))
    rates = child_speech.LEARNING_RATES["lora"]

    def try_out(rate: float, wrong: float) -> None:
        key = f"child-tuning/lora-{rate:g}-s{child_speech.TUNING_SEED}"
        context.store.path(key).parent.mkdir(parents=True, exist_ok=True)
        context.store.write(key, {"sets": {"child-dev": {"wer": wrong}}})

    for at, rate in enumerate(rates[:-1]):
        try_out(rate, 0.2 if at == 1 else 0.5)
    with pytest.raises(ValueError, match=f"{rates[-1]}"):
        child_speech.best_rate(context, "lora")
    try_out(rates[-1], 0.3)
    assert child_speech.best_rate(context, "lora") == rates[1]


def test_every_kind_is_tuned_by_an_arm_of_it_and_sparse_arms_apart() -> None:
    kinds = {arm: child_speech.tuned_as(method) for arm, method in child_speech.METHODS.items()}
    assert set(kinds.values()) == set(child_speech.LEARNING_RATES) == set(child_speech.TUNED_BY)
    assert all(kinds[arm] == kind for kind, arm in child_speech.TUNED_BY.items())
    assert [arm for arm, kind in kinds.items() if kind == "sparse-s2lora"] == ["s2-r32-sparse-0.1", "s2-r32-sparse-0.3"]
    keys = [run.key for run in child_speech.runs(settings(Path("unused"), smoke=False))]
    assert sum(key.startswith("child-tuning/sparse-s2lora-") for key in keys) == 4


def test_an_arm_is_trained_at_the_rate_of_its_kind(tmp_path: Path, whole: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    items = whole.hear(clips(), "en", "en")
    monkeypatch.setattr(whole, "items", lambda *arguments: items)
    chosen = {"s2lora": 1.5e-3, "sparse-s2lora": 5e-3}
    context = Context(settings(tmp_path, smoke=False, num_steps=2, batch_size=2), whole, Store(tmp_path / "rows"))
    for kind, best in chosen.items():
        for rate in child_speech.LEARNING_RATES[kind]:
            key = f"child-tuning/{kind}-{rate:g}-s{child_speech.TUNING_SEED}"
            context.store.path(key).parent.mkdir(parents=True, exist_ok=True)
            context.store.write(key, {"sets": {"child-dev": {"wer": 0.2 if rate == best else 0.5}}})
    for arm, rate in {"s2-r8": 1.5e-3, "s2-r32-slower": 5e-4, "s2-r32-sparse-0.3": 5e-3}.items():
        assert child_speech.trained_arm(context, arm, 0)["method"]["learning_rate"] == rate


def test_a_few_minutes_are_of_all_speakers(tmp_path: Path, whole: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    items = whole.hear(clips(), "en", "en")
    monkeypatch.setattr(whole, "items", lambda *arguments: items)
    context = Context(settings(tmp_path), whole, Store(tmp_path))
    chosen = child_speech.training_items(context, minutes=sum(item.seconds for item in items[:3]) / 60)
    assert {item.speaker for item in chosen} == {item.speaker for item in items}
    assert np.isclose(sum(item.seconds for item in chosen), sum(item.seconds for item in items[:3]))
    assert child_speech.training_items(context) == items
