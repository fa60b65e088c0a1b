"""Which kernel multiplies by a quantized weight on a GPU, by the number of rows: a small table, measured or assumed.

`dispatch.json` maps a device kind ("cuda-9.0": backend and compute capability) and a class of shapes to rules. A rule
reads: up to `max_m` rows take this kernel with these tiles. Beyond the last rule the weight is decoded into scratch and
the vendor's product runs: for many rows its cost is that of the dense product plus a write of the weight. The entry
"default" is arithmetic, not measurement: a fused kernel reads 4 bits a weight where decoding writes 16 more, so it wins
until the matrix units are busy, at about a hundred rows on current devices; `scripts/bench_kernels.py` measures a
device and rewrites its entry.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("dispatch.json")
LARGE = 32 * 2**20
"""Weights from which a matrix is of the class "large": there are enough tiles to fill a device."""


@dataclass(frozen=True)
class Fused:
    """How a fused product is cut.

    Attributes:
        max_m: rows up to which this rule is taken.
        kernel: "dot" (matrix units, for inputs of 16 bits) or "sum" (plain sums, for a few rows of float32, which the
            matrix units would round).
        block_m, block_o, block_k: rows, out features and in features of a tile; powers of two.
        warps, stages: what Triton compiles with.
        programs: how many should run: the in features are cut into parts where tiles of O are too few.
    """

    max_m: int
    kernel: str
    block_m: int
    block_o: int
    block_k: int
    warps: int = 4
    stages: int = 1
    programs: int = 1

    def parts(self, out_features: int, in_features: int) -> int:
        """Parts that the in features are cut into."""
        tiles = -(-out_features // self.block_o)
        return max(1, min(self.programs // tiles, in_features // self.block_k))

    def for_width(self, in_features: int) -> Fused | None:
        """The same with a tile's width that divides the in features; None where that would be less than 32."""
        block_k = self.block_k
        while in_features % block_k:
            block_k //= 2
        return None if block_k < 32 else replace(self, block_k=block_k)


@lru_cache(maxsize=4096)
def choose(
    family: str, rows: int, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device
) -> Fused | None:
    """The fused kernel for a product, or None to decode first.

    Args:
        family: storage format as the table names it: "codebook4", "int8", "affine".
        rows: of the input.
    """
    size = "large" if out_features * in_features >= LARGE else "small"
    kernel = "sum" if dtype == torch.float32 else "dot"
    for rule in rules(device_kind(device), family, size):
        if rule.kernel == kernel and rows <= rule.max_m:
            return rule.for_width(in_features)
    return None


@cache
def rules(kind: str, family: str, size: str) -> tuple[Fused, ...]:
    """The rules of a device kind, else the default ones, fewest rows first."""
    table = read_table()
    found = table.get(kind, {}).get(family) or table["default"][family]
    return tuple(sorted((Fused(**rule) for rule in found[size]), key=lambda rule: rule.max_m))


def read_table(path: Path = TABLE) -> dict[str, Any]:
    """The table as plain values: device kind -> format -> "small" | "large" -> rules."""
    table: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {key: value for key, value in table.items() if key != "format_version"}


def write_rules(kind: str, family: str, size: str, measured: list[Fused], path: Path = TABLE) -> None:
    """Replace the rules of a device kind; the whole file is written anew."""
    table = read_table(path)
    entry = table.setdefault(kind, {}).setdefault(family, {})
    entry[size] = [asdict(rule) for rule in sorted(measured, key=lambda rule: rule.max_m)]
    for other in ("small", "large"):
        entry.setdefault(other, table["default"][family][other])
    path.write_text(render(table), "utf-8")
    rules.cache_clear()
    choose.cache_clear()


def render(table: dict[str, Any]) -> str:
    """The file's text: one line a rule."""
    lines = ["{", '"format_version": 1,']
    for k, (kind, families) in enumerate(table.items()):
        lines.append(f"{json.dumps(kind)}: {{")
        for f, (family, sizes) in enumerate(families.items()):
            lines.append(f" {json.dumps(family)}: {{")
            for s, (size, found) in enumerate(sizes.items()):
                body = ",\n".join(f"   {json.dumps(rule)}" for rule in found)
                lines.append(f"  {json.dumps(size)}: [\n{body}\n  ]{',' if s + 1 < len(sizes) else ''}")
            lines.append(f" }}{',' if f + 1 < len(families) else ''}")
        lines.append(f"}}{',' if k + 1 < len(table) else ''}")
    return "\n".join([*lines, "}"]) + "\n"


@cache
def device_kind(device: torch.device) -> str:
    """Backend and generation of a device: "cuda-9.0", "hip-gfx942", "xpu"; "default" for one without a name."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return f"hip-{properties.gcnArchName.partition(':')[0]}"
    return f"cuda-{properties.major}.{properties.minor}"
