"""Pruned checkpoints: opened by stock transformers, trained on, merged and stored anew with the same zeros."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantize_models
import torch
from quantize_models import logits, run, save
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import finetune as ft
from finetune.adapters.base import ADAPTERS
from finetune.data.rows import Row, TokenRows
from finetune.errors import ConfigError
from finetune.export.base import ExportSource
from finetune.export.formats import bnb_nf4
from finetune.quant.base import FrozenExperts, FrozenLinear, FrozenWeight, QuantConfig
from finetune.quant.dense import DenseConfig

FAMILIES = ("llama", "gpt2", "mixtral")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize_models.text(tmp_path_factory.mktemp("text") / "rows.jsonl", rows=12)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save(tmp_path_factory.mktemp(family) / "model", family, torch.float32) for family in FAMILIES}


@pytest.fixture(scope="module")
def pruned(bases: dict[str, Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every family at 2:4 by SparseGPT, dense."""
    out = {family: tmp_path_factory.mktemp("pruned") / family for family in FAMILIES}
    for family, directory in out.items():
        run(bases[family], text, directory, "pruner=sparsegpt", "pruner.pattern=2:4", "quant=none")
    return out


def stock_of(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The block projections of a loaded base as [.., O, I]."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear | FrozenExperts):
            weight = module.dequantize(torch.float32)
            turned = isinstance(module, FrozenExperts) and module.transposed
            found[name] = weight.mT if turned else weight
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_transformers_opens_a_pruned_checkpoint(
    family: str, bases: dict[str, Path], pruned: dict[str, Path]
) -> None:
    record = json.loads((pruned[family] / "quantization.json").read_text("utf-8"))
    assert record["pruner"] == {"name": "sparsegpt", "sparsity": None, "pattern": "2:4", "damping": 0.01}
    assert record["sparsity"] == 0.5 and record["read_by"] == "transformers, and finetune"
    assert all(layer["sparsity"] == 0.5 and 0 < layer["error"] < layer["error_rtn"] for layer in record["layers"])
    told = json.loads((pruned[family] / "config.json").read_text("utf-8"))
    assert told["pruning"] == {"method": "sparsegpt", "sparsity": 0.5, "pattern": "2:4"}
    assert "quantization_config" not in told
    assert (
        load_file(pruned[family] / "model.safetensors").keys() == load_file(bases[family] / "model.safetensors").keys()
    )
    ours, _ = ft.load(str(pruned[family]), DenseConfig(), dtype="fp32", device="cpu")
    torch.testing.assert_close(logits(stock_of(pruned[family])), logits(ours), atol=2e-5, rtol=1e-4)
    assert len(weights(ours)) == len(record["layers"])
    for weight in weights(ours).values():
        assert ((weight == 0).unflatten(-1, (-1, 4)).sum(dim=-1) == 2).all()


def trained(model: Any, method: str) -> Any:
    """An adapter whose every tensor has moved."""
    settings: dict[str, Any] = {"layers": {"layers": [0, 1]}, "ia3": {}}.get(method, {"rank": 4})
    adapter = ft.attach(model, ADAPTERS.type_of(method)(**settings))
    optimizer = torch.optim.AdamW(adapter.trainable().values(), lr=0.02, weight_decay=0.01)
    for _ in range(2):
        model(input_ids=torch.arange(40, 72).reshape(2, 16), use_cache=False).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return adapter


CASES = [("llama", method, None) for method in ("lora", "dora", "ia3", "pissa", "layers")]
CASES += [("gpt2", "lora", None), ("mixtral", "lora", None), ("mixtral", "layers", None)]
CASES += [(family, "lora", ft.NF4Config()) for family in FAMILIES]


@pytest.mark.parametrize(("family", "method", "quant"), CASES)
def test_what_is_merged_is_what_was_trained_and_has_the_same_zeros(
    family: str, method: str, quant: QuantConfig | None, pruned: dict[str, Path]
) -> None:
    model, _ = ft.load(str(pruned[family]), quant or DenseConfig(), dtype="fp32", device="cpu")
    zeros = {name: weight == 0 for name, weight in weights(model).items()}
    assert all(float(mask.float().mean()) >= 0.5 for mask in zeros.values())
    before = logits(model)
    adapter = trained(model, method)
    expected = logits(model.eval())
    assert (expected - before).abs().max() > 1e-3, "the adapter does nothing, so nothing was tested"
    stock = stock_of(pruned[family])
    held = {**dict(stock.named_parameters()), **dict(stock.named_buffers())}
    projections = {p.name: p for p in adapter.structure.projections}
    count = 0
    for name, weight in adapter.merged():
        held[name].data = weight
        projection = projections.get(name.removesuffix(".weight"))
        if projection is not None and not name.endswith(".bias"):
            count += 1
            laid = weight.mT if projection.transposed else weight
            assert not laid[zeros[projection.name]].any()
            assert (laid[~zeros[projection.name]] != 0).float().mean() > 0.99
    assert count == len(adapter.projections) > 0
    torch.testing.assert_close(logits(stock), expected, atol=2e-4, rtol=1e-3)


def test_a_lora_starts_as_the_pruned_base_and_never_reads_its_zeros(pruned: dict[str, Path]) -> None:
    model, _ = ft.load(str(pruned["llama"]), DenseConfig(), dtype="fp32", device="cpu")
    before = logits(model)
    adapter = ft.attach(model, ft.LoRAConfig(rank=4, dropout=0.1))
    assert torch.equal(logits(model.eval()), before)
    assert adapter.peft_obstacle == "PEFT knows no masks, and this base was pruned"
    layer = next(iter(adapter.adapted.values()))
    a_RI, b_OR = layer.factors()
    nn.init.normal_(b_OR)
    x_BI = torch.randn(5, layer.in_features, dtype=torch.float64).float()
    w_OI = layer.base.dequantize(torch.float64)
    wanted = x_BI.double() @ ((w_OI != 0) * (w_OI + layer.scaling * b_OR.double() @ a_RI.double())).T
    torch.testing.assert_close(layer(x_BI).double(), wanted, atol=2e-5, rtol=1e-4)


def test_a_base_that_was_not_pruned_is_left_alone(bases: dict[str, Path]) -> None:
    model, _ = ft.load(str(bases["llama"]), DenseConfig(), dtype="fp32", device="cpu")
    adapter = ft.attach(model, ft.LoRAConfig(rank=4))
    assert all(layer.kept() is None for layer in adapter.adapted.values()) and adapter.peft_obstacle == ""


@pytest.mark.parametrize(
    ("quant", "calibrator"),
    [("nf4", "gptq"), ("int4", "gptq"), ("int4", "rtn"), ("int8", "gptq"), ("int3", "gptq")],
)
def test_quantizing_a_pruned_base_keeps_its_zeros(
    quant: str, calibrator: str, pruned: dict[str, Path], text: Path, tmp_path: Path
) -> None:
    record = run(pruned["llama"], text, tmp_path / "out", f"quant={quant}", f"calibrator={calibrator}")
    assert record["pruner"] == {"name": "none"} and record["sparsity"] >= 0.5
    before, _ = ft.load(str(pruned["llama"]), DenseConfig(), dtype="fp32", device="cpu")
    after, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    told = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["pruning"]
    assert told["method"] == "sparsegpt" and told["pattern"] == "2:4"
    for (name, dense), stored in zip(weights(before).items(), weights(after).values(), strict=True):
        assert not stored[dense == 0].any(), name
    assert all(isinstance(m, FrozenWeight) for m in after.modules() if hasattr(m, "bits_per_weight"))


@pytest.mark.parametrize("family", FAMILIES)
def test_pruning_and_codes_at_once(family: str, bases: dict[str, Path], text: Path, tmp_path: Path) -> None:
    record = run(
        bases[family], text, tmp_path / "out", "pruner=sparsegpt", "pruner.sparsity=0.6", "quant=int4",
        "quant.group_size=32",
    )  # fmt: skip
    assert record["sparsity"] >= 0.6 - 1e-3
    error, simple = (sum(layer[key] for layer in record["layers"]) for key in ("error", "error_rtn"))
    assert error < 0.6 * simple
    model, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    for weight in weights(model).values():
        assert float((weight == 0).float().mean()) >= 0.599


def test_magnitude_needs_no_text(bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(bases["llama"], None, tmp_path / "out", "pruner=magnitude", "pruner.sparsity=0.3", "quant=none")
    assert record["sparsity"] == pytest.approx(0.3, abs=5e-4) and record["calibration_tokens"] == 0
    shown = capsys.readouterr().out
    assert "% of the weights of the blocks are zero" in shown and "zeros" in shown and "magnitude" in shown


def test_an_nf4_export_of_a_pruned_base_keeps_its_zeros(pruned: dict[str, Path], tmp_path: Path, text: Path) -> None:
    model, tokenizer = ft.load(str(pruned["llama"]), DenseConfig(), dtype="fp32", device="cpu")
    zeros = {name: weight == 0 for name, weight in weights(model).items()}
    adapter = trained(model, "lora")
    ids = [np.array(tokenizer(line).input_ids[:64]) for line in text.read_text("utf-8").splitlines()]
    rows = TokenRows.of([Row(row, row) for row in ids])
    source = ExportSource(model, adapter, tokenizer, str(pruned["llama"]), torch.float32, None, 10**9, calibration=rows)
    (tmp_path / "out").mkdir()
    bnb_nf4.write(source, tmp_path / "out")
    loaded, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    for name, weight in weights(loaded).items():
        assert not weight[zeros[name]].any() and weight[~zeros[name]].any()


REFUSED = [
    (["pruner=sparsegpt"], "pruner=sparsegpt looks at inputs: set data.calibration=FILE, or pruner=magnitude"),
    (["pruner=wanda", "quant=none"], "pruner=wanda looks at inputs"),
    (["pruner=magnitude", "quant=none", "calibrator=gptq"], "quant=none rounds nothing, so calibrator=gptq has no say"),
    (["quant=none"], "quant=none stores nothing in fewer bits"),
    (["pruner=magnitude", "quant.zero_point=real"], "quant=int4 as it is set here has no code for exactly 0"),
    (["pruner=magnitude", "pruner.pattern=1:7"], "but model.layers.0.self_attn.q_proj has 64 inputs"),
    (["pruner=magnitude", "pruner.sparsety=0.5"], "sparsity"),
]


@pytest.mark.parametrize(("overrides", "words"), REFUSED)
def test_what_cannot_work_is_said_before_weights_are_loaded(
    overrides: list[str], words: str, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.model.load.load", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=words):
        run(bases["llama"], None, tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()


def test_a_format_without_zero_is_refused_for_a_pruned_base(pruned: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which weights of the pruned base have to be"):
        run(pruned["llama"], None, tmp_path / "out", "quant=int4", "quant.zero_point=real")
