"""`finetune quantize` with llama.cpp's blocks and with OBQ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import finetune as ft
from finetune.cli import quantize
from finetune.errors import ConfigError
from finetune.quant.base import FrozenWeight

EMBEDDED = Path(ft.__file__).parent / "assets"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("base") / "model"
    tokenizer = AutoTokenizer.from_pretrained(next(EMBEDDED.rglob("tokenizer.json")).parent)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=96, max_position_embeddings=128, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    row = " ".join(f"{name} is called with {number}" for number, name in enumerate(dir(torch.Tensor)[40:100]))
    path.write_text("".join(json.dumps({"text": row[start:]}) + "\n" for start in range(0, 600, 60)), "utf-8")
    return path


@pytest.mark.parametrize(
    ("quant", "calibrator", "bits"),
    [("q4_0", "gptq", 4.5), ("q5_1", "obq", 6.0), ("q8_0", "rtn", 8.5)],
)
def test_what_is_written_is_a_base(
    base: Path, text: Path, tmp_path: Path, quant: str, calibrator: str, bits: float
) -> None:
    target = tmp_path / "out"
    overrides = [f"model.path={base}", f"output={target}", f"quant={quant}", f"calibrator={calibrator}", "device=cpu"]
    assert quantize([*overrides, f"data.calibration={text}", "data.max_length=64"]) == 0
    record = json.loads((target / "quantization.json").read_text("utf-8"))
    better = [layer["error"] < layer["error_rtn"] for layer in record["layers"]]
    assert len(better) == 14 and all(better) == (calibrator != "rtn")
    model, _ = ft.load(str(target), dtype="fp32", device="cpu")
    frozen = [module for module in model.modules() if isinstance(module, FrozenWeight)]
    assert len(frozen) == 14 and {module.storage for module in frozen} == {quant}
    assert record["bits_per_weight"] == pytest.approx(bits)


def test_a_layer_too_wide_for_obq_is_one_line(base: Path, text: Path, tmp_path: Path) -> None:
    overrides = [f"model.path={base}", f"output={tmp_path / 'out'}", "calibrator=obq", "calibrator.max_inputs=64"]
    with pytest.raises(ConfigError, match=r"down_proj has 96 .*calibrator.max_inputs is 64: use calibrator=gptq"):
        quantize([*overrides, f"data.calibration={text}", "data.max_length=64", "device=cpu"])
    assert not (tmp_path / "out").exists()
