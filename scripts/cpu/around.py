"""What surrounds the products in a training step, fused operators beside torch's own, forward and backward.

Shapes of the 160M step of scripts/bench_step.py: 2 rows of 512 positions, 768 wide, 12 heads of 64, bfloat16.
Shape suffixes: B rows, S positions, N = B * S tokens, H heads or hidden width, D features of a head, F inner width of
the MLP, V vocabulary.
"""

from __future__ import annotations

import statistics
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cpu.timing import Call, clock, interleaved, speed

B, S, HEADS, D, HIDDEN, INNER, VOCAB = 2, 512, 12, 64, 768, 2048, 32000
Function = Callable[..., Tensor]


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    """bfloat16 normal values that ask for a gradient."""
    return (torch.randn(shape) * scale).bfloat16().requires_grad_()


def pairs() -> Iterator[tuple[str, Function, Function, list[Tensor]]]:
    """Name, ours, torch's, inputs."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, rotate_half

    from finetune.kernels import fused
    from finetune.kernels.cross_entropy import linear_cross_entropy

    norm = LlamaRMSNorm(HIDDEN, 1e-6).bfloat16().requires_grad_(False)
    yield "RMSNorm", lambda x: fused.rms_norm(x, norm.weight, 1e-6), norm, [draw(B, S, HIDDEN)]
    inner = [draw(B, S, INNER), draw(B, S, INNER)]
    yield "SwiGLU", lambda g, u: fused.act_mul(g, u, "silu"), lambda g, u: F.silu(g) * u, inner
    angle = torch.outer(torch.arange(S).float(), 10000.0 ** (-torch.arange(0, D, 2) / D)).repeat(1, 2)[None]
    cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
    yield (
        "RoPE",
        lambda x: fused.rope(x, cos, sin),
        lambda x: x * cos.unsqueeze(2) + rotate_half(x) * sin.unsqueeze(2),
        [draw(B, S, HEADS, D)],
    )
    heads = [draw(B, S, HEADS, D).detach().transpose(1, 2).requires_grad_() for _ in range(3)]
    yield (
        "causal attention",
        lambda q, k, v: fused.attention(q, k, v, causal=True),
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        heads,
    )
    head_VH, labels_N = draw(VOCAB, HIDDEN, scale=0.02).detach(), torch.randint(0, VOCAB, (B * S,))
    yield (
        "linear cross entropy",
        lambda h: linear_cross_entropy(h, head_VH, labels_N),
        lambda h: F.cross_entropy((h @ head_VH.T).float(), labels_N, reduction="sum"),
        [draw(B * S, HIDDEN)],
    )


def around(options: Namespace, emit: Callable[..., None]) -> None:
    """Forward and backward of each pair, in turn."""
    torch.manual_seed(0)
    for name, mine, theirs, inputs in pairs():
        calls: dict[str, Call] = {"finetune": step(mine, inputs), "torch": step(theirs, inputs)}
        samples = interleaved(calls, clock(options.threads), options.rounds, options.seconds)
        for engine, sample in samples.items():
            took = statistics.median(sample) * 1e3
            emit(operator=name, engine=engine, milliseconds=took, speed=speed(sample, samples["torch"]))


def step(function: Function, inputs: list[Tensor]) -> Call:
    """Forward, and the gradients of all inputs for an output gradient of ones."""
    gradient = torch.ones_like(function(*inputs))

    def call() -> Any:
        return torch.autograd.grad(function(*inputs), inputs, gradient)

    return call
