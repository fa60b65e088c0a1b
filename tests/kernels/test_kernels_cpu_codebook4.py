"""The compiled 4-bit kernels: bit for bit with the reference, products against float64, at every level of the CPU."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune.kernels import codebook as books
from finetune.kernels import native, ops, pages, reference
from finetune.quant.codebook4 import Codebook4Linear
from finetune.quant.codebook4_storage import Codebook4Config

pytestmark = pytest.mark.skipif(native.why_off() is not None, reason=str(native.why_off()))

LEVELS = native.LEVELS[: native.LEVELS.index(native.level()) + 1] if native.why_off() is None else native.LEVELS[:1]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SHAPES = [(64, 128), (96, 80), (7, 9), (1, 1), (1, 63), (30, 1031)]


def bits(values: Tensor) -> Tensor:
    """What equality of bits compares: a zero's sign, and NaN as itself."""
    return values.view(INTEGERS[values.dtype])


def weights(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal weights with rows of every size down to subnormal ones, and a run of zeros."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-43, 4, (shape[0], *[1] * (len(shape) - 1)), generator=generator)
    w = torch.randn(shape, generator=generator) * scale
    w.view(-1)[: min(70, w.numel() // 2)] = 0
    return w.to(dtype)


def normal(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- decoding


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
@pytest.mark.parametrize("codebook", books.CODEBOOKS)
def test_decoding_is_bit_exact_with_the_reference(codebook: str, double_quant: bool, level: str) -> None:
    with native.at_most(level):
        for shape in SHAPES:
            for block_size in (32, 64, 256, 4096):
                packed = reference.quantize_4bit(weights(shape), codebook, block_size, double_quant)
                for dtype in DTYPES:
                    ours = ops.dequantize_4bit(*packed, codebook, block_size, list(shape), dtype)
                    oracle = reference.dequantize_4bit(packed, codebook, block_size, list(shape), dtype)
                    assert torch.equal(bits(ours), bits(oracle)), (shape, block_size, dtype)


@pytest.mark.parametrize("level", LEVELS)
def test_ties_round_to_even(level: str) -> None:
    """Blocks whose largest value lies half way between two of 16 bits: above an even one, and above an odd one."""
    for dtype, half in ((torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)):
        w = torch.zeros(2, 64)
        w[:, 0] = torch.tensor([1 + half, 1 + 3 * half])
        packed = ops.quantize_4bit(w, "nf4", 64, False)
        with native.at_most(level):
            decoded = ops.dequantize_4bit(*packed, "nf4", 64, [2, 64], dtype)
        assert decoded[:, 0].double().tolist() == [1.0, 1 + 4 * half]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(LEVELS),
    st.sampled_from(books.CODEBOOKS),
    st.sampled_from([32, 64, 128, 1024]),
    st.booleans(),
    st.integers(1, 40),
    st.integers(1, 700),
    st.sampled_from(DTYPES),
)
def test_decoding_of_any_shape(
    level: str, codebook: str, block_size: int, double_quant: bool, rows: int, columns: int, dtype: torch.dtype
) -> None:
    shape = (rows, columns)
    packed = reference.quantize_4bit(weights(shape, rows), codebook, block_size, double_quant)
    with native.at_most(level):
        ours = ops.dequantize_4bit(*packed, codebook, block_size, list(shape), dtype)
    oracle = reference.dequantize_4bit(packed, codebook, block_size, list(shape), dtype)
    assert torch.equal(bits(ours), bits(oracle))


@pytest.mark.parametrize("double_quant", [False, True], ids=["plain", "double"])
def test_decoding_is_bit_exact_with_bitsandbytes(double_quant: bool) -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    w = normal((192, 256))
    codes, state = oracle.quantize_4bit(w, blocksize=64, compress_statistics=double_quant, quant_type="nf4")
    nested, offset = (state.state2.absmax, state.offset.reshape(1)) if double_quant else (None, None)
    ours = ops.dequantize_4bit(codes, state.absmax, nested, offset, "nf4", 64, [192, 256], torch.bfloat16)
    assert torch.equal(bits(ours), bits(oracle.dequantize_4bit(codes, state)))


def test_non_finite_blocks_decode_to_non_finite_values() -> None:
    w = normal((4, 64), dtype=torch.float32)
    w[1, 3], w[2, 5] = float("inf"), float("nan")
    packed = ops.quantize_4bit(w, "nf4", 64, False)
    for dtype in DTYPES:
        decoded = ops.dequantize_4bit(*packed, "nf4", 64, [4, 64], dtype)
        assert decoded[0].isfinite().all() and decoded[3].isfinite().all()
        assert not decoded[1].isfinite().any() and decoded[2].isnan().all()


def test_large_outputs_use_their_pages_again_but_never_share_them() -> None:
    rows = pages.SMALLEST // 2 // 1024
    packed = ops.quantize_4bit(normal((rows, 1024)), "nf4", 64, True)

    def decoded() -> Tensor:
        return ops.dequantize_4bit(*packed, "nf4", 64, [rows, 1024], torch.bfloat16)

    first, second = decoded(), decoded()
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    address, part = first.data_ptr(), first[:1]
    del first
    assert decoded().data_ptr() != address, "a view keeps the pages"
    del part
    again = decoded()
    assert torch.equal(again, second)
    assert torch.equal(again[-50:], reference_rows(packed, rows)[-50:])


def reference_rows(packed: reference.Packed4bit, rows: int) -> Tensor:
    return reference.dequantize_4bit(packed, "nf4", 64, [rows, 1024], torch.bfloat16)


# ---- encoding


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("codebook", books.CODEBOOKS)
def test_encoding_is_bit_exact_with_the_reference(codebook: str, level: str) -> None:
    with native.at_most(level):
        for shape in SHAPES:
            for block_size in (32, 64, 4096):
                for dtype in DTYPES:
                    w = weights(shape, dtype=dtype)
                    check_encoding(w, codebook, block_size)
                    if w.numel() > 200:
                        flat = w.view(-1)
                        flat[100], flat[150], flat[-1] = float("nan"), -float("inf"), float("inf")
                        check_encoding(w, codebook, block_size)


def check_encoding(w: Tensor, codebook: str, block_size: int) -> None:
    ours = ops.quantize_4bit(w, codebook, block_size, False)
    oracle = reference.quantize_4bit(w, codebook, block_size, False)
    where = f"{codebook} {tuple(w.shape)} block {block_size} {w.dtype}"
    assert torch.equal(ours.codes_P1, oracle.codes_P1), where
    assert torch.equal(ours.absmax_G.nan_to_num(7.0), oracle.absmax_G.nan_to_num(7.0)), where


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("codebook", books.CODEBOOKS)
def test_encoding_and_its_ties_are_bit_exact_with_bitsandbytes(codebook: str, level: str) -> None:
    oracle = pytest.importorskip("bitsandbytes.functional")
    mids = books.midpoints(books.table(codebook, torch.device("cpu")).sort().values)
    scales = torch.rand(40, generator=torch.Generator().manual_seed(3)) + 0.5
    ties = [torch.cat([torch.tensor([1.0]), mids, torch.zeros(16), torch.tensor([-1.0]), mids]) * s for s in scales]
    with native.at_most(level):
        for w in (*ties, normal((96, 80)), normal((33, 65), dtype=torch.float32)):
            codes, state = oracle.quantize_4bit(w, blocksize=32, quant_type=codebook, compress_statistics=True)
            ours = ops.quantize_4bit(w, codebook, 32, True)
            assert torch.equal(ours.codes_P1, codes) and torch.equal(ours.absmax_G, state.absmax)


def test_encoding_of_strided_weights() -> None:
    for w in (normal((80, 96)).T, normal((3, 48, 64)).transpose(1, 2), normal((3, 5, 7)).transpose(1, 2)):
        ours, oracle = (quantize(w, "nf4", 64, True) for quantize in (ops.quantize_4bit, reference.quantize_4bit))
        assert all(torch.equal(a, b) for a, b in zip(ours, oracle, strict=True))


def test_encoding_passes_opcheck() -> None:
    torch.library.opcheck(torch.ops.finetune.quantize_4bit, (normal((5, 13)), "nf4", 32))


# ---- products

BOUND = 2.0**-8, 4e-6
"""bf16's unit roundoff, doubled, of the result, and float32's of a sum of so many products."""


def storage_of(
    shape: tuple[int, int], codebook: str = "nf4", block_size: int = 64, double_quant: bool = True
) -> tuple[tuple, Tensor]:
    """Stored tensors and settings as the operators take them, and the weight in bf16, as float64."""
    packed = reference.quantize_4bit(normal(shape, 5) * 0.05, codebook, block_size, double_quant)
    w = reference.dequantize_4bit(packed, codebook, block_size, list(shape), torch.bfloat16)
    return (*packed, codebook, block_size), w.double()


def assert_close(found: Tensor, left: Tensor, right: Tensor, bias: Tensor | None = None) -> None:
    exact, size = left.double() @ right, left.double().abs() @ right.abs()
    if bias is not None:
        exact, size = exact + bias.double(), size + bias.double().abs()
    error = (found.double() - exact).abs()
    assert (error <= BOUND[0] * exact.abs() + BOUND[1] * size).all(), (error / (size + 1e-30)).max().item()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [*range(1, 10), 16, 33, 65])
def test_products_equal_float64_algebra(rows: int, level: str) -> None:
    with native.at_most(level):
        for shape in ((70, 128), (33, 192), (64, 1024)):
            storage, w = storage_of(shape)
            x, bias, grad = normal((rows, shape[1]), 1), normal((shape[0],), 2), normal((rows, shape[0]), 3)
            assert_close(ops.linear_4bit(x, None, *storage, shape[0]), x, w.T)
            assert_close(ops.linear_4bit(x, bias, *storage, shape[0]), x, w.T, bias)
            assert_close(torch.ops.finetune.input_gradient_4bit(grad, *storage, shape[1]), grad, w)


@settings(max_examples=80, deadline=None)
@given(
    st.sampled_from(LEVELS),
    st.sampled_from(books.CODEBOOKS),
    st.sampled_from([32, 64, 128, 2048]),
    st.booleans(),
    st.integers(1, 20),
    st.integers(1, 150),
    st.one_of(st.integers(1, 400), st.integers(1, 8).map(lambda n: 64 * n)),
    st.booleans(),
)
def test_products_of_any_shape(
    level: str, codebook: str, block_size: int, double_quant: bool, rows: int, out: int, width: int, biased: bool
) -> None:
    storage, w = storage_of((out, width), codebook, block_size, double_quant)
    x, grad = normal((rows, width), 1), normal((rows, out), 3)
    bias = normal((out,), 2) if biased else None
    with native.at_most(level):
        y = ops.linear_4bit(x, bias, *storage, out)
        back = torch.ops.finetune.input_gradient_4bit(grad, *storage, width)
    assert_close(y, x, w.T, bias)
    assert_close(back, grad, w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_have_the_bits_of_the_decoded_product(dtype: torch.dtype) -> None:
    storage, _ = storage_of((48, 96))
    w = reference.dequantize_4bit(reference.Packed4bit(*storage[:4]), "nf4", 64, [48, 96], dtype)
    x, grad = normal((5, 96), 1, dtype), normal((5, 48), 2, dtype)
    assert torch.equal(ops.linear_4bit(x, None, *storage, 48), torch.nn.functional.linear(x, w))
    assert torch.equal(torch.ops.finetune.input_gradient_4bit(grad, *storage, 96), grad @ w)


def test_float64_goes_by_the_reference() -> None:
    storage, _ = storage_of((6, 70))
    w = reference.dequantize_4bit(reference.Packed4bit(*storage[:4]), "nf4", 64, [6, 70], torch.float64)
    x = normal((3, 70), 1, torch.float64)
    assert torch.equal(ops.linear_4bit(x, None, *storage, 6), x @ w.T)
    assert torch.equal(ops.dequantize_4bit(*storage, [6, 70], torch.float64), w)


@pytest.mark.parametrize("bias", [False, True], ids=["bare", "bias"])
def test_bf16_products_pass_opcheck(bias: bool) -> None:
    storage, _ = storage_of((24, 64))
    for rows in (2, 12):
        x = normal((rows, 64)).requires_grad_()
        b = normal((24,)).requires_grad_() if bias else None
        torch.library.opcheck(torch.ops.finetune.linear_4bit, (x, b, *storage, 24))


def test_rows_agree_however_they_are_grouped() -> None:
    storage, _ = storage_of((256, 512))
    x = normal((80, 512), 1)
    whole = ops.linear_4bit(x, None, *storage, 256)
    for size in (1, 2, 3, 8, 20, 70):
        parts = torch.cat([ops.linear_4bit(part, None, *storage, 256) for part in x.split(size)])
        assert (parts.float() - whole.float()).abs().max() <= 2e-2 * whole.float().abs().max()


def test_strided_inputs_and_storage() -> None:
    storage, w = storage_of((40, 128))
    x, bias, grad = normal((128, 6), 1).T, normal((80,), 2)[::2], normal((40, 6), 3).T
    assert_close(ops.linear_4bit(x, bias, *storage, 40), x, w.T, bias)
    assert_close(torch.ops.finetune.input_gradient_4bit(grad, *storage, 128), grad, w)
    spaced = torch.stack([storage[0], storage[0]], dim=1)[:, 0]
    assert not spaced.is_contiguous()
    assert torch.equal(
        ops.linear_4bit(x, None, spaced, *storage[1:], 40), ops.linear_4bit(x.contiguous(), None, *storage, 40)
    )


def test_threads_do_not_disturb_one_another() -> None:
    cases = [storage_of((96 + 32 * n, 256 + 64 * n)) for n in range(4)]
    failures: list[BaseException] = []

    def work(storage: tuple, w: Tensor) -> None:
        try:
            for rows in (1, 3, 9, 40) * 5:
                x = normal((rows, w.shape[1]), rows)
                assert_close(ops.linear_4bit(x, None, *storage, w.shape[0]), x, w.T)
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=case) for case in cases]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures


# ---- what bitsandbytes 0.50.2 gets wrong on a CPU


def frozen(shape: tuple[int, int], bias: bool = False) -> Codebook4Linear:
    module = Codebook4Linear(Codebook4Config("nf4", 64, True), *shape, bias=bias, dtype=torch.bfloat16)
    module.store(normal(shape, 7))
    return module


@pytest.mark.parametrize("level", LEVELS)
def test_the_gradient_after_an_evaluation_pass_is_the_one_before(level: str) -> None:
    """bitsandbytes repacks the weight in place at the first inference, and then passes no gradient on."""
    module, x = frozen((96, 128)), normal((4, 128))

    def gradient() -> Tensor:
        leaf = x.clone().requires_grad_()
        module.train()(leaf).float().square().sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    with native.at_most(level):
        before, stored = gradient(), module.weight.clone()
        with torch.no_grad():
            module.eval()(x)
        assert torch.equal(before, gradient()) and torch.equal(stored, module.weight)


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("width", [352, 90, 33])
def test_widths_that_64_does_not_divide(width: int, rows: int) -> None:
    """bitsandbytes fails in its repacking, or decodes rows that begin inside a block wrongly."""
    module, x = frozen((40, width)).eval(), normal((rows, width))
    with torch.inference_mode():
        assert_close(module(x).clone(), x, module.dequantize(torch.bfloat16).double().T)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16, 70])
def test_evaluation_and_training_give_the_same_bits(rows: int, level: str) -> None:
    """bitsandbytes rounds absmax to bf16 in evaluation only."""
    module, x = frozen((96, 192), bias=True), normal((rows, 192))
    with native.at_most(level):
        training = module.train()(x.clone().requires_grad_()).detach()
        with torch.no_grad():
            assert torch.equal(module.eval()(x), training)
        with torch.inference_mode():
            assert torch.equal(module.eval()(x).clone(), training)


def test_merging_after_a_forward_starts_from_the_stored_weight() -> None:
    module = frozen((64, 128))
    before = module.dequantize(torch.float32)
    with torch.no_grad():
        module.eval()(normal((1, 128)))
    assert torch.equal(module.dequantize(torch.float32), before)
    delta = normal((64, 128), 9, torch.float32)
    merged = module.requantize(before + delta).dequantize(torch.float32)
    step = (before + delta).view(-1, 64).abs().amax(dim=1, keepdim=True) * 0.16  # half of NF4's widest gap, and more
    assert ((merged - before - delta).view(-1, 64).abs() <= step).all()
