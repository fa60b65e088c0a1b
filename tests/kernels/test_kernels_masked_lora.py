"""LoRA on a pruned weight: values and gradients against the dense expression in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.kernels.masked_lora import masked_lora_linear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.03, torch.float16: 0.004}


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("with_base", [True, False], ids=["whole", "change"])
@pytest.mark.parametrize("turned", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_it_is_the_dense_expression(dtype: torch.dtype, turned: bool, with_base: bool) -> None:
    w_OI = torch.where(drawn(9, 21, seed=0) > 0, drawn(9, 21, seed=1), 0).to(dtype)
    w_OI = w_OI.t().contiguous().t() if turned else w_OI
    x_BI, a_RI, b_OR = drawn(2, 5, 21, seed=2).to(dtype), drawn(3, 21, seed=3).float(), drawn(9, 3, seed=4).float()
    bias_O, weights_BO = drawn(9, seed=5).to(dtype), drawn(2, 5, 9, seed=6)
    leaves = [tensor.clone().requires_grad_() for tensor in (x_BI, a_RI, b_OR, bias_O)]
    x, a, b, bias = leaves
    base = (lambda: w_OI) if with_base else None
    y_BO = masked_lora_linear(x, a, b, 0.5, lambda: w_OI == 0, base, bias)
    y_BO.backward(weights_BO.to(dtype))
    exact = [tensor.detach().double().requires_grad_() for tensor in leaves]
    dense_OI = torch.where(w_OI != 0, (w_OI.double() if with_base else 0) + 0.5 * exact[2] @ exact[1], 0)
    wanted_BO = exact[0] @ dense_OI.T + exact[3]
    wanted_BO.backward(weights_BO.to(dtype).double())
    assert y_BO.dtype == dtype and [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]  # type: ignore[union-attr]
    limit = max(TOLERANCE[dtype], 1e-6)  # the factors are float32
    for found, wanted in zip(
        [y_BO, *(leaf.grad for leaf in leaves)], [wanted_BO, *(one.grad for one in exact)], strict=True
    ):
        assert found is not None and wanted is not None
        assert (found.double() - wanted).norm() <= limit * wanted.norm()


@pytest.mark.parametrize("turned", [False, True], ids=["OI", "IO"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_of_zeros_leaves_every_bit(dtype: torch.dtype, turned: bool) -> None:
    w_OI = torch.where(drawn(48, 64, seed=0) > 0, drawn(48, 64, seed=1), 0).to(dtype)
    w_OI = w_OI.t().contiguous().t() if turned else w_OI
    x_BI, a_RI, b_OR = drawn(7, 64, seed=2).to(dtype), torch.randn(4, 64), torch.zeros(48, 4)
    y_BO = masked_lora_linear(x_BI, a_RI, b_OR, 2.0, lambda: w_OI == 0, lambda: w_OI)
    assert torch.equal(y_BO, torch.nn.functional.linear(x_BI, w_OI))


def test_what_models_add_to_outputs_in_place_reaches_no_gradient() -> None:
    w_OI = torch.randn(6, 8)
    x, a, b = torch.randn(1, 3, 8, requires_grad=True), torch.randn(2, 8), torch.randn(6, 2)
    y_BO = masked_lora_linear(x, a, b, 1.0, lambda: w_OI == 0, lambda: w_OI)
    y_BO += torch.ones(1, 3, 6)
    y_BO.sum().backward()
    torch.testing.assert_close(x.grad, (w_OI + b @ a).sum(0).expand(1, 3, 8))
