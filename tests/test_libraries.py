"""Models that libraries make, as they are, and loops that people write: the chain is found, and the numbers are their own.

Skipped where a library is absent. `python -m zoo.public` goes through both ways in, and times them.
"""

import pytest
from zoo.public import EXHIBITS, Exhibit
from zoo.public.look import look_at

OPTIONS = {"solver": "sequential", "kernels": False}
# What only `torch.compile` reads, or nothing does; the message says why.
REFUSED = {
    "torchsde euler": "draws from a torch.Generator",
    "torchode, fixed steps": "cannot be traced",
    "spikingjelly.LIFNode, step by step": "keeps LIFNode._memories from call to call",
    "diffusers.EulerDiscreteScheduler": "keeps Calling.scheduler from call to call",
    "diffusers.DPMSolverMultistepScheduler": "keeps Calling.scheduler from call to call",
    "pfhedge.Hedger": "nothing in it repeats",
    "torchdeq, thirty iterations": "branches on the value of a tensor",
    "Langevin, torch.func.grad": "transforms functions",
    "Hamiltonian Monte Carlo, leapfrog": "transforms functions",
    "MAML, torch.func.grad": "transforms functions",
}
# What takes long to trace, or is like another one here, is left to the command.
SLOW = """torchdiffeq rk4|torchdiffeq rk4, all states|torchdiffeq rk4 by step_size|rain and runoff, after HBV
transformers.Rwkv, its recurrence|transformers.RecurrentGemma, its recurrence
Kalman filter with its likelihood|nn.RNN|nn.GRU|nn.LSTM
nn.RNN, two layers, both ways|nn.GRU, two layers, both ways|nn.LSTM, two layers, both ways|nn.RNNCell, a loop|nn.GRUCell, a loop
nn.LSTMCell, a loop|Karras et al., Heun""".replace("\n", "|").split("|")
SAMPLE = [one for one in EXHIBITS if one.name not in SLOW]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("exhibit", SAMPLE, ids=lambda exhibit: exhibit.name)
def test_transform_reads_it(exhibit: Exhibit) -> None:
    if not exhibit.is_here:
        pytest.skip(f"{exhibit.package} is not installed")
    look = look_at(exhibit, "transform", OPTIONS, timed=False)
    if exhibit.name in REFUSED:
        assert REFUSED[exhibit.name] in look.words
    else:
        assert look.chain >= exhibit.least, look.words
        assert look.error <= 1e-4


@pytest.mark.parametrize("name", ["Langevin, torch.func.grad", "MAML, torch.func.grad"])
def test_torch_compile_reads_it(name: str) -> None:
    (exhibit,) = (one for one in EXHIBITS if one.name == name)
    look = look_at(exhibit, "torch.compile", OPTIONS, timed=False)
    assert look.chain >= exhibit.least, look.words
    assert look.error <= 1e-4
