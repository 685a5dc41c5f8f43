"""Spiking networks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from zoo.public.exhibit import STEPS, Calling, Made, exhibit


def _seen() -> tuple[Tensor, ...]:
    return (torch.randn(STEPS, 4, 6),)


@exhibit("snntorch.Leaky", STEPS, "snntorch")
def leaky() -> Made:
    import snntorch

    def run(self: Any, x: Tensor) -> Tensor:
        membrane, spikes = self.neuron.init_leaky(), []
        for now in x:
            spike, membrane = self.neuron(self.linear(now), membrane)
            spikes.append(spike)
        return torch.stack(spikes)

    return Calling(run, linear=nn.Linear(6, 8), neuron=snntorch.Leaky(beta=0.9)), _seen()


@exhibit("snntorch.Synaptic and a readout", STEPS, "snntorch")
def synaptic() -> Made:
    import snntorch

    def run(self: Any, x: Tensor) -> Tensor:
        (current, membrane), outer = self.inner.init_synaptic(), self.outer.init_leaky()
        spikes, membranes = [], []
        for now in x:
            spike, current, membrane = self.inner(self.first(now), current, membrane)
            spike, outer = self.outer(self.second(spike), outer)
            spikes.append(spike)
            membranes.append(outer)
        return torch.stack(spikes) + torch.stack(membranes)

    neurons = {"inner": snntorch.Synaptic(alpha=0.8, beta=0.9), "outer": snntorch.Leaky(beta=0.9)}
    return Calling(run, first=nn.Linear(6, 8), second=nn.Linear(8, 3), **neurons), _seen()


@exhibit("snntorch.RLeaky", package="snntorch")
def recurrent_leaky() -> Made:
    import snntorch

    def run(self: Any, x: Tensor) -> Tensor:
        (spike, membrane), membranes = self.neuron.init_rleaky(), []
        for now in x:
            spike, membrane = self.neuron(self.linear(now), spike, membrane)
            membranes.append(membrane)
        return torch.stack(membranes)

    return Calling(run, linear=nn.Linear(6, 8), neuron=snntorch.RLeaky(beta=0.9, linear_features=8)), _seen()


@exhibit("spikingjelly.LIFNode, step by step", package="spikingjelly")
def lif_node() -> Made:
    from spikingjelly.activation_based import functional, neuron

    def run(self: Any, x: Tensor) -> Tensor:
        functional.reset_net(self)
        return sum(self.neuron(self.linear(now)) for now in x) / STEPS

    return Calling(run, linear=nn.Linear(6, 8), neuron=neuron.LIFNode()), _seen()


@exhibit("norse.LIFCell", package="norse")
def lif_cell() -> Made:
    import norse.torch as norse

    def run(self: Any, x: Tensor) -> Tensor:
        state, spikes = None, []
        for now in x:
            spike, state = self.neuron(self.linear(now), state)
            spikes.append(spike)
        return torch.stack(spikes) + state.v

    return Calling(run, linear=nn.Linear(6, 8), neuron=norse.LIFCell()), _seen()


@exhibit("norse.LIFRecurrent", package="norse")
def lif_recurrent() -> Made:
    import norse.torch as norse

    def run(self: Any, x: Tensor) -> Tensor:
        spikes, state = self.layer(x)
        return spikes + state.v

    return Calling(run, layer=norse.LIFRecurrent(6, 8)), _seen()
