"""Sparse weights by the compiled kernels, at each level of a CPU, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finetune.kernels import native, sparse

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = [(0, 0), (2, 4), (1, 4), (4, 8), (3, 8), (5, 16)]
"""Kept and group; a bitmask first."""


def stored(rows: int, width: int, kept: int, group: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, int, int]:
    """Random values at random places; some groups and rows are empty."""
    random = torch.Generator().manual_seed(rows + width)
    w_OI = torch.randn(rows, width, generator=random).to(dtype)
    if not group:
        mask = torch.rand(rows, width, generator=random) < torch.rand(rows, 1, generator=random)
        mask[::3] &= False
        return sparse.pack_mask(mask), w_OI[mask], 0, 0
    order = torch.rand(rows, width // group, group, generator=random).argsort(-1)
    w_OI = torch.where(order < kept, w_OI.unflatten(-1, (-1, group)), 0).flatten(-2)
    w_OI[:, :group] = 0
    return *sparse.compress_groups(w_OI, kept, group), kept, group


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize(("kept", "group"), LAYOUTS)
@pytest.mark.parametrize(("rows", "width"), [(1, 32), (7, 48), (5, 80), (3, 1040), (260, 320)])
def test_decodes_to_the_bits_of_plain_torch(rows: int, width: int, kept: int, group: int, level: str) -> None:
    for of_values in FLOATS:
        held = stored(rows, width, kept, group, of_values)
        for dtype in (*FLOATS, torch.float64):
            wanted = sparse.reference_dequantize(*held, [rows, width], dtype)
            with native.at_most(level):
                assert torch.equal(sparse.dequantize_sparse(*held, [rows, width], dtype), wanted), (of_values, dtype)


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize("width", [1, 13, 77, 1001])
def test_a_row_of_any_width_has_a_bitmask(width: int, level: str) -> None:
    held = stored(9, width, 0, 0, torch.bfloat16)
    with native.at_most(level):
        found = sparse.dequantize_sparse(*held, [9, width], torch.bfloat16)
    assert torch.equal(found, sparse.reference_dequantize(*held, [9, width], torch.bfloat16))


@pytest.mark.parametrize("level", native.LEVELS)
@pytest.mark.parametrize(("kept", "group"), LAYOUTS)
@pytest.mark.parametrize(("rows", "out", "width"), [(1, 48, 96), (3, 33, 80), (40, 130, 1040), (5, 40, 4160)])
def test_multiplies_by_what_it_decodes(rows: int, out: int, width: int, kept: int, group: int, level: str) -> None:
    for dtype, near in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)):
        held = stored(out, width, kept, group, torch.bfloat16)
        exact_OI = sparse.reference_dequantize(*held, [out, width], dtype).double()
        x = torch.randn(2, rows, width, dtype=dtype, requires_grad=True)
        bias, grad = torch.randn(out, dtype=dtype), torch.randn(2, rows, out, dtype=dtype)
        with native.at_most(level):
            y = sparse.linear_sparse(x, bias, *held, out)
            y.backward(grad)
        assert x.grad is not None and y.dtype == dtype
        wanted, wanted_grad = x.double() @ exact_OI.T + bias.double(), grad.double() @ exact_OI
        assert (y.double() - wanted).norm() <= near * wanted.norm()
        assert (x.grad.double() - wanted_grad).norm() <= near * wanted_grad.norm()


@pytest.mark.skipif(native.library() is None, reason="plain torch says so in its own words")
@pytest.mark.parametrize(("kept", "group"), [(0, 0), (2, 4)])
def test_as_many_values_as_places(kept: int, group: int) -> None:
    places, values, *layout = stored(5, 64, kept, group, torch.float32)
    with pytest.raises(
        ValueError, match=rf"name {len(values.view(-1))} values, and there are {len(values.view(-1)) - 1}"
    ):
        sparse.dequantize_sparse(places, values.view(-1)[:-1], *layout, [5, 64], torch.float32)
