"""What people write inside a block, beside what `ops.py` has: templates by kinds, in double precision.

Further kinds are `q`, complex numbers of the shape of a state, `s`, one number a row without a dimension for it, and `t`, columns
`[.., 4, 1]`. A block knows its number `t`, and `words`, four whole numbers of its own that may be places. What draws at random is
in `RANDOM`. A model of these is not for `solve_chain`, whose blocks do not know their numbers.
"""

from __future__ import annotations

# Functions that the templates call.
PRELUDE = '''
import math
from torch.utils.checkpoint import checkpoint

class Spike(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, width):
        ctx.save_for_backward(v)
        ctx.width = width
        return (v > 0).to(v.dtype)

    @staticmethod
    def backward(ctx, cotangent):
        (v,) = ctx.saved_tensors
        return cotangent / (1 + ctx.width * v.abs()) ** 2, None

class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return torch.round(4 * v) / 4

    @staticmethod
    def backward(ctx, cotangent):
        return cotangent

class Product(torch.autograd.Function):
    """With derivatives of its own by both, one of them scaled."""

    @staticmethod
    def forward(ctx, v, w):
        ctx.save_for_backward(v, w)
        return v * torch.tanh(w)

    @staticmethod
    def backward(ctx, cotangent):
        v, w = ctx.saved_tensors
        return 0.5 * cotangent * torch.tanh(w), cotangent * v

def well(v, n):
    """Matrices `[.., n, n]` whose diagonal outweighs the rest."""
    w = torch.cat([v, 0.5 * v], -1)[..., :n]
    return 4 * torch.eye(n, dtype=v.dtype) + 0.3 * torch.sin(w.unsqueeze(-1) - 2 * w.unsqueeze(-2))

def definite(v, n):
    return well(v, n) @ well(v, n).mT

def wide(v, n):
    return torch.cat([v, 0.5 * v], -1)[..., :n]

def narrow(v):
    """`[.., n]` as `[.., 4]`."""
    return F.pad(v, (0, 4 - v.shape[-1])) if v.shape[-1] < 4 else v[..., :4] + v[..., -4:]

def unseen(v):
    with torch.no_grad():
        return torch.tanh(v) * 0.5

def written(v, w):
    v = v.clone()
    v[..., 0] = 0.3 * w[..., 1]
    v[..., 1:3] *= w[..., :2]
    v += 0.1
    return v

def masked(v, m):
    v = v.clone()
    v[m.expand_as(v)] = 0.25
    return v

def slope(v, w):
    return torch.autograd.grad((torch.sin(v) * w).sum(), v, create_graph=True)[0]

def in_autocast(function, *arguments):
    with torch.autocast("cpu", torch.bfloat16):
        return function(*arguments)

def cells(v, w):
    """As convolutions have it, `[n, 2, 4]`."""
    return torch.stack([v.reshape(-1, v.shape[-1]), w.expand_as(v).reshape(-1, v.shape[-1])], 1)
'''

OPERANDS = {
    "r": ["b", "(0.5 * x)", "u[0]", "z1", "y", "(y @ s)", "b[order]", "(x + b)"],
    "c": ["x[..., :1]", "k", "b[0]"],
    "m": ["mask", "(b > 0)", "(x > y)", "mask[:1]"],
    "w": ["words", "words[0]", "order", "(words + t)"],
}

PLAIN = {"q": "torch.complex(z, 0.5 * z)", "s": "z[..., 0]", "t": "z.unsqueeze(-1)"}

RANDOM: list[tuple[str, str, str]] = [
    ("F.dropout({0}, 0.3, True)", "r", "r"),
    ("{0} * F.dropout(torch.ones_like({0}), 0.2)", "r", "r"),
    ("{0} + 0.1 * torch.randn_like({0})", "r", "r"),
    ("{0} * torch.rand_like({0})", "r", "r"),
    ("{0} + 0.1 * torch.randn({0}.shape, dtype={0}.dtype)", "r", "r"),
    ("torch.where(torch.rand({0}.shape) < 0.4, {0}, 0.1)", "r", "r"),
    ("{0} * torch.bernoulli(torch.full_like({0}, 0.7))", "r", "r"),
    ("{0} * torch.empty_like({0}).bernoulli_(0.6)", "r", "r"),
    ("{0} + 0.1 * torch.empty_like({0}).normal_(0.2, 0.5)", "r", "r"),
    ("{0} + torch.empty_like({0}).uniform_(-0.1, 0.1)", "r", "r"),
    ("{0} * {0}.new_empty({0}.shape[0], *[1] * ({0}.dim() - 1)).bernoulli_(0.8).div_(0.8)", "r", "r"),
    ("{0} + 0.01 * torch.randint(0, 5, (4,))", "r", "r"),
    ("{0} + 0.1 * torch.normal(0.0, 1.0, (4,)).to({0})", "r", "r"),
    ("torch.bernoulli(torch.sigmoid({0})) * 0.2", "r", "r"),
    ("{0} + 0.1 * torch.normal({0}, 0.3)", "r", "r"),
]

OPS: list[tuple[str, str, str]] = [
    # By places.
    ("torch.stack([{0}[..., 1], -{0}[..., 0], {1}[..., 3], {0}[..., -1]], -1)", "rr", "r"),
    ("{0}[..., 0] * {1}[..., 2]", "rr", "s"),
    ("{0}[..., 1]", "r", "s"),
    ("{0} * {1}.unsqueeze(-1)", "rs", "r"),
    ("{0} + torch.stack([{1}, {1} * a[0, 1], {2}, {1} - {2}], -1)", "rss", "r"),
    ("{0}[..., 1:3].repeat_interleave(2, -1)", "r", "r"),
    ("{0}[..., [2, 0, 3, 1]]", "r", "r"),
    ("torch.cat([{0}[..., ::2], {1}[..., 1::2]], -1)", "rr", "r"),
    ("torch.select_scatter({0}, {1}[..., 3] * a[0, 0], -1, 1)", "rr", "r"),
    ("torch.slice_scatter({0}, {1}[..., :2], -1, 1, 3)", "rr", "r"),
    ("torch.diagonal_scatter(torch.outer(b, u[0]), b).sum(0) * {0}", "r", "r"),
    ("{0}.roll(1, -1) - 2 * {0} + {0}.roll(-1, -1)", "r", "r"),
    ("{0}.flip(-1) * a.diagonal()", "r", "r"),
    ("F.pad(torch.cross({0}[..., :3], {1}[..., 1:], -1), (1, 0))", "rr", "r"),
    ("{0}.cumsum(-1) * 0.3", "r", "r"),
    ("torch.cumprod(torch.tanh({0}), -1)", "r", "r"),
    ("torch.logcumsumexp({0}, -1) * 0.3", "r", "r"),
    ("torch.cummax({0}, -1).values", "r", "r"),
    ("torch.cummin({0}, -1)[0]", "r", "r"),
    ("{0} - {0}.max(-1, keepdim=True).values", "r", "r"),
    ("{0}.argmax(-1, keepdim=True).expand_as({0})", "r", "w"),
    ("{0}.min(-1).values", "r", "s"),
    ("{0}.sort(-1).values", "r", "r"),
    ("{0}.sort(-1, descending=True)[0]", "r", "r"),
    ("{0}.argsort(-1)", "r", "w"),
    ("{0}.topk(2, -1).values.repeat_interleave(2, -1)", "r", "r"),
    ("torch.take_along_dim({0}, {0}.argsort(-1), -1)", "r", "r"),
    ("{0}.gather(-1, words.expand({0}.shape))", "r", "r"),
    ("{0}.gather(-1, {1}.remainder(4).expand({0}.shape))", "rw", "r"),
    ("F.embedding(words, table)[:, 0] + {0}", "r", "r"),
    ("{0} + F.embedding(words[0], table)", "r", "r"),
    ("{0} + table[words, order]", "r", "r"),
    ("{0}.index_select(-1, words)", "r", "r"),
    ("F.one_hot(words[1], 4) * {0}", "r", "r"),
    ("torch.where(mask, {0}, {1})", "rr", "r"),
    ("{0}.masked_fill({1}, 0.2)", "rm", "r"),
    ("masked({0}, {1})", "rm", "r"),
    ("written({0}, {1})", "rr", "r"),
    ("F.pad({0}[..., 1:], (0, 1))", "r", "r"),
    ("F.pad({0}, (1, 1), value=0.5).unfold(-1, 3, 1).mean(-1)", "r", "r"),
    ("torch.einsum('...i,ij,...j->...i', {0}, a, {1})", "rr", "r"),
    ("F.conv1d(cells({0}, {1}), a.view(2, 2, 4)[..., :3], padding=1).sum(1).view({0}.shape)", "rr", "r"),
    ("F.conv1d(cells({0}, {1}), a.view(4, 1, 4)[:2, :, :3], padding=1, groups=2)[:, 0].view({0}.shape)", "rr", "r"),
    ("F.conv2d(cells({0}, {1})[:, None], a[None, None, :3, :3], padding=1)[:, 0, 1].view({0}.shape)", "rr", "r"),
    ("torch.outer(b, u[1]).tril() @ {0}.unsqueeze(-1)", "r", "t"),
    ("{0}.squeeze(-1)", "t", "r"),
    ("({0}.unsqueeze(-1) * {1}.unsqueeze(-2)).tril(-1).sum(-1)", "rr", "r"),
    ("({0}.unsqueeze(-1) * {1}.unsqueeze(-2)).triu().amax(-2)", "rr", "r"),
    ("{0} @ torch.diag(b)", "r", "r"),
    ("torch.diag_embed({0}).sum(-1) * 0.5", "r", "r"),
    ("torch.kron(b[:2], u[0, :2]) * {0}", "r", "r"),
    ("({0}.unsqueeze(-1) - {1}.unsqueeze(-2)).square().mean(-1)", "rr", "r"),
    ("torch.cdist({0}.unsqueeze(-1), {1}.unsqueeze(-1) + 5).mean(-1) * 0.1", "rr", "r"),
    ("torch.softmax({0}.unsqueeze(-1) * {1}.unsqueeze(-2), -1) @ {0}.unsqueeze(-1)", "rr", "t"),
    ("{0}.std(-1, keepdim=True)", "r", "c"),
    ("F.cosine_similarity({0} + 2, {1} + 1, -1)", "rr", "s"),
    ("F.softmin({0}, -1)", "r", "r"),
    ("torch.trapezoid({0}, dim=-1)", "r", "s"),
    ("torch.diff({0}, dim=-1, prepend={1}[..., :1])", "rr", "r"),
    ("torch.nan_to_num({0} / {1}.relu(), 0.1, 0.2, -0.2)", "rr", "r"),
    ("F.avg_pool1d(cells({0}, {1}), 2).flatten(-2).view({0}.shape)", "rr", "r"),
    ("F.interpolate(cells({0}, {1})[..., :2], scale_factor=2)[:, 0].view({0}.shape)", "rr", "r"),
    # Small linear algebra.
    *((f"narrow(torch.linalg.solve(well({{0}}, {n}), wide({{1}}, {n})))", "rr", "r") for n in (1, 2, 3, 4, 8)),
    *((f"narrow(torch.linalg.inv(well({{0}}, {n})).sum(-1))", "r", "r") for n in (1, 2, 3)),
    *((f"narrow(torch.linalg.cholesky(definite({{0}}, {n})).sum(-1)) * 0.2", "r", "r") for n in (1, 2, 4)),
    *((f"torch.linalg.det(well({{0}}, {n})) * 0.{'0' * n}1", "r", "s") for n in (1, 2, 3, 4)),
    *((f"torch.logdet(definite({{0}}, {n})) * 0.1", "r", "s") for n in (2, 3)),
    ("torch.linalg.slogdet(well({0}, 3))[1] * 0.1", "r", "s"),
    ("torch.linalg.slogdet(well({0}, 2)).logabsdet * 0.1", "r", "s"),
    ("(well({0}, 4).inverse() @ {1}.unsqueeze(-1))", "rr", "t"),
    ("torch.linalg.solve_triangular(definite({0}, 4).tril(), {1}.unsqueeze(-1), upper=False)", "rr", "t"),
    ("torch.cholesky_solve({1}.unsqueeze(-1), torch.linalg.cholesky(definite({0}, 4)))", "rr", "t"),
    # Derivatives of their own, or none.
    ("Spike.apply({0} - 0.1, 10.0)", "r", "r"),
    ("Spike.apply({0}, 2.0 + t)", "r", "r"),
    ("Straight.apply({0})", "r", "r"),
    ("Product.apply({0}, {1})", "rr", "r"),
    ("({0}.round() - {0}).detach() + {0}", "r", "r"),
    ("unseen({0}) * {1}", "rr", "r"),
    ("torch.func.grad(lambda v: (torch.sin(v) * {1}).sum())({0})", "rr", "r"),
    ("torch.func.grad(lambda v: torch.tanh(v @ a).square().sum())({0})", "r", "r"),
    ("slope({0}, {1})", "rr", "r"),
    ("checkpoint(torch.tanh, {0}, use_reentrant=False)", "r", "r"),
    # The number of the block.
    ("torch.full_like({0}, 0.1 * t) + {0}", "r", "r"),
    ("{0} + torch.tensor(0.1 * t)", "r", "r"),
    ("{0}.clamp(max=0.2 + 0.05 * t)", "r", "r"),
    ("{0}.clamp(-0.1 * t, 0.1 * t + 0.1)", "r", "r"),
    ("{0} * (t % 2)", "r", "r"),
    ("{0} * [0.1, 0.7, -0.4][t % 3]", "r", "r"),
    ("({0}.abs() + 0.5) ** (1 + 0.1 * t)", "r", "r"),
    ("({0}.abs() + 0.5) ** (t - 2)", "r", "r"),
    ("(1 + 0.1 * t) ** {0}", "r", "r"),
    ("{0} + torch.sin(0.3 * t * torch.arange(4, dtype={0}.dtype))", "r", "r"),
    ("torch.add({0}, {1}, alpha=0.1 * t)", "rr", "r"),
    ("torch.lerp({0}, {1}, 0.1 * t)", "rr", "r"),
    ("torch.where({0} > 0.1 * t, {1}, 0.2 * t)", "rr", "r"),
    ("{0}.masked_fill({1}, 0.1 * t)", "rm", "r"),
    ("F.leaky_relu({0}, 0.02 * t)", "r", "r"),
    ("F.elu({0}, 0.5 + 0.1 * t)", "r", "r"),
    ("F.softplus({0}, 1 + 0.2 * t)", "r", "r"),
    ("F.hardtanh({0}, -0.1 * t - 0.1, 0.3)", "r", "r"),
    ("F.threshold({0}, 0.1 * t, -0.1)", "r", "r"),
    ("torch.addcmul({0}, {1}, {1}, value=0.05 * t)", "rr", "r"),
    ("{0} + {0}.new_tensor([0.1 * t, 1.0, -0.2, 0.0])", "r", "r"),
    ("{0} + {0}.new_full((4,), math.cos(t))", "r", "r"),
    ("{0} + torch.linspace(0, 1, 12, dtype={0}.dtype)[t]", "r", "r"),
    ("torch.div({0}, t + 1)", "r", "r"),
    ("(t + 1) / ({0}.abs() + 1) * 0.1", "r", "r"),
    ("{0} + math.sin(t) * {1}", "rr", "r"),
    ("torch.maximum({0}, torch.tensor(0.1 * t, dtype={0}.dtype))", "r", "r"),
    ("{0}.roll(t % 4, -1)", "r", "r"),
    ("{0} * table[t]", "r", "r"),
    ("{0} * (words > t)", "r", "r"),
    ("F.layer_norm({0}, (4,), b, None, 0.1 + 0.01 * t)", "r", "r"),
    # Masks, whole numbers, and what they are beside reals.
    ("{0} + words * 0.1", "r", "r"),
    ("{0} * {1}", "rw", "r"),
    ("({0} * {1}).sum(-1, keepdim=True).expand_as({0})", "rm", "r"),
    ("({0} > {1})", "rr", "m"),
    ("({0} >= 0.1 * t)", "r", "m"),
    ("({0} & {1})", "mm", "m"),
    ("~{0}", "m", "m"),
    ("({0} == words)", "w", "m"),
    ("{0}.any(-1, keepdim=True).expand_as(z)", "m", "m"),
    ("({0} * {1}) % 5", "ww", "w"),
    ("({0} + 1) // 2", "w", "w"),
    ("torch.where({0}, {1}, t)", "mw", "w"),
    ("{0}.cumsum(-1)", "m", "w"),
    ("{0}.to(z.dtype) * 0.1", "w", "r"),
    ("torch.where({0}, {1}, {2})", "mrr", "r"),
    ("F.prelu({0}.reshape(-1, 4), b).view({0}.shape)", "r", "r"),
    ("F.prelu({0}, b[:1])", "r", "r"),
    # Complex numbers.
    ("torch.complex({0}, {1})", "rr", "q"),
    ("torch.polar({0}.abs() + 0.1, {1})", "rr", "q"),
    ("{0} * torch.exp(1j * {1})", "qr", "q"),
    ("{0} * {1} * 0.3", "qq", "q"),
    ("{0}.conj() * (0.5 - 0.2j)", "q", "q"),
    ("{0} + 0.1j * t", "q", "q"),
    ("{0} @ torch.complex(a, s)", "q", "q"),
    ("torch.where(mask, {0}, 0.1j)", "q", "q"),
    ("{0}.real", "q", "r"),
    ("{0}.imag * 0.5", "q", "r"),
    ("torch.view_as_real({0}).sum(-1)", "q", "r"),
    ("({0} * {0}.conj()).real", "q", "r"),
    ("torch.fft.fft({0}).imag * 0.3", "r", "r"),
    # Plain ones between them.
    ("torch.tanh({0})", "r", "r"),
    ("{0} @ a", "r", "r"),
    ("F.linear({0}, a, b)", "r", "r"),
    ("{0} * {1}", "rr", "r"),
    ("{0} + 0.5 * {1}", "rr", "r"),
    ("{0} - {1}", "rc", "r"),
    ("F.silu({0})", "r", "r"),
]

# Further states: name, kind, what it starts from, and what it becomes, of a result of its kind.
STATES: dict[str, tuple[str, str, str]] = {
    "n": ("w", "torch.zeros(x.shape, dtype=torch.long)", "(n + {0}) % 7"),
    "i": ("w", "torch.zeros((), dtype=torch.int32)", "i + 1"),
    "f": ("m", "x > 0.5", "f ^ {0}"),
    "g": ("m", "torch.zeros(x.shape, dtype=torch.bool)", "g | {0}"),
    "q": ("q", "torch.complex(x, 0.5 * x)", "0.4 * q + 0.3 * {0} / (1 + {0}.abs())"),
}

# What the first block is given.
STARTS = {
    "numbers that broadcast": "torch.zeros(4, dtype=x.dtype), 0.5 * x, x",
    "one number": "x.new_zeros(()), x.new_zeros(()), x.new_zeros(())",
    "another dtype": "torch.zeros(x.shape), 0.5 * x, x",
    "nothing yet": "x, None, None",
}

# How a block is called.
AROUND = {
    "checkpoint": "checkpoint(step, states, block, shared, t, use_reentrant=False)",
    "autocast": "in_autocast(step, states, block, shared, t)",
    "scaled": "tuple(0.9 * one if one.is_floating_point() else one for one in step(states, block, shared, t))",
}
