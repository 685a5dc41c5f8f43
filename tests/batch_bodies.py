"""Bodies with the dimensions that must be proved to be batch dimensions: modules, functions, and aten ops."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from complex_bodies import COMPLEX
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

aten = torch.ops.aten
Function = Callable[..., Any]
Shape = tuple[int, ...]


def tensors(*shapes: Shape) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


def trace(function: Function, *shapes: Shape) -> fx.GraphModule:
    def body(*states: Tensor) -> tuple[Tensor, ...]:
        result = function(*states)
        return tuple(result) if isinstance(result, tuple | list) else (result,)

    torch.manual_seed(0)
    with torch.no_grad():
        return make_fx(body)(*tensors(*shapes))


class Annotate(fx.Interpreter):
    """Gives every node its `meta["val"]`."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["val"] = super().run_node(n)
        return n.meta["val"]


def record(function: Function, *shapes: Shape) -> fx.GraphModule:
    """The graph of a function that calls aten ops: as it calls them, where `make_fx` would decompose some."""
    graph = fx.symbolic_trace(function)
    Annotate(graph).run(*tensors(*shapes))
    return graph


def residual(width: int) -> nn.Module:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 7), nn.GELU(), nn.Linear(7, width))

        def forward(self, x: Tensor) -> Tensor:
            return x + 0.1 * self.inner(x)

    return Residual()


class Mixer(nn.Module):
    """A block of MLP-Mixer, `[B, T, w]`."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.channels = residual(5), residual(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(self.tokens(x.transpose(1, 2)).transpose(1, 2))


class CausalAttention(nn.Module):
    """Attention as it is written by hand, `[B, T, 2 * heads]`."""

    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(6, 18), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        size, length, width = x.shape
        parts = self.project(x).split(width, dim=2)
        q, k, v = (part.view(size, length, 2, width // 2).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(mixed.transpose(1, 2).contiguous().view(size, length, width))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 4)

    def forward(self, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        return self.cell(hidden, (hidden, cell))


def cell(module: nn.Module) -> Function:
    return lambda hidden: module(hidden, hidden)


def attention(**options: Any) -> Function:
    module = nn.MultiheadAttention(4, 2, **options).double()
    return lambda x: x + module(x, x, x, need_weights=False)[0]


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()


ACTIVATIONS = [
    nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Softplus(), nn.ELU(), nn.CELU(), nn.SELU(), nn.LeakyReLU(),
    nn.ReLU(), nn.ReLU6(), nn.Hardtanh(), nn.Hardswish(), nn.Hardsigmoid(), nn.Hardshrink(), nn.Softshrink(),
    nn.Tanhshrink(), nn.Softsign(), nn.Mish(), nn.LogSigmoid(), nn.Threshold(0.1, 2.0), nn.PReLU(4).double(),
    nn.Tanh(), nn.Sigmoid(), nn.Identity(), nn.Dropout().eval(),
    nn.SiLU(inplace=True), nn.Mish(inplace=True), nn.Hardswish(inplace=True), nn.ELU(inplace=True),
    nn.CELU(inplace=True), nn.Threshold(0.1, 2.0, inplace=True),
]  # fmt: skip

# name -> (build, shapes of the states, dimensions)
MODULES: dict[str, tuple[Callable[[], Any], list[Shape], Shape]] = {
    **{
        f"{number} {each}": (lambda each=each: lambda x: each(x.clone()), [(3, 4)], (0, 1))
        for number, each in enumerate(ACTIVATIONS)
    },
    "linear": (lambda: nn.Linear(4, 4), [(3, 4)], (0,)),
    "linear, no bias": (lambda: nn.Linear(4, 4, bias=False), [(3, 4)], (0,)),
    "linear 1-D": (lambda: nn.Linear(4, 4), [(4,)], ()),
    "linear 3-D": (lambda: nn.Linear(4, 4), [(3, 5, 4)], (0, 1)),
    "linear 3-D, no bias": (lambda: nn.Linear(4, 4, bias=False), [(3, 5, 4)], (0, 1)),
    "linear 4-D, equal sizes": (lambda: nn.Linear(4, 4), [(4, 4, 4, 4)], (0, 1, 2)),
    "linear, width 1": (lambda: nn.Linear(1, 1), [(3, 1)], (0,)),
    "mlp": (lambda: residual(4), [(3, 4)], (0,)),
    "mlp 3-D": (lambda: residual(4), [(3, 5, 4)], (0, 1)),
    "mlp, one sample": (lambda: residual(4), [(1, 4)], (0,)),
    "mlp 3-D, one sample": (lambda: residual(4), [(1, 5, 4)], (0, 1)),
    "mlp 3-D, one token": (lambda: residual(4), [(3, 1, 4)], (0, 1)),
    "mlp 3-D, one of each": (lambda: residual(4), [(1, 1, 4)], (0, 1)),
    "mlp, one number": (lambda: residual(1), [(1, 1)], (0,)),
    "layer norm": (lambda: nn.LayerNorm(4), [(3, 4)], (0,)),
    "layer norm over two": (lambda: nn.LayerNorm([5, 4]), [(3, 5, 4)], (0,)),
    "rms norm": (lambda: nn.RMSNorm(4), [(3, 4)], (0,)),
    "group norm": (lambda: nn.GroupNorm(2, 4), [(3, 4, 5, 5)], (0,)),
    "group norm 2-D": (lambda: nn.GroupNorm(2, 4), [(3, 4)], (0,)),
    "batch norm, evaluation": (lambda: nn.BatchNorm2d(4).eval(), [(3, 4, 5, 5)], (0, 1, 2, 3)),
    "batch norm, training": (lambda: nn.BatchNorm1d(4), [(3, 4)], ()),
    "batch norm, own statistics": (
        lambda: nn.BatchNorm2d(4, track_running_stats=False).eval(),
        [(3, 4, 5, 5)],
        (1,),
    ),
    "instance norm": (lambda: nn.InstanceNorm2d(4), [(3, 4, 5, 5)], (0, 1)),
    "softmax": (lambda: nn.Softmax(-1), [(3, 4)], (0,)),
    "log softmax": (lambda: nn.LogSoftmax(0), [(3, 4)], (1,)),
    "conv1d": (lambda: nn.Conv1d(4, 4, 3, padding=1), [(3, 4, 6)], (0,)),
    "conv2d": (lambda: nn.Conv2d(4, 4, 3, padding=1), [(3, 4, 5, 5)], (0,)),
    "conv2d, depthwise": (lambda: nn.Conv2d(4, 4, 3, padding="same", groups=4), [(3, 4, 5, 5)], (0,)),
    "conv2d, transposed": (lambda: nn.ConvTranspose2d(4, 4, 3, padding=1), [(3, 4, 5, 5)], (0,)),
    "conv2d, circular": (
        lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        [(3, 4, 5, 5)],
        (0,),
    ),
    "conv2d, one image": (lambda: nn.Conv2d(4, 4, 3, padding=1), [(4, 5, 5)], ()),
    "conv2d, batch of one": (
        lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4).eval()),
        [(1, 4, 5, 5)],
        (0,),
    ),
    "attention": (lambda: attention(batch_first=True), [(3, 5, 4)], (0,)),
    "attention, sequence first": (attention, [(5, 3, 4)], (1,)),
    "attention by hand": (CausalAttention, [(3, 5, 6)], (0,)),
    "attention by hand, one sample": (CausalAttention, [(1, 5, 6)], (0,)),
    "transformer layer": (encoder_layer, [(3, 5, 4)], (0,)),
    "gru cell": (lambda: cell(nn.GRUCell(4, 4).double()), [(3, 4)], (0,)),
    "gru cell, one sample": (lambda: cell(nn.GRUCell(4, 4).double()), [(1, 4)], (0,)),
    "gru cell, no batch": (lambda: cell(nn.GRUCell(4, 4).double()), [(4,)], ()),
    "rnn cell": (lambda: cell(nn.RNNCell(4, 4).double()), [(3, 4)], (0,)),
    "rnn cell, one sample": (lambda: cell(nn.RNNCell(4, 4).double()), [(1, 4)], (0,)),
    "lstm cell": (Lstm, [(3, 4), (3, 4)], (0,)),
    "lstm cell, one sample": (Lstm, [(1, 4), (1, 4)], (0,)),
    "bilinear": (lambda: cell(nn.Bilinear(4, 4, 4).double()), [(3, 4)], (0,)),
    "bilinear 3-D": (lambda: cell(nn.Bilinear(4, 4, 4).double()), [(3, 5, 4)], (0, 1)),
    "mixer": (Mixer, [(3, 5, 4)], (0,)),
    "mixer, one sample": (Mixer, [(1, 5, 4)], (0,)),
}


W, W3, rows, vector, keys, kernels = tensors((4, 4), (3, 4, 4), (3, 4), (4,), (2, 3, 7, 4), (3, 3, 3))
positive = rows > 0
mask = torch.tril(torch.ones(5, 5, dtype=torch.bool))
first_column = torch.zeros(3, 1, dtype=torch.long)


def write_in_part(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, :2].mul_(y[:, 2:]).sigmoid_()
    return y


def write_across(x: Tensor) -> Tensor:
    y = x.clone()
    y[0].add_(y[1])
    return y


def write_into_buffer(x: Tensor) -> Tensor:
    buffer = torch.zeros_like(x)
    buffer.copy_(x.mean(0))
    return buffer


def write_through_view(x: Tensor) -> Tensor:
    y = x.clone()
    y.t().copy_(x)
    return y


# name -> (body, shapes of the states, dimensions)
FUNCTIONS: dict[str, tuple[Function, list[Shape], Shape]] = {
    # views
    "flatten and back": (lambda x: (x.flatten(0, 1) @ W).view(3, 5, 4), [(3, 5, 4)], (0, 1)),
    "flatten all and back": (lambda x: x.reshape(-1).view(3, 5, 4), [(3, 5, 4)], (0, 1, 2)),
    "regroup features": (lambda x: x.view(3, 2, 6).reshape(3, 4, 3), [(3, 4, 3)], (0, 2)),
    "split features": (lambda x: x.view(3, 2, 2).softmax(-1).view(3, 4), [(3, 4)], (0,)),
    "merge the wrong pair": (lambda x: x.view(10, 3).softmax(-1).view(5, 2, 3), [(5, 2, 3)], (0, 1)),
    "cut through the batch": (lambda x: x.view(2, 2, 3).softmax(0).view(4, 3), [(4, 3)], (1,)),
    "joined in two orders": (
        lambda x: (x.flatten(0, 1) + x.transpose(0, 1).flatten(0, 1)).view(2, 2, 3),
        [(2, 2, 3)],
        (2,),
    ),
    "shuffle the batch": (lambda x: x.view(2, 2, 3).transpose(0, 1).reshape(4, 3), [(4, 3)], (1,)),
    "mix the batch": (lambda x: (x.view(4, 3) @ W[:3, :3]).view(3, 4), [(3, 4)], ()),
    "move and return": (lambda x: (x.permute(2, 0, 1) * 2).permute(1, 2, 0), [(3, 5, 4)], (0, 1, 2)),
    "transposed batch": (lambda x: (W @ x.t()).t(), [(3, 4)], (0,)),
    "transposed, equal sizes": (lambda x: x + x.t(), [(4, 4)], ()),
    "swapped": (lambda x: x.transpose(0, 1), [(4, 4)], ()),
    "unsqueeze and squeeze": (lambda x: x.unsqueeze(1).tanh().squeeze(1), [(3, 4)], (0, 1)),
    "squeeze all": (lambda x: x.unsqueeze(1).unsqueeze(-1).squeeze(), [(3, 4)], (0, 1)),
    "expand and sum": (lambda x: (x.unsqueeze(1).expand(3, 6, 4) * 2).sum(1), [(3, 4)], (0, 1)),
    "repeat and take": (lambda x: x.repeat(2, 1, 3).select(0, 1)[:, 4:8], [(3, 4)], (0,)),
    "repeat a new dimension": (lambda x: x.repeat(2, 1, 1).sum(0), [(3, 4)], (0, 1)),
    "tile the batch": (lambda x: x.repeat(2, 1)[:3], [(3, 4)], (1,)),
    "same slice": (lambda x: aten.slice.Tensor(x, 0, 0, 3), [(3, 4)], (0, 1)),
    "colons": (lambda x: x[:, :], [(3, 4)], (0, 1)),
    "rotate halves": (lambda x: torch.cat([-x[:, 2:], x[:, :2]], 1), [(3, 4)], (0,)),
    "gates": (lambda x: torch.sigmoid(x @ W).chunk(2, 1)[0].repeat(1, 2) * x, [(3, 4)], (0,)),
    "uneven split": (lambda x: torch.cat(x.split([1, 3], 1)[::-1], 1), [(3, 4)], (0,)),
    "split whole": (lambda x: x.split(4, 1)[0], [(3, 4)], (0, 1)),
    "unbind": (lambda x: torch.stack(x.unbind(1)[::-1], 1), [(3, 4)], (0,)),
    "stack and sum": (lambda x: torch.stack([x, x.tanh()]).sum(0), [(3, 4)], (0, 1)),
    "pad and crop": (lambda x: F.pad(x, (1, 0))[:, :-1], [(3, 4)], (0,)),
    "pad and crop at once": (lambda x: F.pad(x, (1, -1)), [(3, 4)], (0,)),
    "pad the batch": (lambda x: F.pad(x, (0, 0, 1, -1)), [(3, 4)], ()),
    "replicate the edge": (lambda x: F.pad(x, (1, 1), mode="replicate")[..., 1:-1], [(3, 5, 4)], (0, 1)),
    # elementwise
    "mask": (lambda x: x.masked_fill(mask, 0.5), [(5, 5)], (0, 1)),
    "triangle": (lambda x: x.tril().triu(-1), [(3, 5, 5)], (0,)),
    "triangle of the batch": (lambda x: torch.sin(x).triu(), [(3, 4)], ()),
    "where": (lambda x: torch.where(x > 0, x, x.exp()).clamp(-1, 1) ** 2, [(3, 4)], (0, 1)),
    "operands of every shape": (lambda x: torch.addcmul(rows, x, vector).lerp(x, 0.3), [(3, 4)], (0, 1)),
    "casts": (lambda x: x.float().contiguous().clone().double().detach(), [(3, 4)], (0, 1)),
    "floor": (lambda x: x.floor_divide(0.5), [(3, 4)], (0, 1)),
    "shape only": (lambda x: x + torch.zeros_like(x.t()).t() + x.new_ones(3, 1), [(3, 4)], (0, 1)),
    "constant": (lambda x: torch.ones_like(x), [(3, 4)], (0, 1)),
    "identity": (lambda x: x, [(3, 4)], (0, 1)),
    # products
    "einsum": (lambda x: torch.einsum("bi,ij->bj", x, W), [(3, 4)], (0,)),
    "einsum, weights per sample": (lambda x: torch.einsum("bti,bij->btj", x, W3), [(3, 5, 4)], (0, 1)),
    # At size 1 einsum moves the batch about by views that do not tell where it went.
    "einsum, one sample": (lambda x: torch.einsum("bti,ij->btj", x, W), [(1, 5, 4)], (1,)),
    "einsum, pairs": (lambda x: torch.einsum("bti,bsi->bts", x, x).softmax(-1) @ x, [(3, 5, 4)], (0,)),
    "mv": (lambda x: aten.mv(W, x), [(4,)], ()),
    "batched mv": (lambda x: (x @ vector).unsqueeze(1) * x, [(3, 4)], (0,)),
    "addmv": (lambda x: torch.addmv(x.sum(1), x, vector).unsqueeze(1) + x, [(3, 4)], (0,)),
    "addmv, state as vector": (lambda x: torch.addmv(x, W, x), [(4,)], ()),
    "dot": (lambda x: x * torch.dot(x, vector), [(4,)], ()),
    "selected from the back": (lambda x: x * x.select(-1, 0).unsqueeze(-1), [(3, 4)], (0,)),
    "outer": (lambda x: torch.outer(x.sum(1), vector), [(3, 4)], (0,)),
    "batched product": (lambda x: x @ x, [(3, 4, 4)], (0,)),
    "weight on the left": (lambda x: W @ x, [(3, 4, 4)], (0, 2)),
    "weights on both sides": (lambda x: torch.baddbmm(x, torch.bmm(W3, x), W3), [(3, 4, 4)], (0,)),
    "baddbmm, only added": (lambda x: torch.baddbmm(x, W3, W3), [(3, 4, 4)], (0, 1, 2)),
    "addmm, only added": (lambda x: torch.addmm(x, rows, W), [(3, 4)], (0, 1)),
    "gram": (lambda x: (x @ x.t()) @ x, [(3, 4)], ()),
    # reductions
    "normalise": (lambda x: F.normalize(x, dim=1), [(3, 4)], (0,)),
    "cosine": (lambda x: x * F.cosine_similarity(x, rows, dim=1)[:, None], [(3, 4)], (0,)),
    "centre": (lambda x: x - x.mean(1, keepdim=True), [(3, 4)], (0,)),
    "standardise": (lambda x: (x - x.mean(1, True)) / x.var(1, keepdim=True).sqrt(), [(3, 4)], (0,)),
    "standard deviation": (lambda x: x / torch.std_mean(x, 1, keepdim=True)[0], [(3, 4)], (0,)),
    "log sum exp": (lambda x: x - x.logsumexp(-1, keepdim=True), [(3, 4)], (0,)),
    "extremes": (lambda x: x - x.amax(1, True) + x.amin(1, True) * x.prod(1, True), [(3, 4)], (0,)),
    "max and where": (lambda x: x * x.max(1)[0][:, None] + x.max(1)[1][:, None], [(3, 4)], (0,)),
    "both extremes": (lambda x: x - sum(torch.aminmax(x, dim=1, keepdim=True)), [(3, 4)], (0,)),
    "counts": (lambda x: x + x.argmax(1, True) + (x > 0).any(1, True), [(3, 4)], (0,)),
    "all reduced": (lambda x: x * x.norm(), [(3, 4)], ()),
    # along a dimension
    "scans": (lambda x: x.cumsum(1) + x.cummax(1)[0] + x.logcumsumexp(1), [(3, 4)], (0,)),
    "reordered": (lambda x: x.roll(1, 1) + x.flip(1) + x.sort(1)[0] + x.topk(4, 1)[0], [(3, 4)], (0,)),
    "gathered": (lambda x: x + x.gather(1, first_column), [(3, 4)], (0,)),
    "indexed": (lambda x: x[:, [2, 0, 0, 3]] + x[:, torch.tensor([1])], [(3, 4)], (0,)),
    "indexed twice": (lambda x: x[:, [2, 0, 1], [0, 0, 1]][..., None] + x, [(2, 3, 4)], (0,)),
    "indexed in the middle": (lambda x: x[:, [2, 0], [0, 1]][:, None] + x, [(5, 3, 2)], (0,)),
    # matrices
    "inverse": (lambda x: torch.linalg.inv_ex(x + 9 * torch.eye(3))[0], [(2, 3, 3)], (0,)),
    "solved": (lambda x: torch.linalg.solve_ex(x + 9 * torch.eye(3), x)[0], [(2, 3, 3)], (0,)),
    "solved by fixed": (lambda x: torch.linalg.solve_ex(9 * torch.eye(3, dtype=x.dtype), x)[0], [(3, 4)], ()),
    "solved for a vector": (lambda x: x + torch.linalg.solve_ex(9 * torch.eye(4, dtype=x.dtype), x)[0], [(4,)], ()),
    "triangular": (lambda x: torch.linalg.solve_triangular(x + 9 * torch.eye(3), x, upper=True), [(2, 3, 3)], (0,)),
    "determinant": (lambda x: x * torch.linalg.det(x)[:, None, None], [(2, 3, 3)], (0,)),
    "log determinant": (lambda x: x + torch.linalg.slogdet(x + 9 * torch.eye(3))[1][:, None, None], [(2, 3, 3)], (0,)),
    "batch inverse": (
        lambda x: torch.linalg.inv_ex(x.transpose(0, 1) + 9 * torch.eye(3))[0].transpose(0, 1),
        [(3, 2, 3)],
        (1,),
    ),
    "inverse of all": (lambda x: torch.linalg.inv_ex(x + 9 * torch.eye(3))[0], [(3, 3)], ()),
    "batch determinant": (lambda x: x * torch.linalg.det(x), [(3, 3)], ()),
    "batch cross": (lambda x: torch.linalg.cross(x, x.flip(1), dim=0), [(3, 2)], ()),
    "factorised": (lambda x: torch.linalg.cholesky_ex(x @ x.mT + 9 * torch.eye(3))[0], [(2, 3, 3)], (0,)),
    "solved by a factor": (lambda x: torch.cholesky_solve(x, x + 9 * torch.eye(3)), [(2, 3, 3)], (0,)),
    "crossed": (lambda x: torch.linalg.cross(x, x.flip(1), dim=1), [(2, 3)], (0,)),
    "gathered by rank": (lambda x: x.gather(1, x.argsort(1)), [(3, 4)], (0,)),
    "selected by the state": (lambda x: x.index_select(0, x.argmax(0)), [(4, 4)], ()),
    "selected": (lambda x: x + x.index_select(1, torch.tensor([2])), [(3, 4)], (0,)),
    "gated": (lambda x: F.glu(torch.cat([x, x @ W], 1), 1), [(3, 4)], (0,)),
    "gated, whole operands": (lambda x: F.glu(x, 1).repeat(1, 2), [(3, 4)], (0,)),
    # images
    "pooled": (lambda x: F.avg_pool2d(x, 3, 1, 1) + F.max_pool2d(x, 3, 1, 1), [(2, 3, 6, 6)], (0, 1)),
    "pooled, no batch": (lambda x: F.avg_pool2d(x, 3, 1, 1), [(3, 6, 6)], (0,)),
    "adaptive": (
        lambda x: x + F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1),
        [(2, 3, 4, 4)],
        (0, 1),
    ),
    "resampled": (lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2), [(2, 3, 4, 4)], (0, 1)),
    "shuffled": (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2), [(2, 4, 3, 3)], ()),
    # attention
    "attention with a mask": (
        lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=mask),
        [(2, 3, 5, 4)],
        (0, 1),
    ),
    "attention 3-D": (lambda x: F.scaled_dot_product_attention(x, x, x), [(3, 5, 4)], (0,)),
    "attention to fixed keys": (
        lambda x: F.scaled_dot_product_attention(x, keys, keys),
        [(2, 3, 5, 4)],
        (0, 1, 2),
    ),
    "attention over values": (
        lambda x: F.scaled_dot_product_attention(keys, keys, x),
        [(2, 3, 7, 4)],
        (0, 1, 3),
    ),
    # the batch coupled
    "batch mean": (lambda x: x + x.mean(0), [(3, 4)], (1,)),
    "batch flip": (lambda x: x.flip(0), [(3, 4)], (1,)),
    "batch roll": (lambda x: x.roll(1, 0), [(3, 4)], (1,)),
    "roll of all": (lambda x: x.roll(1), [(3, 4)], ()),
    "batch cumsum": (lambda x: x.cumsum(0), [(3, 4)], (1,)),
    "batch softmax": (lambda x: x.softmax(0), [(3, 4)], (1,)),
    "batch cat": (lambda x: torch.cat([x[1:], x[:1]]), [(3, 4)], (1,)),
    "batch cat of two": (lambda x: torch.cat([x, x])[1:4], [(3, 4)], (1,)),
    "batch sort": (lambda x: x.sort(0)[0], [(3, 4)], (1,)),
    "minus the first": (lambda x: x - x[0], [(3, 4)], (1,)),
    "broadcast of the first": (lambda x: x[:1] + x, [(3, 4)], (1,)),
    "stacked away": (lambda x: torch.stack([x[1], x[2], x[0]]), [(3, 4)], (1,)),
    "batch index": (lambda x: x[[1, 2, 0]], [(3, 4)], (1,)),
    "index by the state": (lambda x: x[:, x.sum(0).argsort()], [(3, 4)], ()),
    "indices apart": (lambda x: x + x[torch.tensor([0, 1, 1]), :, torch.tensor([1, 0, 1])][..., None], [(3, 3, 2)], ()),
    "unknown op": (lambda x: torch.renorm(x, 2, 0, 1.0), [(3, 4)], ()),
    "a number of all": (lambda x: x + torch.cdist(x, x).sum(1, keepdim=True), [(3, 4)], ()),
    "broadcast over one sample": (lambda x: (x + rows).mean(0, keepdim=True), [(1, 4)], (1,)),
    "batch mean of one sample": (lambda x: x + x.mean(0), [(1, 4)], (1,)),
    # writes in place
    "write": (lambda x: x.clone().add_(1).relu_().mul_(rows), [(3, 4)], (0, 1)),
    "write in part": (write_in_part, [(3, 4)], (0,)),
    "write across the batch": (write_across, [(3, 4)], (1,)),
    "write into a buffer": (write_into_buffer, [(3, 4)], ()),
    "write through a view": (write_through_view, [(4, 4)], ()),
    "fill": (lambda x: x.clone().fill_(2.0) * x.clone().copy_(rows), [(3, 4)], (0, 1)),
    # several states
    "two states": (lambda x, y: (x + y @ W, y * x), [(3, 4), (3, 4)], (0,)),
    "two states, second coupled": (lambda x, y: (x, y.flip(0)), [(3, 4), (3, 4)], (1,)),
    "two states, exchanged": (lambda x, y: (y, x), [(3, 4), (3, 4)], (0, 1)),
    "two states of other widths": (lambda x, y: (x * y.sum(1, True), y.exp()), [(3, 4), (3, 2)], (0,)),
    "two states of other ranks": (lambda x, y: (x * y[:, None], y + x.sum(1)), [(3, 4), (3,)], (0,)),
    "two states, one crosses": (lambda x, y: (x + y.t(), y), [(4, 4), (4, 4)], ()),
    # sizes at the edge
    "no dimensions": (lambda x: x * 2, [()], ()),
    "no elements": (lambda x: x * 2, [(0, 4)], ()),
    "no elements inside": (lambda x: x + x[:, :0].sum(1, keepdim=True), [(3, 4)], (0,)),
    "view of no elements, cut": (lambda x: x + x[:, :0].reshape(0, 5).sum(), [(3, 4)], ()),
    "view of no elements": (lambda x: x + x[:, :0].reshape(0, 3).sum(), [(3, 4)], ()),
}


def exchanged(parts: Sequence[Tensor]) -> Tensor:
    return aten.cat.default([parts[1], parts[0]], 1)


# Ops called directly: those that other tracers, modes or devices leave in a graph.
OPS: dict[str, tuple[Function, list[Shape], Shape]] = {
    "linear": (lambda x: aten.linear.default(x, W, vector), [(3, 5, 4)], (0, 1)),
    "linear, state as weight": (lambda x: aten.linear.default(W, x), [(4, 4)], ()),
    "matmul": (lambda x: aten.matmul.default(x, aten.matmul.default(W, x)), [(3, 4, 4)], (0,)),
    "matmul, weight on the left": (lambda x: aten.matmul.default(W, x), [(3, 4, 4)], (0, 2)),
    "matmul, vector": (lambda x: aten.mul.Tensor(x, aten.matmul.default(vector, x)), [(4,)], ()),
    "reshape": (
        lambda x: aten.reshape.default(aten._reshape_alias.default(x, [20], [1]), [5, 4]),
        [(5, 4)],
        (0, 1),
    ),
    "other type": (
        lambda x: aten.view.dtype(aten.view.dtype(x, torch.float32), torch.float64),
        [(3, 4)],
        (),
    ),
    "softmax": (lambda x: aten.log_softmax.int(aten.softmax.int(x, 1), 1), [(3, 4)], (0,)),
    "softmax backward": (
        lambda x: aten._softmax_backward_data.default(x, x, 1, torch.float64),
        [(3, 4)],
        (0,),
    ),
    "log softmax backward": (
        lambda x: aten._log_softmax_backward_data.default(rows, x, 0, torch.float64),
        [(3, 4)],
        (1,),
    ),
    "standard deviation": (
        lambda x: aten.sub.Tensor(x, aten.std.correction(x, [1], keepdim=True)),
        [(3, 4)],
        (0,),
    ),
    "statistics": (
        lambda x: aten.sub.Tensor(x, aten.var_mean.correction(x, [0], keepdim=True)[1]),
        [(3, 4)],
        (1,),
    ),
    "least": (lambda x: aten.sub.Tensor(x, aten.min.dim(x, 1, True)[0]), [(3, 4)], (0,)),
    "middle": (lambda x: aten.sub.Tensor(x, aten.median.dim(x, 1, True)[0]), [(3, 4)], (0,)),
    "where least": (lambda x: aten.mul.Tensor(x, aten.argmin.default(x, 1, True)), [(3, 4)], (0,)),
    "where least of all": (lambda x: aten.mul.Tensor(x, aten.argmin.default(x)), [(3, 4)], ()),
    "all": (lambda x: aten.mul.Tensor(x, aten.all.dim(aten.gt.Scalar(x, 0), 1, True)), [(3, 4)], (0,)),
    "norm": (lambda x: aten.div.Tensor(x, aten.norm.ScalarOpt_dim(x, 2, [1], True)), [(3, 4)], (0,)),
    "scans": (lambda x: aten.cummin.default(aten.cumprod.default(x, 1), 1)[0], [(3, 4)], (0,)),
    "split": (lambda x: exchanged(aten.unsafe_split_with_sizes.default(x, [1, 3], 1)), [(3, 4)], (0,)),
    "split, taken whole": (
        lambda x: aten.cat.default(aten.unsafe_split_with_sizes.default(x, [1, 3], 1), 1),
        [(3, 4)],
        (),
    ),
    "written": (
        lambda x: aten.floor_divide_.Scalar(aten.fill.Scalar(x, 3), 2),
        [(4, 4)],
        (0, 1),
    ),
    "written by masks": (
        lambda x: aten.gelu_.default(aten.masked_fill_.Scalar(aten.copy.default(rows, x), positive, 2)),
        [(3, 4)],
        (0, 1),
    ),
    "written activations": (
        lambda x: aten.leaky_relu_.default(aten.hardtanh_.default(aten.hardsigmoid_.default(aten.selu_.default(x)))),
        [(3, 4)],
        (0, 1),
    ),
    "resampled": (lambda x: aten.upsample_bilinear2d.default(x, [4, 4], False), [(2, 3, 4, 4)], (0, 1)),
    "adaptive": (lambda x: aten._adaptive_avg_pool2d.default(x, [4, 4]), [(2, 3, 4, 4)], (0, 1)),
    "padded": (
        lambda x: aten.slice.Tensor(aten.reflection_pad1d.default(x, [1, 1]), 2, 1, 5),
        [(2, 3, 4)],
        (0, 1),
    ),
    "padded volumes": (
        lambda x: aten.reflection_pad3d.default(x, [1, -1, 0, 0, 0, 0]),
        [(2, 2, 3, 3, 3)],
        (0, 1),
    ),
    "replicated": (lambda x: aten.replication_pad2d.default(x, [1, -1, 0, 0]), [(2, 3, 3, 3)], (0, 1)),
    "replicated volumes": (
        lambda x: aten.replication_pad3d.default(x, [1, -1, 0, 0, 0, 0]),
        [(2, 2, 3, 3, 3)],
        (0, 1),
    ),
    "evaluated batch norm": (
        lambda x: aten._native_batch_norm_legit_no_training.default(x, None, None, vector, vector**2, 0.1, 1e-5)[0],
        [(3, 4)],
        (0, 1),
    ),
    "batch norm without statistics": (
        lambda x: aten._native_batch_norm_legit.no_stats(x, None, None, True, 0.1, 1e-5)[0],
        [(3, 4)],
        (1,),
    ),
    "batch norm without update": (
        lambda x: aten._batch_norm_no_update.default(x, None, None, vector, vector**2, 0.1, 1e-5)[0],
        [(3, 4)],
        (0, 1),
    ),
    "batch norm, state as scale": (
        lambda x: aten.select.int(
            aten.native_batch_norm.default(rows, x, None, vector, vector**2, False, 0, 1e-5)[0], 0, 1
        ),
        [(4,)],
        (0,),
    ),
    "layer norm, state as scale": (
        lambda x: aten.select.int(aten.native_layer_norm.default(rows, [4], x, None, 1e-5)[0], 0, 1),
        [(4,)],
        (0,),
    ),
    "rms norm": (lambda x: aten._fused_rms_norm.default(x, [4], vector, None)[0], [(3, 4)], (0,)),
    "statistics of a norm": (
        lambda x: aten.mul.Tensor(x, aten.native_layer_norm.default(x, [4], None, None, 1e-5)[2]),
        [(3, 4)],
        (),
    ),
    "convolution, state as weight": (
        lambda x: aten.convolution.default(kernels, x, None, [1], [1], [1], False, [0], 1),
        [(3, 3, 3)],
        (),
    ),
    "cat with an empty list's tensor": (
        lambda x: aten.cat.default([aten.slice.Tensor(x, 0, 0, 0), x], 0),
        [(3,)],
        (),
    ),
}


@cache
def graph_of(table: str, name: str) -> fx.GraphModule:
    if table in ("ops", "complex"):
        function, shapes, _ = TABLES[table][name]
        return record(function, *shapes)
    if table == "functions":
        return trace(FUNCTIONS[name][0], *FUNCTIONS[name][1])
    torch.manual_seed(0)
    build, shapes, _ = MODULES[name]
    module = build()
    return trace(module.double() if isinstance(module, nn.Module) else module, *shapes)


TABLES = {"modules": MODULES, "functions": FUNCTIONS, "ops": OPS, "complex": COMPLEX}
BODIES = [(table, name) for table, entries in TABLES.items() for name in entries]
