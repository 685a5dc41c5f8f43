"""Put PyTorch's recurrent networks, which are one op each, into a graph as chains of their layers' steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from pcr_fx.chain import NearMiss, Origin
from pcr_fx.graphs.nodes import op_name
from pcr_fx.options import Options
from pcr_fx.passes.describe import describe_source, module_path
from pcr_fx.recurrent import CELLS, Form, Recurrent

_ARGUMENTS = 9


def replace_recurrent(graph: fx.Graph, options: Options) -> tuple[dict[str, Recurrent], list[NearMiss]]:
    """Call a module in place of each such op, and say why not.

    Returns:
        The modules, by the names that the graph calls them by, and near misses.
    """
    made: dict[str, Recurrent] = {}
    near_misses: list[NearMiss] = []
    for node in list(graph.nodes):
        if type(node.target) is not type(torch.gru) or node.target not in CELLS:
            continue
        where, source = module_path(node) or "forward", describe_source(node)
        found = _form(node)
        if isinstance(found, str):
            near_misses.append(NearMiss(where, f"{op_name(node)}: {found}", 0, source))
            continue
        form, length = found
        if length < options.min_length:
            words = f"{op_name(node)}: too short: {length} steps, min_length={options.min_length}"
            near_misses.append(NearMiss(where, words, length, source))
            continue
        name = f"pcr_fx_recurrent_{len(made)}"
        made[name] = Recurrent(form, Origin(where, source), options, length)
        with graph.inserting_before(node):
            called = graph.call_module(name, tuple(node.args[:3]))
        called.meta = dict(node.meta)
        node.replace_all_uses_with(called)
        graph.erase_node(node)
    return made, near_misses


def _form(node: fx.Node) -> tuple[Form, int] | str:
    """What a network is and how many steps it takes, or why it stays PyTorch's op."""
    if len(node.args) != _ARGUMENTS or node.kwargs:
        return "called in no known manner"
    x, hx, weights, *flags = node.args
    if not isinstance(weights, (list, tuple)):
        return (
            "a packed sequence, whose batch shrinks from step to step, is left to PyTorch's own op; pad the sequences"
        )
    value: Any = x.meta.get("example_value") if isinstance(x, fx.Node) else None
    if not isinstance(value, torch.Tensor) or value.dim() != 3:
        return "the shape of its input is not known"
    has_biases, num_layers, dropout, training, bidirectional, batch_first = flags
    length = value.shape[int(bool(batch_first))]
    if type(length) is not int:
        return "the number of its steps is left open by the compiler (dynamic=True)"
    if not isinstance(hx, fx.Node) and not _is_pair(hx):
        return "called in no known manner"
    each = len(weights) // (int(num_layers) * (2 if bidirectional else 1))  # type: ignore[call-overload, arg-type]
    projects = each - (4 if has_biases else 2)
    if projects not in (0, 1):
        return "called in no known manner"
    form = Form(
        node.target,
        bool(has_biases),
        int(num_layers),  # type: ignore[call-overload, arg-type]
        float(dropout),  # type: ignore[arg-type]
        bool(training),
        bool(bidirectional),
        bool(batch_first),
        bool(projects),
    )
    return form, length


def _is_pair(hx: Any) -> bool:
    return isinstance(hx, Sequence) and len(hx) == 2 and all(isinstance(one, fx.Node) for one in hx)
