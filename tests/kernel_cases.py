"""Bodies for native kernels, and how a kernel is compared with its plain twin in float64."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from comparison import relative_error, value_and_gradients
from torch import Tensor, nn

import pcr_fx
from pcr_fx.targets import CppKernel

WIDTH = 6


def linear(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return F.linear(x, p["w"], p["b"])


def gated(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    first, second = torch.cat([linear(x, p), x * p["b"]], -1).chunk(2, -1)
    return x + 0.5 * torch.sigmoid(first) * second


def attention(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """[B, 3, 2]: three tokens of two features."""
    weights = torch.softmax(x @ x.transpose(-1, -2) / math.sqrt(2), -1)
    return x + 0.1 * weights @ x @ p["w"][:2, :2]


def normed(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return x + F.layer_norm(linear(x, p), (WIDTH,), p["b"], p["b"])


def rms_normed(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return x + F.rms_norm(linear(x, p), (WIDTH,), p["b"])


def batch_normed(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """As in evaluation; PyTorch gives running statistics no gradient."""
    return F.batch_norm(linear(x, p), torch.zeros_like(p["b"]), torch.full_like(p["b"], 2.0), p["b"], p["b"])


def rearranged(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    parts = x.view(-1, 2, 3).permute(0, 2, 1).flip(1)
    first, second = parts.reshape(-1, WIDTH).split([2, 4], -1)
    return torch.tanh(torch.cat([second, first[:, :1], first[:, 1:]], -1) + F.pad(linear(x, p)[:, 1:4], (1, 2)))


def piecewise(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    y = linear(x, p)
    return torch.where(y > 0.1, y.clamp(-0.5, 0.7), torch.maximum(0.3 * y, y - 0.4)) + y.abs().sqrt() * 0.1


def reduced(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    return x - x.mean(-1, keepdim=True) + x.var(-1, keepdim=True) * p["b"] + 0.1 * x.amax(-1, keepdim=True)


def lost_input(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """What the state was does not matter; neither does the matrix."""
    return torch.zeros_like(x) + p["b"]


def powers(y: Tensor) -> Tensor:
    return y**2 - 0.1 * y**3 + (y.abs() + 1) ** -0.5 - (y.abs() + 1) ** 1.7


def activation(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, p: 0.5 * x + function(linear(x, p))


BODIES: dict[str, Callable[..., Tensor]] = {
    "residual": lambda x, p: x + 0.1 * torch.tanh(linear(x, p)) @ p["w"],
    "gated": gated,
    "attention": attention,
    "layer norm": normed,
    "rms norm": rms_normed,
    "batch norm": batch_normed,
    "rearranged": rearranged,
    "piecewise": piecewise,
    "reduced": reduced,
    "lost input": lost_input,
    "low rank": lambda x, p: x + 0.1 * torch.tanh(x @ (p["w"][:, :2] @ p["w"][:2])),
    "softmax": activation(lambda y: F.softmax(y, -1)),
    "log softmax": activation(lambda y: F.log_softmax(y, -1)),
    **{
        name: activation(getattr(F, name))
        for name in "sigmoid relu gelu silu softplus elu leaky_relu hardswish mish relu6".split()
    },
    "tanh gelu": activation(lambda y: F.gelu(y, approximate="tanh")),
    "powers": lambda x, p: powers(torch.tanh(linear(x, p))),
    "transcendental": activation(lambda y: torch.sin(y) * torch.exp(-y * y) + torch.log1p(y.abs()) - torch.atan(y)),
}


class Deep(nn.Module):
    """`length` blocks of one body, each with a matrix and a vector of its own."""

    def __init__(self, name: str, length: int) -> None:
        super().__init__()
        self.step = BODIES[name]
        draw = torch.Generator().manual_seed(length)
        for kind, scale in (("w", WIDTH**-0.5), ("b", 0.5)):
            shape = (WIDTH, WIDTH) if kind == "w" else (WIDTH,)
            values = [scale * torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(length)]
            self.register_module(kind, nn.ParameterList(map(nn.Parameter, values)))

    def forward(self, x: Tensor) -> Tensor:
        for w, b in zip(self.w, self.b, strict=True):
            x = self.step(x, {"w": w, "b": b})
        return x


def states(name: str, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (batch, 3, 2) if name == "attention" else (batch, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(batch), dtype=torch.float64).to(dtype)


def by_kernel(model: nn.Module, x: Tensor, solver: str = "sequential", **options: Any) -> Any:
    """`model` transformed, its one chain certain to run as a kernel."""
    fast = pcr_fx.transform(model, x, {"solver": solver, **options})
    (entry,) = fast.report.chains
    assert isinstance(entry.plan.kernel, CppKernel), entry.plan.kernel
    state = entry.plan.program.layout.flatten([x])
    directions = ("newton",) if solver == "newton" else ("forward", "adjoint")
    assert all(entry.plan.kernel.is_ready(direction, state) for direction in directions)
    return fast


def assert_as_good(model: nn.Module, x: Tensor, **options: Any) -> None:
    """The kernel's values and gradients are as near to those in float64 as eager's are."""
    reference = copy.deepcopy(model).double()
    exact = value_and_gradients(reference, list(reference.parameters()), x.double())
    eager = value_and_gradients(model, list(model.parameters()), x)
    ours = value_and_gradients(by_kernel(model, x, **options), list(model.parameters()), x)
    # The output; then all gradients together, since rounding makes any one of thousands the worst.
    for part in (slice(0, 1), slice(1, None)):
        true, theirs, got = (torch.cat([t.flatten().double() for t in run[part]]) for run in (exact, eager, ours))
        limit = 1e-11 if x.dtype == torch.float64 else 8 * relative_error(theirs, true) + 2e-6
        assert relative_error(got, true) <= limit


class Recurrence(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, inputs: Tensor, *states: Tensor) -> Any:
        state: Any = states[0] if len(states) == 1 else states
        for value in inputs.unbind(0):
            state = self.cell(value, state)
        return state
