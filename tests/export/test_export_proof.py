"""Whole exports: written, opened in an interpreter that cannot import finetune, measured and judged."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from export_tiny import Trained, llama
from safetensors.torch import load_file, save_file

from finetune.data.batching import eval_batches
from finetune.data.rows import TokenRows
from finetune.evaluation import RowLosses, predictions
from finetune.export import client
from finetune.export.base import ExportSource, Proof, Written
from finetune.export.client import ClientFailed, ask, probe
from finetune.export.config import ExportConfig
from finetune.export.export import export, unlike
from finetune.export.formats import safetensors
from finetune.export.verify import still
from finetune.quant.affine import Int4Config
from finetune.quant.base import QuantConfig
from finetune.quant.int8_storage import Int8Config
from finetune.quant.nf4 import NF4Config

CLIENT = Path(client.SCRIPT)


@pytest.fixture(scope="module")
def trained(make_trained: Callable[..., Trained]) -> Trained:
    return make_trained(llama(), NF4Config(), dtype="bfloat16")


def loss_of(trained: Trained) -> float:
    losses = RowLosses()
    with still(trained.source.model, torch.float32):
        for part in predictions(trained.source.model, eval_batches(trained.rows, 8, 0), "cpu"):
            losses.add(part.losses_P(), part.rows_P)
    return losses.loss


def one(source: ExportSource, out: Path, name: str, held_out: TokenRows, **settings: Any) -> Proof:
    (proof,) = export(source, out, ExportConfig(formats=[name], **settings), held_out, 0)
    assert json.loads((out / name / "export.json").read_text()) == proof.to_dict()
    return proof


def test_every_format_is_proven_and_the_model_left_as_it_was(trained: Trained, tmp_path: Path) -> None:
    model = trained.source.model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    config = ExportConfig(formats=["safetensors", "bnb-nf4", "peft"])
    proofs = {proof.format: proof for proof in export(trained.source, tmp_path, config, trained.rows, 0)}
    assert model.training
    model.eval()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bnb-nf4", "peft", "safetensors"], "leftovers"
    expected = loss_of(trained)
    with trained.adapter.disabled():
        base = loss_of(trained)
    for name, proof in proofs.items():
        assert proof.passed, (name, proof.reason)
        assert proof.loss_trained == pytest.approx(expected, abs=1e-5)
        assert proof.loss_base == pytest.approx(base, abs=1e-5)
        assert proof.rows == 40 and proof.tokens == proof.kl_tokens == tokens(trained)
        assert json.loads((tmp_path / name / "export.json").read_text()) == proof.to_dict()
        files = [path for path in (tmp_path / name).iterdir() if path.name != "export.json"]
        assert proof.bytes == sum(path.stat().st_size for path in files)
    plain, packed, beside = (proofs[name] for name in ("safetensors", "bnb-nf4", "peft"))
    assert plain.kl_mean < 1e-4 and plain.bits_per_weight == 16 and plain.retained > 0.999
    assert packed.kl_mean < 1e-2 and packed.bits_per_weight < 8 and packed.retained > 0.97
    assert beside.kl_mean < 1e-5 and beside.retained == pytest.approx(1, abs=1e-3)


def test_a_relative_directory_is_proven_like_any_other(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs go to runs/<name>/<timestamp> of wherever the user stands; the client stands elsewhere."""
    monkeypatch.chdir(tmp_path)
    proof = one(trained.source, Path("somewhere") / "below", "safetensors", trained.rows)
    assert proof.passed, proof.reason


def tokens(trained: Trained) -> int:
    return sum(batch.target_tokens() for batch in eval_batches(trained.rows, 8, 0))


def test_a_tampered_export_fails(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = safetensors.FORMAT.write

    def tamper(source: ExportSource, directory: Path) -> Written:
        written = honest(source, directory)
        path = directory / "model.safetensors"
        weights = load_file(path)
        weights["model.layers.1.self_attn.o_proj.weight"] *= -1
        save_file(weights, path, metadata={"format": "pt"})
        return written

    monkeypatch.setattr(safetensors, "FORMAT", replace(safetensors.FORMAT, write=tamper))
    proof = one(trained.source, tmp_path, "safetensors", trained.rows)
    assert not proof.passed and proof.reason
    assert proof.kl_mean > 1e-2


def test_what_the_client_cannot_open_is_a_reason_not_a_traceback(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    honest = safetensors.FORMAT.write

    def truncate(source: ExportSource, directory: Path) -> Written:
        written = honest(source, directory)
        weights = load_file(directory / "model.safetensors")
        del weights["model.norm.weight"]
        save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
        return written

    monkeypatch.setattr(safetensors, "FORMAT", replace(safetensors.FORMAT, write=truncate))
    proof = one(trained.source, tmp_path, "safetensors", trained.rows)
    assert not proof.passed and "missing keys: ['model.norm.weight']" in proof.reason
    assert proof.loss_export is None and "\n" not in proof.reason
    assert "Traceback" not in "".join(capfd.readouterr())


def test_another_tokenizer_or_stop_token_is_a_complaint(trained: Trained, tmp_path: Path) -> None:
    facts = probe(trained.source.tokenizer)
    assert facts["chats"] and len(facts["asked"]) == 2
    trial: Any = SimpleNamespace(source=trained.source, facts=facts)
    answer = facts | {"generation_eos": [1, 3], "continuation": [5]}
    assert unlike(trial, answer) is None
    for key, value in (("chats", [[1]]), ("texts", []), ("eos", 2), ("vocabulary", 31)):
        complaint = unlike(trial, answer | {key: value})
        assert complaint is not None and complaint.startswith(f"its tokenizer is not the one trained with: {key}")
    assert unlike(trial, answer | {"generation_eos": 2}) == "its generation stops at token 2, the base's at [1, 3]"
    assert unlike(trial, answer | {"continuation": []}) == "greedy generation made no token"


def test_an_adapter_that_cannot_be_merged_leaves_the_others(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(trained.adapter), "mergeable", property(lambda self: False))
    proof = one(trained.source, tmp_path, "safetensors", trained.rows)
    assert not proof.passed and "lora cannot be merged" in proof.reason
    assert [path.name for path in (tmp_path / "safetensors").iterdir()] == ["export.json"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("quant", "most_kl"),
    [(NF4Config(block_size=32), 1e-5), (Int4Config(), 1e-5), (Int8Config(threshold=0), 1e-5), (Int8Config(), 3e-3)],
    ids=["nf4-32", "int4", "int8-weight-only", "llm-int8"],
)
def test_peft_on_bases_that_stock_quantizes_otherwise_or_alike(
    make_trained: Callable[..., Trained], tmp_path: Path, quant: QuantConfig, most_kl: float
) -> None:
    """LLM.int8() alone is repeated by stock; an input a rounding apart gets another code there now and then."""
    trained = make_trained(llama(), quant)
    proof = one(trained.source, tmp_path, "peft", trained.rows)
    assert proof.passed and proof.kl_mean < most_kl, proof.reason


@pytest.mark.slow
def test_without_an_improvement_kl_is_the_gate(make_trained: Callable[..., Trained], tmp_path: Path) -> None:
    untrained = make_trained(llama(), NF4Config(), steps=0)
    proof = one(untrained.source, tmp_path, "bnb-nf4", untrained.rows, rows=5)
    assert proof.passed and proof.retained is None and proof.rows == 5, proof.reason
    assert proof.loss_base == proof.loss_trained


def test_no_rows_is_a_reason(trained: Trained, tmp_path: Path) -> None:
    proof = one(trained.source, tmp_path, "safetensors", TokenRows.of([]))
    assert not proof.passed and "no held-out row" in proof.reason


def test_the_client_cannot_import_finetune(tmp_path: Path) -> None:
    """Even with the checkout on its path; run as the real script is, up to the point where it reads its request."""
    spy = tmp_path / "spy.py"
    spy.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(CLIENT.parents[2])!r})\n"
        f"sys.argv = ['proof_client.py', {str(tmp_path / 'request.json')!r}]\n"
        "try:\n"
        f"    runpy.run_path({str(CLIENT)!r}, run_name='__main__')\n"
        "except FileNotFoundError:\n"
        "    import finetune\n"
    )
    done = subprocess.run([sys.executable, "-I", str(spy)], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: the proof runs without finetune, so finetune cannot be imported"
    )


def test_a_client_that_hangs_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(ClientFailed, match=r"still running after 0.05 s and was stopped"):
        ask({}, tmp_path, timeout=0.05)
