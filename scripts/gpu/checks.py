"""Whether the Triton kernels are right: decoded weights against the reference's bits, products against float64.

`python scripts/gpu/checks.py --device cuda` checks on a GPU. With TRITON_INTERPRET=1 in the environment and
`--device cpu` the same checks run in Triton's interpreter, with FINETUNE_CPU=off through torch's dispatcher as well:
which is how the tests run them.

Shape suffixes: M rows, O out features, I in features.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from torch import Tensor

from finetune.kernels import affine, dispatch, int8, reference, triton_backend
from finetune.kernels.triton_backend import DEVICES
from gpu.oracle import ROUNDING, close, draw, same_bits

SHAPES = ((48, 96), (7, 33), (5, 77), (3, 64), (2, 3, 50), (1, 4096 + 34))
"""Whole blocks, rows that end within a block, an odd count, a stack of experts, more than a program takes."""
PRODUCTS = ((1, 40, 128), (2, 70, 160), (3, 65, 96), (16, 64, 256), (40, 33, 64), (5, 31, 50))
"""M, O, I: plain sums, matrix units with ragged tiles, and a width that cannot be fused."""


def codebook4_decode(device: torch.device) -> float:
    """NF4 and FP4, with and without double quantization, blocks of 32 to 4096: the reference's bits."""
    from finetune.kernels import triton_codebook4

    for codebook, block_size, nested in (
        ("nf4", 64, True),
        ("nf4", 32, False),
        ("fp4", 64, False),
        ("fp4", 4096, True),
    ):
        for shape in SHAPES:
            packed = reference.quantize_4bit(draw(*shape), codebook, block_size, nested)
            here = [None if part is None else part.to(device) for part in packed]
            for dtype in ROUNDING:
                found = triton_codebook4.dequantize(*here, codebook, block_size, list(shape), dtype)
                expected = reference.dequantize_4bit(packed, codebook, block_size, list(shape), dtype)
                same_bits(found, expected, f"{codebook} {block_size} {shape} {dtype}")
    return 0.0


def codebook4_encode(device: torch.device) -> float:
    """The quantizer: the reference's codes and absmax, blocks of zeros and a short last block among them."""
    from finetune.kernels import triton_codebook4

    for codebook, block_size in (("nf4", 64), ("fp4", 64), ("nf4", 1024)):
        for shape in SHAPES:
            for dtype in ROUNDING:
                w = draw(*shape, seed=1, dtype=dtype)
                w.view(-1)[:block_size] = 0
                codes, absmax = triton_codebook4.quantize(w.to(device), codebook, block_size)
                expected = reference.quantize_4bit(w, codebook, block_size, False)
                what = f"{codebook} {block_size} {shape} {dtype}"
                same_bits(codes, expected.codes_P1, what)
                same_bits(absmax, expected.absmax_G, what)
    for bad in (float("nan"), float("inf")):
        w = draw(4, 64)
        w[2, 5] = bad
        _, absmax = triton_codebook4.quantize(w.to(device), "nf4", 64)
        assert [bool(value) for value in absmax.cpu().isfinite()] == [True, True, False, True], f"{bad} went unnoticed"
    return 0.0


def products(
    device: torch.device, weights: Iterator[tuple[str, int, Callable[..., Tensor], Callable[..., Tensor], Tensor, list]]
) -> float:
    """Forward and input gradient of formats against float64 over the weight as decoded in the product's dtype.

    Args:
        weights: (what, M, linear, input_gradient, w_OI in float32 on the CPU, stored tensors and settings).
    """
    worst = 0.0
    for what, rows, linear, input_gradient, w_OI, storage in weights:
        here = [part.to(device) if isinstance(part, Tensor) else part for part in storage]
        bias_O = draw(w_OI.shape[0], seed=3)
        for dtype in ROUNDING:
            x_MI, g_MO = draw(rows, w_OI.shape[1], seed=4).to(dtype), draw(rows, w_OI.shape[0], seed=5).to(dtype)
            w64 = w_OI.to(dtype).double()
            y_MO = linear(x_MI.to(device), bias_O.to(device, dtype), *here, w_OI.shape[0])
            exact = x_MI.double() @ w64.T + bias_O.to(dtype).double()
            worst = max(worst, close(y_MO, exact, f"{what} {dtype} forward"))
            if dtype == torch.float16 or rows == 1:
                grad = input_gradient(g_MO.to(device), *here, w_OI.shape[1])
                worst = max(worst, close(grad, g_MO.double() @ w64, f"{what} {dtype} gradient"))
    return worst


def codebook4_products(device: torch.device) -> float:
    """4-bit linear and its input gradient."""
    from finetune.kernels import triton_codebook4 as kernels

    def weights() -> Iterator[Any]:
        for codebook, block_size, nested, shapes in (("nf4", 64, True, PRODUCTS), ("fp4", 32, False, PRODUCTS[1:4])):
            for rows, out_features, in_features in shapes:
                shape = [out_features, in_features]
                packed = reference.quantize_4bit(draw(*shape), codebook, block_size, nested)
                w_OI = reference.dequantize_4bit(packed, codebook, block_size, shape, torch.float32)
                what = f"{codebook} M={rows} {shape}"
                yield what, rows, kernels.linear, kernels.input_gradient, w_OI, [*packed, codebook, block_size]

    return products(device, weights())


def int8_products(device: torch.device) -> float:
    """int8 by rows: decode, linear, its input gradient."""
    from finetune.kernels import triton_int8 as kernels

    def weights() -> Iterator[Any]:
        for rows, out_features, in_features in PRODUCTS:
            stored = int8.quantize_weight(draw(out_features, in_features))
            w_OI = int8.decode(stored.codes_MI, stored.absmax_M)
            shape = list(w_OI.shape)
            for dtype in ROUNDING:
                found = kernels.dequantize(stored.codes_MI.to(device), stored.absmax_M.to(device), shape, dtype)
                same_bits(found, w_OI.to(dtype), f"int8 {shape} {dtype}")
            what = f"int8 M={rows} {shape}"
            yield what, rows, kernels.linear, kernels.input_gradient, w_OI, [stored.codes_MI, stored.absmax_M]

    return products(device, weights())


def llm_int8(device: torch.device) -> float:
    """LLM.int8() with outlier columns: the product of codes is exact, the rest the reference's."""
    from finetune.kernels import triton_int8 as kernels

    worst = 0.0
    for rows, out_features, in_features in ((1, 64, 128), (17, 64, 128), (40, 48, 64), (5, 31, 50)):
        x_MI = draw(rows, in_features, seed=6)
        x_MI[:, 3] *= 20
        stored = int8.quantize_weight(draw(out_features, in_features))
        a, b = int8.quantize_rows(x_MI).codes_MI, stored.codes_MI
        same_bits(kernels.integer_product(a.to(device), b.to(device)), int8.product(a, b), f"int8 x int8, {rows} rows")
        exact = int8.llm_int8_by(int8.product, x_MI, None, stored.codes_MI, stored.absmax_M, 3.0).double()
        here = (stored.codes_MI.to(device), stored.absmax_M.to(device))
        worst = max(worst, close(kernels.llm_int8(x_MI.to(device), None, *here, 3.0), exact, "llm_int8"))
    return worst


def affine_weights(bits: int, group_size: int, shape: tuple[int, ...]) -> Iterator[tuple[Tensor, Tensor, Any]]:
    """Codes, scale and zero point, in each way a zero point can be meant."""
    generator = torch.Generator().manual_seed(bits)
    count = affine.groups(shape[-1], group_size)
    codes = affine.pack(torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=generator), bits)
    scale = draw(*shape[:-1], count, seed=7).abs() + 0.01
    yield codes, scale.half(), None
    yield codes, scale, torch.randint(0, 2**bits, scale.shape, dtype=torch.uint8, generator=generator)
    yield codes, scale.half(), draw(*scale.shape, seed=8)


def affine_decode(device: torch.device) -> float:
    """Codes of 2, 3, 4 and 8 bits, short last groups, whole rows: the reference's bits."""
    from finetune.kernels import triton_affine as kernels

    for bits in affine.BITS:
        for group_size, shape in ((-1, (7, 33)), (32, (6, 96)), (5, (2, 3, 50)), (64, (3, 4130))):
            for codes, scale, zero in affine_weights(bits, group_size, shape):
                w = affine.decode(affine.unpack(codes, bits, shape[-1]), scale, zero, bits, group_size)
                here = (codes.to(device), scale.to(device), None if zero is None else zero.to(device))
                for dtype in (torch.float32, torch.float16):
                    found = kernels.dequantize(*here, bits, group_size, list(shape), dtype)
                    same_bits(found, w.to(dtype), f"affine {bits} bits, groups of {group_size}, {shape} {dtype}")
    return 0.0


def affine_products(device: torch.device) -> float:
    """Affine linear of 4 and 8 bits, fused, and of 3 bits, by scratch."""
    from finetune.kernels import triton_affine as kernels

    def weights() -> Iterator[Any]:
        for bits, group_size, (rows, *shape) in (
            (4, 32, PRODUCTS[0]),
            (4, 64, PRODUCTS[3]),
            (8, -1, PRODUCTS[2]),
            (3, 5, PRODUCTS[5]),
        ):
            for stored in affine_weights(bits, group_size, tuple(shape)):
                w_OI = affine.decode(affine.unpack(stored[0], bits, shape[1]), *stored[1:], bits, group_size)
                what = f"affine {bits} bits M={rows} {shape}"
                yield what, rows, kernels.linear, kernels.input_gradient, w_OI, [*stored, bits, group_size]

    return products(device, weights())


def splitting(device: torch.device) -> float:
    """Cutting the in features into parts changes the order of the sums only; each way repeats bit for bit."""
    from finetune.kernels import triton_codebook4 as kernels

    packed = reference.quantize_4bit(draw(32, 320), "nf4", 64, True)
    here = [None if part is None else part.to(device) for part in packed]
    x_MI = draw(4, 320, seed=9).half().to(device)
    w_OI = reference.dequantize_4bit(packed, "nf4", 64, [32, 320], torch.float16)
    exact = x_MI.cpu().double() @ w_OI.double().T
    worst = 0.0
    for programs in (1, 2, 3, 10):  # 10 chunks of 32: in three parts the last is short
        plan = dispatch.Fused(16, "dot", 16, 32, 32, programs=programs)
        first, again = (kernels.fused(plan, x_MI, None, 32, *here, "nf4", 64) for _ in range(2))
        assert torch.equal(first, again), f"{programs} parts: two calls differ"
        worst = max(worst, close(first, exact, f"{programs} parts"))
    return worst


def around_products(device: torch.device) -> float:
    """RMSNorm, gated activations, rotary embedding, each with its backward, against the references in plain torch."""
    from finetune.kernels import activation, norm, rope, triton_fused

    worst = 0.0

    def compare(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
        nonlocal worst
        for one, other in zip(found, expected, strict=True):
            assert one.shape == other.shape and one.dtype == other.dtype, what
            if other.numel():
                worst = max(worst, close(one, other.double(), what))

    for dtype in ROUNDING:
        for shape in ((3, 5, 96), (2, 1000), (1, 2100)):
            x, grad, gain = (draw(*size, seed=k).to(dtype) for k, size in enumerate((shape, shape, (shape[-1],))))
            y, inverse = norm.reference(x, gain, 1e-6, 1.0)
            here = (x.to(device), gain.to(device))
            compare(triton_fused.rms_norm(*here, 1e-6, 1.0), (y, inverse), f"rms_norm {shape} {dtype}")
            found = triton_fused.rms_norm_backward(grad.to(device), *here, inverse.to(device), 1.0, False)
            expected = norm.reference_backward(grad, x, gain, inverse, 1.0, False)
            compare(found, expected, f"rms_norm gradient {shape} {dtype}")
        for name in activation.ACTIVATIONS:
            both, grad = draw(7, 2 * 130, seed=12).to(dtype), draw(7, 130, seed=13).to(dtype)
            gate, up = both.chunk(2, dim=-1)
            here_gate, here_up = both.to(device).chunk(2, dim=-1)  # halves of one projection
            y = activation.reference(gate, up, name)
            compare((triton_fused.act_mul(here_gate, here_up, name),), (y,), f"{name} {dtype}")
            found = triton_fused.act_mul_backward(grad.to(device), here_gate, here_up, name)
            compare(found, activation.reference_backward(grad, gate, up, name), f"{name} gradient {dtype}")
        for rows, turned in ((2, 32), (1, 24)):
            x = draw(2, 5, 3 * 32, seed=14).to(dtype).view(2, 5, 3, 32)[:, :, :2]  # some heads of a joint projection
            cos, sin = draw(rows, 5, turned, seed=15).to(dtype), draw(rows, 5, turned, seed=16).to(dtype)
            for transposed in (False, True):
                found = triton_fused.rope(x.to(device), cos.to(device), sin.to(device), transposed)
                compare((found,), (rope.reference(x, cos, sin, transposed),), f"rope {rows} {turned} {dtype}")
    return worst


def operators(device: torch.device) -> float:
    """Through torch's dispatcher: the registered kernels serve, gradients flow, and grad mode changes no bit."""
    if device.type not in DEVICES:
        return 0.0
    from finetune.kernels import ops

    assert triton_backend.why_off() is None, f"the Triton kernels are off: {triton_backend.why_off()}"

    packed = reference.quantize_4bit(draw(256, 128), "nf4", 64, True)
    here = [None if part is None else part.to(device) for part in packed]
    w_OI = reference.dequantize_4bit(packed, "nf4", 64, [256, 128], torch.float32)
    worst = 0.0
    for rows in (1, 8, 300):
        x_MI = draw(rows, 128, seed=10).to(device).requires_grad_()
        y_MO = ops.linear_4bit(x_MI, None, *here, "nf4", 64, 256)
        y_MO.sum().backward()
        with torch.no_grad():
            assert torch.equal(y_MO, ops.linear_4bit(x_MI, None, *here, "nf4", 64, 256)), "grad mode changes bits"
        worst = max(worst, close(y_MO.detach(), x_MI.detach().cpu().double() @ w_OI.double().T, f"M={rows}"))
        assert x_MI.grad is not None
        worst = max(worst, close(x_MI.grad, torch.ones(rows, 256).double() @ w_OI.double(), f"gradient M={rows}"))
    return worst


def exchanged_model(device: torch.device) -> float:
    """A small Llama on an NF4 base with LoRA, its norms and MLPs exchanged: loss and gradients of the plain one."""
    if device.type not in DEVICES:
        return 0.0
    from finetune.model.exchange import exchange
    from finetune.quant.nf4 import NF4Config
    from gpu.models import adapted, random_llama, sft_loss, token_ids

    found: list[Tensor] = []
    for fused in (False, True):
        model = random_llama("tiny", NF4Config(), device, dtype=torch.float32)
        kinds = {one.kind for one in exchange(model) if not one.reason} if fused else set()
        assert not fused or {"norm", "gated MLP"} <= kinds, f"exchanged only {kinds}"
        parameters = adapted(model.train(), 4, "fp32")
        with torch.no_grad():
            for k, parameter in enumerate(parameters):
                parameter.copy_(draw(*parameter.shape, seed=k))
        loss = sft_loss(model)(token_ids("tiny", 1, 8, device))
        grads = torch.autograd.grad(loss, parameters)
        found.append(torch.cat([loss.detach().view(1), *(grad.flatten() for grad in grads)]).cpu())
    error = float((found[1] - found[0]).norm() / found[0].norm())
    assert error < 1e-4, f"the exchanged model differs by {error:.2e}"
    return error


def streams_and_graphs(device: torch.device) -> float:
    """The scratch of two streams at once, and of a captured graph after the shared one has grown."""
    if device.type != "cuda":
        return 0.0
    from finetune.kernels import ops, scratch

    def layer(out_features: int, seed: int) -> tuple[list, Tensor]:
        packed = reference.quantize_4bit(draw(out_features, 512, seed=seed), "nf4", 64, True)
        dense = reference.dequantize_4bit(packed, "nf4", 64, [out_features, 512], torch.float32)
        return [None if part is None else part.to(device) for part in packed], dense

    layers = [layer(1024, 1), layer(2048, 2)]
    x_MI = draw(512, 512, seed=11).to(device)
    streams = [torch.cuda.Stream(device) for _ in layers]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for k, (here, dense) in enumerate(layers):
            with torch.cuda.stream(streams[k]):
                found[k].append(ops.linear_4bit(x_MI, None, *here, "nf4", 64, len(dense)))
    torch.cuda.synchronize()
    worst = 0.0
    for ys, (_, dense) in zip(found, layers, strict=True):
        exact = x_MI.cpu().double() @ dense.double().T
        worst = max(worst, *(close(y, exact, "two streams") for y in ys))
    here, dense = layers[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.linear_4bit(x_MI, None, *here, "nf4", 64, len(dense))
    scratch.release()
    ops.linear_4bit(x_MI, None, *layers[1][0], "nf4", 64, 2048)
    graph.replay()
    torch.cuda.synchronize()
    return max(worst, close(captured, x_MI.cpu().double() @ dense.double().T, "a replayed graph"))


CHECKS: dict[str, Callable[[torch.device], float]] = {
    check.__name__: check
    for check in (
        codebook4_decode, codebook4_encode, codebook4_products, int8_products, llm_int8, affine_decode,
        affine_products, splitting, around_products, operators, exchanged_model,
        streams_and_graphs,
    )
}  # fmt: skip
"""What there is to check: each takes the device and returns the largest relative error, or raises AssertionError."""


def run(device: str) -> list[dict[str, Any]]:
    """All checks, one after another, whatever fails: name, seconds, largest relative error, or what went wrong."""
    results = []
    for name, check in CHECKS.items():
        start = time.perf_counter()
        result: dict[str, Any] = {"check": name, "passed": True}
        try:
            result["worst_relative_error"] = check(torch.device(device))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            result |= {"passed": False, "error": f"{type(error).__name__}: {error} ({where.name}:{where.lineno})"}
        results.append({**result, "seconds": round(time.perf_counter() - start, 2)})
        print(json.dumps(results[-1]), flush=True)
    return results


def main() -> int:
    """Check and say so in JSON lines; 1 where a check fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    return 0 if all(result["passed"] for result in run(parser.parse_args().device)) else 1


if __name__ == "__main__":
    sys.exit(main())
