"""The zoo's chains are found in both dialects, and evaluating them changes nothing."""

import pytest
import torch
from torch import Tensor, nn
from zoo.check import DIALECTS, examine
from zoo.models import EXHIBITS, Exhibit

import pcr_fx


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("exhibit", EXHIBITS, ids=lambda exhibit: exhibit.name)
def test_every_chain_is_found_and_right(exhibit: Exhibit, dialect: str) -> None:
    seen = examine(exhibit, dialect)
    assert seen.chains == exhibit.chains, seen.reasons
    assert seen.error <= 1e-12
    assert seen.gradient_error <= 1e-11


NARROW = ["rtdl_revisiting_models.ResNet", "torchdiffeq rk4", "LSTMCell, unrolled", "momentum ResNet", "DDPM sampler"]


@pytest.mark.parametrize("exhibit", [e for e in EXHIBITS if e.name in NARROW], ids=lambda exhibit: exhibit.name)
def test_newton_solves_the_narrow_ones(exhibit: Exhibit) -> None:
    seen = examine(exhibit, "tracer", "newton")
    assert seen.error <= 1e-10
    assert seen.gradient_error <= 1e-9


@pytest.mark.parametrize("solver", ["sequential", "newton"])
def test_a_physics_informed_loss(solver: str) -> None:
    """The loss holds second derivatives in the input, and is differentiated once more in the parameters."""
    exhibit = next(e for e in EXHIBITS if e.name == "physics-informed MLP")
    model, (x,) = exhibit.build()
    fast = pcr_fx.transform(model, x, {"solver": solver})

    def gradients(run: nn.Module) -> tuple[Tensor, ...]:
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(run(leaf).sum(), leaf, create_graph=True)
        (curvature,) = torch.autograd.grad(slope[:, 0].sum(), leaf, create_graph=True)
        loss = (slope[:, 1] - 0.1 * curvature[:, 0]).square().mean()
        return torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)

    for got, expected in zip(gradients(fast), gradients(model), strict=True):
        assert (got is None) == (expected is None)
        if got is not None and expected is not None:
            torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-12)
