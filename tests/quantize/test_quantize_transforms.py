"""`finetune quantize transform=...`: a plain checkpoint that others read, the report, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from quantize_models import logits, run, save
from transformers import AutoModelForCausalLM

import finetune as ft
from finetune.cli import quantize
from finetune.errors import ConfigError


def outliers(model: Any) -> None:
    """A few outlier channels."""
    for layer in model.model.layers:
        layer.input_layernorm.weight[:2] *= 20
        layer.post_attention_layernorm.weight[:2] *= 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base") / "model", change=outliers, tie_word_embeddings=False)


@pytest.mark.parametrize(
    ("transform", "calibrator", "quant"),
    [
        ("awq", "gptq", ["quant=nf4"]),
        ("awq", "rtn", ["quant=int4", "quant.group_size=32"]),
        ("smoothquant", "rtn", ["quant=int8"]),
        ("gamma", "rtn", ["quant=int8g"]),
    ],
)
def test_the_checkpoint_is_a_plain_one(
    base: Path,
    text: Path,
    tmp_path: Path,
    transform: str,
    calibrator: str,
    quant: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    told = [f"transform={transform}", f"calibrator={calibrator}", *quant]
    record = run(base, text, tmp_path / "out", *told)
    assert (
        record["transform"]["name"] == transform and record["transform"]["folded"] and not record["transform"]["notes"]
    )
    assert f"transform {transform}: {len(record['transform']['folded'])} tensors scaled\n" in capsys.readouterr().out
    ours, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert ours.state_dict().keys() >= {"model.layers.0.input_layernorm.weight", "model.norm.weight"}
    gain = ours.model.layers[0].input_layernorm.weight
    assert not torch.equal(gain, dense.model.layers[0].input_layernorm.weight)
    if quant[0] in ("quant=nf4", "quant=int8"):
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map={"": "cpu"})
        for module in stock.modules():  # its CPU kernel computes in bf16, so what it decodes is compared: in float32
            if isinstance(module, Linear4bit):
                module.weight.quant_state.dtype = torch.float32
        stock = stock.dequantize().float() if quant[0] == "quant=nf4" else stock
        distance = (logits(stock.eval()) - logits(ours)).norm() / logits(ours).norm()
        assert float(distance) < (1e-5 if quant[0] == "quant=nf4" else 0.1)
    if quant[0].startswith("quant=int8"):
        assert record["quality"]["kl_mean"] < 0.05
    else:
        # Before GPTQ, scaling gains or loses by chance (docs/quantization.md): it is held to each part's own gain.
        less = [[], [f"transform={transform}"]] if calibrator == "gptq" else [[]]
        for number, settings in enumerate(less):
            other = run(base, text, tmp_path / f"other-{number}", "calibrator=rtn", *settings, *quant)
            assert record["quality"]["kl_mean"] < other["quality"]["kl_mean"], settings


def test_a_transform_asks_for_text(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="transform=awq looks at inputs"):
        quantize([f"model.path={base}", f"output={tmp_path / 'out'}", "transform=awq"])
    with pytest.raises(ConfigError, match=r"transform.formula is 'dua': expected both \| paper \| duo; did you mean"):
        quantize([f"model.path={base}", f"output={tmp_path / 'out'}", "transform=awq", "transform.formula=dua"])
    assert not (tmp_path / "out").exists()
