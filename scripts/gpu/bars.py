"""The bars of the GPU acceptance, and the table of what was measured against them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Bar:
    """A number to reach.

    Attributes:
        key: under which a stage reports what it measured.
        stage: which measures it.
        text: what is measured, for people.
        sense: ">=" or "<=".
        limit: the bar.
        unit: of both; "x" for a ratio.
    """

    key: str
    stage: str
    text: str
    sense: str
    limit: float
    unit: str = "x"

    def passed(self, value: float) -> bool:
        """Whether a value reaches the bar."""
        return value >= self.limit if self.sense == ">=" else value <= self.limit


BARS = (
    Bar("checks", "checks", "kernel checks against the reference and float64 that fail", "<=", 0, ""),
    Bar("training", "training", "training runs that fail (export, proof, 8-bit Adams, fp16)", "<=", 0, ""),
    Bar("resume", "training", "training losses after SIGKILL and resume, largest relative difference", "<=", 0.01, ""),
    Bar("dequantize", "kernels", "NF4 + double quantization to bf16, share of the copy bandwidth", ">=", 0.80),
    Bar("linear_4096_2048", "kernels", "NF4 linear fwd+bwd, 4096x4096, M=2048, time over bf16", "<=", 1.15),
    Bar("linear_4096_8192", "kernels", "the same, M=8192", "<=", 1.05),
    Bar("linear_6656_2048", "kernels", "NF4 linear fwd+bwd, 6656x17920, M=2048, time over bf16", "<=", 1.15),
    Bar("linear_6656_8192", "kernels", "the same, M=8192", "<=", 1.05),
    Bar("fused_bf16", "kernels", "fused NF4, M<=16, 6656x17920, speed over bf16 (worst M)", ">=", 2.3),
    Bar("fused_bnb", "kernels", "the same over bitsandbytes (worst M)", ">=", 1.0),
    Bar("step_bf16_4096", "step", "QLoRA step of a 7B-shaped Llama, 4096 tokens, speed over bf16 LoRA", ">=", 0.95),
    Bar("step_bf16_8192", "step", "the same, 8192 tokens", ">=", 0.95),
    Bar("step_peft_4096", "step", "the same step over PEFT + bitsandbytes, 4096 tokens", ">=", 1.5),
    Bar("step_peft_8192", "step", "the same, 8192 tokens", ">=", 1.5),
    Bar("memory_33b", "memory_33b", "33B-shaped, r=64, 2048 tokens, peak by the driver", "<=", 23.5, "GiB"),
    Bar("memory_65b", "memory_65b", "65B-shaped, the same", "<=", 46.0, "GiB"),
)  # fmt: skip


def judged(measured: dict[str, float], faults: dict[str, str], reasons: dict[str, str]) -> list[dict[str, Any]]:
    """A row for every bar: "pass", "fail", or "unmeasured" with the reason.

    Args:
        measured: value by key.
        faults: by key, what went wrong although, or instead of, a value: that is a failure.
        reasons: by stage, why it did not measure all it should have.
    """
    rows = []
    for bar in BARS:
        row: dict[str, Any] = {
            "key": bar.key,
            "what": bar.text,
            "bar": f"{bar.sense} {bar.limit:g}{bar.unit and ' '}{bar.unit}",
        }
        if bar.key in faults:
            row |= {"measured": measured.get(bar.key), "result": "fail", "reason": faults[bar.key]}
        elif bar.key in measured:
            value = measured[bar.key]
            row |= {"measured": value, "result": "pass" if bar.passed(value) else "fail"}
        else:
            row |= {"measured": None, "result": "unmeasured", "reason": reasons.get(bar.stage, "not run")}
        rows.append(row)
    return rows


def table(rows: Iterable[dict[str, Any]]) -> str:
    """The rows as text, a line each."""
    lines = [("measure", "bar", "measured", "result")]
    for row in rows:
        value = "-" if row["measured"] is None else f"{row['measured']:.4g}"
        lines.append(
            (row["what"], row["bar"], value, row["result"] + (f": {row['reason']}" if "reason" in row else ""))
        )
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]) for line in lines
    )
