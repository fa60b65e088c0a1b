"""The report: what a quantization cost in size, layer by layer in error, and in the end in perplexity and KL."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from finetune.model.describe import storage_table
from finetune.quant.driver import Layer

FORMAT_VERSION = 1
WORST = 8
"""Layers that the printed table names: those with the largest error."""


def collect(
    directory: Path, model: nn.Module, layers: Sequence[Layer], quality: dict[str, Any] | None
) -> dict[str, Any]:
    """The report as plain values.

    Args:
        directory: the checkpoint, written.
        quality: from measure.py; None where there was no text to measure on.
    """
    rows = storage_table(model)
    packed = [row for row in rows if not row.dense] or [row for row in rows if row.block]
    return {
        "format_version": FORMAT_VERSION,
        "bytes": sum(path.stat().st_size for path in directory.rglob("*") if path.is_file()),
        "bits_per_weight": 8 * sum(row.bytes for row in packed) / max(1, sum(row.weights for row in packed)),
        "bits_per_weight_model": 8 * sum(row.bytes for row in rows) / max(1, sum(row.weights for row in rows)),
        "quality": quality,
        "layers": [asdict(layer) for layer in layers],
    }


def table(record: dict[str, Any]) -> str:
    """The report as text: a line of totals, quality, the worst layers and whatever was noted."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    layers = sorted(record["layers"], key=lambda layer: -layer["error"])
    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    pruned = any(layer["sparsity"] is not None for layer in layers)
    simple = "magnitude" if pruned else "nearest"
    columns = [f"worst {min(WORST, len(layers))} of {len(layers)}", "error", simple, "ratio", "damping", "bits"]
    for column in [*columns, *(["zeros"] if pruned else [])]:
        shown.add_column(column, justify="left" if column.startswith("worst") else "right", no_wrap=True)
    for layer in layers[:WORST]:
        ratio = layer["error_rtn"] / layer["error"] if layer["error"] > 0 else 1.0
        damping = "-" if layer["damping"] is None else f"{layer['damping']:g}"
        errors = (f"{layer['error']:.2e}", f"{layer['error_rtn']:.2e}", f"{ratio:.2f}")
        zeros = [f"{layer['sparsity'] or 0:.2%}"] if pruned else []
        shown.add_row(layer["name"], *errors, damping, f"{layer['bits_per_weight']:.3f}", *zeros)
    lines = []
    if layers:
        text = io.StringIO()
        Console(file=text, width=140).print(shown)
        lines = [line.rstrip() for line in text.getvalue().strip("\n").splitlines()]
    lines.append(
        f"{record['bits_per_weight']:.3f} bits a weight ({record['bits_per_weight_model']:.2f} over the whole model),"
        f" {record['bytes'] / 1e6:.1f} MB, {record['seconds']:.0f} s"
    )
    if pruned:
        lines.append(f"{record['sparsity']:.2%} of the weights of the blocks are zero")
    if large := [layer for layer in layers if record["quant"]["name"] != "none" and layer["bits_per_weight"] > 16]:
        lines.append(f"{len(large)} layers take more than the 16 bits of a dense weight: prune more, or quant=none")
    cut = _cut_lines(record["pruner"])
    lines += cut
    lines += _transform_lines(record["transform"]) + _distill_lines(record["distill"])
    quality = record["quality"]
    if quality is not None:
        lines.append(_quality_line(quality, "quantized" if not pruned and layers else "pruned"))
    return "\n".join(lines)


def _quality_line(quality: dict[str, Any], changed: str) -> str:
    """What was measured: of tokens that are predicted, of rows that are classified, or of hidden states."""
    said = {key: _figure(value) for key, value in quality.items()}
    if "relative_error" in quality:
        what = "last hidden states" if "cosine" in quality else "numbers"
        cosine = f", mean cosine {said['cosine']}" if "cosine" in quality else ""
        error = f"relative error {said['relative_error']}"
        return f"held-out {what}: {error}{cosine}, over {quality['positions']} positions"
    if "rows" in quality:
        known = "accuracy" in quality
        before, after = (f"accuracy {said['accuracy_dense']}", said["accuracy"]) if known else ("", "")
        losses = f"loss {said['loss_dense']} dense, {said['loss']} {changed}; {before} and {after}; " if known else ""
        said_of = f"KL {said['kl_mean']} nats a row, same class {said['top1_agreement']}, over {quality['rows']} rows"
        return f"held-out {losses}{said_of}" + ("" if known else " without labels")
    return (
        f"held-out perplexity {said['perplexity_dense']} dense, {said['perplexity']} {changed}; KL {said['kl_mean']}"
        f" nats a token, same top token {said['top1_agreement']}, over {quality['tokens']} tokens"
    )


def _cut_lines(pruner: dict[str, Any]) -> list[str]:
    """What was taken out, and where that cost most; nothing where nothing was."""
    parts = pruner.get("parts")
    if not parts:
        return []
    changes = ", ".join(f"{key} {old} -> {pruner['after'][key]}" for key, old in pruner["before"].items())
    lines = [f"pruner {pruner['name']}: {changes}"]
    if "dropped" in parts[0]:
        gone = [f"{part['name']} ({part['influence']:.3g})" for part in parts if part["dropped"]]
        return [*lines, f"gone, with their influence: {', '.join(gone)}"]
    worst = max(parts, key=lambda part: part["error"])
    mean = sum(part["error"] for part in parts) / len(parts)
    by_size = sum(part["error_magnitude"] for part in parts) / len(parts)
    said = f"mean error {mean:.2e} ({by_size:.2e} by size), worst {worst['error']:.2e} in {worst['name']}"
    return [*lines, said, *(f"{part['name']}: {part['note']}" for part in parts if part["note"])]


def _transform_lines(transform: dict[str, Any]) -> list[str]:
    """What a transform did, and the first tensor that it had to leave; nothing where there was none."""
    folded, notes = transform.get("folded"), transform.get("notes", [])
    if folded is None:
        return []
    left = f"; {len(notes)} left: {notes[0]}" if notes else ""
    return [f"transform {transform['name']}: {len(folded)} tensors scaled{left}"]


def _distill_lines(distill: dict[str, Any]) -> list[str]:
    """What training behind the codes did to the blocks; nothing where there was none."""
    blocks = distill["blocks"]
    if not blocks:
        return []
    ratios = [block["before"] / block["after"] if block["after"] > 0 else 1.0 for block in blocks]
    last = blocks[-1]
    told = f"({last['block']}: {last['before']:.2e} to {last['after']:.2e}); errors of layers are from before that"
    return [f"distilled {len(blocks)} blocks: errors {min(ratios):.2f} to {max(ratios):.2f} times smaller {told}"]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
