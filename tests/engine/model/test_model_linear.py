"""Every kind of linear layer computes the same thing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tandem.engine.model.linear import Int8Linear, PackedLinear, PlainLinear, make_linear

ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SUMMING = 1e-5  # the same products added in another order
SIZES = [(64, 128), (100, 60), (960, 384), (1024, 48)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_results_agree_with_a_plain_product(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    weight = (torch.randn(outputs, inputs) / inputs**0.5).to(dtype)
    b = torch.randn(outputs).to(dtype) if bias else None
    linear, rounding = make_linear(weight, b), ROUNDING[dtype]
    for rows in (1, 2, 33, 200, 600):
        x, residual = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype)
        exact = F.linear(x.float(), weight.float(), None if b is None else b.float())
        total = exact + residual.float()
        assert_within(linear(x), exact, rounding * exact.abs())
        # A layer may round its product before it adds the residual.
        assert_within(linear.plus(x, residual), total, rounding * (exact.abs() + total.abs()))


def assert_within(found: torch.Tensor, exact: torch.Tensor, rounding: torch.Tensor) -> None:
    assert ((found.float() - exact).abs() <= 1.01 * rounding + SUMMING).all()


def test_the_cpu_packs_what_it_can() -> None:
    assert isinstance(make_linear(torch.randn(8, 8), None), PackedLinear)
    assert isinstance(make_linear(torch.randn(8, 8).half(), None), PlainLinear)
    assert isinstance(make_linear(torch.randn(8, 8), None, quantization="int8"), Int8Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_int8_error_is_bounded_by_half_a_step_per_weight(dtype: torch.dtype) -> None:
    weight = torch.randn(96, 128)
    weight[3] = 0
    linear = Int8Linear(weight.to(dtype), None)
    identity = torch.eye(128).to(dtype)
    for rows in (1, 8, 128):
        restored = linear(identity[:rows]).float().T
        step = weight.abs().amax(dim=1, keepdim=True) / 127
        slack = 0.01 * weight.abs().max() if dtype == torch.bfloat16 else 1e-6
        assert ((restored - weight[:, :rows]).abs() <= 0.5 * step + slack).all()
