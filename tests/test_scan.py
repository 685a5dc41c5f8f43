"""Loops of any length: numbers and gradients beside a plain Python loop, what is traced when, structures, bad input."""

import functools
import logging
import sys
from typing import Any, NamedTuple

import pytest
import torch
from comparison import relative_error
from scan_cases import F64, IN_OPS, Cell, assert_same, draw, plain_loop, real
from torch import Tensor, nn

from pcr_fx import UnsupportedError, scan, steps


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The steps that are traced from here on."""
    found: list[str] = []
    compile_ = steps.Captures._compile

    def noting(self: Any, *arguments: Any) -> Any:
        found.append(self.name)
        return compile_(self, *arguments)

    monkeypatch.setattr(steps.Captures, "_compile", noting)
    return found


def assert_captured(step: Any) -> None:
    """It did not run as it is, which would be right too."""
    found = steps.latest_of(step)
    assert found
    assert not any(one.failure for one in found)


@pytest.mark.parametrize("seed", range(14))
def test_drawn_loops(seed: int) -> None:
    loop = draw(seed)
    given = {"dim": loop.dim, "reverse": loop.reverse}
    options = {"planning": "estimated"} if seed % 5 == 0 else IN_OPS
    got = scan(loop.step, loop.init, loop.xs, options=options, **given)
    assert_same(got, plain_loop(loop.step, loop.init, loop.xs, **given), loop.leaves)
    assert_captured(loop.step)


def test_lengths_share_a_trace(traced: list[str]) -> None:
    cell = Cell()
    for length in (5, 1, 2, 3, 64, 1000, 7):
        h, x = real(2, 3), real(length, 2, 3)
        assert_same(scan(cell, h, x), plain_loop(cell, h, x), [h, x, cell.w])
    assert len(traced) == 1


def test_other_functions_of_one_code_share_a_trace(traced: list[str]) -> None:
    h, x = real(2, 3), real(9, 2, 3)
    for _ in range(3):
        w = real(3, 3)

        def step(h: Tensor, x: Tensor) -> tuple[Tensor, None]:
            return torch.tanh(h @ w + x), None  # noqa: B023

        assert_same(scan(step, h, x, options=IN_OPS), plain_loop(step, h, x), [h, x, w])
    assert len(traced) == 1


def test_what_is_closed_over_is_read_at_each_call() -> None:
    cell, h, x = Cell(), real(2, 3), real(9, 2, 3)
    settings = {"scale": 1.0}
    numbers = [1.0]

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        new, y = cell(h, x)
        if settings.get("doubled"):
            new = 2 * new
        return settings["scale"] * new * numbers[-1], y + offset

    offset = torch.tensor(1.0, dtype=F64)

    def check() -> None:
        assert_same(scan(step, h, x, options=IN_OPS), plain_loop(step, h, x), [h, x, cell.w])
        assert_captured(step)

    check()
    cell.w.data.mul_(0.5)
    check()
    cell.gain = 0.25
    check()
    settings["scale"] = 0.5
    check()
    settings["doubled"] = 1.0
    check()
    numbers.append(0.75)
    check()
    offset = offset + 1
    check()
    cell = Cell()
    check()
    handle = cell.register_forward_hook(lambda module, inputs, output: (0.5 * output[0], output[1]))
    check()
    handle.remove()
    check()
    cell.w = nn.Parameter(cell.w.detach() * 0.3)
    check()


def test_a_method_that_is_replaced_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, h, x = Cell(), real(2, 3), real(4, 2, 3)
    assert_same(scan(cell, h, x, options=IN_OPS), plain_loop(cell, h, x))
    monkeypatch.setattr(Cell, "forward", lambda self, h, x: (h * 0.5 + x, h.sum(-1)))
    assert_same(scan(cell, h, x, options=IN_OPS), plain_loop(cell, h, x))


def test_modes_of_modules() -> None:
    layer, h, x = nn.Sequential(nn.Linear(3, 3, dtype=F64), nn.Dropout(0.5)), real(2, 3), real(6, 2, 3)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.tanh(layer(h) + x)
        return h, h

    for training in (False, True, False):
        layer.train(training)
        torch.manual_seed(1)
        expected = plain_loop(step, h, x)
        torch.manual_seed(1)
        assert_same(scan(step, h, x, options=IN_OPS), expected, [h, x, *layer.parameters()])


def test_without_gradients_and_with() -> None:
    cell, h, x = Cell(), real(2, 3), real(17, 2, 3)
    for _ in range(2):
        with torch.no_grad():
            assert_same(scan(cell, h, x, options=IN_OPS), plain_loop(cell, h, x))
        assert_same(scan(cell, h, x, options=IN_OPS), plain_loop(cell, h, x), [h, x, cell.w])
    cell.w.requires_grad_(False)
    assert_same(scan(cell, h, x, options=IN_OPS), plain_loop(cell, h, x), [h, x])


def test_gradients_that_a_step_switches_on() -> None:
    w, h, x = real(3, 3), real(2, 3), real(5, 2, 3)

    def step(h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        with torch.enable_grad():
            return torch.tanh(h @ w + x), None

    options = {"kernels": False, "solver": "sequential"}
    for is_on in (False, True, False):
        with torch.set_grad_enabled(is_on):
            got, expected = scan(step, h, x, options=options), plain_loop(step, h, x)
        assert_same(got, expected, [h, x, w])


def test_no_steps() -> None:
    h = real(2, 3)
    carry, ys = scan(Cell(), h, torch.empty(0, 2, 3, dtype=F64))
    assert carry is h
    assert ys.shape == (0, 2)
    carry, ys = scan(lambda h, _: (2 * h, {"a": None, "b": h > 0}), h, length=0, reverse=True)
    assert carry is h
    assert ys["a"] is None
    assert (ys["b"].shape, ys["b"].dtype) == ((0, 2, 3), torch.bool)


@pytest.mark.parametrize("options", [None, IN_OPS])
def test_results_may_be_written_to(options: Any) -> None:
    cell, h, x = Cell(), real(2, 3), real(9, 2, 3)

    def loop(run: Any) -> Tensor:
        carry, (states, sums) = run(lambda h, x: (cell(h, x)[0], cell(h, x)), h, x)
        return states.mul_(2).sum() + sums.relu_().sum() + carry.sum()

    ours, theirs = loop(functools.partial(scan, options=options)), loop(plain_loop)
    assert_same(ours, theirs, [h, x, cell.w])


class State(NamedTuple):
    h: Tensor
    memory: Tensor


def test_structures() -> None:
    def step(state: State, x: dict[str, Any]) -> tuple[State, list[Any]]:
        h = torch.tanh(state.h + x["u"] * x["k"])
        return State(h, 0.5 * state.memory + h), [h, (None, x["k"] + 1), {"m": state.memory}]

    init = State(real(3), real(3))
    xs = {"u": real(5, 3), "k": torch.arange(5)}
    assert_same(scan(step, init, xs, options=IN_OPS), plain_loop(step, init, xs), [*init, xs["u"]])
    assert_captured(step)


def test_carries_that_are_no_reals() -> None:
    def step(carry: Any, x: Tensor) -> tuple[Any, Tensor]:
        h, count, seen = carry
        h = torch.where(seen, h + count * x, x)
        return (h, count + 1, seen | (x > 0).any()), h

    init = (real(3), torch.tensor(0), torch.tensor(False))
    x = real(6, 3)
    assert_same(scan(step, init, x, options=IN_OPS), plain_loop(step, init, x), [init[0], x])
    assert_same(
        scan(lambda c, x: (c + x, c), torch.tensor(0), torch.arange(9)),
        (torch.tensor(36), torch.arange(9).cumsum(0) - torch.arange(9)),
    )


@pytest.mark.parametrize(
    "step",
    [
        lambda c, x: ((c[1], c[0] + x), None),
        lambda c, x: ((c[0], c[0] + x), c[1]),
        lambda c, x: ((x, c[0]), c),
        lambda c, x: ((c[0] * x, c[0] * x), (x, x)),
        lambda c, x: (c, c[0] * x),
        lambda c, x: ((x, x), (c[0], c[0], c[0] + c[1])),
    ],
    ids=["swapped", "kept", "shifted", "same", "nothing handed on", "inputs"],
)
def test_what_is_handed_on(step: Any) -> None:
    init, x = (real(2, 3), real(2, 3)), real(5, 2, 3)
    assert_same(scan(step, init, x, options=IN_OPS), plain_loop(step, init, x), [*init, x])
    assert_captured(step)


def test_what_cannot_be_traced_runs_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    def branching(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return (h + x if h.sum() > 0 else h - x), h

    def noting(h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        seen.append(len(seen))
        return h * x, None

    h, x = real(3), real(5, 3)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_same(scan(branching, h, x, options=IN_OPS), plain_loop(branching, h, x), [h, x])
    assert len([r for r in caplog.records if "step by step" in r.message]) == 1
    scan(noting, h, x)
    assert seen == list(range(5))


def test_numbers_that_change_all_the_time(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    module = sys.modules["pcr_fx.scan"]  # the package names its function so, too
    monkeypatch.setattr(module, "captures_of", functools.partial(steps.captures_of, limit=2))
    h, x = real(2), real(3, 2)
    for index in range(4):
        step = functools.partial(lambda h, x, a: (torch.tanh(a * h + x), None), a=0.1 * index)
        assert_same(scan(step, h, x, options=IN_OPS), plain_loop(step, h, x))
    assert "a number that changes" in caplog.text


class Surrogate(torch.autograd.Function):
    """A square with the derivative of a cube."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return 3 * cotangent * x * x


@pytest.mark.parametrize("compiles", [False, True])
def test_derivatives_of_a_functions_own(compiles: bool) -> None:
    # The first carry has no gradient, and all others have.
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return 0.1 * Surrogate.apply(h) + x * w, None

    def loop(h: Tensor, x: Tensor) -> tuple[Tensor, None]:
        return scan(step, h, x, options=None if compiles else IN_OPS)

    w, h, x = real(3), torch.randn(3, dtype=F64), torch.randn(5, 3, dtype=F64)
    run = torch.compile(loop, backend="aot_eager", fullgraph=True) if compiles else loop
    assert_same(run(h, x), plain_loop(step, h, x), [w])


def test_steps_with_graphs_of_their_own() -> None:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cond(h.sum() > 0, lambda h, x: h + x, lambda h, x: h - x, (h, x)), h

    h, x = real(3), real(5, 3)
    assert_same(scan(step, h, x), plain_loop(step, h, x), [h, x])


def test_a_loop_in_a_loop() -> None:
    w = real(3, 3)

    def outer(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h, _ = scan(lambda h, u: (torch.tanh(h @ w + u), None), h, x)
        return h, h

    h, x = real(2, 3), real(4, 5, 2, 3)

    def plain(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        h, _ = plain_loop(lambda h, u: (torch.tanh(h @ w + u), None), h, x)
        return h, h

    assert_same(scan(outer, h, x, options=IN_OPS), plain_loop(plain, h, x), [h, x, w])


def test_transforms_of_functions() -> None:
    cell, h, x = Cell(), torch.randn(4, 2, 3, dtype=F64), torch.randn(5, 2, 3, dtype=F64)

    def loss(h: Tensor, run: Any) -> Tensor:
        return run(cell, h, x)[1].sum()

    got = torch.func.vmap(torch.func.grad(functools.partial(loss, run=scan)))(h)
    assert relative_error(got, torch.func.vmap(torch.func.grad(functools.partial(loss, run=plain_loop)))(h)) < 1e-9


@pytest.mark.parametrize("solver", ["newton", "sequential"])
def test_solvers(solver: str) -> None:
    cell, options = Cell(), {"solver": solver}
    for length in (12, 30):
        h, x = real(2, 3), real(length, 2, 3)
        assert_same(scan(cell, h, x, options=options), plain_loop(cell, h, x), [h, x, cell.w], 1e-8)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("callable", (3, torch.ones(2), torch.ones(3))),
        ("init holds no tensor", (lambda c, x: (c, x), (), torch.ones(3))),
        ("init must be tensors, got int 0", (lambda c, x: (c, x), 0, torch.ones(3))),
        ("xs must be tensors, got float", (lambda c, x: (c, x), torch.ones(2), {"a": 1.0})),
        ("how many steps", (lambda c, x: (c, x), torch.ones(2))),
        (
            "must agree on the number of steps, got 3 and 4",
            (lambda c, x: (c, None), torch.ones(2), (torch.ones(3), torch.ones(4))),
        ),
        ("pair", (lambda c, x: c, torch.ones(2), torch.ones(3))),
        ("structure of init", (lambda c, x: ((c, c), x), torch.ones(2), torch.ones(3))),
        (r"\[2\] torch.float32 became \[4\]", (lambda c, x: (torch.cat([c, c]), x), torch.ones(2), torch.ones(3))),
        ("float32 became .* torch.float64", (lambda c, x: (c.double(), x), torch.ones(2), torch.ones(3))),
        ("ys must be tensors or None, got float", (lambda c, x: (c + x, 1.0), torch.ones(2), torch.ones(3))),
        ("write into its carry", (lambda c, x: (c.add_(x), None), torch.ones(2), torch.ones(3))),
    ],
)
def test_bad_input(message: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(UnsupportedError, match=message):
        scan(*arguments)


@pytest.mark.parametrize("given", [{"dim": 2}, {"dim": True}, {"reverse": 1}, {"length": 4}, {"length": -1}])
def test_bad_settings(given: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError):
        scan(lambda c, x: (c, x), torch.ones(2), torch.ones(3), **given)


@pytest.mark.parametrize("compiles", [False, True])
@pytest.mark.parametrize(
    "inner",
    [
        lambda h, x, w: torch.func.grad(lambda z: torch.tanh(z @ w).square().sum())(h) + x,
        lambda h, x, w: torch.func.vmap(lambda a, b: torch.tanh(a @ w + b))(h, x),
        lambda h, x, w: h + x * torch.func.jvp(torch.tanh, (h @ w,), (x,))[1],
    ],
    ids=["grad", "vmap", "jvp"],
)
def test_transforms_within_a_step(inner: Any, compiles: bool) -> None:
    w, h, x = real(3, 3), real(2, 3), real(4, 2, 3)

    def loop(run: Any, h: Tensor, x: Tensor) -> Any:
        return run(lambda h, x: (inner(h, x, w), torch.func.vmap(torch.sin)(h)), h, x)

    compiled = torch.compile(loop, backend="eager") if compiles else loop
    assert_same(compiled(scan, h, x), loop(plain_loop, h, x), [h, x, w])


@pytest.mark.parametrize("compiles", [False, True])
def test_what_is_closed_over_is_returned_as_it_is(compiles: bool) -> None:
    w, h, x = real(2, 3), real(2, 3), real(4, 2, 3)
    for step in (lambda h, x: (torch.tanh(h + x), w), lambda h, x: (w, h), lambda h, x: (w, w)):

        def loop(run: Any, h: Tensor, x: Tensor, step: Any = step) -> Any:
            return run(step, h, x)

        compiled = torch.compile(loop, backend="eager") if compiles else loop
        assert_same(compiled(functools.partial(scan, options=IN_OPS), h, x), loop(plain_loop, h, x), [h, x, w])
        if not compiles:
            assert_captured(step)


def test_another_default_dtype() -> None:
    def step(h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(h * torch.full((3,), 0.1).double() + x), h

    h, x, options = torch.randn(2, 3, dtype=F64), torch.randn(5, 2, 3, dtype=F64), {"planning": "estimated"}
    try:
        for dtype in (torch.float32, torch.float64):
            torch.set_default_dtype(dtype)
            assert_same(scan(step, h, x, options=options), plain_loop(step, h, x), error=1e-12)
    finally:
        torch.set_default_dtype(torch.float32)
