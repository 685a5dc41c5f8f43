"""Sequences of shapes that one transformed model is called with, and a model that takes them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from comparison import relative_error
from torch import Tensor, nn

D = 4
Shape = tuple[int, ...]
# Shapes of the state without its features, and of an operand.
SEQUENCES: dict[str, list[tuple[Shape, Shape]]] = {
    "positions": [((5, t), (t, D)) for t in (7, 3, 9, 1, 5)],
    "positions of one length": [((b, 7), (7, D)) for b in (5, 1, 7, 6)],
    "one position at first": [((5, 1), (5, 1, D)), ((5, 7), (5, 1, D)), ((5, 7), (5, 7, D))],
    "one for all positions": [((5, 7), (5, 1, D)), ((5, 9), (5, 1, D)), ((5, 1), (5, 1, D)), ((9, 5), (9, 1, D))],
    "one for all samples": [((5, 3), (5, 1, D)), ((5, 1), (1, 1, D)), ((1, 3), (1, 1, D)), ((3, 3), (1, 3, D))],
    "one for all features": [((5, 7), (5, 7, 1)), ((5, 7), (5, 1, 1)), ((7, 7), (7, 1, 1)), ((1, 7), (1, 1, 1))],
    "one batch dimension": [((b,), (b, D)) for b in (1, 5, 4)] + [((5,), (1, D)), ((1,), (1, D)), ((4,), (D,))],
    "samples, then one by itself": [((5,), (5, D)), ((), (D,)), ((0,), (0, D)), ((5,), (5, D))],
    "none at last": [((5, 3), (5, 3, D)), ((3, 5), (3, 5, D)), ((0, 3), (0, 3, D)), ((2, 3), (2, 3, D))],
    "equal sizes": [((b, b), (b, b, D)) for b in (3, 5, 1)] + [((3, 5), (3, 5, D)), ((5, 5), (5, D))],
}


class Net(nn.Module):
    """`x` `[*batch, D]` and `c`, which every block takes, scaled or normalised."""

    def __init__(self, length: int, normalised: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(D, D) for _ in range(length)])
        self.normalised = normalised

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        for layer in self.layers:
            x = 0.9 * x + 0.1 * torch.tanh(layer(x) * F.layer_norm(c, (D,)) if self.normalised else layer(x) + c)
        return x


def assert_agree(
    make: Callable[[Tensor, Tensor], nn.Module], model: nn.Module, sequence: list[tuple[Shape, Shape]]
) -> None:
    """What `make` makes of the first tensors agrees with `model`, in float64, for all: values and all gradients."""
    made, device = None, next(model.parameters()).device
    for batch, shape in sequence:
        x = torch.randn(*batch, D, dtype=torch.float64, device=device, requires_grad=True)
        c = torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)
        made = make(x, c) if made is None else made
        for got, expected in zip(_results(made, x, c), _results(model, x, c), strict=True):
            assert relative_error(got, expected) < 1e-9
        with torch.no_grad():
            assert relative_error(made(x, c), model(x, c)) < 1e-9


def _results(model: nn.Module, x: Tensor, c: Tensor) -> list[Tensor]:
    out = model(x, c)
    return [out, *torch.autograd.grad(out.square().sum(), [x, c, *model.parameters()])]
