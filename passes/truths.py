"""Chains that carry truth values, such as which samples are done: solved as numbers, and truth values again where they are read."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor

from pcr_fx.body.truths import carry_numbers, number_of_truth
from pcr_fx.passes.assembly import FoundChain


def carry_truths(found: FoundChain, value: Callable[[fx.Node], Any]) -> FoundChain:
    """The chain with numbers in place of the truth values among its states, which it starts from too.

    Args:
        value: that of a node, as far as it is known.
    """
    if not any(found.truths):
        return found
    like = next(index for index, node in enumerate(found.initial) if _is_real(value(node)))
    initial = tuple(
        _as_number(node, found.initial[like], value) if is_truth else node
        for node, is_truth in zip(found.initial, found.truths, strict=True)
    )
    return replace(found, chain=carry_numbers(found.chain, found.truths, like), initial=initial)


def _is_real(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _as_number(truth: fx.Node, like: fx.Node, value: Callable[[fx.Node], Any]) -> fx.Node:
    """A node behind both, and behind all inputs."""
    graph, at = truth.graph, max(truth, like)
    if at.op == "placeholder":
        at = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(at):
        made = graph.call_function(number_of_truth, (truth, like))
    values = value(truth), value(like)
    made.meta = dict(truth.meta)
    with next((one.fake_mode for one in values if isinstance(one, FakeTensor)), contextlib.nullcontext()):
        made.meta["example_value"] = number_of_truth(*values)
    return made
