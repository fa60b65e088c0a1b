"""`finetune quantize quant=sparse`: the weights of the dense checkpoint with zeros, in less room, to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_models import logits, run, save

import finetune as ft
from finetune.errors import ConfigError
from finetune.quant.base import FrozenWeight
from finetune.quant.dense import DenseConfig
from finetune.quant.sparse import Sparse, SparseExperts, SparseWeightConfig
from finetune.quantize import opening

HALF = ("pruner=magnitude", "pruner.pattern=2:4")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base") / "model")


def stored(model: Any) -> list[Sparse]:
    return [module for module in model.modules() if isinstance(module, Sparse)]


MOST = ("pruner=magnitude", "pruner.sparsity=0.75")
CASES = [("llama", HALF, 9.0), ("gpt2", MOST, 5.0), ("mixtral", HALF, 9.0), ("mixtral", MOST, 5.0)]


@pytest.mark.parametrize(("family", "how", "bits"), CASES)
def test_it_is_the_dense_checkpoint_with_zeros(family: str, how: tuple[str, ...], bits: float, tmp_path: Path) -> None:
    source = save(tmp_path / "base", family)
    run(source, None, tmp_path / "dense", "quant=none", *how)
    record = run(source, None, tmp_path / "sparse", "quant=sparse", *how)
    assert record["bits_per_weight"] == pytest.approx(bits, rel=2e-3) and "finetune alone" in record["read_by"]
    assert all(not layer["note"] for layer in record["layers"])
    told = json.loads((tmp_path / "sparse" / "config.json").read_text("utf-8"))
    assert told["quantization_config"]["quant_method"] == "finetune" and told["pruning"]["method"] == "magnitude"
    ours, _ = ft.load(str(tmp_path / "sparse"), dtype="bf16", device="cpu")
    dense, _ = ft.load(str(tmp_path / "dense"), DenseConfig(), dtype="bf16", device="cpu")
    assert len(stored(ours)) == len(record["layers"])
    for name, module in ours.named_modules():
        if isinstance(module, FrozenWeight):
            theirs: Any = dense.get_submodule(name)
            assert torch.equal(module.dequantize(torch.bfloat16), theirs.dequantize(torch.bfloat16)), name  # type: ignore[operator]
    assert torch.equal(logits(ours), logits(dense))
    frozen, _ = ft.load(str(tmp_path / "dense"), SparseWeightConfig(), dtype="bf16", device="cpu")
    mine, other = ours.state_dict(), frozen.state_dict()
    assert mine.keys() == other.keys() and all(torch.equal(mine[key], other[key]) for key in mine)
    assert any(isinstance(module, SparseExperts) for module in ours.modules()) == (family == "mixtral")


def test_an_interrupted_run_tells_the_same_room(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = ("quant=sparse", "pruner=sparsegpt", "pruner.sparsity=0.6", "data.samples=4")
    straight = run(base, text, tmp_path / "straight", *how)
    from finetune.model.blocks import BlockReader

    read, stopped = BlockReader.read, []

    def reading(self: BlockReader, name: str) -> Any:
        if name == self.blocks[1] and not stopped:
            stopped.append(name)
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(BlockReader, "read", reading)
    with pytest.raises(KeyboardInterrupt):
        run(base, text, tmp_path / "out", *how)
    resumed = run(base, text, tmp_path / "out", *how)
    assert resumed["bits_per_weight"] == pytest.approx(straight["bits_per_weight"], abs=1e-3)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("straight", "out")]
    assert files[0] == files[1]
    monkeypatch.setattr(opening, "_streamed", lambda *_: "the test says so")
    run(base, text, tmp_path / "whole", *how)
    assert files[0] == (tmp_path / "whole" / "model.safetensors").read_bytes()


def test_training_on_it_keeps_the_zeros(base: Path, tmp_path: Path) -> None:
    run(base, None, tmp_path / "out", "quant=sparse", *HALF)
    model, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    before, zeros = logits(model), {name: m.cleared() for name, m in model.named_modules() if isinstance(m, Sparse)}
    adapter = ft.attach(model, ft.LoRAConfig(rank=4))
    assert torch.equal(logits(model), before)
    optimizer = torch.optim.AdamW(adapter.trainable().values(), lr=0.02)
    for _ in range(2):
        model(input_ids=torch.arange(40, 72).reshape(2, 16), use_cache=False).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = logits(model.eval())
    assert (expected - before).abs().max() > 1e-3
    merged = {name.removesuffix(".weight"): weight for name, weight in adapter.merged()}
    assert merged.keys() == zeros.keys()
    dense, _ = ft.load(str(base), DenseConfig(), dtype="fp32", device="cpu")
    for name, weight in merged.items():
        assert not weight[zeros[name]].any() and (weight[~zeros[name]] != 0).float().mean() > 0.99
        dense.get_submodule(name).store(weight)
    torch.testing.assert_close(logits(dense), expected, atol=2e-4, rtol=1e-3)


def test_what_has_no_say_or_gains_nothing_is_told(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "quant=sparse rounds nothing, so calibrator=gptq has no say: expected calibrator=rtn"
    with pytest.raises(ConfigError, match=words):
        run(base, None, tmp_path / "out", "quant=sparse", "calibrator=gptq", *HALF)
    run(base, None, tmp_path / "out", "quant=sparse")
    assert "14 layers take more than the 16 bits of a dense weight" in capsys.readouterr().out
