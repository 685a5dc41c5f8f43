"""Loops drawn at random, as long as it is told: `python -m tests.fuzz.loops --minutes 30 --seed 1`.

Each is run by `pcr_fx.scan` and by a plain Python loop; outputs, gradients and structures are compared in float64, the structure
also with what PyTorch's own `scan` returns, where that takes the step.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from comparison import relative_error  # noqa: E402
from scan_cases import Drawn, draw, plain_loop  # noqa: E402

import pcr_fx  # noqa: E402

LENGTHS = (0, 1, 2, 7, 64, 1000)
# Every so many loops one is compiled to a kernel, which takes a hundred times as long.
KERNELS = 4
ERROR = 1e-8


def fault(loop: Drawn, options: dict[str, Any]) -> str:
    """What is wrong with the results of a loop, or nothing."""
    given = {"dim": loop.dim, "reverse": loop.reverse}
    if loop.length == 0:
        carry, ys = pcr_fx.scan(loop.step, loop.init, loop.xs, options=options, **given)
        same = all(a is b for a, b in zip(pytree.tree_leaves(carry), pytree.tree_leaves(loop.init), strict=True))
        empty = all(y is None or y.numel() == 0 for y in pytree.tree_leaves(ys))
        return "" if same and empty else "no steps return something"
    got = pcr_fx.scan(loop.step, loop.init, loop.xs, options=options, **given)
    expected = plain_loop(loop.step, loop.init, loop.xs, **given)
    ours, theirs = pytree.tree_flatten(got), pytree.tree_flatten(expected)
    if ours[1] != theirs[1]:
        return f"structure {ours[1]} in place of {theirs[1]}"
    pairs = [(a, b) for a, b in zip(ours[0], theirs[0], strict=True) if b is not None]
    for a, b in pairs:
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            return f"{a.shape} {a.dtype} in place of {b.shape} {b.dtype}"
        if b.is_floating_point() and not relative_error(a, b) < ERROR:
            return f"values differ by {relative_error(a, b):.2g}"
        if not b.is_floating_point() and not torch.equal(a, b):
            return "values differ"
    moving = [(a, b) for a, b in pairs if b.requires_grad]
    weights = [torch.randn_like(b) for _, b in moving]
    gradients = (
        torch.autograd.grad(outputs, loop.leaves, weights, allow_unused=True, materialize_grads=True)
        for outputs in zip(*moving, strict=True)
    )
    errors = [relative_error(a, b) for a, b in zip(*gradients, strict=True)]
    return "" if max(errors, default=0.0) < ERROR else f"gradients differ by {max(errors):.2g}"


def structure_fault(loop: Drawn) -> str:
    """How the structure differs from what PyTorch's own `scan` returns, where it takes the loop."""
    try:
        theirs = torch._higher_order_ops.scan(loop.step, loop.init, loop.xs, dim=loop.dim, reverse=loop.reverse)
    except Exception:
        return ""
    ours = pcr_fx.scan(loop.step, loop.init, loop.xs, dim=loop.dim, reverse=loop.reverse)
    forms = [
        [(leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in pytree.tree_leaves(both)]
        for both in (ours, theirs)
    ]
    alike = pytree.tree_structure(ours) == pytree.tree_structure(theirs) and forms[0] == forms[1]
    return "" if alike else f"forms {forms[0]} in place of PyTorch's {forms[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    ends, seed, faults = time.monotonic() + 60 * given.minutes, given.seed, 0
    while time.monotonic() < ends:
        loop = draw(seed, LENGTHS)
        try:
            options = {"planning": "estimated", "kernels": seed % KERNELS == 0}
            found = fault(loop, options) or (structure_fault(loop) if loop.length and seed % 4 == 0 else "")
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        if found:
            faults += 1
            print(f"seed {seed} ({loop.words}): {found}")
        seed += 1
    print(f"{seed - given.seed} loops, {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
