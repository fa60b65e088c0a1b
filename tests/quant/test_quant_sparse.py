"""Sparse storage: bit for bit what was stored, in as much room as is said, and zeros that stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from quant_matrices import empty, normal
from torch import Tensor

from finetune.errors import ModelError
from finetune.kernels import pieces, sparse
from finetune.quant.facts import pack_json, unpack_json
from finetune.quant.pruners.base import keep_of_groups
from finetune.quant.sparse import FACTS, Sparse, SparseWeightConfig


def pruned(*shape: int, pattern: tuple[int, int] | None = None, share: float = 0.5, seed: int = 1) -> Tensor:
    """bfloat16 with zeros in a pattern, or anywhere."""
    w = normal(*shape, seed=seed).bfloat16()
    if pattern is not None:
        return torch.where(keep_of_groups(w.float().abs(), pattern), w, 0)
    return torch.where(torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share, 0, w)


def filled(w: Tensor) -> Any:
    module = empty(SparseWeightConfig(), *w.shape).to(w.dtype)
    module.store(w)
    return module


CASES = [
    (pruned(24, 48, pattern=(2, 4)), (2, 4), 9.0),
    (pruned(24, 48, pattern=(3, 4)), (1, 4), 4.5),
    (pruned(24, 64, pattern=(7, 8)), (1, 8), 2.375),
    (pruned(24, 64, pattern=(15, 16)), (1, 16), 1.25),
    (pruned(24, 48, pattern=(4, 8)), (0, 0), 9.0),  # places in eight would take 9.5
    (pruned(24, 48, pattern=(1, 4)), (0, 0), 13.0),
    (pruned(24, 33), (0, 0), None),
    (pruned(3, 24, 48, pattern=(2, 4)), (2, 4), 9.0),
    (pruned(3, 24, 33, share=0.9), (0, 0), None),
    (torch.zeros(5, 8, dtype=torch.bfloat16), (0, 0), 1.0),
    (normal(5, 64).half(), (0, 0), 17.0),
]


@pytest.mark.parametrize(
    ("w", "layout", "bits"), CASES, ids=lambda v: str(tuple(v.shape)) if isinstance(v, Tensor) else ""
)
def test_nothing_is_lost_and_the_room_is_what_the_layout_takes(
    w: Tensor, layout: tuple[int, int], bits: float | None
) -> None:
    module = filled(w)
    assert (module.kept, module.group) == layout
    expected = 16 * float((w != 0).float().mean()) + 8 * sparse.mask_width(w.shape[-1]) / w.shape[-1]
    assert module.bits_per_weight() == pytest.approx(expected if bits is None else bits)
    assert torch.equal(module.decode(w.dtype), w) and module.values.dtype == w.dtype
    twin = empty(SparseWeightConfig(), *w.shape)
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.decode(torch.float32), w.float()) and twin.dtype == w.dtype
    if w.dim() == 3:
        assert all(torch.equal(module[e].dense(), w[e]) for e in range(len(w)))


def test_the_bitmask_is_numpys() -> None:
    w = pruned(7, 21)
    module = filled(w)
    by_hand = np.packbits((w != 0).numpy(), axis=-1, bitorder="little")
    assert np.array_equal(module.weight.numpy(), by_hand)
    assert torch.equal(module.values, w[w != 0])


def test_two_of_four_is_torchs_metadata() -> None:
    """As `to_sparse_semi_structured` makes it of a dense weight, before the order of the matrix units."""
    from torch.sparse import _semi_structured_conversions as theirs

    w = pruned(64, 128, pattern=(2, 4))
    w[5, 8:12] = torch.tensor([0, 0, 0, 1])  # a group with fewer
    module = filled(w)
    values, reordered = theirs.sparse_semi_structured_from_dense_cutlass(w)
    offsets = theirs._calculate_meta_reordering_scatter_offsets(64, 8, torch.int16, w.device)
    full = (w.unflatten(-1, (-1, 4)) != 0).sum(-1) == 2
    metadata = reordered.view(-1).gather(0, offsets).view(64, 8)
    mine = module.weight.view(torch.int16)
    whole = full.unflatten(-1, (-1, 4)).all(dim=-1)
    assert whole.float().mean() > 0.9 and torch.equal(mine[whole], metadata[whole])
    assert torch.equal(module.values.unflatten(-1, (-1, 2))[full], values.unflatten(-1, (-1, 2))[full])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_float32_takes_what_holds_it(dtype: torch.dtype) -> None:
    w = pruned(8, 16).float() if dtype == torch.bfloat16 else torch.where(normal(8, 16) > 0, normal(8, 16, seed=3), 0)
    w = w.to(dtype).float()
    module = filled(w)
    assert module.values.dtype == dtype and torch.equal(module.decode(torch.float32), w)


@pytest.mark.parametrize("pattern", [(2, 4), None], ids=["2:4", "bitmask"])
@pytest.mark.parametrize("shape", [(24, 48), (3, 24, 48)], ids=str)
def test_what_is_merged_into_keeps_its_zeros(shape: tuple[int, ...], pattern: tuple[int, int] | None) -> None:
    w = pruned(*shape, pattern=pattern)
    module, change = filled(w), normal(*shape, seed=9)
    merged = module.requantize(w.float() + change)
    expected = torch.where(w != 0, w.float() + change, 0).bfloat16()
    assert torch.equal(merged.decode(torch.bfloat16), expected) and merged.values.dtype == torch.bfloat16
    assert (merged.kept, merged.group) == (module.kept, module.group) and module.pruned
    dense = module.requantize(w.float() + change * (w == 0))  # a change where nothing may change
    assert torch.equal(dense.weight, module.weight) and torch.equal(dense.values, module.values)


@pytest.mark.parametrize("pattern", [(2, 4), None], ids=["2:4", "bitmask"])
def test_the_operators_are_those_that_torch_expects(pattern: tuple[int, int] | None) -> None:
    module = filled(pruned(8, 16, pattern=pattern).float())
    storage = (module.weight.data, module.values.data, module.kept, module.group)
    x, bias = torch.randn(3, 16, requires_grad=True), torch.randn(8, requires_grad=True)
    torch.library.opcheck(torch.ops.finetune.linear_sparse, (x, bias, *storage, 8))
    torch.library.opcheck(torch.ops.finetune.input_gradient_sparse, (torch.randn(3, 8), *storage, 16))
    torch.library.opcheck(torch.ops.finetune.dequantize_sparse, (*storage, [8, 16], torch.float32))


def test_rows_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for pattern in ((2, 4), None):
        w = pruned(40, 64, pattern=pattern)
        module = filled(w)
        monkeypatch.setattr(pieces, "CHUNK", 64 * 7)
        assert torch.equal(module.decode(torch.bfloat16), w)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("weight.values"), "weight.values is missing"),
        (lambda s: s.update({"weight.values": s["weight.values"][:-1]}), r"weight.values is .*, expected"),
        (lambda s: s.update({"weight": s["weight"][:, :-1]}), r"weight is .* torch.uint8, expected"),
        (lambda s: s.pop(FACTS), "expected places and weight.finetune_sparse"),
        (lambda s: _facts(s, group=5), "is not a storage we can read"),
        (lambda s: _facts(s, format_version=2), "format_version 2, this program reads 1"),
        (lambda s: _facts(s, shape=[12, 71]), "has shape .12, 71., expected .12, 72."),
    ],
)
def test_a_corrupt_state_is_named(change: Any, message: str) -> None:
    module = filled(pruned(12, 72))
    state = dict(module.state_dict())
    change(state)
    with pytest.raises(RuntimeError, match=message):
        empty(SparseWeightConfig(), 12, 72).load_state_dict(state)


def _facts(state: dict[str, Any], **changes: Any) -> None:
    state[FACTS] = pack_json(unpack_json(state[FACTS]) | changes)


def test_what_is_not_finite_is_refused() -> None:
    w = normal(4, 8)
    w[1, 2] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinity"):
        filled(w)
    assert isinstance(filled(normal(4, 8)), Sparse)
