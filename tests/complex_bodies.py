"""Bodies of real states with complex numbers inside, as calls of aten ops, with the dimensions that are batch dimensions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def whole(x: Tensor) -> Tensor:
    return aten.complex.default(x, x)


def real_of(op: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: aten.real.default(op(whole(x)))


COMPLEX: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]], tuple[int, ...]]] = {
    "imaginary part": (lambda x: aten.imag.default(whole(x)), [(3, 4)], (0, 1)),
    "conjugate": (real_of(aten._conj.default), [(3, 4)], (0, 1)),
    "resolved conjugate": (real_of(lambda z: aten.resolve_conj.default(aten._conj.default(z))), [(3, 4)], (0, 1)),
    "view of negatives": (lambda x: aten.resolve_neg.default(aten._neg_view.default(x)), [(3, 4)], (0, 1)),
    "polar": (lambda x: aten.real.default(aten.polar.default(x, x)), [(3, 4)], (0, 1)),
    "part by index": (lambda x: aten.select.int(aten.view_as_real.default(whole(x)), -1, 1), [(3, 4)], (0, 1)),
    "from parts": (
        lambda x: aten.imag.default(aten.view_as_complex.default(aten.stack.default([x, x], -1))),
        [(3, 4)],
        (0, 1),
    ),
    "transformed": (real_of(lambda z: aten._fft_c2c.default(z, [1], 0, True)), [(3, 4)], (0,)),
    "transformed there and back": (
        lambda x: aten._fft_c2r.default(aten._fft_r2c.default(x, [1], 0, True), [1], 2, 4),
        [(3, 4)],
        (0,),
    ),
    "second of a row": (lambda x: aten.add.Tensor(x, aten.kthvalue.default(x, 2, 1, True)[0]), [(3, 4)], (0,)),
}
