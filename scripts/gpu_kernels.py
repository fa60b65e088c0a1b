"""Measures the GPU kernels against bitsandbytes, bf16 cuBLAS and Liger, and finds the tiles of the dispatch table.

`python scripts/gpu_kernels.py` prints JSON lines; `--tune` measures the candidates of kernels/dispatch.py for this
device and rewrites its entry. Times are medians of Triton's `do_bench`: device events, the L2 cache cleared before each
call, warmed up.

Shape suffixes: M rows, O out features, I in features.
"""

# ruff: noqa: B023 - what is defined in a loop is called before the loop goes on

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from finetune.kernels import affine, dispatch, int8, ops  # noqa: E402

SMALL, LARGE = (4096, 4096), (6656, 17920)
BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of NF4 with double quantization, a weight."""
FEW = (1, 2, 4, 8, 16)
TUNED = (1, 16, 32, 64, 128)
Emit = Callable[..., None]


def milliseconds(call: Callable[[], Any], repeat: int = 60) -> float:
    """Median time of a call on the device."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=15, rep=repeat, return_mode="median"))


def copy_bandwidth(device: torch.device, size: int = 2**30) -> float:
    """Bytes read plus bytes written a second, of a large copy."""
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * size / milliseconds(lambda: target.copy_(source)) * 1e3


def random_weight(shape: tuple[int, int], device: torch.device) -> Tensor:
    """bfloat16 [O, I] as a model is initialised."""
    return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)


def nf4(w_OI: Tensor) -> tuple[Any, ...]:
    """Storage as the operators take it: tensors, codebook, block size; double quantization."""
    return (*ops.quantize_4bit(w_OI, "nf4", 64, True), "nf4", 64)


def bitsandbytes_nf4(w_OI: Tensor) -> tuple[Tensor, Any]:
    """The same weight in bitsandbytes' storage."""
    import bitsandbytes.functional as bnb

    return bnb.quantize_4bit(w_OI, quant_type="nf4", compress_statistics=True)


def dequantize(emit: Emit, device: torch.device) -> None:
    """Decoding NF4, int8 and affine int4 to bfloat16, and the quantizer, as a share of the copy bandwidth."""
    copied = copy_bandwidth(device)
    emit("detail", "copy_bandwidth", gigabytes_per_second=copied / 1e9)
    for shape in (LARGE, SMALL):
        w_OI = random_weight(shape, device)
        stored, count = nf4(w_OI), w_OI.numel()
        size = f"{shape[0]}x{shape[1]}"
        read = BITS / 8 + 2
        time = milliseconds(lambda: torch.ops.finetune.dequantize_4bit(*stored, list(shape), torch.bfloat16))
        share = read * count / time * 1e3 / copied
        emit("detail", f"dequantize_nf4_{size}", milliseconds=time, share_of_copy=share)
        if shape == LARGE:
            emit("value", "dequantize", value=round(share, 3))
        rows = int8.quantize_weight(w_OI)
        time = milliseconds(
            lambda: torch.ops.finetune.dequantize_int8(rows.codes_MI, rows.absmax_M, list(shape), torch.bfloat16)
        )
        emit("detail", f"dequantize_int8_{size}", milliseconds=time, share_of_copy=3 * count / time * 1e3 / copied)
        group = int4(shape, device)
        time = milliseconds(lambda: torch.ops.finetune.dequantize_affine(*group, list(shape), torch.bfloat16))
        read = 0.5 + 3 / 64 + 2
        emit("detail", f"dequantize_int4_{size}", milliseconds=time, share_of_copy=read * count / time * 1e3 / copied)
        time = milliseconds(lambda: torch.ops.finetune.quantize_4bit(w_OI, "nf4", 64), 30)
        emit("detail", f"quantize_nf4_{size}", milliseconds=time, weights_per_second=count / time * 1e3)
        with rival(emit, "bitsandbytes dequantize"):
            import bitsandbytes.functional as bnb

            packed, state = bitsandbytes_nf4(w_OI)
            time = milliseconds(lambda: bnb.dequantize_4bit(packed, state))
            emit("detail", f"dequantize_bitsandbytes_{size}", milliseconds=time)


def int4(shape: tuple[int, int], device: torch.device) -> tuple[Any, ...]:
    """Random affine int4 in groups of 64 with integer zero points."""
    out_features, in_features = shape
    codes = torch.randint(0, 256, (out_features, affine.packed_width(in_features, 4)), device=device, dtype=torch.uint8)
    scale = torch.rand(out_features, in_features // 64, device=device).half() * 0.01
    zero = torch.full(scale.shape, 8, device=device, dtype=torch.uint8)
    return codes, scale, zero, 4, 64


class rival:
    """What is done with another library: its absence or failure is a note, nothing more."""

    def __init__(self, emit: Emit, what: str) -> None:
        self.emit, self.what = emit, what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Exception):
            self.emit("note", f"{self.what}: {type(error).__name__}: {error}".splitlines()[0])
        return isinstance(error, Exception)


def training_linear(emit: Emit, device: torch.device, rows: tuple[int, ...] = (2048, 8192)) -> None:
    """Forward plus gradient of the input, frozen weight: NF4 against bf16 and bitsandbytes."""
    for shape in (SMALL, LARGE):
        w_OI = random_weight(shape, device)
        stored = nf4(w_OI)
        for count in rows:
            x_MI = random_weight((count, shape[1]), device).requires_grad_()
            g_MO = random_weight((count, shape[0]), device)

            def both(forward: Callable[[Tensor], Tensor]) -> float:
                def call() -> None:
                    x_MI.grad = None
                    forward(x_MI).backward(g_MO)

                return milliseconds(call)

            dense = both(lambda x: torch.nn.functional.linear(x, w_OI))
            mine = both(lambda x: ops.linear_4bit(x, None, *stored, shape[0]))
            emit("detail", f"linear_{shape[0]}x{shape[1]}_{count}", bf16=dense, finetune=mine)
            emit("value", f"linear_{shape[0]}_{count}", value=round(mine / dense, 3))
            with rival(emit, "bitsandbytes matmul_4bit"):
                import bitsandbytes as bnb

                packed, state = bitsandbytes_nf4(w_OI)
                theirs = both(lambda x: bnb.matmul_4bit(x, packed.t(), quant_state=state))
                emit("detail", f"linear_{shape[0]}x{shape[1]}_{count}_bitsandbytes", milliseconds=theirs)


def few_rows(emit: Emit, device: torch.device) -> None:
    """Inference with few rows: fused NF4, int8 and int4 against bf16 and bitsandbytes."""
    over_bf16: dict[tuple[int, int], list[float]] = {}
    over_bnb: dict[tuple[int, int], list[float]] = {}
    for shape in (LARGE, SMALL):
        w_OI = random_weight(shape, device)
        stored, group, rows = nf4(w_OI), int4(shape, device), int8.quantize_weight(w_OI)
        for count in FEW:
            x_MI = random_weight((count, shape[1]), device)
            calls = {
                "bf16": lambda: torch.nn.functional.linear(x_MI, w_OI),
                "nf4": lambda: torch.ops.finetune.linear_4bit(x_MI, None, *stored, shape[0]),
                "int8": lambda: torch.ops.finetune.linear_int8(x_MI, None, rows.codes_MI, rows.absmax_M, shape[0]),
                "int4": lambda: torch.ops.finetune.linear_affine(x_MI, None, *group, shape[0]),
            }
            with torch.no_grad(), rival(emit, "few rows"):
                times = {name: milliseconds(call) for name, call in calls.items()}
                over_bf16.setdefault(shape, []).append(times["bf16"] / times["nf4"])
                with rival(emit, "bitsandbytes gemm_4bit"):
                    import bitsandbytes as bnb

                    packed, state = bitsandbytes_nf4(w_OI)
                    times["bitsandbytes"] = milliseconds(lambda: bnb.matmul_4bit(x_MI, packed.t(), quant_state=state))
                    over_bnb.setdefault(shape, []).append(times["bitsandbytes"] / times["nf4"])
                emit("detail", f"fused_{shape[0]}x{shape[1]}_{count}", **times)
    if LARGE in over_bf16:
        emit("value", "fused_bf16", value=round(min(over_bf16[LARGE]), 3))
    if LARGE in over_bnb:
        emit("value", "fused_bnb", value=round(min(over_bnb[LARGE]), 3))


def liger(emit: Emit, device: torch.device, tokens: int = 4096, hidden: int = 4096, vocabulary: int = 32000) -> None:
    """The chunked cross entropy against Liger's fused linear cross entropy."""
    from finetune.kernels.cross_entropy import linear_cross_entropy

    h_NH = random_weight((tokens, hidden), device).requires_grad_()
    w_VH = random_weight((vocabulary, hidden), device)
    labels_N = torch.randint(0, vocabulary, (tokens,), device=device)

    def timed(loss: Callable[[], Tensor]) -> dict[str, float]:
        def call() -> None:
            h_NH.grad = None
            loss().backward()

        call()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20
        return {"milliseconds": milliseconds(call), "peak_mib": peak}

    emit("detail", "cross_entropy_finetune", **timed(lambda: linear_cross_entropy(h_NH, w_VH, labels_N)))
    with rival(emit, "Liger"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        emit("detail", "cross_entropy_liger", **timed(lambda: fused(w_VH, h_NH, labels_N)))


def candidates(rows: int) -> Iterator[dispatch.Fused]:
    """Tiles worth trying for a number of rows in 16 bits."""
    block_m = min(64, max(16, rows))
    for block_o in (32, 64, 128):
        for block_k in (64, 128):
            for stages in (2, 3):
                for warps, programs in ((4, 264), (4, 528), (8, 264)):
                    yield dispatch.Fused(rows, "dot", block_m, block_o, block_k, warps, stages, programs)


def tune(emit: Emit, device: torch.device, family: str, shape: tuple[int, int]) -> list[dispatch.Fused]:
    """The fastest tiles for each number of rows until decoding first is faster; the rules of float32 stay."""
    from finetune.kernels import triton_affine, triton_codebook4, triton_int8

    w_OI = random_weight(shape, device)
    stored = {"codebook4": nf4(w_OI), "int8": int8.quantize_weight(w_OI)[:2], "affine": int4(shape, device)}[family]
    module = {"codebook4": triton_codebook4, "int8": triton_int8, "affine": triton_affine}[family]
    size = "large" if shape == LARGE else "small"
    found = [rule for rule in dispatch.rules("default", family, size) if rule.kernel == "sum"]
    for count in TUNED:
        x_MI = random_weight((count, shape[1]), device)
        best = None
        fastest = milliseconds(lambda: module.linear_by_scratch(x_MI, None, shape, module.decode_into, stored), 20)
        width = (shape[0],) if family == "codebook4" else ()
        for plan in candidates(count):
            fitted = plan.for_width(shape[1])
            if fitted is None:
                continue
            try:
                time = milliseconds(lambda: module.fused(fitted, x_MI, None, *width, *stored), 10)
            except Exception as error:  # a tile that the device has no room for
                emit("note", f"{plan}: {type(error).__name__}")
                continue
            if time < fastest:
                best, fastest = plan, time
        emit("detail", f"tune_{family}_{shape[0]}x{shape[1]}_{count}", milliseconds=fastest, plan=best and vars(best))
        if best is None:
            break
        found.append(best)
    return found


def tune_all(emit: Emit, device: torch.device, path: Path = dispatch.TABLE) -> None:
    """Measure every family and size on this device and rewrite its entry in the table."""
    for family in ("codebook4", "int8", "affine"):
        for size, shape in (("small", SMALL), ("large", LARGE)):
            dispatch.write_rules(dispatch.device_kind(device), family, size, tune(emit, device, family, shape), path)


def measure_all(emit: Emit, device: torch.device, quick: bool = False) -> None:
    """All benchmarks, the ones with a bar first; each fails on its own."""
    for benchmark in (dequantize, few_rows, training_linear, liger):
        if quick and benchmark is liger:
            continue
        with rival(emit, benchmark.__name__):
            benchmark(emit, device)


def main() -> int:
    """Print what is measured as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="rewrite this device's entry of the dispatch table")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_kernels: no CUDA here", file=sys.stderr)
        return 2

    def emit(kind: str, key: str, **values: Any) -> None:
        print(json.dumps({"kind": kind, "key": key, **values}), flush=True)

    (tune_all if options.tune else measure_all)(emit, torch.device("cuda"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
