"""Whether a model computes the same by a solver, or crashes."""

from __future__ import annotations

import contextlib
import functools
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import pcr_fx
from fuzz.cases import Case
from fuzz.interpreted import interpreted
from pcr_fx.errors import BodyError, CaptureError

SOLVERS = ("newton", "quasi-newton", "picard", "jacobi", "sequential")
TRANSFORMS = ("jvp", "vmap", "gradients of each", "jvp of gradients")
# How far a result may be from float64: some times as far as eager's, and a share of its size for each dtype.
_TIMES, _SHARE = 20.0, {torch.bfloat16: 3e-2, torch.float32: 2e-4, torch.float64: 1e-9}
# Inputs moved by so many roundings show how far a result may be moved by rounding alone.
_MOVED = 4.0


@dataclass(frozen=True)
class Call:
    """How a model is called.

    Attributes:
        way_in: "transform", "compile" or "solve_chain".
        solver: of `SOLVERS`, in PyTorch's ops; "interpreted" or "kernel", block by block in what is lowered; "kernel newton".
        twice: whether gradients of gradients are compared too.
        batch: of a call that comes first, by which the model is planned; none if it is 0.
        under: one of `TRANSFORMS` that the model is called under; none if it is empty.
    """

    way_in: str
    solver: str
    twice: bool = False
    batch: int = 0
    under: str = ""

    @property
    def options(self) -> dict[str, Any]:
        kernel = self.solver.startswith(("kernel", "interpreted"))
        solver = "newton" if self.solver == "kernel newton" else "sequential" if kernel else self.solver
        return {"solver": solver, "kernels": kernel, "min_length": 2, "plan_cache": False}


def draw_calls(case: Case, kernels: float) -> list[Call]:
    """Some ways to call a model; a share of `kernels` of these compiles native code.

    To trace a model takes most of the time, so that each is called in many ways, all planned for one batch.
    """
    rng = random.Random(case.seed)
    if case.prelude:
        return [
            Call("transform", "interpreted", rng.randrange(8) == 0),
            Call("transform", rng.choice(SOLVERS)),
            Call("compile", rng.choice(["interpreted", *SOLVERS])),
        ]
    batch = rng.choice([0, 0, *(other for other in (1, 2, 4, 18) if other != case.batch)])
    solvers = ["interpreted", "newton", *rng.sample(SOLVERS[1:], 3)]
    calls = [Call("transform", solver, batch=batch) for solver in solvers]
    calls += [Call("transform", solver, True, batch) for solver in rng.sample(solvers, 2)]
    if rng.randrange(10) == 0:
        calls.append(Call("transform", rng.choice(solvers), under=rng.choice(TRANSFORMS)))
    if rng.randrange(3) == 0:
        calls += [Call("solve_chain", solver) for solver in ("interpreted", *rng.sample(SOLVERS, 2))]
    if rng.randrange(12) == 0:
        calls.append(Call("compile", rng.choice([*SOLVERS, "interpreted"])))
    if rng.random() < kernels * len(calls):
        calls.append(Call("transform", rng.choice(["kernel", "kernel", "kernel newton"]), batch=batch))
    return calls


@dataclass(frozen=True)
class Verdict:
    """How a call went.

    Attributes:
        kind: "right", "wrong", "crashed"; or "refused", where eager itself raises, `solve_chain` says that this is no chain, or
            `transform` that it cannot trace the model and `torch.compile` can.
        chains, kernels: how many chains were found, and how many of these have a kernel.
    """

    kind: str
    words: str = ""
    chains: int = 0
    kernels: int = 0


def judge(case: Case, call: Call) -> Verdict:
    reference = _reference(case, call.twice, call.under, call.way_in == "solve_chain")
    if isinstance(reference, str):
        return Verdict("refused", reference)
    if call.way_in == "solve_chain" and not all(bool(one.isfinite().all()) for one in reference[0]):
        # A cotangent of zero times what is not finite is NaN in a chain; eager does not go where there is no cotangent.
        return Verdict("refused", "not finite")
    names, dtype = case.build(), getattr(torch, case.dtype)
    model, given = names["Model"]().to(dtype), names["inputs"](dtype)
    before = replace(case, batch=call.batch)
    if call.batch and isinstance(error := _reference(before, False, call.under, False), str):
        return Verdict("refused", error)
    try:
        with _quiet(), interpreted() if call.solver == "interpreted" else contextlib.nullcontext():
            first = before.build()["inputs"](dtype) if call.batch else given
            run = _way_in(call, model, first, names["step"], case.tapped)
            if call.batch:
                _results(run, model, first, False)
            got = _results(run, model, given, call.twice, call.under)
            is_module = isinstance(run, nn.Module) and call.way_in == "transform"
            plans = [entry.plan for entry in run.report.chains] if is_module else []
    except Exception as error:
        if call.way_in == "solve_chain" and isinstance(error, BodyError):
            return Verdict("refused", str(error))
        if isinstance(error, CaptureError) and "reads such models" in str(error):
            return Verdict("refused", str(error))
        return Verdict("crashed", f"{type(error).__name__}: {str(error)[:500]}")
    found = len(plans), sum(plan is not None and not isinstance(plan.kernel, str) for plan in plans)
    expected, exact = reference
    words = _difference(got, expected, exact)
    if words and not _is_sensitive(case, call, got, exact):
        return Verdict("wrong", words, *found)
    return Verdict("right", "", *found)


@functools.lru_cache(maxsize=8)
def _reference(case: Case, twice: bool, under: str, by_tensors: bool) -> tuple[list[Tensor], list[Tensor]] | str:
    """What eager gives, in the dtype of the case and in float64; or the error that it raises.

    Args:
        by_tensors: whether a block's number is a tensor, as `solve_chain` is given it: times a mask that is another dtype.
    """
    try:
        names, dtype = case.build(), getattr(torch, case.dtype)
        model = names["Model"]().to(dtype)
        if by_tensors:
            block = model.block
            model.block = lambda t, xs: (*block(t, xs)[:-1], xs.new_tensor(block(t, xs)[-1]))
        with _quiet():
            expected = _results(model, model, names["inputs"](dtype), twice, under)
            return expected, _results(model.double(), model, names["inputs"](torch.float64), twice, under)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _way_in(
    call: Call, model: nn.Module, given: Sequence[Tensor], step: Callable[..., Any], tapped: Sequence[int]
) -> Callable[..., Any]:
    if call.way_in == "transform":
        return pcr_fx.transform(model, tuple(given), options=call.options)
    if call.way_in == "compile":
        torch._dynamo.reset()
        return torch.compile(model, backend="deeppcr", options={**call.options, "inner_backend": "eager"})
    options = {key: value for key, value in call.options.items() if key != "min_length"}

    def run(x: Tensor, xs: Tensor) -> tuple[Tensor, ...]:
        blocks = [model.block(t, xs) for t in range(len(xs))]  # type: ignore[operator]
        numbers = [xs.new_tensor(block[-1]) for block in blocks]
        operands = tuple(torch.stack(list(parts)) for parts in zip(*(block[:-1] for block in blocks), strict=True))
        shared = model.s, model.u, model.order, model.table
        solved = pcr_fx.solve_chain(
            step, (x, 0.5 * x, x), (*operands, torch.stack(numbers)), shared=shared, options=options
        )
        return (*solved.final[:2], *(solved.trajectory[0][tap] for tap in tapped))

    return run


def _results(
    run: Callable[..., Any], model: nn.Module, given: Sequence[Tensor], twice: bool, under: str = ""
) -> list[Tensor]:
    """The outputs, and the gradients of a weighting of them by the inputs and all parameters; perhaps theirs in turn."""
    if under:
        return [result.detach().clone() for result in _transformed(run, given, under)]
    x, xs = (tensor.detach().requires_grad_() for tensor in given)
    leaves = [x, xs, *model.parameters()]
    torch.manual_seed(0)
    outputs = run(x, xs)
    after = torch.rand(2, dtype=torch.float64)  # as far as the model has drawn from the generator
    loss = _weighted(outputs)
    gradients = torch.autograd.grad(loss, leaves, create_graph=twice, allow_unused=True, materialize_grads=True)
    results = [*outputs, after, *gradients]
    if twice:
        again = sum((gradient**2).sum() for gradient in gradients)
        if again.requires_grad:
            results += torch.autograd.grad(again, leaves, allow_unused=True, materialize_grads=True)
    return [result.detach().clone() for result in results]


def _weighted(outputs: Sequence[Tensor]) -> Tensor:
    return sum((o * torch.linspace(-1, 2, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outputs)  # type: ignore[return-value]


def _transformed(run: Callable[..., Any], given: Sequence[Tensor], under: str) -> list[Tensor]:
    """What a function transform makes of a model."""
    primals, tangents = tuple(given), tuple(tensor.sin() for tensor in given)
    several = tuple(torch.stack([tensor, 0.5 * tensor, 0.9 * tensor]) for tensor in given)
    gradients = torch.func.grad(lambda x, xs: _weighted(run(x, xs)), (0, 1))
    found: Any = {
        "jvp": lambda: torch.func.jvp(run, primals, tangents),
        "vmap": lambda: torch.vmap(run)(*several),
        "gradients of each": lambda: torch.vmap(gradients)(*several),
        "jvp of gradients": lambda: torch.func.jvp(gradients, primals, tangents),
    }[under]()
    return pytree.tree_leaves(found)  # type: ignore[no-any-return]


def _difference(got: Sequence[Tensor], expected: Sequence[Tensor], exact: Sequence[Tensor]) -> str:
    for index, (ours, theirs, true) in enumerate(zip(got, expected, exact, strict=True)):
        if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
            return f"result {index} is {ours.dtype}{list(ours.shape)}, in eager {theirs.dtype}{list(theirs.shape)}"
        finite = theirs.isfinite()
        if not torch.equal(finite, ours.isfinite()):
            return f"result {index} is finite elsewhere than in eager"
        ours, theirs, true = (torch.where(finite, one.double(), 0.0) for one in (ours, theirs, true))
        size = float(true.abs().max()) if true.numel() else 0.0
        error, eager = (float((one - true).abs().max()) if one.numel() else 0.0 for one in (ours, theirs))
        if error > _TIMES * eager + _SHARE[expected[index].dtype] * (size + 1e-2):
            return f"result {index} is {error:.3g} off where eager is {eager:.3g}; it is as large as {size:.3g}"
    return ""


def _is_sensitive(case: Case, call: Call, got: Sequence[Tensor], exact: Sequence[Tensor]) -> bool:
    """Whether inputs moved by a few roundings move eager's results as far as ours are off: a kink, or chaos."""
    names = case.build()
    dtype = getattr(torch, case.dtype)
    draw = torch.Generator().manual_seed(0)

    def moved(tensor: Tensor) -> Tensor:
        noise = 2 * torch.rand(tensor.shape, generator=draw, dtype=torch.float64) - 1
        return tensor.double() * (1 + _MOVED * torch.finfo(dtype).eps * noise)

    for _ in range(6):
        model = names["Model"]().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(moved(parameter))
        others = _results(model, model, [moved(tensor) for tensor in names["inputs"](dtype)], call.twice, call.under)
        if not _difference([one.to(dtype) for one in others], [one.to(dtype) for one in exact], exact):
            continue
        return True
    return False
