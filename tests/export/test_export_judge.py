"""The gate, the panel of held-out rows, and the words that a user reads."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from export_tiny import rows_to_learn
from torch import nn

from finetune.data.rows import IGNORE, Row, TokenRows
from finetune.errors import ConfigError
from finetune.evaluation import Divergence, RowLosses
from finetune.export import verify
from finetune.export.base import Format, Proof, Written
from finetune.export.config import ExportConfig
from finetune.export.export import proof_table
from finetune.export.formats import chosen, formats
from finetune.export.verify import Panel, Reference, fill, judge, still

FORM = Format("x", "x", "x", True, "try peft", False, write=lambda source, directory: Written(1))


def proof(base: float, trained: float, exported: float, *, error: float = 0.01, kl: float = 1e-4) -> Proof:
    losses = {"loss_base": base, "loss_trained": trained, "loss_export": exported, "loss_error": error}
    return Proof("bnb-nf4", "x", kl_mean=kl, **losses)


def test_retained_is_the_share_of_the_improvement() -> None:
    result = proof(3.0, 2.0, 2.02)
    judge(result, ExportConfig(), FORM)
    assert result.retained == pytest.approx(0.98) and result.passed and result.reason == ""


def test_too_little_retained_fails_and_says_what_to_do() -> None:
    result = proof(3.0, 2.0, 2.05)
    judge(result, ExportConfig(), FORM)
    assert not result.passed and result.retained == pytest.approx(0.95)
    assert "0.9500 of the improvement" in result.reason and "export.min_retained=0.97" in result.reason
    assert result.reason.endswith(": try peft")
    judge(result, ExportConfig(min_retained=0.9), FORM)
    assert result.passed and result.reason == ""


def test_a_lossless_format_is_gated_by_kl_as_well() -> None:
    result = proof(3.0, 2.0, 2.001, kl=2e-2)
    judge(result, ExportConfig(), FORM)
    assert result.passed
    judge(result, ExportConfig(), replace(FORM, lossless=True))
    assert not result.passed and result.retained == pytest.approx(0.999) and "export.max_kl" in result.reason


@pytest.mark.parametrize(("base", "trained"), [(2.01, 2.0), (2.0, 2.0), (1.9, 2.0)])
def test_an_improvement_within_its_noise_is_gated_by_kl(base: float, trained: float) -> None:
    result = proof(base, trained, 2.5, kl=9e-3)
    judge(result, ExportConfig(), FORM)
    assert result.retained is None and result.passed
    result = proof(base, trained, trained, kl=2e-2)
    judge(result, ExportConfig(), FORM)
    assert result.retained is None and not result.passed and "export.max_kl=0.01" in result.reason


def test_what_is_not_finite_never_passes() -> None:
    losses, broken = RowLosses([3.0, 3.0], [1, 1]), RowLosses([math.nan, 1.0], [1, 1])
    divergence = Divergence()
    divergence.add(torch.zeros(1, 1), torch.full((1, 1), math.nan))
    result = Proof("safetensors", "x")
    fill(result, Reference(Path(), losses, RowLosses([2.0, 2.5], [1, 1])), broken, divergence)
    judge(result, ExportConfig(), FORM)
    assert result.loss_export is None and result.kl_mean is None and not result.passed
    assert "not finite" in result.reason
    json.dumps(result.to_dict(), allow_nan=False)


def test_the_panel_takes_rows_that_teach_evenly_and_batches_them_by_size(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = Row(np.arange(4, dtype=np.int32), np.full(4, IGNORE, np.int32))
    rows = TokenRows.of([silent, *rows_to_learn(30), silent])
    panel = Panel.of(rows, 10, vocabulary=100, pad_id=0)
    assert len(panel.rows) == 10 and sorted(i for batch in panel.plan for i in batch) == list(range(10))
    lengths = panel.rows.lengths().tolist()
    assert lengths == sorted(lengths) and panel.stride == 1
    monkeypatch.setattr(verify, "LOGITS_ELEMENTS", 100 * 3 * max(lengths))
    small = Panel.of(rows, 10, vocabulary=100, pad_id=0)
    for batch in small.plan:
        assert len(batch) * max(lengths[i] for i in batch) * 100 <= verify.LOGITS_ELEMENTS
    assert len(small.plan) >= 3
    monkeypatch.setattr(verify, "LOG_PROBS_BYTES", 4 * 100 * 7)
    positions = sum(batch.target_tokens() for batch in panel.batches())
    assert Panel.of(rows, 10, vocabulary=100, pad_id=0).stride == math.ceil(positions / 7)


def test_still_widens_and_puts_everything_back() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).to(torch.bfloat16)
    model[0].compute = torch.bfloat16  # a module that remembers its dtype
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    with pytest.raises(RuntimeError, match="inside"), still(model, torch.float32):
        assert not any(module.training for module in model.modules())
        assert model[0].weight.dtype == torch.float32 and model[0].compute == torch.float32
        raise RuntimeError("inside")
    assert [module.training for module in model] == [True, True, False]
    assert model[0].compute == torch.bfloat16
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_formats_are_found_and_a_misspelt_one_is_named() -> None:
    assert list(formats()) == ["bnb-nf4", "compressed-tensors", "peft", "safetensors"]
    assert [form.name for form in chosen(["peft", "safetensors"])] == ["peft", "safetensors"]
    with pytest.raises(ConfigError, match=r"no format is called 'safetensor'.*did you mean 'safetensors'"):
        chosen(["safetensor"])


def test_the_table_shows_every_format_and_why_one_failed() -> None:
    good = proof(3.0, 2.0, 2.001)
    good.bits_per_weight, good.bytes = 4.127, 12_300_000
    judge(good, ExportConfig(), FORM)
    bad = Proof("peft", "PEFT", reason="the proof client could not use it (OSError: gone)")
    lines = proof_table([good, bad]).splitlines()
    row = next(line for line in lines if line.split()[:1] == ["bnb-nf4"])
    assert row.split()[1:3] == ["12.3", "4.13"] and row.split()[-2:] == ["0.9990", "passed"]
    assert next(line for line in lines if line.split()[:1] == ["peft"]).split()[-2:] == ["-", "FAILED"]
    assert lines[-1] == "peft: the proof client could not use it (OSError: gone)"
    assert max(map(len, lines)) <= 140
