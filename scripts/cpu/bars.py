"""What the CPU kernels are to reach, and how it is read from the rows of kernels_cpu.json and step_cpu.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cpu.timing import BASE

Row = dict[str, Any]


@dataclass(frozen=True)
class Bar:
    """A number to reach.

    Attributes:
        text: what is measured, for people.
        limit: the bar.
        value: what the rows say, None where they do not.
        at_most: whether the bar is an upper one.
    """

    text: str
    limit: float
    value: Callable[[list[Row]], float | None]
    at_most: bool = False

    def judged(self, rows: list[Row]) -> tuple[str, str]:
        """What was measured and whether it holds, as words."""
        value = self.value(rows)
        if value is None:
            return "", "not measured"
        return f"{value:.2f}", "yes" if (value <= self.limit if self.at_most else value >= self.limit) else "**no**"


def only(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have these values and were not left out."""
    return [r for r in rows if "skipped" not in r and all(r.get(key) == value for key, value in wanted.items())]


def decoding(rows: list[Row], engine: str, side: int, pages: str, double_quant: bool) -> float | None:
    """Milliseconds, the median over the processes."""
    found = only(rows, section="dequantize", engine=engine, shape=[side, side], pages=pages, double_quant=double_quant)
    return statistics.median(row["milliseconds"] for row in found) if found else None


def ratio(a: float | None, b: float | None) -> float | None:
    """a / b, where both are known."""
    return None if a is None or b is None else a / b


def faster_decoding(side: int, pages: str) -> Callable[[list[Row]], float | None]:
    """bitsandbytes' time over ours; the smaller one of those with and without double quantization."""

    def value(rows: list[Row]) -> float | None:
        both = [
            ratio(decoding(rows, "bitsandbytes", side, pages, dq), decoding(rows, "finetune", side, pages, dq))
            for dq in (False, True)
        ]
        return min((r for r in both if r is not None), default=None)

    return value


def bytes_per_weight(double_quant: bool) -> float:
    """Read and written when NF4 becomes bfloat16: codes, an absmax for 64 weights (1 byte where nested), output."""
    return 0.5 + (1 + 4 / 256 if double_quant else 4) / 64 + 2


def of_fill(side: int) -> Callable[[list[Row]], float | None]:
    """Bytes a second of decoding over those of filling as large an output, pages recycled for both; the smaller one."""

    def value(rows: list[Row]) -> float | None:
        shares = []
        for dq in (False, True):
            quick = ratio(
                decoding(rows, "fill", side, "recycled", dq), decoding(rows, "finetune", side, "recycled", dq)
            )
            shares.append(math.inf if quick is None else quick * bytes_per_weight(dq) / 2)
        return None if min(shares) == math.inf else min(shares)

    return value


def over(
    engine: str, base: str, mode: str, counts: tuple[int, ...], pages: str = "stock", section: str = "nf4"
) -> Callable[[list[Row]], float | None]:
    """Speed of an engine over another at the worst of some numbers of rows."""

    def value(rows: list[Row]) -> float | None:
        speeds = []
        for count in counts:
            wanted = {"section": section, "pages": pages, "mode": mode, "m": count}
            mine, theirs = only(rows, engine=engine, **wanted), only(rows, engine=base, **wanted)
            if not mine or not theirs:
                return None
            speeds.append(mine[0]["speed"] / theirs[0]["speed"])
        return min(speeds)

    return value


def quantizer(rows: list[Row]) -> float | None:
    """Speed over bitsandbytes; None also where the bits differ."""
    found = only(rows, section="quantize", engine="finetune", same_bits=True)
    return min((row["speed"] for row in found), default=None)


NF4, BNB = "finetune nf4", "bitsandbytes nf4"
MANY = (8, 64, 512, 1024)
ONE_THREAD = (
    Bar("NF4 dequantize over bitsandbytes, 2048x2048, stock malloc", 1.4, faster_decoding(2048, "stock")),
    Bar("the same, pages recycled", 1.4, faster_decoding(2048, "recycled")),
    Bar("NF4 dequantize over bitsandbytes, 4096x4096 (above 32 MiB), fresh pages", 6.0, faster_decoding(4096, "stock")),
    Bar("the same, pages recycled", 1.2, faster_decoding(4096, "recycled")),
    Bar("bandwidth of NF4 dequantize over that of a fill, 2048x2048", 0.75, of_fill(2048)),
    Bar("the same, 4096x4096", 0.75, of_fill(4096)),
    *(
        Bar(f"NF4 linear forward + backward over bf16, M = {m}", limit, over(NF4, BASE, "training", (m,)))
        for m, limit in ((8, 0.75), (64, 0.85), (512, 0.95), (1024, 0.95))
    ),
    *(
        Bar(f"the same over bitsandbytes, worst M, {pages} pages", 1.0, over(NF4, BNB, "training", MANY, kind))
        for pages, kind in (("fresh", "stock"), ("recycled", "recycled"))
    ),
    *(
        Bar(
            f"int8 linear ({what}) forward + backward over bf16, M = {m}",
            limit,
            over(engine, BASE, "training", (m,), section="int8"),
        )
        for what, engine in (("weight-only", "finetune int8"), ("LLM.int8, threshold 6", "finetune llm.int8"))
        for m, limit in ((8, 0.8), (512, 0.95))
    ),
    Bar("NF4 inference over bitsandbytes, M = 1 and 2", 1.0, over(NF4, BNB, "inference", (1, 2))),
    Bar("the same, M = 4 and 8", 0.9, over(NF4, BNB, "inference", (4, 8))),
    Bar("NF4 inference over bf16, M = 64", 0.93, over(NF4, BASE, "inference", (64,))),
    Bar("the same, M = 512 and 1024", 0.97, over(NF4, BASE, "inference", (512, 1024))),
    Bar("NF4 quantizer over bitsandbytes, same bits", 10.0, quantizer),
)  # fmt: skip
TWO_THREADS = (
    Bar("NF4 linear forward + backward over bf16, M = 512 and 1024", 0.90, over(NF4, BASE, "training", (512, 1024))),
    *(
        Bar(f"the same over bitsandbytes, {pages} pages", 0.95, over(NF4, BNB, "training", (512, 1024), kind))
        for pages, kind in (("fresh", "stock"), ("recycled", "recycled"))
    ),
)


def step(size: str, key: str) -> Callable[[list[Row]], float | None]:
    """Ours over PEFT + bitsandbytes in a row of step_cpu.json."""

    def value(rows: list[Row]) -> float | None:
        found = {row["engine"]: row[key] for row in only(rows, size=size) if key in row}
        return ratio(found.get("finetune"), found.get("peft+bitsandbytes"))

    return value


STEP = (
    Bar("QLoRA step over PEFT + bitsandbytes, tokens a second, 25M", 1.35, step("25m", "tokens_per_second")),
    Bar("the same, 160M", 1.2, step("160m", "tokens_per_second")),
    Bar("peak memory of that step over theirs, 25M", 0.5, step("25m", "peak_bytes"), at_most=True),
    Bar("the same, 160M", 0.55, step("160m", "peak_bytes"), at_most=True),
)
