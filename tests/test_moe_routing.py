"""Routing as data: what each constructor means, rows that repeat, leave or return, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whisper_moe import Routing, RoutingSlot


def test_one_hot_gives_each_row_its_expert_and_none_nothing():
    routing = Routing.one_hot([2, None, 0], num_experts=3)
    assert routing.dense(3).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert (routing.num_rows, routing.k) == (3, 1)


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_a_mixture_keeps_its_k_largest_weights_and_its_sum(data):
    rows, experts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    k = data.draw(st.integers(1, experts))
    weights = torch.rand(rows, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999))))
    dense = Routing.mixture(weights, k).dense(experts)
    for row in range(rows):  # a plain loop is the truth
        best = sorted(range(experts), key=lambda e: -float(weights[row, e]))[:k]
        total = sum(float(weights[row, e]) for e in best)
        expected = [float(weights[row, e]) * float(weights[row].sum()) / total if e in best else 0.0 for e in range(experts)]
        assert torch.allclose(dense[row], torch.tensor(expected, dtype=torch.float64))


def test_a_mixture_of_zeros_stays_zero():
    assert Routing.mixture(torch.zeros(2, 3), top_k=1).dense(3).tolist() == [[0, 0, 0]] * 2


def test_static_is_the_same_for_every_row():
    assert Routing.static(torch.tensor([0.25, 0.75]), rows=2).dense(2).tolist() == [[0.25, 0.75]] * 2


def test_repeated_rows_stand_next_to_each_other_as_beams_do():
    routing = Routing.one_hot([0, 1]).repeat(2)
    assert routing.indices[:, 0].tolist() == [0, 0, 1, 1]
    assert Routing.one_hot([0, 1]).for_batch(4).indices[:, 0].tolist() == [0, 0, 1, 1]


def test_a_batch_of_the_same_size_gets_the_routing_itself():
    routing = Routing.one_hot([0, 1])
    assert routing.for_batch(2) is routing


def test_a_batch_that_is_no_multiple_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"3 rows.*with 4.*select"):
        Routing.one_hot([0, 1, 2]).for_batch(4)


def test_rows_that_stay_keep_their_routing_in_the_order_given():
    routing = Routing.one_hot([0, 1, 2])
    assert routing.select([2, 0]).indices[:, 0].tolist() == [2, 0]
    assert routing.select(torch.tensor([True, False, True])).indices[:, 0].tolist() == [0, 2]
    with pytest.raises(ValueError, match="mask over rows"):
        routing.select(torch.tensor([True, False]))


def test_a_row_that_names_an_expert_twice_gets_the_sum():
    routing = Routing(torch.tensor([[1, 1]]), torch.tensor([[0.25, 0.5]]))
    assert routing.dense(2).tolist() == [[0, 0.75]]


def test_moving_changes_the_weights_only_and_nothing_if_nothing_changes():
    routing = Routing.one_hot([1])
    assert routing.to("cpu") is routing
    moved = routing.to(dtype=torch.bfloat16)
    assert (moved.weights.dtype, moved.indices.dtype) == (torch.bfloat16, torch.long)


def test_gradients_reach_the_weights_through_dense():
    weights = torch.tensor([[0.5, 0.5]], requires_grad=True)
    Routing.mixture(weights).dense(2)[0, 1].backward()
    assert weights.grad.tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Routing(torch.zeros(2, dtype=torch.long), torch.zeros(2)), r"\(rows, k\), got \(2,\)"),
        (lambda: Routing(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 2)), r"got \(2, 1\) and \(2, 2\)"),
        (lambda: Routing(torch.zeros(2, 1), torch.zeros(2, 1)), "int64"),
        (lambda: Routing.one_hot([0, 3], num_experts=3), "Row 1 .* expert 3; there are 3"),
        (lambda: Routing.one_hot([-1]), "Row 0 .* expert -1"),
        (lambda: Routing.one_hot([True]), "Row 0"),
        (lambda: Routing.mixture(torch.tensor([[0.5, float("nan")]])), "row 0 are not finite"),
        (lambda: Routing.mixture(torch.zeros(2, 3), top_k=4), "number of experts, 3, got 4"),
        (lambda: Routing.mixture(torch.zeros(2, 3), top_k=0), "got 0"),
        (lambda: Routing.mixture(torch.zeros(3)), r"\(rows, experts\)"),
        (lambda: Routing.static(torch.zeros(1, 3), 2), r"\(experts,\)"),
    ],
)
def test_what_cannot_be_a_routing_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_slot_holds_a_routing_for_the_length_of_a_block_and_also_forgets_it_after_an_error():
    slot, outer, inner = RoutingSlot(), Routing.one_hot([0]), Routing.one_hot([1])
    with slot.use(outer):
        with pytest.raises(ValueError, match="no multiple"), slot.use(inner):  # noqa: PT012 - what is inside the slot, and the error
            assert slot.current is inner
            inner.repeat(2).for_batch(3)
        assert slot.current is outer
    assert slot.current is None
