"""Every way of adding gated experts against a plain Python loop over rows and experts in float64, and what the ways cost."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from whisper_moe import Routing
from whisper_moe.experts import add_experts, add_gated, add_gathered, add_shared, gather, gathering_pays, mixed_weight

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 0.3, torch.float16: 0.05}


class Problem:
    """Random tensors of one size, and the answer by loops."""

    def __init__(self, seed=0, rows=2, T=3, E=4, k=2, r=2, d_in=5, d_out=7, dtype=torch.float64, two_dimensional=False) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        shape = (rows,) if two_dimensional else (rows, T)
        self.x, self.y = random(*shape, d_in), random(*shape, d_out)
        self.A, self.B = random(E, r, d_in), random(E, r, d_out).mT
        weights = torch.rand(rows, E, generator=generator, dtype=torch.float64).to(torch.promote_types(dtype, torch.float32))
        self.routing = Routing.mixture(weights, k)
        self.E = E

    def truth(self, gates: torch.Tensor | None = None) -> torch.Tensor:
        """Loops over rows and experts, in float64. `gates`: (rows, E) or (rows, T, E)."""
        gates = self.routing.dense(self.E) if gates is None else gates
        x, A, B, gates = (tensor.detach().double() for tensor in (self.x, self.A, self.B, gates))
        result = self.y.detach().double().clone()
        for row in range(len(x)):
            for e in range(self.E):
                result[row] += gates[row, ..., e, None] * (x[row] @ A[e].T @ B[e].T)
        return result

    def ways(self) -> dict[str, torch.Tensor]:
        dense = self.routing.dense(self.E)
        return {
            "chosen": add_experts(self.y.clone(), self.x, self.A, self.B, self.routing),
            "few": add_gated(self.y.clone(), self.x, self.A, self.B, dense),
            "few, flat y": add_gated(self.y.clone().flatten(0, -2), self.x, self.A, self.B, dense).view(self.y.shape),
            "many": add_gathered(self.y.clone(), self.x, gather(self.A, self.B, self.routing)),
            "many, flat y": add_gathered(self.y.clone().flatten(0, -2), self.x, gather(self.A, self.B, self.routing)).view(self.y.shape),
        }


sizes = st.fixed_dictionaries(
    {"seed": st.integers(0, 99), "rows": st.integers(1, 4), "T": st.integers(1, 5), "E": st.integers(1, 9), "r": st.integers(1, 4)}
)


@given(sizes, st.data())
@settings(max_examples=60, deadline=None)
def test_every_way_is_the_loop_over_experts(size, data):
    k = data.draw(st.integers(1, size["E"]))
    problem = Problem(**size, k=k, two_dimensional=data.draw(st.booleans()))
    for way, result in problem.ways().items():
        assert torch.allclose(result, problem.truth(), atol=1e-10), way


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_way_keeps_the_type_and_its_precision(dtype):
    problem = Problem(dtype=dtype, r=3)
    for way, result in problem.ways().items():
        assert result.dtype == dtype, way
        assert (result.double() - problem.truth()).abs().max() < TOLERANCE[dtype], way


@pytest.mark.parametrize("y_type", [torch.bfloat16, torch.float32])
def test_experts_of_another_type_than_the_base_work_and_the_result_has_the_bases(y_type):
    problem = Problem(dtype=torch.float32)
    problem.x, problem.y = problem.x.to(y_type), problem.y.to(y_type)
    for tensors in ("A", "B"):
        setattr(problem, tensors, getattr(problem, tensors).to(torch.float32 if y_type == torch.bfloat16 else torch.bfloat16))
    for way, result in problem.ways().items():
        assert result.dtype == y_type, way
        error = (result.double() - problem.truth()).abs() / problem.truth().abs().clamp_min(1)
        # Wider experts round once, at the end (half a unit of bfloat16 is 2**-9). Narrower ones take the gates in their own type.
        assert error.max() < (2**-8 if y_type == torch.bfloat16 else 0.05), way


@given(sizes)
@settings(max_examples=30, deadline=None)
def test_a_gate_for_every_position_is_the_loop_too(size):
    problem = Problem(**size, k=1)
    gates = torch.rand(size["rows"], size["T"], size["E"], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    result = add_gated(problem.y.clone(), problem.x, problem.A, problem.B, gates)
    assert torch.allclose(result, problem.truth(gates), atol=1e-10)


def test_a_routing_for_recordings_serves_their_beams():
    problem = Problem(rows=6)
    recordings = problem.routing.select([0, 2, 4])
    expected = Problem(rows=6)
    expected.routing = recordings.repeat(2)
    gathered = gather(problem.A, problem.B, recordings).for_batch(6)
    assert torch.allclose(add_experts(problem.y.clone(), problem.x, problem.A, problem.B, recordings), expected.truth())
    assert torch.allclose(add_gathered(problem.y.clone(), problem.x, gathered), expected.truth())
    with pytest.raises(ValueError, match="for 3 rows, but the batch has 4"):
        gather(problem.A, problem.B, recordings).for_batch(4)


def test_one_shared_pair_with_coefficients_of_each_row():
    problem = Problem(E=1, k=1, r=4)
    s = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    A, B = problem.A[0], problem.B[0]
    expected = torch.stack([problem.y[row] + problem.x[row] @ A.T @ torch.diag(s[row]) @ B.T for row in range(2)])
    assert torch.allclose(add_shared(problem.y.clone(), problem.x, A, B, s), expected)
    down = F.linear(problem.x, A)
    assert torch.allclose(add_shared(problem.y.clone(), problem.x, A, B, s, down=down), expected)


def test_a_mixture_in_the_weight_is_the_mixture_on_the_input():
    problem = Problem(rows=1)
    weight = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gates = problem.routing.dense(4)[0]
    problem.y = F.linear(problem.x, weight)
    up = (problem.B.mT * gates[:, None, None]).flatten(0, 1)
    assert torch.allclose(F.linear(problem.x, mixed_weight(weight, problem.A.flatten(0, 1), up)), problem.truth())


# ---- in place, and what autograd keeps ---------------------------------------------------------------------------------


def test_without_autograd_the_result_is_written_into_y():
    with torch.no_grad():
        for way in (add_experts, lambda y, x, A, B, routing: add_gathered(y, x, gather(A, B, routing))):
            problem = Problem()
            y = problem.y.clone()
            assert way(y, problem.x, problem.A, problem.B, problem.routing).data_ptr() == y.data_ptr()


def test_with_autograd_a_flat_y_is_written_to_as_well():
    problem = Problem()
    problem.x.requires_grad_()
    y = F.linear(problem.x.flatten(0, 1), torch.randn(7, 5, dtype=torch.float64))
    result = add_gated(y, problem.x, problem.A, problem.B, problem.routing.dense(4))
    assert result.data_ptr() == y.data_ptr()
    result.sum().backward()
    assert problem.x.grad is not None


@pytest.mark.parametrize("way", ["chosen", "few", "few, flat y", "many", "many, flat y"])
def test_gradients_are_those_of_the_loop(way):
    generator = torch.Generator().manual_seed(4)
    weights = torch.rand(2, 4, generator=generator, dtype=torch.float64)

    def gradients(use_loop: bool) -> list[torch.Tensor]:
        problem = Problem(k=4)
        leaves = [problem.x.requires_grad_(), weights.clone().requires_grad_()]
        problem.A, problem.B = problem.A.requires_grad_(), problem.B.mT.contiguous().requires_grad_()
        leaves += [problem.A, problem.B]
        problem.B = problem.B.mT
        problem.routing = Routing.mixture(leaves[1])
        if use_loop:
            out = problem.y.clone()
            for e in range(4):
                out = out + leaves[1][:, None, e, None] * (problem.x @ problem.A[e].T @ problem.B[e].T)
        else:
            out = problem.ways()[way]
        (out * torch.arange(out.numel(), dtype=torch.float64).view(out.shape)).sum().backward()
        return [leaf.grad for leaf in leaves]

    for ours, expected in zip(gradients(False), gradients(True), strict=True):
        assert torch.allclose(ours, expected)


def test_frozen_experts_get_no_gradient_and_no_full_size_tensor_is_kept_for_them():
    d, T = 64, 128
    problem = Problem(rows=2, T=T, d_in=d, d_out=d, dtype=torch.float32)
    gates = problem.routing.dense(4).clone().requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda tensor: tensor):
        y = torch.zeros(2 * T, d)
        result = add_gated(y, problem.x, problem.A, problem.B, gates)
    result.sum().backward()
    assert gates.grad is not None
    assert problem.A.grad is None
    assert max(kept) < 2 * T * d  # the largest thing kept is the low-rank part, not an input or output


# ---- cost --------------------------------------------------------------------------------------------------------------


def count_operators(function) -> int:
    class Counter(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            self.count += 1
            return operator(*args, **(kwargs or {}))

    with Counter() as counter, torch.no_grad():
        function()
    return counter.count


def test_the_number_of_operators_does_not_grow_with_experts_or_rows():
    counts = {way: set() for way in ("few", "many")}
    for rows, E, k in ((1, 2, 1), (2, 8, 3), (32, 64, 2)):
        problem = Problem(rows=rows, E=E, k=k)
        dense, gathered = problem.routing.dense(E), gather(problem.A, problem.B, problem.routing)
        counts["few"].add(count_operators(lambda p=problem, g=dense: add_gated(p.y, p.x, p.A, p.B, g)))
        counts["many"].add(count_operators(lambda p=problem, g=gathered: add_gathered(p.y, p.x, g)))
    assert all(len(numbers) == 1 for numbers in counts.values()), counts


def test_the_way_is_chosen_by_size():
    assert gathering_pays(rows=8, length=1500, k=1, num_experts=8)  # long inputs: compute what is chosen
    assert gathering_pays(rows=8, length=1, k=1, num_experts=1000)  # many languages: do not read them all
    assert not gathering_pays(rows=8, length=1, k=1, num_experts=8)  # a token step with few: read them once
    assert not gathering_pays(rows=1, length=1500, k=8, num_experts=8)  # all chosen: nothing to save


# ---- compile, autocast -------------------------------------------------------------------------------------------------


def test_compiled_it_is_one_graph_and_other_languages_do_not_recompile_it():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def run(y: torch.Tensor, x: torch.Tensor, A: torch.Tensor, B: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor):
        return add_experts(y, x, A, B, Routing(indices, weights))

    problem = Problem(rows=3)
    with torch.no_grad():
        for languages in ([0, 1, 2], [3, 3, 1], [2, 0, 0]):
            problem.routing = Routing.one_hot(languages).to(dtype=torch.float64)
            result = run(problem.y.clone(), problem.x, problem.A, problem.B, problem.routing.indices, problem.routing.weights)
            assert torch.allclose(result, problem.truth())
    assert counter.frame_count == 1


def test_under_autocast_the_base_result_keeps_its_type():
    problem = Problem(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear(problem.x, torch.eye(7, 5))
        assert y.dtype == torch.bfloat16
        problem.y = y
        for way, result in problem.ways().items():
            assert result.dtype == torch.bfloat16, way
            assert (result.double() - problem.truth()).abs().max() < TOLERANCE[torch.bfloat16], way
