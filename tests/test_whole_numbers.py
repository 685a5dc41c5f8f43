"""Truth values and whole numbers in kernels: with the arithmetic of their dtype, or not at all."""

from collections.abc import Callable

import pytest
import torch
from test_codegen_lowering import traced
from torch import Tensor

from pcr_fx.codegen import Unprintable, lower
from pcr_fx.codegen.interpreter import interpret

# Of a state `[3, 4]` and another tensor like it.
KEPT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "bool + bool": lambda z, o: (z > o) + (z > -9),
    "bool + True": lambda z, o: torch.add(z > o, True),
    "bool * bool": lambda z, o: (z > o) * (z > -9) + (z > -9) * (z < 9),
    "full of a bool": lambda z, o: torch.full_like(z > o, 2.0) * (z > -9),
    "new_full of a bool": lambda z, o: (z > o).new_full(z.shape, 3),
    "NaN is true": lambda z, o: torch.full_like(z > o, float("nan")),
    "bool padded": lambda z, o: torch.nn.functional.pad(z > o, [1, -1], value=2),
    "int64 padded": lambda z, o: torch.nn.functional.pad((z > o).long(), [1, -1], value=-1.5),
    "full of an int64": lambda z, o: torch.full_like((z > o).long(), -1.5),
    "full of a real as int64": lambda z, o: torch.full_like(z, 2.5, dtype=torch.int64),
    "sum of bools": lambda z, o: (z > o).sum(-1, keepdim=True).expand(3, 4),
    "sum as bool": lambda z, o: (z > o).sum(0, keepdim=True, dtype=torch.bool).expand(3, 4),
    "sum of reals as bool": lambda z, o: (z - z.mean()).sum(0, dtype=torch.bool).expand(3, 4),
    "sum of what cancels as bool": lambda z, o: ((z > -9).long() - 2 * (z > 0).long()).sum(0, dtype=torch.bool).expand(3, 4),
    "int64 sums of sums": lambda z, o: ((z > o).sum(0) + 3 * (z > -9).sum(0) - 1).expand(3, 4),
    "int64 times a negative number": lambda z, o: 1.0 / ((z > 9).long() * -3),
    "minus an int64": lambda z, o: 1.0 / -((z > 9).long()),
    "int64 squared": lambda z, o: ((z > o).long() - 3) ** 2,
    "int64 clamped": lambda z, o: ((z > o).long() * 5).clamp(1, 3),
    "int64 compared": lambda z, o: ((z > -9).sum(0) > (z > o).sum(0) + 1).expand(3, 4),
    "int64 as bool": lambda z, o: ((z > o).long() * 3).bool() + (z > -9),
    "where of bools": lambda z, o: torch.where(z > o, True, z > -9) + (z > 0),
    "bools joined": lambda z, o: torch.cat([z > o, (z > 0) + (z > -1)])[1:4] + (z > -9),
    "largest of bools": lambda z, o: ((z > o).amax(-1, keepdim=True) + (z > -9)).amin(0).expand(3, 4),
    "uint8 moved": lambda z, o: torch.where(z > o, (z > o).to(torch.uint8)[:, :1], 255),
    "uint8 added": lambda z, o: ((z > o).to(torch.uint8) + 2) * 60,
    "mask filled": lambda z, o: (z > -9).long().masked_fill(z > o, 7),
    "of reals, between two numbers": lambda z, o: (3 * z).long().clamp(-2, 3) * 2,
    "of what is no number": lambda z, o: torch.where(o > 0, z / 0.0, z * 1e30 - 0 / (z - z)).long().clamp(-5, 7),
    "times a real": lambda z, o: ((z > -9) + (z > o)) * z + (z > o).sum() * o,
}  # fmt: skip
REFUSED: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "too large": (lambda z, o: (z > o).long() * 2**60, "aten.mul.Tensor of torch.int64 which may not be exact"),
    "too large a sum": (lambda z, o: ((z > o).long() * 2**51).sum() + 0 * z, "aten.sum.default of torch.int64"),
    "compared with a large one": (lambda z, o: (z > o).long() == 2**60 + 1, "aten.eq.Scalar of torch.int64"),
    "of reals": (lambda z, o: (3 * z).long(), "aten._to_copy.default of torch.int64"),
    "of few bits": (lambda z, o: ((z > o).to(torch.int8) * 100) * 2, "aten.mul.Tensor of torch.int8"),
    "compared in float32": (lambda z, o: (z > o).long() > 0.1, "aten.gt.Scalar in torch.float32 beside torch.float64"),
    "beyond": (lambda z, o: ((z > o).to(torch.int16) * 128).to(torch.int8), "aten._to_copy.default of torch.int8"),
    "below zero": (lambda z, o: (z > o).to(torch.uint8) - (z > -9).to(torch.uint8), "aten.sub.Tensor of torch.uint8"),
    "without a sign": (lambda z, o: (-(z > o).to(torch.int8)).to(torch.uint8), "aten._to_copy.default of torch.uint8"),
    "padded below zero": (lambda z, o: torch.nn.functional.pad((z > o).byte(), [1, -1], value=-1), "torch.uint8"),
    "bits": (lambda z, o: (z > o).long() & 1, "aten.bitwise_and.Scalar"),
}


def lowered(body: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What the body is lowered to makes of two tensors, and what it makes of them itself."""
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(3, 4, generator=draw, dtype=dtype) for _ in range(2)]
    graph = traced(lambda z, o: body(z, o).to(dtype), given, decomposed=True)
    function = lower(graph.graph, graph, [True, True], [False])
    (got,) = interpret(function, [tensor.reshape(1, -1) for tensor in given])
    return got.reshape(3, 4), body(*given).to(dtype)


@pytest.mark.parametrize("name", KEPT)
def test_they_are_what_pytorch_makes_of_them(name: str) -> None:
    # Where PyTorch computes a real of whole numbers, it does so in float32.
    got, expected = lowered(KEPT[name], torch.float32)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_exact_is_refused_by_name(name: str) -> None:
    body, reason = REFUSED[name]
    with pytest.raises(Unprintable, match=reason):
        lowered(body, torch.float64)
