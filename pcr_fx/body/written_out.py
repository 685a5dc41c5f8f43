"""Fused ops written out, where PyTorch's own cannot be batched over blocks or differentiated in all they take.

Its recurrent cells are batched one block at a time. Its batch norm refuses to be differentiated in the statistics,
which are operands like any other here. Its cross entropy with logits is NaN at infinity once it is transformed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

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


_WRITTEN_OUT: dict[Any, Callable[..., Any]] = {
    torch.lstm_cell: lstm_cell,
    torch.gru_cell: gru_cell,
    torch.rnn_tanh_cell: rnn_tanh_cell,
    torch.rnn_relu_cell: rnn_relu_cell,
    F.batch_norm: batch_norm,
    F.binary_cross_entropy_with_logits: binary_cross_entropy_with_logits,
    torch._weight_norm: weight_norm,
}


def write_out_fused(body: fx.GraphModule) -> fx.GraphModule:
    """`body` with its fused ops written out; it is left as it is."""
    if not any(node.target in _WRITTEN_OUT for node in body.graph.nodes):
        return body
    graph = fx.Graph()
    graph.output(graph.graph_copy(body.graph, {}))
    for node in graph.nodes:
        node.target = _WRITTEN_OUT.get(node.target, node.target)
    return fx.GraphModule(body, graph)
