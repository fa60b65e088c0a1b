"""llama.cpp's blocks by the compiled kernels, at each level of a CPU, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.kernels import ggml, native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [(1, 48, 96, 0), (3, 33, 70, 2), (40, 130, 512, 1), (5, 40, 4160, 2)]
"""Rows, outputs, inputs and weights kept aside of a product; the last is wider than what engines decode at a time."""


def stored(kind: str, rows: int, width: int, aside: int, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Blocks of every code, with scales of either sign and of all sizes, some weights kept aside."""
    random = torch.Generator().manual_seed(seed)
    layout, groups = ggml.LAYOUTS[kind], ggml.blocks(width)
    codes = torch.randint(0, 1 << layout.bits, (rows, width), dtype=torch.uint8, generator=random)
    sizes = torch.randn(2, rows, groups, generator=random) * 10 ** torch.randint(
        -6, 3, (2, rows, groups), generator=random
    )
    scale, least = sizes.half()
    blocks = ggml.pack(codes, scale, least if layout.least else None, kind)
    if not aside:
        return blocks, None, None
    places = torch.rand(rows, groups, ggml.BLOCK, generator=random).argsort(-1)[..., :aside].to(torch.uint8)
    return blocks, places.flatten(1), torch.randn(rows, groups * aside, generator=random).half()


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("kind", ggml.LAYOUTS)
@pytest.mark.parametrize(("rows", "width", "aside"), [(1, 32, 0), (7, 96, 3), (5, 77, 0), (9, 1030, 8), (300, 320, 1)])
def test_decodes_to_the_bits_of_plain_torch(kind: str, rows: int, width: int, aside: int, level: str) -> None:
    held = stored(kind, rows, width, aside)
    for dtype in DTYPES:
        wanted = ggml.reference_dequantize(*held, kind, [rows, width], dtype)
        with native.at_most(level):
            found = ggml.dequantize_ggml(*held, kind, [rows, width], dtype)
        assert torch.equal(found, wanted), dtype
    double = ggml.dequantize_ggml(*held, kind, [rows, width], torch.float64)
    assert torch.equal(double, ggml.reference_dequantize(*held, kind, [rows, width], torch.float64))


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("kind", ggml.LAYOUTS)
@pytest.mark.parametrize(("rows", "out", "width", "aside"), SIZES)
def test_multiplies_by_what_it_decodes(kind: str, rows: int, out: int, width: int, aside: int, level: str) -> None:
    held = stored(kind, out, width, aside)
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)):
        exact_OI = ggml.reference_dequantize(*held, kind, [out, width], dtype).double()
        x = torch.randn(2, rows, width, dtype=dtype, requires_grad=True)
        bias, grad = torch.randn(out, dtype=dtype), torch.randn(2, rows, out, dtype=dtype)
        with native.at_most(level):
            y = ggml.linear_ggml(x, bias, *held, kind, out)
            y.backward(grad)
        assert x.grad is not None and y.dtype == dtype
        wanted, wanted_grad = x.double() @ exact_OI.T + bias.double(), grad.double() @ exact_OI
        assert (y.double() - wanted).norm() <= near * wanted.norm()
        assert (x.grad.double() - wanted_grad).norm() <= near * wanted_grad.norm()
