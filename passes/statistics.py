"""Write batch norm in training, which updates its running statistics, as one that does not, and their updates beside it.

The normalised values are then those of an op that only computes, and what the statistics become is read behind the blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses import FakeTensor

from pcr_fx.graphs.effects import updates_statistics
from pcr_fx.graphs.nodes import argument

_NAMES = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
# Numbers of a batch beyond which no kernel holds a block: the model's own op, which does both at once, is the fastest then.
# Measured on one thread, a training step of 24 linear layers with batch norm and up to so many numbers as a chain is 1.1 to 3.5
# times as fast; with more, and left to the model's own ops, it took 1.5 times as long.
_LARGEST = 2048
_DEFAULTS = {"weight": None, "bias": None, "momentum": 0.1, "eps": 1e-5}


def update_apart(nodes: Iterable[fx.Node]) -> bool:
    """Write the updates of running statistics by some ops as ops of their own; whether there was any."""
    return any([_update_apart(node) for node in nodes if node.target is F.batch_norm and updates_statistics(node)])


def _update_apart(node: fx.Node) -> bool:
    given = {name: argument(node, index, name, _DEFAULTS.get(name)) for index, name in enumerate(_NAMES)}
    x, momentum = given["input"], given["momentum"]
    value = x.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.dim() < 2 or type(momentum) is not float:
        return False
    if value.dtype not in (torch.float32, torch.float64) or value.numel() > _LARGEST:
        return False
    with node.graph.inserting_before(node.next):
        kept = _call(node, "detach", x)
        dims = [dim for dim in range(value.dim()) if dim != 1]
        mean, variance = _call(node, "mean", kept, dims), _call(node, "var", kept, dims)
        for running, measured in ((given["running_mean"], mean), (given["running_var"], variance)):
            # What is measured may have derivatives where it comes out of a chain; the statistics have none.
            scaled = _call(node, "mul_", _call(node, "detach", running), 1 - momentum)
            _call(node, "add_", scaled, _call(node, "mul", measured, momentum))
    node.args = (x, None, None, given["weight"], given["bias"], True, momentum, given["eps"])
    node.kwargs = {}
    return True


def _call(node: fx.Node, method: str, source: fx.Node, *arguments: Any) -> fx.Node:
    """A method's call in place of a part of `node`."""
    made = node.graph.call_method(method, (source, *arguments))
    made.meta = {key: value for key, value in node.meta.items() if key != "example_value"}
    if not method.endswith("_"):
        value = source.meta.get("example_value")
        if value is None:
            return made
        with value.fake_mode if isinstance(value, FakeTensor) else contextlib.nullcontext():
            made.meta["example_value"] = getattr(value, method)(*arguments)
    return made
