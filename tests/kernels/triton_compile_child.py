"""Compiles every Triton kernel for GPUs that are not here; run by test_kernels_triton.py in a process of its own.

The functions are called as on a device, on CPU tensors, but a launch compiles its kernel ahead of time for each target,
with the specialization that these very arguments get, instead of running it. Prints a JSON line a kernel and target.
"""

from __future__ import annotations

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

TARGETS = (GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64))


def compile_for_targets(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
    """Stands in for `JITFunction.run`. The older generation differs in its matrix units alone."""
    for target in TARGETS if self.fn.__name__ == "_dot" else TARGETS[1:]:
        backend = make_backend(target)
        bound, specialization, rest = create_function_from_signature(self.signature, self.params, backend)(
            *args, **{**options, "debug": False}
        )
        parsed, signature, constants, attributes = self._pack_args(backend, rest, bound, specialization, rest)
        source = ASTSource(self, signature, constants, attributes)
        compiled = triton.compile(source, target=target, options=parsed.__dict__)
        size = len(compiled.asm["cubin" if target.backend == "cuda" else "hsaco"])
        name = f"{self.fn.__module__.rpartition('.')[2]}.{self.fn.__name__}"
        shared = compiled.metadata.shared
        print(json.dumps({"kernel": name, "target": str(target.arch), "bytes": size, "shared": shared}), flush=True)


def main() -> None:
    """Call every function once or more, so that each branch that compiles differently is met."""
    JITFunction.run = compile_for_targets
    from finetune.kernels import affine, dispatch, triton_affine, triton_codebook4, triton_int8

    out_features, in_features = 128, 256
    w_OI = torch.zeros(out_features, in_features)
    packed, absmax = triton_codebook4.quantize(w_OI.bfloat16(), "nf4", 64)
    nested = (torch.zeros(len(absmax), dtype=torch.uint8), torch.zeros(-(-len(absmax) // 256)), torch.zeros(1))
    codebook4 = ((packed, absmax, None, None), (packed, nested[0], nested[1], nested[2]))
    for storage in codebook4:
        triton_codebook4.dequantize(*storage, "nf4", 64, [out_features, in_features], torch.bfloat16)
    codes = torch.zeros(out_features, in_features, dtype=torch.int8)
    triton_int8.dequantize(codes, torch.zeros(out_features), list(codes.shape), torch.bfloat16)
    scale = torch.zeros(out_features, in_features // 64, dtype=torch.float16)
    zeros = (None, torch.zeros(scale.shape, dtype=torch.uint8), torch.zeros(scale.shape))
    stacks = {
        bits: torch.zeros(out_features, affine.packed_width(in_features, bits), dtype=torch.uint8)
        for bits in affine.BITS
    }
    for bits, zero in zip(affine.BITS, [*zeros, None], strict=True):
        triton_affine.dequantize(stacks[bits], scale, zero, bits, 64, list(codes.shape), torch.bfloat16)
    rules = dispatch.rules("default", "codebook4", "large")
    for rule in (rules[0], rules[1], rules[-1]):
        dtype = torch.float32 if rule.kernel == "sum" else torch.bfloat16
        x_MI = torch.zeros(rule.block_m, in_features, dtype=dtype)
        plan = rule.for_width(in_features)
        triton_codebook4.fused(plan, x_MI, None, out_features, *codebook4[1], "nf4", 64)
        triton_int8.fused(plan, x_MI, torch.zeros(out_features), codes, torch.zeros(out_features))
        triton_affine.fused(plan, x_MI, None, stacks[4], scale, zeros[1], 4, 64)
    triton_codebook4.fused(plan, x_MI, None, out_features, *codebook4[0], "nf4", 64)
    triton_affine.fused(plan, x_MI, None, stacks[8], scale, None, 8, 64)
    around_products()


def around_products() -> None:
    """RMSNorm, gated activations, rotary embedding."""
    from finetune.kernels import activation, triton_fused

    x_MN, gain_N = torch.zeros(4, 4096, dtype=torch.bfloat16), torch.zeros(4096, dtype=torch.bfloat16)
    y_MN, inverse_M = triton_fused.rms_norm(x_MN, gain_N, 1e-6, 0.0)
    triton_fused.rms_norm_backward(y_MN, x_MN, gain_N, inverse_M, 0.0, False)
    for name in activation.ACTIVATIONS:
        triton_fused.act_mul(x_MN, x_MN, name)
        triton_fused.act_mul_backward(x_MN, x_MN, x_MN, name)
    q_BSHD, cos_BSR = torch.zeros(1, 4, 8, 128, dtype=torch.bfloat16), torch.zeros(1, 4, 128, dtype=torch.bfloat16)
    triton_fused.rope(q_BSHD, cos_BSR, cos_BSR, False)
    triton_fused.rope(q_BSHD, cos_BSR[..., :96], cos_BSR[..., :96], True)


if __name__ == "__main__":
    main()
