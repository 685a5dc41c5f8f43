"""Whatever a model looks like, a rewrite computes what the model computes: random models against themselves.

Most cases evaluate each chain by a plain loop over its body. That leaves out the solver, which has tests of its own, and
makes thousands of cases affordable; a few go through the real ways in.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import hypothesis
import pytest
import random_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import Program
from torch import Tensor, fx, nn

import pcr_fx
from pcr_fx.backend import rewrite_captured
from pcr_fx.errors import CaptureError
from pcr_fx.graphs.attributes import attributes_of
from pcr_fx.options import Options
from pcr_fx.passes.capture import capture_model
from pcr_fx.passes.detect import FoundChain, find_chains
from pcr_fx.passes.normalise import normalise_graph
from pcr_fx.passes.rewrite import rewrite_chains, sortable_chains
from pcr_fx.ways import evaluate_whole

RANDOM = st.randoms(use_true_random=False)


def many(cases: int) -> settings:
    return settings(
        max_examples=cases, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )


class PlainLoop(nn.Module):
    """Stands in for the solve node: its body, block by block."""

    def __init__(self, found: FoundChain) -> None:
        super().__init__()
        self.chain, self.taps = found.chain, found.leaving.taps

    def forward(self, states: Sequence[Tensor], *given: Sequence[Tensor]) -> list[Tensor]:
        pairs = list(zip(given[::2], given[1::2], strict=True))
        found = evaluate_whole(self.chain, states, pairs)
        return [found[block][index] for index, block in self.taps]


def rewrite(model: nn.Module, x: Tensor | None, min_length: int) -> tuple[Callable[..., Any], list[int]]:
    """What `pcr_fx.transform` makes of a model, with plain loops in place of solve nodes; and the chains' lengths."""
    captured = capture_model(model, x)
    graph = captured.graph
    normalise_graph(graph)
    attributes = attributes_of(model, graph)
    chains = sortable_chains(graph, find_chains(graph, attributes, min_length).chains)
    loops = {f"loop_{index}": PlainLoop(found) for index, found in enumerate(chains)}

    def stack(new: fx.Graph, column: Sequence[fx.Node], copies: dict[fx.Node, fx.Node]) -> fx.Node:
        return new.call_function(torch.stack, ([copies[node] for node in column],))

    new = rewrite_chains(graph, chains, list(loops), stack)
    return fx.GraphModule({**attributes, **loops}, new), [found.chain.length for found in chains]


# --- comparing -------------------------------------------------------------------------------------------------------


def observe(run: Callable[..., Any], model: nn.Module, x: Tensor, gradients: bool) -> dict[str, Tensor]:
    """All that a call of `run` does: outputs, writes to the input and to the model's state, and gradients."""
    before = [(tensor, tensor.detach().clone()) for tensor in [*model.parameters(), *model.buffers()]]
    torch.manual_seed(0)
    leaf = x.clone().requires_grad_(gradients)
    try:
        with torch.set_grad_enabled(gradients):
            given = leaf.clone()
            outputs = run(given)
            seen = {f"output {index}": output.detach().clone() for index, output in enumerate(outputs)}
            seen["input"] = given.detach().clone()
            seen |= {name: value.detach().clone() for name, value in model.state_dict().items()}
            seen["random state"] = torch.rand(1, dtype=torch.float64)
            if gradients:
                seen |= gradients_of(outputs, {"input": leaf, **dict(model.named_parameters())})
        return seen
    finally:
        for tensor, value in before:
            tensor.data.copy_(value)


def gradients_of(outputs: Iterable[Tensor], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients of a fixed weighting of the outputs."""
    total = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for output in outputs:
        total = total + (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view(output.shape)).sum()
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    return {
        f"gradient of {name}": torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def expected_of(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], bool] | None:
    """What the model itself does, with gradients if it has any; `None` when it cannot be run at all."""
    for gradients in (True, False):
        try:
            return observe(model, model, x, gradients), gradients
        except (RuntimeError, TypeError, IndexError, ValueError, AttributeError):
            continue
    return None


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, value in expected.items():
        assert got[name].shape == value.shape and got[name].dtype == value.dtype, name
        finite = value[value.isfinite()]
        scale = float(finite.abs().max()) if finite.numel() else 0.0
        close = torch.isclose(got[name], value, rtol=0, atol=tolerance * scale, equal_nan=True)
        assert close.all(), f"{name}: {got[name]} instead of {value}"


def check(program: Program, min_length: int, known: bool = True) -> list[int] | None:
    """Rewrite a model and compare; the lengths of its chains, or `None` if it cannot be run or read."""
    if hypothesis.currently_in_test_context():
        hypothesis.note(f"min_length={min_length}, known={known}, {program.seed=}\n{program.source()}")
    model, x = random_models.build(program)
    expected = expected_of(model, x)
    if expected is None:
        return None
    try:
        rewritten, lengths = rewrite(model, x if known else None, min_length)
    except CaptureError:
        return None
    if lengths:
        assert_same(observe(rewritten, model, x, expected[1]), expected[0], 1e-10)
    return lengths


# --- the tests -------------------------------------------------------------------------------------------------------


def changed_chain(rng: random.Random) -> tuple[Program, int, bool]:
    """A chain with up to three things changed, how short a chain may be, and whether its shapes are known."""
    program = random_models.random_chain(rng, impure=rng.randrange(4) == 0)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        random_models.change(rng, program)
    return program, rng.randint(2, 8), rng.randrange(4) > 0


def changed_words(rng: random.Random) -> tuple[Program, int, bool]:
    program = random_models.random_words(rng)
    for _ in range(rng.choice([0, 0, 1])):
        random_models.change(rng, program)
    return program, rng.randint(2, 5), rng.randrange(4) > 0


@many(400)
@given(RANDOM)
def test_chains_with_something_changed(rng: random.Random) -> None:
    check(*changed_chain(rng))


@many(150)
@given(RANDOM)
def test_words_of_ops(rng: random.Random) -> None:
    check(*changed_words(rng))


def test_most_cases_hold_a_chain() -> None:
    """Random cases that are never rewritten would prove nothing."""
    cases = [check(*changed_chain(random.Random(seed))) for seed in range(100)]
    assert sum(bool(lengths) for lengths in cases) > 40


@pytest.mark.parametrize("seed", range(60))
def test_a_chain_left_as_it_is_is_found(seed: int) -> None:
    program = random_models.random_chain(random.Random(seed), min_length=10)
    lengths = check(program, 5)
    # Whole numbers that differ between blocks must stay numbers beside a tensor of truth values.
    mixed = "> 0) *" in program.source()
    if lengths is not None and random_models.is_recurrent(program) and not mixed:
        assert lengths and max(lengths) >= 5, program.source()


@pytest.mark.parametrize("seed", range(20))
def test_by_the_solver(seed: int) -> None:
    program, min_length, _ = changed_chain(random.Random(1000 + seed))
    model, x = random_models.build(program)
    expected = expected_of(model, x)
    if expected is None:
        return
    try:
        fast = pcr_fx.transform(model, x, {"solver": "newton", "kernels": False, "min_length": min_length})
    except CaptureError:
        return
    assert_same(observe(fast, model, x, expected[1]), expected[0], 1e-8)


@pytest.mark.parametrize("seed", range(12))
def test_by_dynamo(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    program, min_length, _ = changed_chain(random.Random(2000 + seed))
    model, x = random_models.build(program)
    expected = expected_of(model, x)
    if expected is None:
        return

    def backend(graph_module: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        rewrite_captured(graph_module, example_inputs, Options(solver="sequential", min_length=min_length))
        return graph_module.forward

    torch._dynamo.reset()
    assert_same(observe(torch.compile(model, backend=backend), model, x, expected[1]), expected[0], 1e-10)
