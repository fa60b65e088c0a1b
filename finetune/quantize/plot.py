"""The errors of all layers as a picture: which projections lose most, where in depth, and what calibration won."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PICTURE = "errors.png"
"""The picture's file beside the report."""
INCHES, DOTS = (9.0, 5.0), 120


def plot(record: Mapping[str, Any], directory: Path) -> str:
    """Draw relative squared output errors over depth, a line for each kind of projection; what is to be said of it.

    Nothing is drawn where there are no errors.

    Args:
        record: the report.
        directory: where `errors.png` is written, unless matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"{PICTURE} is left out: matplotlib is not installed (the extra `plot` brings it)"
    drawn, method, simple = _drawn(record)
    if not drawn:
        return ""
    figure = Figure(figsize=INCHES, dpi=DOTS, layout="constrained")
    axes = figure.add_subplot()
    for number, (kind, layers) in enumerate(kinds(drawn).items()):
        colour, depth = f"C{number % 10}", range(len(layers))
        axes.plot(depth, [layer["error"] for layer in layers], color=colour, marker=".", label=kind)
        axes.plot(depth, [layer["error_rtn"] for layer in layers], color=colour, linestyle=":", linewidth=1)
    axes.set_yscale("log", nonpositive="mask")
    axes.set_xlabel("block")
    axes.set_ylabel("relative squared error of the output")
    axes.set_title(f"{method} (solid) and {simple} (dotted)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(directory / PICTURE)
    return ""


def _drawn(record: Mapping[str, Any]) -> tuple[Sequence[Mapping[str, Any]], str, str]:
    """Whose errors are drawn, what they and those beside them are called; of a cut where nothing was stored anew."""
    layers = record["layers"]
    if layers:
        simple = "by magnitude" if layers[0]["sparsity"] is not None else "nearest"
        return layers, record["calibrator"]["name"], simple
    pruner = record.get("pruner", {})
    parts = [part for part in pruner.get("parts", ()) if "error" in part]
    return [{**part, "error_rtn": part["error_magnitude"]} for part in parts], pruner.get("name", ""), "by size"


def kinds(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Layers in order of depth, by what is left of their names without numbers and without what all share."""
    plain = [[part for part in layer["name"].split(".") if not part.isdigit()] for layer in layers]
    shared = 0
    while plain and len({tuple(parts[: shared + 1]) for parts in plain}) == 1 and shared + 1 < min(map(len, plain)):
        shared += 1
    found: dict[str, list[Mapping[str, Any]]] = {}
    for layer, parts in zip(layers, plain, strict=True):
        found.setdefault(".".join(parts[shared:]), []).append(layer)
    return found
