"""What an op of a captured graph does beside computing its result: writing, drawing random numbers, aliasing."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_INPLACE_OPERATORS = {
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imatmul", "imod", "iand", "ior", "ixor")
}
_RANDOM_NAMES = frozenset(
    "bernoulli binomial dropout1d multinomial normal poisson rand rand_like randint randint_like randn randn_like "
    "randperm rrelu_with_noise gumbel_softmax".split()
)
# Results of these never share memory with an input.
_FRESH_NAMES = frozenset(
    "linear bilinear conv1d conv2d conv3d addmm matmul mm bmm baddbmm einsum layer_norm rms_norm group_norm batch_norm "
    "instance_norm add sub mul truediv div pow neg tanh sigmoid relu gelu silu elu selu celu leaky_relu softplus mish "
    "hardtanh softmax log_softmax exp log sqrt rsqrt sin cos cat stack gru_cell lstm_cell rnn_tanh_cell rnn_relu_cell "
    "scaled_dot_product_attention addcmul lerp where clone abs square mean sum".split()
)


def op_name(node: fx.Node) -> str:
    """The op's name as its author would write it: `linear`, `tanh`, `view`."""
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.split("::")[-1]
    return getattr(node.target, "__name__", str(node.target)).strip("_") or str(node.target)


def argument(node: fx.Node, name: str, position: int, default: Any = None) -> Any:
    """An argument given by keyword or by position."""
    return node.kwargs.get(name, node.args[position] if position < len(node.args) else default)


def writes(node: fx.Node) -> list[fx.Node]:
    """The nodes that this op writes to."""
    if node.op == "call_method":
        name = str(node.target)
        written = name.endswith("_") and not name.endswith("__")
        return _tensors(node.args[:1]) if written or name == "__setitem__" else []
    if node.op != "call_function":
        return []
    if isinstance(node.target, torch._ops.OpOverload):
        arguments = zip(node.target._schema.arguments, node.args, strict=False)
        return _tensors([value for arg, value in arguments if arg.alias_info and arg.alias_info.is_write])
    targets = _tensors([node.kwargs["out"]]) if node.kwargs.get("out") is not None else []
    name = getattr(node.target, "__name__", "")
    if node.target in _INPLACE_OPERATORS or node.target is operator.setitem:
        return targets + _tensors(node.args[:1])
    if is_inplace_variant(node) or (name.endswith("_") and not name.endswith("__")):
        return targets + _tensors(node.args[:1])
    if updates_statistics(node):
        return targets + _tensors(node.args[1:3])
    return targets


def is_inplace_variant(node: fx.Node) -> bool:
    """`F.relu(x, inplace=True)` and its like."""
    if node.kwargs.get("inplace") is True:
        return True
    positions = {F.relu: 1, F.silu: 1, F.mish: 1, F.hardswish: 1, F.relu6: 1, F.hardsigmoid: 1, F.selu: 1}
    positions |= {F.leaky_relu: 2, F.elu: 2, F.celu: 2, F.hardtanh: 3, F.threshold: 3, F.dropout: 3, F.alpha_dropout: 3}
    return node.target in positions and argument(node, "inplace", positions[node.target]) is True


def updates_statistics(node: fx.Node) -> bool:
    """Batch norm that writes its running mean and variance."""
    name = op_name(node)
    if name == "batch_norm" and node.target is F.batch_norm:
        return bool(argument(node, "training", 5, False)) and bool(_tensors(node.args[1:3]))
    if name == "batch_norm":
        return bool(argument(node, "training", 5, False))
    return name == "instance_norm" and bool(argument(node, "use_input_stats", 5, True)) and bool(_tensors(node.args[1:3]))


def is_random(node: fx.Node) -> bool:
    """Whether two calls with the same input give different results."""
    name = op_name(node)
    if isinstance(node.target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in node.target.tags
    if "dropout" in name:
        return bool(argument(node, "training", 2, True)) and argument(node, "p", 1, 0.5) != 0
    if name == "rrelu":
        return bool(argument(node, "training", 3, False))
    if name == "scaled_dot_product_attention":
        return argument(node, "dropout_p", 4, 0.0) != 0
    return name.rstrip("_") in _RANDOM_NAMES


def is_idle_dropout(node: fx.Node) -> bool:
    """Dropout that is switched off: its result is its input."""
    if node.op != "call_function" or "dropout" not in op_name(node) or isinstance(node.target, torch._ops.OpOverload):
        return False
    return not is_random(node) and bool(node.args) and isinstance(node.args[0], fx.Node)


def is_fresh(node: fx.Node) -> bool:
    """Whether the result surely shares no memory with any input."""
    return node.op in ("call_function", "call_method") and op_name(node) in _FRESH_NAMES and not writes(node)


def written_nodes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Every node whose memory some op of the graph may write to, with that op.

    A write to a view writes to what it is a view of, and shows in every other view of it.
    """
    written: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for target in writes(node):
            pending = [target]
            while pending:
                alias = pending.pop()
                if alias in written:
                    continue
                written[alias] = node
                if not is_fresh(alias) and alias.op not in ("placeholder", "get_attr"):
                    pending.extend(alias.all_input_nodes)
                pending.extend(user for user in alias.users if not is_fresh(user) and user.op != "output")
    return written


def _tensors(values: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(tuple(values), found.append)
    return found
