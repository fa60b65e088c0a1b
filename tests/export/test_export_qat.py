"""QAT to the end: the export in a public layout predicts what was trained, in stock transformers, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_tiny import fit, llama, rows_to_learn, write_base

from finetune.adapters.attach import attach
from finetune.adapters.base import AdapterConfig
from finetune.adapters.qat import QATConfig
from finetune.adapters.qat_scales import QATScalesConfig
from finetune.errors import UserError
from finetune.export.base import ExportSource
from finetune.export.config import ExportConfig
from finetune.export.export import export
from finetune.export.formats import compressed_tensors
from finetune.model.config import ModelConfig
from finetune.model.load import load
from finetune.quant.affine import Int2Config, Int4Config
from finetune.quant.base import QuantConfig
from finetune.quant.dense import DenseConfig
from finetune.quant.keep import KeepConfig

pytest.importorskip("compressed_tensors")
pytestmark = pytest.mark.filterwarnings("ignore")
CASES: dict[str, tuple[QuantConfig, AdapterConfig]] = {
    "3 bits": (DenseConfig(), QATConfig(rank=8, bits=3, group_size=32, symmetric=True)),
    "2 bits, zero points": (DenseConfig(), QATConfig(rank=8, bits=2, group_size=32)),
    "8 bits, rows": (DenseConfig(), QATConfig(rank=8, bits=8, group_size=-1, symmetric=True, steps="fitted")),
    "on int4": (Int4Config(group_size=32), QATConfig(rank=8)),
    "scales of int2": (Int2Config(group_size=32, symmetric=True), QATScalesConfig()),
}
SYMMETRIC = ("3 bits", "8 bits, rows", "scales of int2")


def trained(case: str, directory: Path, dtype: torch.dtype = torch.float32, steps: int = 6) -> ExportSource:
    quant, method = CASES[case]
    base = write_base(directory / "base", llama(tie_word_embeddings=False))
    loaded = load(ModelConfig(path=str(base), fused="off"), quant, dtype, "cpu")
    torch.manual_seed(1)
    adapter = attach(loaded.model, replace(method))
    fit(loaded.model, adapter, rows_to_learn(128), steps)
    return ExportSource(
        model=loaded.model,
        adapter=adapter,
        tokenizer=loaded.tokenizer,
        base_path=str(base),
        dtype=torch.bfloat16,
        quantization_config=loaded.quantization_config,
        max_shard_bytes=10**9,
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[5, 8, 11, 14], [20, 23, 26, 29]]), use_cache=False).logits


@pytest.mark.parametrize("case", CASES)
def test_stock_transformers_gives_the_trained_logits_to_the_last_bit(case: str, tmp_path: Path) -> None:
    """In float32; where there are zero points transformers decodes to bfloat16 while it loads, so in that."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if case in SYMMETRIC else torch.bfloat16
    source = trained(case, tmp_path, dtype, steps=3)
    (tmp_path / "out").mkdir()
    written = compressed_tensors.write(source, tmp_path / "out")
    assert len(written.quantized) == 14
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype).eval()
    assert torch.equal(logits(stock), logits(source.model))


def test_the_proof_in_a_fresh_interpreter(tmp_path: Path) -> None:
    source = trained("3 bits", tmp_path, torch.bfloat16, steps=12)
    config = ExportConfig(formats=["compressed-tensors", "safetensors"])
    proofs = {p.format: p for p in export(source, tmp_path / "out", config, rows_to_learn(40, seed=1), 0)}
    packed, plain = proofs["compressed-tensors"], proofs["safetensors"]
    assert packed.passed and plain.passed, (packed.reason, plain.reason)
    assert packed.retained > 0.97 and packed.kl_mean < 1e-6 and packed.top1_agreement == 1
    assert packed.bits_per_weight < 8 < plain.bits_per_weight


def test_the_export_is_a_base_like_any_other(tmp_path: Path) -> None:
    source = trained("2 bits, zero points", tmp_path)
    (tmp_path / "out").mkdir()
    compressed_tensors.write(source, tmp_path / "out")
    again = load(ModelConfig(path=str(tmp_path / "out"), fused="off"), KeepConfig(), torch.float32, "cpu")
    found = dict(source.adapter.merged_frozen())
    for name, module in found.items():
        twin = again.model.get_submodule(name)
        assert twin.bits == 4
        assert torch.equal(twin.dequantize(torch.float32), module.dequantize(torch.float32))


def test_what_it_cannot_hold_is_said(tmp_path: Path) -> None:
    source = trained("3 bits", tmp_path, steps=1)
    with pytest.raises(UserError, match="there is no adapter that trained integers"):
        compressed_tensors.write(replace(source, adapter=None), tmp_path)
    with torch.no_grad():
        next(iter(source.adapter.adapted.values())).first_scale.mul_(2.0**-20)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"q_proj.weight has scales that torch.float16 does not hold"):
        compressed_tensors.write(replace(source, dtype=torch.float16), tmp_path / "out")
