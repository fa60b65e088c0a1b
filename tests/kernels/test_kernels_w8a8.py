"""Weights in symmetric integers by the compiled kernels, at each level of a CPU, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.kernels import native, w8a8


def stored(rows: int, width: int, groups: int, scales: str) -> tuple[Tensor, Tensor]:
    """Codes, -128 among them, and scales of all sizes: one a group or row, or one for the whole matrix."""
    random = torch.Generator().manual_seed(rows + width)
    codes = torch.randint(-128, 128, (rows, width), dtype=torch.int8, generator=random)
    if scales == "tensor":
        return codes, torch.tensor([0.013])
    return codes, torch.rand(rows, groups, generator=random) * 10.0 ** torch.randint(
        -6, 2, (rows, groups), generator=random
    )


CASES = [
    (1, 32, 1, "row"),
    (7, 96, 3, "row"),
    (5, 77, 1, "row"),
    (9, 60, 5, "row"),
    (6, 100, 1, "tensor"),
    (130, 512, 8, "row"),
]


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize(("rows", "width", "groups", "scales"), CASES)
def test_decodes_to_the_bits_of_plain_torch(rows: int, width: int, groups: int, scales: str, level: str) -> None:
    codes, scale = stored(rows, width, groups, scales)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        wanted = w8a8.reference_dequantize(codes, scale, [rows, width], dtype)
        with native.at_most(level):
            assert torch.equal(w8a8.dequantize_w8a8(codes, scale, [rows, width], dtype), wanted), dtype


def test_a_stack_decodes_with_one_scale_an_expert() -> None:
    codes, _ = stored(6, 64, 1, "row")
    experts, scale = codes.view(2, 3, 64), torch.tensor([0.5, 0.01]).view(2, 1, 1)
    found = w8a8.dequantize_w8a8(experts, scale, [2, 3, 64], torch.float32)
    assert torch.equal(found, experts.float() * scale)


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize(("out", "width", "groups", "scales"), CASES)
def test_products_and_gradients(out: int, width: int, groups: int, scales: str, level: str) -> None:
    codes, scale = stored(out, width, groups, scales)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        exact_OI = w8a8.reference_dequantize(codes, scale, [out, width], dtype).double()
        x = torch.randn(2, 9, width, dtype=dtype, requires_grad=True)
        bias, grad = torch.randn(out, dtype=dtype), torch.randn(2, 9, out, dtype=dtype)
        with native.at_most(level):
            y = w8a8.linear_w8a8(x, bias, codes, scale)
            y.backward(grad)
        assert x.grad is not None
        wanted, wanted_grad = x.double() @ exact_OI.T + bias.double(), grad.double() @ exact_OI
        assert (y.double() - wanted).norm() <= near * wanted.norm()
        assert (x.grad.double() - wanted_grad).norm() <= near * wanted_grad.norm()
