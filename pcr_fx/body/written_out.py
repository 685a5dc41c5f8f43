"""Fused ops written out, where PyTorch's own cannot be batched over blocks or differentiated in all they take.

Its recurrent cells are batched one block at a time. Its batch norm refuses to be differentiated in the statistics,
which are operands like any other here. Its cross entropy with logits is NaN at infinity once it is transformed, its `prelu`
sums a weight's cotangent over the wrong samples, and its `logit` stops a NaN where gradients may be differentiated.

What raises for a singular matrix cannot be evaluated in any order or for states that are only guesses: here the result is not
finite then, and who called it has to look (`may_raise`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from pcr_fx.graphs.parts import Part

Weights = Tensor | None


def lstm_cell(
    x: Tensor, hx: tuple[Tensor, Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Weights = None, b_hh: Weights = None
) -> tuple[Tensor, Tensor]:
    """`torch.lstm_cell`: the new hidden state and the new cell state."""
    hidden, cell = hx
    gates = F.linear(x, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh)
    keep_in, forget, candidate, out = gates.chunk(4, -1)
    cell = torch.sigmoid(forget) * cell + torch.sigmoid(keep_in) * torch.tanh(candidate)
    return torch.sigmoid(out) * torch.tanh(cell), cell


def gru_cell(x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Weights = None, b_hh: Weights = None) -> Tensor:
    """`torch.gru_cell`."""
    reset_x, update_x, new_x = F.linear(x, w_ih, b_ih).chunk(3, -1)
    reset_h, update_h, new_h = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    new = torch.tanh(new_x + torch.sigmoid(reset_x + reset_h) * new_h)
    return new + torch.sigmoid(update_x + update_h) * (hx - new)


def rnn_tanh_cell(
    x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Weights = None, b_hh: Weights = None
) -> Tensor:
    """`torch.rnn_tanh_cell`."""
    return torch.tanh(F.linear(x, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))


def rnn_relu_cell(
    x: Tensor, hx: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Weights = None, b_hh: Weights = None
) -> Tensor:
    """`torch.rnn_relu_cell`."""
    return torch.relu(F.linear(x, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))


def batch_norm(
    x: Tensor,
    running_mean: Weights,
    running_var: Weights,
    weight: Weights = None,
    bias: Weights = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`F.batch_norm`; in evaluation each channel is scaled and shifted, with `x` `[N, C, ...]`."""
    if training or running_mean is None or running_var is None:
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = torch.rsqrt(running_var + eps)
    scale = scale if weight is None else scale * weight
    shift = (0.0 if bias is None else bias) - running_mean * scale
    channels = (-1, *(1 for _ in x.shape[2:]))
    return x * scale.view(channels) + shift.view(channels)


def layer_norm(
    x: Tensor, normalized_shape: Sequence[int], weight: Weights = None, bias: Weights = None, eps: float = 1e-5
) -> Tensor:
    """`F.layer_norm`."""
    dims = [-1 - dim for dim in range(len(normalized_shape))]
    variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
    normed = (x - mean) * torch.rsqrt(variance + eps)
    normed = normed if weight is None else normed * weight
    return normed if bias is None else normed + bias


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm`: `v` with the norm `g`, along all dimensions but `dim` (-1: along all)."""
    dims = [other for other in range(v.ndim) if dim == -1 or other != dim % v.ndim]
    return v * (g / torch.linalg.vector_norm(v, dim=dims, keepdim=True))


def binary_cross_entropy_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Weights = None,
    size_average: bool | None = None,
    reduce: bool | None = None,
    reduction: str = "mean",
    pos_weight: Weights = None,
) -> Tensor:
    """`F.binary_cross_entropy_with_logits`."""
    positive = F.logsigmoid(input) if pos_weight is None else (1 + (pos_weight - 1) * target) * F.logsigmoid(input)
    loss = (1 - target) * input - positive
    loss = loss if weight is None else loss * weight
    if size_average is not None or reduce is not None:  # the older names of the same
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def logit(input: Tensor, eps: float | None = None) -> Tensor:
    """`torch.logit`, with bounds rounded as it rounds them."""
    if eps is None or input.dtype not in (torch.float32, torch.float64):
        return torch.logit(input, eps)
    rounded = np.float32 if input.dtype == torch.float32 else np.float64
    low, high = float(rounded(eps)), float(rounded(1) - rounded(eps))
    return torch.logit(torch.where(input < low, low, torch.where(input > high, high, input)))


def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """`F.prelu`, with one weight or one for each of the channels, which are `input`'s second dimension."""
    if weight.numel() != 1 and input.ndim > 1:
        weight = weight.reshape(-1, *(1 for _ in input.shape[2:]))
    return torch.where(input > 0, torch.ones_like(input), weight) * input


def transformer_encoder_layer(
    x: Tensor,
    embed_dim: int,
    num_heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm_weight_1: Tensor,
    norm_bias_1: Tensor,
    norm_weight_2: Tensor,
    norm_bias_2: Tensor,
    ffn_weight_1: Tensor,
    ffn_bias_1: Tensor,
    ffn_weight_2: Tensor,
    ffn_bias_2: Tensor,
    mask: Weights = None,
    mask_type: int | None = None,
) -> Tensor:
    """`torch._transformer_encoder_layer_fwd`, which evaluation without gradients takes; `x` `[N, T, E]`."""
    if mask is not None:
        raise NotImplementedError("the fused layer of an encoder with a mask is not written out")

    def attend(x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (num_heads, -1)).transpose(-2, -3)
            for part in F.linear(x, qkv_weight, qkv_bias).chunk(3, -1)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(-2, -3).flatten(-2)
        return F.linear(attended, proj_weight, proj_bias)

    def feed(x: Tensor) -> Tensor:
        inner = F.linear(x, ffn_weight_1, ffn_bias_1)
        return F.linear(F.gelu(inner) if use_gelu else torch.relu(inner), ffn_weight_2, ffn_bias_2)

    def first(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_1, norm_bias_1, eps)

    def second(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm_weight_2, norm_bias_2, eps)

    if norm_first:
        x = x + attend(first(x))
        return x + feed(second(x))
    x = first(x + attend(x))
    return second(x + feed(x))


def inv(A: Tensor) -> Tensor:
    """`torch.linalg.inv`."""
    return torch.linalg.inv_ex(A)[0]


def solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    """`torch.linalg.solve`."""
    return torch.linalg.solve_ex(A, B, left=left)[0]


def cholesky(A: Tensor, *, upper: bool = False) -> Tensor:
    """`torch.linalg.cholesky`; not finite where there is none."""
    factor, info = torch.linalg.cholesky_ex(A, upper=upper)
    return torch.where((info == 0)[..., None, None], factor, torch.nan)


def det(A: Tensor) -> Tensor:
    """`torch.linalg.det`; up to 3 by 3 as a polynomial, which has derivatives at singular matrices too."""
    if A.shape[-1] != A.shape[-2] or not 0 < A.shape[-1] <= 3:
        return torch.linalg.det(A)
    first, *others = A.unbind(-2)
    if not others:
        return first[..., 0]
    if len(others) == 1:
        return first[..., 0] * others[0][..., 1] - first[..., 1] * others[0][..., 0]
    return (first * torch.linalg.cross(*others)).sum(-1)


_RAISING: dict[Any, Callable[..., Any]] = {
    torch.linalg.inv: inv,
    torch.inverse: inv,
    torch.linalg.solve: solve,
    torch.linalg.cholesky: cholesky,
    torch.cholesky: cholesky,
    "inverse": inv,
    "cholesky": cholesky,
}
# Steps of a recurrent network that are written out; one that takes more in a block has enough to do by itself.
_FEW_STEPS = 8


def _few_steps(cell: Callable[..., Any], whole: Callable[..., Any], states: int) -> Callable[..., Any]:
    """A recurrent network such as `torch.lstm`, called for a few steps at a time, as its cells.

    Args:
        cell: one layer's step.
        whole: the op itself, for all that is more than that.
        states: how many a layer has.
    """

    def run(
        x: Tensor,
        hx: Any,
        weights: list[Tensor],
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        time, each = int(batch_first), 4 if has_biases else 2
        usual = x.dim() == 3 and len(weights) == each * num_layers and not (train and dropout)
        if bidirectional or not usual or x.shape[time] > _FEW_STEPS:
            return whole(x, hx, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first)
        given = (hx,) if states == 1 else hx
        outputs, last = list(x.unbind(time)), []
        for layer in range(num_layers):
            state: Any = given[0][layer] if states == 1 else tuple(one[layer] for one in given)
            for step, taken in enumerate(outputs):
                state = cell(taken, state, *weights[each * layer : each * (layer + 1)])
                outputs[step] = state if states == 1 else state[0]
            last.append((state,) if states == 1 else state)
        return torch.stack(outputs, time), *(torch.stack(parts) for parts in zip(*last, strict=True))

    return run


_WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    torch.lstm_cell: lstm_cell,
    torch.gru_cell: gru_cell,
    torch.rnn_tanh_cell: rnn_tanh_cell,
    torch.rnn_relu_cell: rnn_relu_cell,
    torch.lstm: _few_steps(lstm_cell, torch.lstm, 2),
    torch.gru: _few_steps(gru_cell, torch.gru, 1),
    torch.rnn_tanh: _few_steps(rnn_tanh_cell, torch.rnn_tanh, 1),
    torch.rnn_relu: _few_steps(rnn_relu_cell, torch.rnn_relu, 1),
    F.batch_norm: batch_norm,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
    torch._weight_norm: weight_norm,
    torch._transformer_encoder_layer_fwd: transformer_encoder_layer,
    torch.logit: logit,
    torch.special.logit: logit,
    "logit": logit,
    torch.prelu: prelu,
    F.prelu: prelu,
    "prelu": prelu,
    torch.det: det,
    torch.linalg.det: det,
    "det": det,
    **_RAISING,
}


# PyTorch's derivatives of these are right twice, and no more often.
_TWICE_DIFFERENTIABLE: dict[Any, Callable[..., Any]] = {
    F.layer_norm: layer_norm,
    torch.layer_norm: lambda *args, cudnn_enable=True, **kwargs: layer_norm(*args[:5], **kwargs),
}


def may_raise(body: fx.GraphModule) -> bool:
    """Whether a body has ops that raise for some matrices, where what is written out is not finite."""
    return any(
        node.target in _RAISING or (isinstance(node.target, Part) and may_raise(node.target.graph))
        for node in body.graph.nodes
    )


def write_out_fused(body: fx.GraphModule, any_derivative: bool = False) -> fx.GraphModule:
    """`body` with its fused ops written out; it is left as it is.

    Args:
        any_derivative: whether it is to be differentiated more than twice.
    """
    table = _WRITTEN_OUT | _TWICE_DIFFERENTIABLE if any_derivative else _WRITTEN_OUT
    return _write_out(body, table)


def _write_out(body: fx.GraphModule, table: Mapping[Any, Callable[..., Any]]) -> fx.GraphModule:
    changed = {node.target: _written_out(node.target, table) for node in body.graph.nodes}
    if all(target is new for target, new in changed.items()):
        return body
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    for node in graph.nodes:
        new = changed.get(node.target, node.target)
        if new is not node.target:
            node.op, node.target = "call_function", new
    return fx.GraphModule(body, graph)


def _written_out(target: Any, table: Mapping[Any, Callable[..., Any]]) -> Any:
    """What stands for an op, or the op itself."""
    if type(target) is not Part:
        return table.get(target, target)
    graph = _write_out(target.graph, table)
    return target if graph is target.graph else Part(graph, target.__name__, target.with_gradients)
