"""`nn.TransformerEncoder`: its fused layers, which evaluation without gradients takes, are blocks like any other."""

from typing import Any

import pytest
import torch
from torch import nn

import pcr_fx

LAYERS = 8
OPTIONS = {"planning": "estimated", "kernels": False}


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False).double()


@pytest.mark.parametrize("way", ["transform", "compile"])
@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize(
    "options",
    [{"batch_first": True}, {"batch_first": True, "norm_first": True, "activation": "gelu"}, {"batch_first": False}],
    ids=["usual", "norm first", "time first"],
)
def test_an_encoder(options: dict[str, Any], trains: bool, way: str) -> None:
    model, x = encoder(**options).train(trains), torch.randn(2, 5, 8, dtype=torch.float64)
    with torch.set_grad_enabled(trains):
        if way == "transform":
            fast: Any = pcr_fx.transform(model, x, options=OPTIONS)
        else:
            torch._dynamo.reset()
            fast = torch.compile(model, backend="deeppcr", options={**OPTIONS, "inner_backend": "eager"})
        torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-10)
        report = pcr_fx.report(fast) if way == "transform" else pcr_fx.report()
    assert [chain["length"] for chain in report.to_dict()["chains"]] == [LAYERS], str(report)


@pytest.mark.parametrize("options", [{}, {"norm_first": True, "activation": "gelu"}], ids=["usual", "norm first"])
@pytest.mark.parametrize("solver", ["sequential", "newton"])
def test_the_fused_layer_written_out(options: dict[str, Any], solver: str) -> None:
    model, x = encoder(batch_first=True, **options).eval(), torch.randn(2, 3, 8, dtype=torch.float64)
    torch._dynamo.reset()
    settings = {"solver": solver, "kernels": False, "inner_backend": "eager"}
    with torch.no_grad():
        fast = torch.compile(model, backend="deeppcr", options=settings)
        torch.testing.assert_close(fast(x), model(x), rtol=1e-8, atol=1e-8)
    assert "transformer_encoder_layer_fwd" in str(pcr_fx.report())


def test_a_mask_is_named() -> None:
    model, x = encoder(batch_first=True).eval(), torch.randn(2, 3, 8, dtype=torch.float64)
    torch._dynamo.reset()
    mask = torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad():
        fast = torch.compile(model, backend="deeppcr", options={**OPTIONS, "inner_backend": "eager"})
        got = fast(x, src_key_padding_mask=mask)
        torch.testing.assert_close(got, model(x, src_key_padding_mask=mask), rtol=1e-10, atol=1e-10, equal_nan=True)
    assert "mask" in str(pcr_fx.report()), str(pcr_fx.report())
