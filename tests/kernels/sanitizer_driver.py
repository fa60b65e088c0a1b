"""Drives the compiled kernels through torch's operators with odd shapes, on a library that checks every access.

    python sanitizer_driver.py LIBRARY ROUNDS

test_kernels_sanitizer.py preloads the allocator of AddressSanitizer, or one that puts a forbidden page behind every
buffer (fence.cpp): torch's own buffers, inputs as well as outputs, then end exactly where their tensors do, and a byte
read or written beyond is fatal. What is computed is checked elsewhere. A function here is one family of operators; a
new one is added to `FAMILIES`.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from finetune.kernels import native

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def size(random: Random, most: int) -> int:
    """A size near a multiple of what vectors and tiles hold, or any."""
    if random.random() < 0.5:
        return random.randint(1, most)
    unit = random.choice([16, 32, 64, 128])
    return max(1, min(most, unit * random.randint(1, max(1, most // unit)) + random.choice([-1, 0, 0, 1])))


def tensor(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    """Memory of its own, so that its end is guarded."""
    return torch.randn(shape).to(dtype).clone().requires_grad_(grad)


def multiply(linear: Callable[[Tensor, Tensor | None], Tensor], rows: int, out: int, width: int, biased: bool) -> None:
    """A product and the gradient of its input, in every dtype."""
    for dtype in DTYPES:
        x = tensor(rows, width, dtype=dtype, grad=True)
        linear(x, tensor(out, dtype=dtype) if biased else None).sum().backward()


def codebook4(random: Random) -> None:
    from finetune.kernels import ops

    out, width, rows = size(random, 130), size(random, 700), random.choice([1, 2, 3, 5, 8, 17, 33])
    settings = random.choice(["nf4", "fp4"]), random.choice([32, 64, 128, 4096])
    weight = tensor(out, width, dtype=random.choice(DTYPES))
    packed = ops.quantize_4bit(weight, *settings, random.random() < 0.5)
    for dtype in DTYPES:
        ops.dequantize_4bit(*packed, *settings, [out, width], dtype)
    multiply(lambda x, bias: ops.linear_4bit(x, bias, *packed, *settings, out), rows, out, width, random.random() < 0.5)


def dense(random: Random) -> None:
    """The engines over a weight that needs no decoding."""
    library = native.library()
    assert library is not None
    out, width, rows = size(random, 130), size(random, 500), random.choice([1, 2, 5, 17, 33, 64])
    w, x, bias, g = (
        tensor(*shape, dtype=torch.bfloat16) for shape in ((out, width), (rows, width), (out,), (rows, out))
    )
    sizes = [ctypes.c_int64(number) for number in (rows, out, width)]
    y, gx, threads = torch.empty_like(g), torch.empty_like(x), torch.get_num_threads()
    library.ft_linear_dense(native.pointer(w), *sizes, *map(native.pointer, (x, bias, y)), threads)
    library.ft_input_gradient_dense(native.pointer(w), *sizes, *map(native.pointer, (g, gx)), threads)


def dropout(random: Random) -> None:
    from finetune.kernels import dropout as ops

    x = tensor(random.randint(1, 50), size(random, 300), dtype=random.choice(DTYPES))
    torch.ops.finetune.zero_dropped(x, ops.draw_kept(x, random.choice([0.0, 0.1, 0.5])))


def int8(random: Random) -> None:
    from finetune.kernels import int8 as ops

    out, width, rows = size(random, 130), size(random, 700), random.choice([1, 2, 5, 8, 17, 33])
    codes, absmax, *_ = ops.quantize_weight(tensor(out, width))
    for dtype in DTYPES:
        ops.dequantize_int8(codes, absmax, [out, width], dtype)
    threshold = random.choice([0.0, 1.5, 6.0])
    multiply(
        lambda x, bias: ops.linear_int8(x, bias, codes, absmax, threshold), rows, out, width, random.random() < 0.5
    )


def affine(random: Random) -> None:
    from finetune.kernels import affine as ops

    out, width, rows = size(random, 130), size(random, 700), random.choice([1, 2, 5, 8, 17, 33])
    bits, group_size = random.choice([2, 3, 4, 8]), random.choice([32, 64, 128, -1])
    codes = ops.pack(torch.randint(0, 1 << bits, (out, width), dtype=torch.uint8), bits)
    groups = ops.groups(width, group_size)
    scale = tensor(out, groups, dtype=random.choice([torch.float16, torch.float32]))
    zero = random.choice([None, torch.ones(out, groups, dtype=torch.uint8), tensor(out, groups)])
    stored = codes, scale, zero, bits, group_size
    for dtype in DTYPES:
        ops.dequantize_affine(*stored, [out, width], dtype)
    multiply(lambda x, bias: ops.linear_affine(x, bias, *stored, out), rows, out, width, random.random() < 0.5)


def ggml(random: Random) -> None:
    from finetune.kernels import ggml as ops

    out, width, rows = size(random, 130), size(random, 700), random.choice([1, 2, 5, 8, 17, 33])
    kind, aside = random.choice(list(ops.LAYOUTS)), random.choice([0, 0, 1, 8])
    groups = ops.blocks(width)
    blocks = torch.randint(0, 256, (out, ops.packed_width(width, kind)), dtype=torch.uint8)
    places = torch.randint(0, ops.BLOCK, (out, groups * aside), dtype=torch.uint8) if aside else None
    values = None if places is None else tensor(out, groups * aside, dtype=torch.float16)
    for dtype in DTYPES:
        ops.dequantize_ggml(blocks, places, values, kind, [out, width], dtype)
    stored = blocks, places, values, kind
    multiply(lambda x, bias: ops.linear_ggml(x, bias, *stored, out), rows, out, width, random.random() < 0.5)


def sparse(random: Random) -> None:
    from finetune.kernels import sparse as ops

    group = random.choice([0, 4, 8, 16])
    out, rows, width = size(random, 130), random.choice([1, 2, 5, 8, 17, 33]), size(random, 700)
    width += -width % (group or 1)
    weight = tensor(out, width, dtype=random.choice(DTYPES))
    if group:
        kept = random.randint(1, group)
        stored = *ops.compress_groups(weight, kept, group), kept, group
    else:
        mask = torch.rand(out, width) < random.random()
        stored = ops.pack_mask(mask), weight[mask], 0, 0
    for dtype in DTYPES:
        ops.dequantize_sparse(*stored, [out, width], dtype)
    multiply(lambda x, bias: ops.linear_sparse(x, bias, *stored, out), rows, out, width, random.random() < 0.5)


def w8a8(random: Random) -> None:
    from finetune.kernels import w8a8 as ops

    groups = random.choice([1, 1, 3, 8])
    out, width, rows = size(random, 130), groups * size(random, 90), random.choice([1, 2, 5, 17])
    codes = torch.randint(-128, 128, (out, width), dtype=torch.int8)
    scale = random.choice([torch.rand(1), torch.rand(out, groups)])
    for dtype in DTYPES:
        ops.dequantize_w8a8(codes, scale, [out, width], dtype)
    multiply(
        lambda x, bias: ops.integer_linear(x, bias, codes, scale, None, 8, True),
        rows,
        out,
        width,
        random.random() < 0.5,
    )


def between_products(random: Random) -> None:
    from finetune.kernels import fused

    rows, width, dtype = random.randint(1, 40), size(random, 300), random.choice(DTYPES[:2])
    x, up = tensor(rows, width, dtype=dtype, grad=True), tensor(rows, width, dtype=dtype, grad=True)
    fused.rms_norm(x, tensor(width, dtype=dtype, grad=True), 1e-6).sum().backward()
    fused.act_mul(x, up, random.choice(list(fused.ACTIVATIONS))).sum().backward()
    batch, heads, depth = random.randint(1, 2), random.randint(1, 3), 2 * random.randint(1, 40)
    queries, keys, groups = random.randint(1, 70), random.randint(1, 70), random.choice([1, heads])
    angle = tensor(batch, queries, depth, dtype=dtype)
    fused.rope(tensor(batch, queries, heads, depth, dtype=dtype, grad=True), angle, angle).sum().backward()
    causal = random.random() < 0.5
    keys = queries if causal else keys
    key, value = (tensor(batch, groups, keys, depth, dtype=dtype, grad=True) for _ in range(2))
    mask = None if causal or random.random() < 0.5 else torch.rand(batch, 1, queries, keys) < 0.7
    query = tensor(batch, heads, queries, depth, dtype=dtype, grad=True)
    fused.attention(query, key, value, mask, causal=causal).sum().backward()


def cross_entropy(random: Random) -> None:
    from finetune.kernels.cross_entropy import linear_cross_entropy

    positions, hidden, vocabulary = random.randint(1, 40), size(random, 80), size(random, 400)
    dtype = random.choice(DTYPES[:2])
    head = tensor(vocabulary, hidden, dtype=dtype, grad=random.random() < 0.5)
    labels = torch.randint(-1, vocabulary, (positions,))
    labels[labels < 0] = -100
    states = tensor(positions, hidden, dtype=dtype, grad=True)
    linear_cross_entropy(states, head, labels, softcap=random.choice([None, 30.0]), chunk=7).backward()


def lengths(random: Random) -> None:
    from finetune.kernels import lengths as ops

    rows, outputs, dtype = random.randint(1, 40), size(random, 1100), random.choice(DTYPES[:2])
    y, magnitude, norm = tensor(rows, outputs, dtype=dtype), tensor(outputs), 1 + torch.rand(outputs)
    bias = random.choice([None, tensor(outputs)])
    ops.scale_outputs_(y, magnitude, norm, bias)
    ops.scale_outputs_backward(tensor(rows, outputs, dtype=dtype), y, magnitude, norm, bias)


def gram(random: Random) -> None:
    from finetune.kernels import gram as ops

    width = 32 * random.randint(1, 20)
    ops.add_gram_(torch.zeros(width, width), tensor(size(random, 1100), width, dtype=torch.bfloat16))


FAMILIES = (codebook4, dense, int8, affine, ggml, sparse, w8a8, dropout, between_products, cross_entropy, lengths, gram)


def main(library: str, rounds: int) -> None:
    native.LIBRARY = Path(library)
    assert native.library() is not None, native.why_off()
    levels = native.LEVELS[: native.LEVELS.index(native.level()) + 1]
    for level in levels:
        for family in FAMILIES:
            random = Random(f"{level} {family.__name__}")
            for number in range(rounds):
                torch.manual_seed(number)
                torch.set_num_threads(1 + number % 2)
                with native.at_most(level):
                    family(random)
            print(level, family.__name__, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
