"""NaN, infinities, zeros of either sign, the smallest and the largest numbers, ties and kinks: they go through kernels where they
go in eager, forward and back, in each op that has a rule and in the functions of PyTorch that are decomposed to such."""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled_functions import LANES, call_compiled
from lowered_bodies import pullback_of, traced
from test_codegen_lowering import NO_PULLBACK, use_of
from torch import Tensor

from pcr_fx.body import written_out
from pcr_fx.codegen import Function, lower
from pcr_fx.codegen.aten import RULES

pytestmark = pytest.mark.usefixtures("kernel_cache")

SHAPE, SAMPLES, TOGETHER = (3, 4), 96, 8
Body = Callable[..., Any]


def _first(function: Body, x: Tensor) -> Tensor:
    return function(x)


def _loss(function: Body, x: Tensor, y: Tensor) -> Tensor:
    return function(x, y, reduction="none")


def _inverse(function: Body, x: Tensor) -> Tensor:
    return 1 / function(x)


# Of tensors `[3, 4]`.
FUNCTIONS: dict[str, Body] = {
    **{name: functools.partial(_first, getattr(F, name)) for name in """relu gelu silu softplus elu celu selu leaky_relu hardtanh
    hardswish hardsigmoid mish logsigmoid softsign tanhshrink softshrink hardshrink relu6 sigmoid tanh""".split()},
    **{name: functools.partial(_loss, getattr(F, name)) for name in "smooth_l1_loss huber_loss mse_loss l1_loss".split()},
    **{f"one over {name}": functools.partial(_inverse, getattr(torch, name)) for name in """abs sign tanh expm1 sin atan round
    sqrt relu""".split()},
    "tanh gelu": lambda x: F.gelu(x, approximate="tanh"),
    "angle": lambda x: torch.angle(x),
    "logaddexp2": lambda x, y: torch.logaddexp2(x, y),
    "infinite": lambda x: torch.where(torch.isinf(x), 0.5, x),
    "rounded to decimals": lambda x: torch.round(x, decimals=2) + torch.round(x, decimals=-1),
    "threshold": lambda x: F.threshold(x, 0.3, -0.1),
    "prelu": lambda x, y: F.prelu(x, y[:1, :1].reshape(1)),
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: x.logsumexp(-1),
    "layer_norm": lambda x, y, z: F.layer_norm(x, (4,), y[:1].reshape(4), z[:1].reshape(4)),
    "rms_norm": lambda x, y: F.rms_norm(x, (4,), y[:1].reshape(4)),
    "norm": lambda x: x.norm(dim=-1),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "glu": lambda x: F.glu(x, -1),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "lerp by a tensor": lambda x, y, z: torch.lerp(x, y, z),
    "addcmul": lambda x, y, z: torch.addcmul(x, y, z, value=0.5),
    "addcdiv": lambda x, y, z: torch.addcdiv(x, y, z, value=0.5),
    "isfinite": lambda x: x * x.isfinite(),
    "signbit": lambda x: 1 / x,
    "masked_fill": lambda x, y: x.masked_fill(y > 0, 0.5),
    "mask times x": lambda x: ((x > 0) & (x < 2)).to(x.dtype) * x,
    "zero times x": lambda x: (x > 0).to(x.dtype) * x + 0 * x,
    "where of a product with zero": lambda x: torch.where(x > 0, x.abs().sqrt(), x * 0),
    "one over zero minus x": lambda x: 1 / (0.0 - x),
    "one over minus x": lambda x: 1 / -x,
    "logaddexp": lambda x, y: torch.logaddexp(x, y),
    "clamp by tensors": lambda x, y, z: torch.clamp(x, y, z),
    "cosine_similarity": lambda x, y: F.cosine_similarity(x, y),
    "std": lambda x: x.std(-1),
    "max": lambda x: x.amax(-1, keepdim=True) - x,
    "sinc": lambda x: torch.sinc(x),
    "frac": lambda x: torch.frac(x),
    "binary_cross_entropy_with_logits": functools.partial(_loss, F.binary_cross_entropy_with_logits),
    "mean smooth_l1_loss": lambda x, y: F.smooth_l1_loss(x, y, beta=0.5),
    "pairwise_distance": lambda x, y: F.pairwise_distance(x, y),
    "logit": lambda x: torch.logit(x, 0.1),
    "outer": lambda x, y: torch.outer(x.reshape(-1)[:3], y.reshape(-1)[:3]),
    "poisson_nll_loss": lambda x, y: F.poisson_nll_loss(x, y, reduction="none"),
    "sgn": lambda x: x * torch.sgn(x),
    "x ** -2": lambda x: x ** -2,
    "var of all": lambda x: x.var(-1, correction=0),
    "group_norm": lambda x: F.group_norm(x.reshape(1, 4, 3), 2),
    "softmin": lambda x: F.softmin(x, -1),
}  # fmt: skip


def _batch_norm(function: Body, x: Tensor, y: Tensor) -> Tensor:
    zeros, ones = torch.zeros(4, dtype=x.dtype), torch.ones(4, dtype=x.dtype)
    return function(x, zeros, ones, y[:1].reshape(4))


FUNCTIONS["batch_norm"] = functools.partial(_batch_norm, F.batch_norm)
# What bodies have in place of these.
WRITTEN_OUT: dict[str, Body] = {
    "batch_norm": functools.partial(_batch_norm, written_out.batch_norm),
    "binary_cross_entropy_with_logits": functools.partial(_loss, written_out.binary_cross_entropy_with_logits),
    "logit": lambda x: written_out.logit(x, 0.1),
}
BODIES = {**{name: use_of(name) for name in RULES}, **FUNCTIONS}
# These read what is empty where there is a NaN.
for _name in [name for name in RULES if "empty" in name]:
    del BODIES[_name]
WITHOUT_PULLBACK = {*NO_PULLBACK}

# --- what PyTorch does not decide ---
# Whether a NaN stops a gradient: its vectors and its numbers do otherwise, so that it depends on the place in memory.
AT_NAN = {"hardtanh", "relu6", "elu", "celu", "selu", "hardswish", "softshrink", "hardshrink", "logit"}
# The sign of a zero, likewise or between its own formulas.
SIGNS = {"maximum.default", "minimum.default", "clamp.Tensor", "clamp by tensors", "softshrink", "lerp by a tensor"}
# NaN or infinity where several of them are added up, which depends on the order.
KINDS = {"var_mean.correction", "layer_norm", "rms_norm", "group_norm"}
# Whether a square overflows whose root would not, or a product whose sum would not: PyTorch computes some of these in float64,
# and kernels fuse products with sums.
OVERFLOWS = set("""layer_norm rms_norm group_norm std norm normalize cosine_similarity pairwise_distance""".split()) | {
    "lerp by a tensor",
    "binary_cross_entropy_with_logits",
}
# The smallest numbers, which its vectors lose.
SMALLEST = {"fmod.Tensor", "remainder.Tensor", "div.Tensor_mode"}
# The digits beyond float32 of a sixth.
COARSE = {"hardsigmoid"}


def arity(body: Body) -> int:
    return len(inspect.signature(body).parameters)


def numbers_of(body: Body, given: list[Tensor]) -> Tensor:
    """All results of a body in a row, truth values as 0 and 1."""
    found = body(*given[: arity(body)])
    parts = found if isinstance(found, tuple | list) else [found]
    return torch.cat([part.reshape(-1).to(given[0].dtype) for part in parts])


def everything(names: Sequence[str], *given: Tensor) -> list[Tensor]:
    """The results of some bodies, and the cotangents of their arguments; the last argument is a cotangent."""
    *arguments, cotangent = given
    results = []
    for name in names:
        body = BODIES[name]
        own, printed = arguments[: arity(body)], WRITTEN_OUT.get(name, body)

        def flat(*own: Tensor, printed: Body = printed) -> Tensor:
            return numbers_of(printed, list(own))

        value = flat(*own)
        results.append(value)
        if name not in WITHOUT_PULLBACK:
            results += pullback_of(flat)(*own, cotangent[: len(value)])
    return results


def draw(dtype: torch.dtype) -> list[Tensor]:
    """Three arguments and a cotangent: in half of the samples all numbers are special, in the others one of each argument.

    There may be one large number among those that are added up: of several it depends on the order whether they overflow.
    """
    generator = torch.Generator().manual_seed(0)
    smallest = torch.finfo(dtype).tiny / 8
    special = [math.nan, math.inf, -math.inf, 0.0, -0.0, smallest, -smallest, 1.0, -1.0]
    # Where functions above have kinks, or round to even.
    special += [0.5, -0.5, 1.5, 2.5, 0.3, 0.1, -0.2, -0.4, 3.0, -3.0, 6.0, 20.0]
    large = [1e38, -1e38]

    def some(values: list[float], *shape: int) -> Tensor:
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), shape, generator=generator)]

    def sparse(count: int) -> Tensor:
        # Eighths, none so small that a difference of two has no digits left.
        plain = torch.randint(1, 24, (count, 12), generator=generator).to(dtype) / 8
        plain = plain * (1 - 2 * torch.randint(2, (count, 12), generator=generator))
        where = torch.randint(12, (count, 1), generator=generator)
        return plain.scatter(1, where, some(special + 3 * large, count, 1))

    half = SAMPLES // 2
    arguments = [torch.cat([some(special, half, 12), sparse(half)]) for _ in range(3)]
    return [*(one.view(SAMPLES, *SHAPE) for one in arguments), some([1.0, -2.0, 0.5], SAMPLES, 40)]


def neighbours(name: str) -> tuple[str, ...]:
    """The bodies that one is compiled with: a compiler takes longer for many in one function than for as many in several."""
    names = list(BODIES)
    first = names.index(name) // TOGETHER * TOGETHER
    return tuple(names[first : first + TOGETHER])


@functools.cache
def compared(names: tuple[str, ...], dtype: torch.dtype, lanes: str) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """By body what a kernel computes and what PyTorch does: values, then gradients."""
    given = draw(dtype)
    found = iter(call_compiled(lowered(names, dtype), [one.reshape(SAMPLES, -1) for one in given], lanes))
    results: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name in names:
        body = BODIES[name]
        expected = [eager(name, body, [one[sample] for one in given]) for sample in range(SAMPLES)]
        results[name] = [(next(found), torch.stack(parts)) for parts in zip(*expected, strict=True)]
    return results


@functools.cache
def lowered(names: tuple[str, ...], dtype: torch.dtype) -> Function:
    graph = traced(functools.partial(everything, names), [one[0] for one in draw(dtype)], decomposed=True)
    (outputs,) = graph.graph.output_node().args
    return lower(graph.graph, graph, [True] * 4, [False for _ in outputs])


# Where the processor is one that oneDNN is used on, its `gelu` has no sign of zero.
@torch.backends.mkldnn.flags(enabled=False)
def eager(name: str, body: Body, given: list[Tensor]) -> list[Tensor]:
    own = [one.clone().requires_grad_(name not in WITHOUT_PULLBACK) for one in given[: arity(body)]]
    value = numbers_of(body, own)
    if name in WITHOUT_PULLBACK:
        return [value]
    if not value.requires_grad:
        return [value, *(torch.zeros_like(one).flatten() for one in own)]
    gradients = torch.autograd.grad(value, own, given[-1][: len(value)], allow_unused=True, materialize_grads=True)
    return [value.detach(), *(gradient.flatten() for gradient in gradients)]


def differing(name: str, index: int, got: Tensor, true: Tensor) -> Tensor:
    """Where a result is wrong: a value if `index` is 0, else a gradient; of zeros only values have a sign that can matter."""
    finite = true.isfinite()
    roundings = 2**28 if name in COARSE and true.dtype == torch.float64 else 1e3
    size = torch.where(finite, true.abs(), 0).amax(-1, keepdim=True).clamp(1, 1e6)  # what others in the row cancel to
    limit = roundings * torch.finfo(true.dtype).eps * (true.abs() + 0.1 * size) + torch.finfo(true.dtype).tiny
    same = (got == true) | (got.isnan() & true.isnan())
    if name in KINDS:
        same |= ~got.isfinite()
    wrong = ~torch.where(finite, (got - true).abs() <= limit, same)
    if index == 0 and name not in SIGNS:
        wrong |= (true == 0) & (got == 0) & (got.signbit() != true.signbit())
    return wrong


def judged(name: str, index: int, dtype: torch.dtype) -> Tensor:
    """The samples that PyTorch decides."""
    given = [one.reshape(SAMPLES, -1) for one in draw(dtype)[: arity(BODIES[name])]]
    every = torch.cat(given, 1)
    live = torch.ones(SAMPLES, dtype=torch.bool)
    if name in AT_NAN and index:
        live &= ~every.isnan().any(1)
    if name in OVERFLOWS and dtype == torch.float32:
        live &= ~((every.abs() > 1e30) & every.isfinite()).any(1)
    if name in SMALLEST:
        live &= ~((every.abs() < torch.finfo(dtype).tiny) & (every != 0)).any(1)
    return live


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", BODIES)
def test_special_values(name: str, dtype: torch.dtype, lanes: str) -> None:
    for index, (got, true) in enumerate(compared(neighbours(name), dtype, lanes)[name]):
        wrong = differing(name, index, got, true) & judged(name, index, dtype).unsqueeze(1)
        if wrong.any():
            sample, at = map(int, wrong.nonzero()[0])
            given = [one[sample].tolist() for one in draw(dtype)[: arity(BODIES[name])]]
            what = "the value" if index == 0 else f"the gradient of argument {index}"
            pytest.fail(f"{what} is {float(got[sample, at])}, in PyTorch {float(true[sample, at])}, of {given}")
