"""Tries an installed wheel away from the checkout: is everything in it, and does its backend compile?"""

import importlib.metadata
import importlib.util
import sysconfig
from pathlib import Path

import torch

assert "deeppcr" in torch._dynamo.list_backends(), "the wheel's entry point was not found"

torch.manual_seed(0)
blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh()) for _ in range(8)]
model = torch.nn.Sequential(*blocks)
x = torch.randn(3, 4)
# The backend's name alone has to be enough: nothing has imported pcr_fx so far.
torch.testing.assert_close(torch.compile(model, backend="deeppcr")(x), model(x))

import pcr_fx  # noqa: E402
import pcr_fx.passes  # noqa: E402

site = Path(sysconfig.get_path("purelib"))
for package in (pcr_fx, pcr_fx.passes):
    assert Path(package.__file__).is_relative_to(site), f"{package.__name__} came from {package.__file__}"
assert (site / "pcr_fx" / "py.typed").exists(), "the wheel lost py.typed"
assert importlib.util.find_spec("passes") is None, "the wheel installed a top-level package called passes"
print(f"pcr_fx {importlib.metadata.version('pcr_fx')} works from its wheel")
