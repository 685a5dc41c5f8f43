"""What an op does beside computing its result: writing, drawing random numbers, handing out memory of its inputs."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from pcr_fx.graphs.hooks import HookOp
from pcr_fx.graphs.memory import same_memory
from pcr_fx.graphs.nodes import argument, arguments_of, declared_writes, is_pytorchs, nodes_in, op_name

_INPLACE_OPERATORS = {
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imatmul", "imod", "iand", "ior", "ixor")
}
_RANDOM_NAMES = frozenset(
    """bernoulli binomial cauchy drawn exponential fractional_max_pool2d fractional_max_pool3d geometric gumbel_softmax
    log_normal multinomial normal poisson rand rand_like randint randint_like randn randn_like random randperm
    rrelu_with_noise uniform""".split()
)
# Recurrent networks of several layers, with dropout between them.
_FUSED_RNN_NAMES = frozenset("lstm gru rnn_tanh rnn_relu".split())
# They write no values, but shape and strides.
RESHAPING_METHODS = frozenset(
    """as_strided_ resize_ resize_as_ set_ squeeze_ swapaxes_ swapdims_ t_ transpose_ unsqueeze_""".split()
)
# Ops that change how all later ops run.
_BARRIERS = frozenset(
    """set_grad_enabled enter_autocast exit_autocast enter_inference_mode exit_inference_mode
    saved_tensors_hooks_enable saved_tensors_hooks_disable""".split()
)
# Results of these never share memory with an input.
_FRESH_NAMES = frozenset(
    """abs acos acosh add addcdiv addcmul addmm all amax amin and any arange argmax argmin argsort asin asinh atan atan2
    atanh baddbmm batch_norm bilinear bmm cat cdist ceil celu clamp clip clone conv1d conv2d conv3d copysign cos cosh
    count_nonzero cross cummax cummin cumprod cumsum deg2rad digamma div dot elu embedding empty empty_like eq erf
    erfc erfinv exp exp2 expm1 flip floor floordiv fmod frac full full_like gather ge gelu glu group_norm gru_cell gt
    hardsigmoid hardswish hardtanh heaviside hypot i0 index_add index_copy index_fill index_select instance_norm
    isfinite isinf isnan kron layer_norm le leaky_relu lerp lgamma linear log log10 log1p log2 log_softmax logaddexp
    logcumsumexp logical_and logical_not logical_or logical_xor logsigmoid logsumexp lstm_cell lt masked_fill
    masked_scatter matmul max max_pool1d max_pool2d max_pool3d maximum mean median min minimum mish mm mod mul mv
    nan_to_num ne neg new_empty new_full new_ones new_zeros normalize one_hot ones ones_like or outer polygamma pow
    prelu prod rad2deg rand rand_like randn randn_like reciprocal relu relu6 remainder renorm repeat rms_norm
    rnn_relu_cell rnn_tanh_cell roll round rrelu rsqrt scaled_dot_product_attention scatter scatter_add selu sgn
    sigmoid sign signbit silu sin sinc sinh softmax softmin softplus softsign sort sqrt square stack std sub sum tan
    tanh tanhshrink tensor tensordot threshold topk tril triu truediv trunc var where xlogy xor zeros zeros_like""".split()
)


def writes(node: fx.Node) -> list[fx.Node]:
    """The nodes that an op writes to."""
    if not node.op.startswith("call_") or node.op == "call_module":
        return []
    if isinstance(node.target, HookOp):
        return list(node.all_input_nodes)  # nobody knows what a hook does
    if updates_statistics(node):
        return list(nodes_in(_running_statistics(node)))
    if isinstance(node.target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return declared_writes(node)
    if op_name(node) in ("embedding", "embedding_bag") and argument(node, 3, "max_norm") is not None:
        return list(nodes_in(argument(node, 1, "weight")))
    if op_name(node) == "triton_kernel_wrapper_mutation":
        return list(node.all_input_nodes)
    subject = argument(node, 0, "input") if _writes_first_argument(node) else None
    return list(nodes_in([subject, node.kwargs.get("out")]))


def _writes_first_argument(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    # The operator module's own and_, or_ and not_ end so because of Python's keywords.
    if name.endswith("_") and not name.endswith("__") and getattr(node.target, "__module__", "") != "_operator":
        return True
    if node.op == "call_method":
        return name == "__setitem__"
    return node.target in _INPLACE_OPERATORS or node.target is operator.setitem or is_inplace_variant(node)


def is_inplace_variant(node: fx.Node) -> bool:
    """`F.relu(x, inplace=True)` and its like."""
    position = _position_of_inplace(node.target) if node.op == "call_function" else None
    return position is not None and argument(node, position, "inplace") is True


# Bounded, since a model's own functions may be many, and are kept alive by it.
@functools.lru_cache(maxsize=512)
def _position_of_inplace(function: Any) -> int | None:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    return names.index("inplace") if "inplace" in names else None


def updates_statistics(node: fx.Node) -> bool:
    """Whether an op is batch or instance norm in training, which writes its running mean and variance if it has any.

    Of overloads, the old ones do not declare it.
    """
    if node.op != "call_function" or "_norm" not in op_name(node):
        return False
    return _is_training_norm(node) and _running_statistics(node)[0] is not None


def _is_training_norm(node: fx.Node) -> bool:
    name = op_name(node)
    if isinstance(node.target, torch._ops.OpOverload):
        given = arguments_of(node)
        is_norm = "batch_norm" in name or "instance_norm" in name
        return is_norm and any(given.get(flag) for flag in ("training", "train", "use_input_stats"))
    if name == "batch_norm":
        return bool(argument(node, 5, "training", False))
    return name == "instance_norm" and bool(argument(node, 5, "use_input_stats", True))


def _running_statistics(node: fx.Node) -> list[Any]:
    """The arguments for the running mean and variance of a batch or instance norm."""
    names = "running_mean", "running_var"
    if isinstance(node.target, torch._ops.OpOverload):
        given = arguments_of(node)
        return [given.get(name) for name in names]
    # They stand behind the input, or behind weight and bias.
    first = 1 if node.target in (F.batch_norm, F.instance_norm) else 3
    return [argument(node, first + index, name) for index, name in enumerate(names)]


def dropout_noise(like: torch.Tensor, p: float, name: str = "dropout") -> torch.Tensor:
    """What dropout multiplies a tensor by: of its shape, drawn as dropout draws it, and leaving the generator as that does.

    Args:
        name: which dropout of `torch.nn.functional`.
    """
    if name == "dropout" and p < 1 and like.device.type == "cpu":  # the same in fewer steps
        return torch.empty_like(like).bernoulli_(1 - p).div_(1 - p)
    noise: torch.Tensor = getattr(F, name)(torch.ones_like(like), p, True)
    return noise


# Methods that fill a tensor with random numbers, whatever was in it.
FILLING = frozenset("bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_".split())


def drawn(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, name: str, *args: Any, **kwargs: Any
) -> torch.Tensor:
    """A new tensor, filled by one of `FILLING`."""
    filled: torch.Tensor = getattr(torch.empty(shape, dtype=dtype, device=device), name)(*args, **kwargs)
    return filled


# Dropouts that multiply their input by noise of their own.
MULTIPLYING_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


def is_noise_like(function: Any) -> bool:
    """Whether a random op takes no more from its first argument than shape, strides, dtype and device."""
    return function in (torch.randn_like, torch.rand_like, torch.randint_like, dropout_noise)


def draws_by_shape(node: fx.Node) -> bool:
    """Whether an op draws numbers that depend on no more of its first argument than `is_noise_like` says."""
    is_fill = node.op == "call_method" and node.target in FILLING
    return is_fill or is_noise_like(node.target) or (node.target in MULTIPLYING_DROPOUTS and is_random(node))


def is_random(node: fx.Node) -> bool:
    """Whether two calls with the same input give different results.

    Attention is tagged as random for the dropout that it could do; what counts is the dropout that it does.
    """
    if not node.op.startswith("call_"):
        return False
    name = op_name(node)
    if isinstance(node.target, torch._ops.OpOverload):
        is_tagged = torch.Tag.nondeterministic_seeded in node.target.tags
        return is_tagged and arguments_of(node).get("dropout_p", 1.0) != 0
    if "dropout" in name:
        return bool(argument(node, 2, "training", True)) and argument(node, 1, "p", 0.5) != 0
    if name == "rrelu":
        return bool(argument(node, 3, "training", False))
    if name == "scaled_dot_product_attention":
        return argument(node, 4, "dropout_p", 0.0) != 0
    if name == "multi_head_attention_forward":
        return bool(argument(node, 13, "training", True)) and argument(node, 10, "dropout_p", 0.0) != 0
    if name in _FUSED_RNN_NAMES:
        return any(isinstance(value, float) and value > 0 for value in node.args)
    return name.rstrip("_") in _RANDOM_NAMES


def is_random_name(name: str) -> bool:
    """Whether an op of this name may draw random numbers."""
    return name.rstrip("_") in _RANDOM_NAMES or "dropout" in name or name == "rrelu"


def hides_ops(node: fx.Node) -> bool:
    """Whether the op is a whole graph of its own, such as a checkpointed block, of which this file cannot tell."""
    return isinstance(node.target, torch._ops.HigherOrderOperator)


def is_barrier(node: fx.Node) -> bool:
    """Whether the op changes how all later ops run, or may do anything, as a hook may."""
    if node.op != "call_function":
        return False
    name = op_name(node)
    return isinstance(node.target, HookOp) or name in _BARRIERS or name.endswith("crement_nesting")


def does_more(node: fx.Node) -> bool:
    """Whether the op does, or may do, more than compute a result."""
    return hides_ops(node) or is_barrier(node) or is_random(node) or bool(writes(node))


def is_of_transform(node: fx.Node) -> bool:
    """Whether the op is part of how a `torch.func` transform runs: it means something only with all others of that one."""
    if node.op != "call_function":
        return False
    module = getattr(node.target, "__module__", None) or ""
    return module.startswith(("torch._functorch", "torch._C._functorch", "torch.autograd.forward_ad"))


def is_idle_dropout(node: fx.Node) -> bool:
    """Dropout that is switched off: its result is its input."""
    if node.op != "call_function" or "dropout" not in op_name(node) or isinstance(node.target, torch._ops.OpOverload):
        return False
    return not is_random(node) and bool(node.args) and isinstance(node.args[0], fx.Node)


def is_fresh(node: fx.Node) -> bool:
    """Whether the result surely shares no memory with any input."""
    if node.op == "call_function" and node.target is operator.getitem:
        return _names_places(node.args[1])
    if node.target in (drawn, dropout_noise):
        return True
    if op_name(node) not in _FRESH_NAMES or not (node.op == "call_method" or is_pytorchs(node.target)):
        return False
    return updates_statistics(node) or not writes(node)


def _names_places(index: Any) -> bool:
    """Whether an index copies what it takes: a list, a mask, or a tensor of dimensions; one number of a tensor is a view's."""
    if isinstance(index, tuple):
        return any(map(_names_places, index))
    value = index.meta.get("example_value") if isinstance(index, fx.Node) else None
    if isinstance(value, torch.Tensor):
        return value.dim() > 0 or value.dtype in (torch.bool, torch.uint8)
    return isinstance(index, list)


def written_nodes(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Every node whose memory some op of the graph may write to, with that op."""
    return {alias: writers[0] for aliases, writers in written_memory(graph) for alias in aliases}


def written_memory(graph: fx.Graph) -> list[tuple[set[fx.Node], list[fx.Node]]]:
    """The pieces of memory that some op may write to: all nodes that may lie in one, and the ops that write to it.

    A write to a view writes to what it is a view of, and shows in every other view of it.
    """
    same = same_memory(graph)
    found: list[tuple[set[fx.Node], list[fx.Node]]] = []
    writers_of: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for target in writes(node):
            if target not in writers_of:
                found.append((_aliases(target, same), []))
                writers_of.update(dict.fromkeys(found[-1][0], found[-1][1]))
            if node not in writers_of[target][-1:]:
                writers_of[target].append(node)
    return found


def _aliases(node: fx.Node, same: Mapping[fx.Node, Sequence[fx.Node]]) -> set[fx.Node]:
    aliases: set[fx.Node] = set()
    pending = [node]
    while pending:
        alias = pending.pop()
        if alias in aliases:
            continue
        aliases.add(alias)
        pending += same.get(alias, ())
        pending += shared_inputs(alias)
        pending += [user for user in alias.users if user.op != "output" and alias in shared_inputs(user)]
    return aliases


# Methods whose second argument only says what shape or dtype the result has.
_LIKE_ANOTHER = frozenset("expand_as reshape_as type_as view_as".split())


def shared_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose memory the result may lie in."""
    if not node.op.startswith("call_") or is_fresh(node):
        return []
    name = op_name(node)
    in_place = _writes_first_argument(node) and (node.op == "call_method" or is_pytorchs(node.target))
    if in_place and name not in RESHAPING_METHODS and node.args and isinstance(node.args[0], fx.Node):
        # What is written is copied from the other arguments.
        return [node.args[0]]
    if node.op == "call_method" and name in _LIKE_ANOTHER and len(node.args) == 2:
        return [one for one in node.args[:1] if isinstance(one, fx.Node)]
    return list(node.all_input_nodes)
