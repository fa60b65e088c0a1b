"""`finetune quantize` with llama.cpp's blocks and with OBQ."""

from __future__ import annotations

from pathlib import Path

import pytest
import quantize_models
import torch
from quantize_models import run, save

import finetune as ft
from finetune.errors import ConfigError
from finetune.quant.base import FrozenWeight


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base") / "model", dtype=torch.float32, intermediate_size=96)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_models.text(tmp_path_factory.mktemp("text") / "rows.jsonl", rows=10)


@pytest.mark.parametrize(
    ("quant", "calibrator", "bits"),
    [("q4_0", "gptq", 4.5), ("q5_1", "obq", 6.0), ("q8_0", "rtn", 8.5)],
)
def test_what_is_written_is_a_base(
    base: Path, text: Path, tmp_path: Path, quant: str, calibrator: str, bits: float
) -> None:
    target = tmp_path / "out"
    record = run(base, text, target, f"quant={quant}", f"calibrator={calibrator}")
    better = [layer["error"] < layer["error_rtn"] for layer in record["layers"]]
    assert len(better) == 14 and all(better) == (calibrator != "rtn")
    model, _ = ft.load(str(target), dtype="fp32", device="cpu")
    frozen = [module for module in model.modules() if isinstance(module, FrozenWeight)]
    assert len(frozen) == 14 and {module.storage for module in frozen} == {quant}
    assert record["bits_per_weight"] == pytest.approx(bits)


def test_a_layer_too_wide_for_obq_is_one_line(base: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"down_proj has 96 .*calibrator.max_inputs is 64: use calibrator=gptq"):
        run(base, text, tmp_path / "out", "calibrator=obq", "calibrator.max_inputs=64")
    assert not (tmp_path / "out").exists()
