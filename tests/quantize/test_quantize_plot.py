"""The picture of the errors: drawn where matplotlib is, told where it is not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from finetune.quantize.plot import kinds, plot


def record(blocks: int = 3, sparsity: float | None = None) -> dict[str, Any]:
    layers = [
        {"name": f"model.layers.{block}.{leaf}", "error": error, "error_rtn": 2 * error, "sparsity": sparsity}
        for block in range(blocks)
        for leaf, error in (("self_attn.q_proj", 0.01), ("mlp.down_proj", 0.0), ("mlp.experts.0.w1", 0.1 * block))
    ]
    return {"layers": layers, "calibrator": {"name": "gptq"}}


def test_layers_are_told_apart_by_kind_and_ordered_by_depth() -> None:
    found = kinds(record()["layers"])
    assert list(found) == ["self_attn.q_proj", "mlp.down_proj", "mlp.experts.w1"]
    assert [layer["error"] for layer in found["mlp.experts.w1"]] == [0.0, 0.1, 0.2]
    assert list(kinds(record(1)["layers"][:1])) == ["q_proj"] and kinds([]) == {}


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_a_picture_is_drawn(tmp_path: Path, sparsity: float | None) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    assert plot(record(sparsity=sparsity), tmp_path) == ""
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    assert plot({**record(), "layers": []}, tmp_path) == ""
    parts = [{"name": "model.layers.0.mlp.down_proj", "error": 0.1, "error_magnitude": 0.2}]
    assert plot({"layers": [], "pruner": {"name": "channels", "parts": parts}}, tmp_path) == ""


def test_without_matplotlib_a_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = plot(record(), tmp_path)
    assert "errors.png is left out: matplotlib is not installed" in said and "\n" not in said
    assert not list(tmp_path.iterdir())
