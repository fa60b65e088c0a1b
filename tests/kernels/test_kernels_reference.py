"""The plain torch quantizer against bitsandbytes, bit for bit, and against the formula where bitsandbytes is wrong."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.kernels import codebook as books
from finetune.kernels import pieces, reference

SHAPES = [(64, 128), (96, 80), (7, 9), (1, 1), (1, 63), (300, 1031), (64, 64)]
BLOCKS = [32, 64, 128, 512, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def weights(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal weights of uneven scale with a run of zeros, so that some blocks are all zero."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator) * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
    w.view(-1)[: min(70, w.numel() // 2)] = 0
    return w.to(dtype)


def formula(packed: reference.Packed4bit, codebook: str, block_size: int, shape: tuple[int, ...]) -> Tensor:
    """The definition of decoding, one nibble at a time."""
    bytes_P = packed.codes_P1.view(-1).long()
    codes_N = torch.stack([bytes_P >> 4, bytes_P & 15], dim=1).view(-1)[: prod(shape)]
    absmax = packed.absmax_G
    if packed.nested_absmax is not None and packed.offset is not None:
        nested = packed.nested_absmax[torch.arange(absmax.numel()) // 256]
        absmax = books.dynamic_map(torch.device("cpu"))[absmax.long()] * nested + packed.offset
    scale = absmax[torch.arange(codes_N.numel()) // block_size]
    return (books.table(codebook, torch.device("cpu"))[codes_N] * scale).view(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("codebook", books.CODEBOOKS)
def test_quantize_is_bit_exact_with_bitsandbytes(codebook: str, double_quant: bool, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    for shape in SHAPES:
        for block_size in BLOCKS:
            w = weights(shape, dtype)
            codes, state = oracle.quantize_4bit(
                w, blocksize=block_size, compress_statistics=double_quant, quant_type=codebook
            )
            packed = reference.quantize_4bit(w, codebook, block_size, double_quant)
            where = f"{shape} block {block_size}"
            assert torch.equal(packed.codes_P1, codes), where
            assert torch.equal(packed.absmax_G, state.absmax), where
            if double_quant:
                assert torch.equal(packed.nested_absmax, state.state2.absmax), where
                assert torch.equal(packed.offset, state.offset.reshape(1)), where


@pytest.mark.parametrize("codebook", books.CODEBOOKS)
def test_ties_fall_as_in_bitsandbytes(codebook: str) -> None:
    """Weights on the decision points: whole blocks multiply by the reciprocal of absmax, a last short one divides."""
    oracle = pytest.importorskip("bitsandbytes.functional")
    mids = books.midpoints(books.table(codebook, torch.device("cpu")).sort().values)
    for scale in (torch.rand(300, generator=torch.Generator().manual_seed(3)) + 0.5).tolist():
        w = torch.cat([torch.tensor([1.0]), mids, torch.zeros(16), torch.tensor([-1.0]), mids]) * scale
        codes, _ = oracle.quantize_4bit(w, blocksize=32, quant_type=codebook)
        assert torch.equal(reference.quantize_4bit(w, codebook, 32, False).codes_P1, codes), scale


def test_equal_blocks_leave_nothing_to_nest() -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    w = torch.full((300, 256), 0.5)
    _, state = oracle.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    packed = reference.quantize_4bit(w, "nf4", 64, True)
    assert not packed.nested_absmax.any() and torch.equal(packed.absmax_G, state.absmax)
    assert torch.equal(reference.dequantize_4bit(packed, "nf4", 64, [300, 256], torch.float32), w)


def test_nested_codes_are_bit_exact_over_many_groups() -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    absmax = weights((1000, 257)).abs().view(-1)
    codes, state = oracle.quantize_blockwise(absmax - absmax.mean(), blocksize=256)
    ours, nested, offset = reference.nest_absmax(absmax)
    assert torch.equal(ours, codes)
    assert torch.equal(nested, state.absmax)
    restored = oracle.dequantize_blockwise(codes, state) + absmax.mean()
    assert torch.equal(reference.decode_absmax(ours, nested, offset), restored)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("codebook", books.CODEBOOKS)
def test_dequantize_is_bit_exact_with_bitsandbytes(codebook: str, double_quant: bool, dtype: torch.dtype) -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    for shape, block_size in [((64, 128), 64), ((32, 256), 128), ((600, 1024), 64), ((3, 64), 32)]:
        w = weights(shape, dtype)
        packed = reference.quantize_4bit(w, codebook, block_size, double_quant)
        codes, state = oracle.quantize_4bit(
            w, blocksize=block_size, compress_statistics=double_quant, quant_type=codebook
        )
        ours = reference.dequantize_4bit(packed, codebook, block_size, list(shape), dtype)
        assert torch.equal(ours, oracle.dequantize_4bit(codes, state))


@pytest.mark.parametrize("codebook", books.CODEBOOKS)
def test_dequantize_runs_over_the_flattened_weight(codebook: str) -> None:
    """bitsandbytes 0.50.2 is wrong on AVX-512 where a row does not hold whole blocks: the formula decides."""
    for shape in [(96, 80), (64, 96), (7, 9), (513, 1031)]:
        w = weights(shape)
        packed = reference.quantize_4bit(w, codebook, 64, True)
        ours = reference.dequantize_4bit(packed, codebook, 64, list(shape), torch.float32)
        assert torch.equal(ours, formula(packed, codebook, 64, shape))
        assert (ours - w).pow(2).mean().sqrt() < 0.2 * w.pow(2).mean().sqrt()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    block_size=st.sampled_from([32, 64, 256]),
    double_quant=st.booleans(),
    codebook=st.sampled_from(books.CODEBOOKS),
    seed=st.integers(0, 1 << 20),
)
def test_any_shape_round_trips(
    rows: int, columns: int, block_size: int, double_quant: bool, codebook: str, seed: int
) -> None:
    w = weights((rows, columns), seed=seed)
    packed = reference.quantize_4bit(w, codebook, block_size, double_quant)
    ours = reference.dequantize_4bit(packed, codebook, block_size, [rows, columns], torch.float32)
    assert torch.equal(ours, formula(packed, codebook, block_size, (rows, columns)))
    if not double_quant:
        again = reference.quantize_4bit(ours, codebook, block_size, False)
        twice = reference.dequantize_4bit(again, codebook, block_size, [rows, columns], torch.float32)
        assert torch.equal(twice, ours)
        # FP4 has a second zero, which a decoded weight does not remember.
        assert codebook == "fp4" or torch.equal(again.codes_P1, packed.codes_P1)


def test_pieces_equal_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights((130, 127))
    whole = reference.quantize_4bit(w, "nf4", 64, True)
    decoded = reference.dequantize_4bit(whole, "nf4", 64, [130, 127], torch.bfloat16)
    monkeypatch.setattr(pieces, "CHUNK", 4096)
    parts = reference.quantize_4bit(w, "nf4", 64, True)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    assert torch.equal(reference.dequantize_4bit(whole, "nf4", 64, [130, 127], torch.bfloat16), decoded)


@pytest.mark.parametrize("columns", [64, 63])
def test_a_strided_weight_equals_its_copy(columns: int) -> None:
    stack = weights((3, columns, 32)).transpose(1, 2)
    ours = reference.quantize_4bit(stack, "nf4", 64, True)
    copied = reference.quantize_4bit(stack.contiguous(), "nf4", 64, True)
    assert all(torch.equal(a, b) for a, b in zip(ours, copied, strict=True))


@pytest.mark.parametrize(("codebook", "zero"), [("nf4", 7), ("fp4", 0)])
def test_zeros_have_their_code_and_decode_to_zero(codebook: str, zero: int) -> None:
    packed = reference.quantize_4bit(torch.zeros(5, 13), codebook, 32, False)
    assert set(packed.codes_P1.view(-1).tolist()) == {zero << 4 | zero}
    assert not reference.dequantize_4bit(packed, codebook, 32, [5, 13], torch.float32).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_spoils_its_own_block_only(bad: float) -> None:
    w = torch.ones(4, 64)
    w[1, 3] = bad
    packed = reference.quantize_4bit(w, "nf4", 64, False)
    assert packed.absmax_G.isfinite().tolist() == [True, False, True, True]
    assert not reference.quantize_4bit(w, "nf4", 64, True).offset.isfinite()
    decoded = reference.dequantize_4bit(packed, "nf4", 64, [4, 64], torch.float32)
    assert torch.equal(decoded[[0, 2, 3]], w[[0, 2, 3]])
