"""Recurrent networks, state-space models, and recursions over sequences."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.public.exhibit import STEPS, Calling, Made, exhibit

# --- PyTorch's own -----------------------------------------------------------------------------------------------------


def _module(kind: str, **form: Any) -> Made:
    def run(self: Any, x: Tensor) -> Tensor:
        return self.network(x)[0]

    shape = (4, STEPS, 6) if form.get("batch_first") else (STEPS, 4, 6)
    return Calling(run, network=getattr(nn, kind)(6, 16, **form)), (torch.randn(shape),)


for _kind in ("RNN", "GRU", "LSTM"):
    exhibit(f"nn.{_kind}", STEPS)(partial(_module, _kind))
    exhibit(f"nn.{_kind}, two layers, both ways", STEPS)(
        partial(_module, _kind, num_layers=2, bidirectional=True, batch_first=True)
    )


def _cells(kind: str) -> Made:
    def run(self: Any, x: Tensor) -> Tensor:
        state, outputs = None, []
        for t in range(x.shape[1]):
            state = self.cell(x[:, t], state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return torch.stack(outputs, 1)

    return Calling(run, cell=getattr(nn, kind)(6, 16)), (torch.randn(4, STEPS, 6),)


for _kind in ("RNNCell", "GRUCell", "LSTMCell"):
    exhibit(f"nn.{_kind}, a loop")(partial(_cells, _kind))


# --- ncps, torchcrf, transformers ----------------------------------------------------------------------------------------


@exhibit("ncps.CfC", STEPS, "ncps")
def closed_form() -> Made:
    from ncps.torch import CfC

    return Calling(lambda self, x: self.network(x)[0], network=CfC(6, 8)), (torch.randn(4, STEPS, 6),)


@exhibit("ncps.LTC", STEPS, "ncps")
def liquid() -> Made:
    from ncps.torch import LTC
    from ncps.wirings import AutoNCP

    network = LTC(6, AutoNCP(10, 3))
    return Calling(lambda self, x: self.network(x)[0], network=network), (torch.randn(4, STEPS, 6),)


@exhibit("torchcrf.CRF, a likelihood", package="torchcrf")
def crf() -> Made:
    from torchcrf import CRF

    tags = torch.arange(4 * STEPS).view(4, STEPS) % 5

    def run(self: Any, x: Tensor) -> Tensor:
        return self.crf(self.linear(x), tags, reduction="mean")

    return Calling(run, linear=nn.Linear(6, 5), crf=CRF(5, batch_first=True)), (torch.randn(4, STEPS, 6),)


def _transformers(name: str, **sizes: Any) -> Made:
    import transformers

    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(vocab_size=50, **sizes))
    run = lambda self, ids: self.model(ids, use_cache=False).last_hidden_state  # noqa: E731
    return Calling(run, model=model), (torch.randint(50, (2, STEPS)),)


_SIZES = {"hidden_size": 16, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "head_dim": 8}
exhibit("transformers.Mamba, its scan", STEPS, "transformers")(
    partial(_transformers, "Mamba", state_size=4, use_mambapy=False, **_SIZES)
)
exhibit("transformers.Rwkv, its recurrence", package="transformers")(
    partial(_transformers, "Rwkv", context_length=STEPS, attention_hidden_size=16, **_SIZES)
)
exhibit("transformers.RecurrentGemma, its recurrence", STEPS, "transformers")(
    partial(
        _transformers,
        "RecurrentGemma",
        lru_width=16,
        attention_window_size=32,
        **{**_SIZES, **_HEADS, "num_hidden_layers": 3},
    )
)


# --- recursions --------------------------------------------------------------------------------------------------------


@exhibit("CTC, forward variables", STEPS - 1)
def ctc() -> Made:
    def run(self: Any, x: Tensor, targets: Tensor) -> Tensor:
        scores = self.linear(x).log_softmax(-1)
        batch, count = targets.shape
        labels = torch.zeros(batch, 2 * count + 1, dtype=torch.long)
        labels[:, 1::2] = targets
        skips = torch.zeros_like(labels, dtype=torch.bool)
        skips[:, 2:] = (labels[:, 2:] != 0) & (labels[:, 2:] != labels[:, :-2])
        forward = torch.cat([scores[0].gather(1, labels[:, :2]), torch.full((batch, 2 * count - 1), -1e9)], 1)
        for now in scores[1:]:
            one = F.pad(forward, (1, 0), value=-1e9)[:, :-1]
            two = torch.where(skips, F.pad(forward, (2, 0), value=-1e9)[:, :-2], -1e9)
            forward = torch.logsumexp(torch.stack([forward, one, two]), 0) + now.gather(1, labels)
        return torch.logsumexp(forward[:, -2:], 1)

    return Calling(run, linear=nn.Linear(6, 5)), (torch.randn(STEPS, 4, 6), torch.randint(1, 5, (4, 5)))


@exhibit("advantages, GAE", STEPS)
def advantages() -> Made:
    def run(self: Any, rewards: Tensor, ends: Tensor, seen: Tensor) -> Tensor:
        values, last, found = self.value(seen).squeeze(-1), torch.zeros(rewards.shape[1]), torch.zeros_like(rewards)
        for t in reversed(range(STEPS)):
            goes_on = 1.0 - ends[t]
            last = rewards[t] + 0.99 * values[t + 1] * goes_on - values[t] + 0.94 * goes_on * last
            found[t] = last
        return found + values[:-1]

    given = torch.randn(STEPS, 8), (torch.rand(STEPS, 8) < 0.1).float(), torch.randn(STEPS + 1, 8, 3)
    return Calling(run, value=nn.Linear(3, 1)), given


@exhibit("pfhedge.Hedger", STEPS - 2, "pfhedge")
def hedger() -> Made:
    from pfhedge.instruments import BrownianStock, EuropeanOption
    from pfhedge.nn import Hedger, MultiLayerPerceptron

    features = ["log_moneyness", "expiry_time", "prev_hedge"]

    def run(self: Any, spot: Tensor) -> Tensor:
        option = EuropeanOption(BrownianStock(cost=1e-4), maturity=STEPS / 250)
        option.ul().register_buffer("spot", spot)
        return self.hedger.compute_portfolio(option)

    network = MultiLayerPerceptron(3, 1, n_layers=2, n_units=8)
    spot = (torch.randn(8, STEPS) * 0.01).cumsum(1).exp()
    return Calling(run, hedger=Hedger(network, inputs=features)), (spot,)
