"""`finetune quantize quant=int8` where norms make a few inputs very large: what is written, and who reads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_models import logits, run, save
from transformers import AutoModelForCausalLM

import finetune as ft
from finetune.quant.int8 import Int8Linear

CHANNELS, GAIN = [3, 40], 100


def inject(model: Any) -> None:
    """Norms a hundred times as large in two channels, and what reads them as much smaller: the same function."""
    for layer in model.model.layers:
        for norm, readers in (
            (layer.input_layernorm, [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
            (layer.post_attention_layernorm, [layer.mlp.gate_proj, layer.mlp.up_proj]),
        ):
            norm.weight[CHANNELS] *= GAIN
            for reader in readers:
                reader.weight[:, CHANNELS] /= GAIN


@pytest.mark.parametrize("calibrator", ["rtn", "gptq"])
def test_what_codes_lose_is_kept_and_read_back(
    text: Path, tmp_path: Path, calibrator: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save(tmp_path / "base", change=inject, dtype=torch.float32)
    calibration = [f"calibrator={calibrator}", "quant=int8"]
    kept = run(base, text, tmp_path / "kept", *calibration)
    assert "transformers + bitsandbytes (less what is kept of 20 columns), and finetune" in capsys.readouterr().out
    plain = run(base, text, tmp_path / "plain", *calibration, "quant.keep_columns=null")
    assert "read by transformers + bitsandbytes, and finetune" in capsys.readouterr().out
    assert 3 * kept["quality"]["kl_mean"] < plain["quality"]["kl_mean"]
    assert kept["bits_per_weight"] > plain["bits_per_weight"]

    ours, _ = ft.load(str(tmp_path / "kept"), dtype="fp32", device="cpu")
    layers = [module for module in ours.modules() if isinstance(module, Int8Linear)]
    assert sum(m.columns is not None and m.columns.tolist() == CHANNELS for m in layers) == 10
    wanted = logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval())
    streamed, _ = ft.load(str(base), ft.Int8Config(), dtype="fp32", device="cpu")
    without, _ = ft.load(str(tmp_path / "plain"), dtype="fp32", device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=torch.float32, device_map={"": "cpu"}).eval()
    error = {
        name: float((logits(model) - wanted).norm() / wanted.norm())
        for name, model in {"kept": ours, "streamed": streamed, "plain": without, "stock": stock}.items()
    }
    assert max(error["kept"], error["streamed"]) < 0.5 * min(error["plain"], error["stock"]), error
