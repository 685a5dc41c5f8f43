"""The zoo: small, seeded models from libraries and from papers, each with the chains that it holds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

Make = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


@dataclass(frozen=True)
class Exhibit:
    """A model with its inputs, in float64, and the lengths of the chains to be found in it, in order."""

    name: str
    make: Make
    chains: tuple[int, ...]

    def build(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        torch.manual_seed(0)
        model, inputs = self.make()
        return model.eval().double(), tuple(t.double() if t.is_floating_point() else t for t in inputs)


EXHIBITS: list[Exhibit] = []


def exhibit(name: str, *chains: int) -> Callable[[Make], Make]:
    def note(make: Make) -> Make:
        EXHIBITS.append(Exhibit(name, make, chains))
        return make

    return note


# --- from libraries -------------------------------------------------------------------------------------------------


@exhibit("rtdl_revisiting_models.MLP", 11)  # the first block takes the features in
def rtdl_mlp() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from rtdl_revisiting_models import MLP

    return MLP(d_in=5, d_out=2, n_blocks=12, d_block=6, dropout=0.1), (torch.randn(3, 5),)


@exhibit("rtdl_revisiting_models.ResNet", 12)
def rtdl_resnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from rtdl_revisiting_models import ResNet

    sizes: dict[str, Any] = {"d_in": 5, "d_out": 2, "n_blocks": 12, "d_block": 6}
    model = ResNet(**sizes, d_hidden=None, d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.0)
    return model, (torch.randn(3, 5),)


@exhibit("transformers.BertModel", 12)
def bert() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
    )
    return First(BertModel(config), "last_hidden_state"), (torch.randint(50, (2, 5)),)


@exhibit("transformers.GPT2LMHeadModel", 12)
def gpt2() -> tuple[nn.Module, tuple[Tensor, ...]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=50, n_embd=8, n_layer=12, n_head=2, n_positions=8, use_cache=False)
    return First(GPT2LMHeadModel(config), "logits"), (torch.randint(50, (2, 5)),)


class First(nn.Module):
    """One of the results that a model returns by name."""

    def __init__(self, model: nn.Module, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, ids: Tensor) -> Tensor:
        return getattr(self.model(ids), self.name)


class VectorField(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, t: Tensor, y: Tensor, perturb: Any = None) -> Tensor:
        return self.outer(torch.tanh(self.inner(y))) * torch.cos(t)


class FixedGrid(nn.Module):
    """The steps of a fixed-grid solver of torchdiffeq, all states returned.

    `odeint` itself looks at the values of its grid to check it, which no graph can hold.
    """

    def __init__(self, solver: Any) -> None:
        super().__init__()
        self.solver, self.field = solver, VectorField()
        self.register_buffer("grid", torch.linspace(0, 1, 13))

    def forward(self, y: Tensor) -> Tensor:
        states = [y]
        for start, stop in zip(self.grid[:-1].unbind(0), self.grid[1:].unbind(0), strict=True):
            change, _ = self.solver._step_func(self.field, start, stop - start, stop, y)
            y = y + change
            states.append(y)
        return torch.stack(states)


def fixed_grid(name: str) -> Make:
    def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
        from torchdiffeq._impl import fixed_grid

        solver = type(name, (getattr(fixed_grid, name),), {"__init__": lambda self: None, "perturb": False})
        return FixedGrid(solver()), (torch.randn(3, 4),)

    return make


for solver in ("Euler", "Midpoint", "RK4"):
    exhibit(f"torchdiffeq {solver.lower()}", 12)(fixed_grid(solver))


# --- well-known architectures -----------------------------------------------------------------------------------------


class MixerBlock(nn.Module):
    """Tolstikhin et al., MLP-Mixer (2021)."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.norm_tokens, self.norm_channels = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.mix_tokens = nn.Sequential(nn.Linear(tokens, 6), nn.GELU(), nn.Linear(6, tokens))
        self.mix_channels = nn.Sequential(nn.Linear(channels, 6), nn.GELU(), nn.Linear(6, channels))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_tokens(self.norm_tokens(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mix_channels(self.norm_channels(x))


@exhibit("MLP-Mixer", 12)
def mixer() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return nn.Sequential(nn.Linear(3, 4), *(MixerBlock(5, 4) for _ in range(12)), nn.LayerNorm(4)), (
        torch.randn(2, 5, 3),
    )


class PreActivation(nn.Module):
    """He et al., Identity mappings in deep residual networks (2016)."""

    def __init__(self, channels: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList([norm(channels), norm(channels)])
        self.convs = nn.ModuleList([nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y = conv(F.relu(norm(y)))
        return x + y


@exhibit("pre-activation ConvNet, batch norm", 9, 9)
def convnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    stages = [
        nn.Conv2d(1, 2, 3, padding=1),
        *(PreActivation(2, nn.BatchNorm2d) for _ in range(9)),
        nn.Conv2d(2, 3, 3, stride=2, padding=1),
        *(PreActivation(3, nn.BatchNorm2d) for _ in range(9)),
        nn.Flatten(),
    ]
    return nn.Sequential(*stages), (torch.randn(2, 1, 4, 4),)


@exhibit("pre-activation ConvNet, group norm", 10)
def group_norm() -> tuple[nn.Module, tuple[Tensor, ...]]:
    blocks = [PreActivation(4, lambda channels: nn.GroupNorm(2, channels)) for _ in range(10)]
    return nn.Sequential(*blocks), (torch.randn(2, 4, 3, 3),)


class Unrolled(nn.Module):
    """A recurrent cell over a sequence, the way its documentation shows it."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        state: Any = None
        outputs = []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)


for cell in (nn.RNNCell, nn.GRUCell, nn.LSTMCell):
    exhibit(f"{cell.__name__}, unrolled", 12)(lambda cell=cell: (Unrolled(cell(3, 4)), (torch.randn(2, 12, 3),)))


class ResidualFlow(nn.Module):
    """Chen et al., Residual flows (2019): spectrally normalised blocks."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = nn.ModuleList([spectral_norm(nn.Linear(4, 6)) for _ in range(depth)])
        self.outer = nn.ModuleList([weight_norm(nn.Linear(6, 4)) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for inner, outer in zip(self.inner, self.outer, strict=True):
            x = x + 0.5 * outer(F.elu(inner(x)))
        return x


@exhibit("residual flow, spectral and weight norm", 12)
def residual_flow() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return ResidualFlow(12), (torch.randn(3, 4),)


class MomentumResNet(nn.Module):
    """Sander et al., Momentum residual neural networks (2021)."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        velocity = torch.zeros_like(x)
        for layer in self.layers:
            velocity = 0.9 * velocity + 0.1 * torch.tanh(layer(x))
            x = x + velocity
        return x


@exhibit("momentum ResNet", 12)
def momentum_resnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return MomentumResNet(12), (torch.randn(3, 4),)


class InnerLoop(nn.Module):
    """Finn et al., MAML (2017): gradient steps of a linear regression, written out, and the loss after them."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(4, 1) / 2)
        self.rates = nn.Parameter(torch.full((steps,), 0.1))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        weight = self.start
        for rate in self.rates.unbind(0):
            gradient = 2 * x.transpose(0, 1) @ (x @ weight - y) / x.shape[0]
            weight = weight - rate * gradient
        return ((x @ weight - y) ** 2).mean()


@exhibit("MAML inner loop", 12)
def inner_loop() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return InnerLoop(12), (torch.randn(5, 4), torch.randn(5, 1))


@exhibit("physics-informed MLP", 11)  # the first layer takes the coordinates in
def physics_informed() -> tuple[nn.Module, tuple[Tensor, ...]]:
    layers = [nn.Linear(2, 5), nn.Tanh()]
    for _ in range(11):
        layers += [nn.Linear(5, 5), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(5, 1)), (torch.randn(4, 2),)


class Sampler(nn.Module):
    """Song et al., DDIM (2021), and Ho et al., DDPM (2020), where `noisy`."""

    def __init__(self, steps: int, noisy: bool) -> None:
        super().__init__()
        self.noisy = noisy
        self.embed = nn.Embedding(steps, 4)
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 3)
        self.register_buffer("alpha", torch.linspace(0.99, 0.2, steps).cumprod(0) ** (1 / steps))

    def forward(self, x: Tensor) -> Tensor:
        for t in reversed(range(1, len(self.alpha))):
            step = torch.full((x.shape[0],), t, dtype=torch.long)
            noise = self.outer(F.silu(self.inner(x) + self.embed(step)))
            now, then = self.alpha[t], self.alpha[t - 1]
            clean = (x - (1 - now).sqrt() * noise) / now.sqrt()
            x = then.sqrt() * clean + (1 - then).sqrt() * noise
            if self.noisy:
                x = x + 0.1 * torch.randn_like(x)
        return x


@exhibit("DDIM sampler", 12)
def ddim() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Sampler(13, noisy=False), (torch.randn(2, 3),)


@exhibit("DDPM sampler", 12)
def ddpm() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Sampler(13, noisy=True), (torch.randn(2, 3),)


class Equilibrium(nn.Module):
    """Bai et al., Deep equilibrium models (2019): one layer again and again, the input injected."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.layer, self.inject = steps, nn.Linear(4, 4), nn.Linear(3, 4)
        self.norm = nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        injected = self.inject(x)
        z = torch.zeros_like(injected)
        for _ in range(self.steps):
            z = self.norm(torch.tanh(self.layer(z) + injected))
        return z


@exhibit("deep equilibrium model, RMS norm", 12)
def equilibrium() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Equilibrium(12), (torch.randn(2, 3),)


class Reversible(nn.Module):
    """Gomez et al., Reversible residual networks (2017): two streams."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.left = nn.ModuleList([nn.Linear(2, 2) for _ in range(depth)])
        self.right = nn.ModuleList([nn.Linear(2, 2) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        for left, right in zip(self.left, self.right, strict=True):
            a = a + torch.tanh(left(b))
            b = b + torch.tanh(right(a))
        return torch.cat([a, b], -1)


@exhibit("reversible ResNet", 24)  # each half is a block, over the states of the two before
def reversible() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Reversible(12), (torch.randn(3, 4),)


class Skips(nn.Module):
    """Deep supervision and U-Net style skips: inner states read again behind the chain."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])
        self.up = nn.ModuleList([nn.Linear(4, 4) for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for layer in self.down:
            x = torch.tanh(layer(x)) + math.sqrt(0.1) * x
            skips.append(x)
        for layer in self.up:
            x = torch.tanh(layer(x) + skips.pop())
        return x


@exhibit("U-Net skips", 12, 12)
def skips() -> tuple[nn.Module, tuple[Tensor, ...]]:
    return Skips(12), (torch.randn(3, 4),)
