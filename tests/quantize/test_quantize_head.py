"""A quantized head in the report, on disk, and as the compressed-tensors package decodes it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from quantize_models import TOKENIZER, logits, run, save, text
from transformers import AutoModelForCausalLM

import finetune as ft
from finetune.errors import ConfigError
from finetune.quant.affine import AffineLinear

PACKAGE = "compressed-tensors is not installed: pip install 'finetune-kit[export]'"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied model whose widths hold groups of 128."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "tie_word_embeddings": False}
    return save(tmp_path_factory.mktemp("untied") / "model", bos_token_id=0, eos_token_id=0, **sizes)


@pytest.mark.parametrize("quant", ["nf4", "int4", "int3", "int8"])
def test_the_head_is_in_the_report(base: Path, tmp_path: Path, quant: str, capsys: pytest.CaptureFixture[str]) -> None:
    head = [] if quant in ("nf4", "int8") else ["quant.head=true"]
    record = run(base, None, tmp_path / "out", f"quant={quant}", *head)
    names = [layer["name"] for layer in record["layers"]]
    assert len(names) == (8 if head else 7) and ("lm_head" in names) == bool(head)
    if head:
        assert names[-1] == "lm_head" and 0 < record["layers"][-1]["error"] == record["layers"][-1]["error_rtn"]
        assert "of 8" in capsys.readouterr().out
        model, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
        assert isinstance(model.lm_head, AffineLinear)
        assert model.lm_head.bits_per_weight() == pytest.approx(record["layers"][-1]["bits_per_weight"])


def test_whoever_reads_the_configuration_reads_the_weights(base: Path, tmp_path: Path) -> None:
    run(base, None, tmp_path / "out", "quant=int4")
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "out").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_a_tied_head_is_refused_before_anything_is_quantized(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="lm_head shares its weight with the embeddings: expected false"):
        run(TOKENIZER, None, tmp_path / "out", "quant=int4", "quant.head=true")
    assert "quantized" not in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "overrides",
    [
        ["quant=int4", "quant.group_size=128", "quant.symmetric=true", "quant.head=true"],
        ["quant=int4", "quant.group_size=128", "quant.head=true"],
        ["quant=int8g", "quant.group_size=128", "quant.head=true"],
    ],
    ids=lambda o: "-".join(o),
)
def test_the_compressed_tensors_package_decodes_the_head_too(base: Path, tmp_path: Path, overrides: list[str]) -> None:
    pytest.importorskip("compressed_tensors", reason=PACKAGE)
    run(base, None, tmp_path / "out", *overrides)
    told = json.loads((tmp_path / "out" / "config.json").read_text("utf-8"))["quantization_config"]
    assert told["ignore"] == []
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, device_map={"": "cpu"}).eval()
    theirs = logits(stock)
    ours, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    for name in ("lm_head", "model.layers.0.mlp.down_proj"):
        decoded = ours.get_submodule(name).dequantize(torch.float32)
        if "dequantize" in told:  # decoded while loading, in the dtype of the scales
            decoded = decoded.bfloat16().float()
        assert torch.equal(stock.get_submodule(name).weight, decoded), name
    exact = "dequantize" not in told
    assert (theirs - logits(ours)).norm() < (1e-5 if exact else 0.02) * theirs.norm()


@pytest.mark.parametrize("streamed", [True, False], ids=["streamed", "whole"])
def test_the_head_is_calibrated_on_what_it_reads(
    base: Path, tmp_path: Path, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error is that of the head's outputs on what the quantized blocks hand it, and GPTQ makes it smaller."""
    if not streamed:
        monkeypatch.setattr("finetune.model.blocks._why_whole", lambda *_: "a test asks for it")
    rows = text(tmp_path / "rows.jsonl")
    settings = ("quant=int3", "quant.group_size=64", "quant.head=true", "calibrator=gptq")
    record = run(base, rows, tmp_path / "out", *settings)
    head = record["layers"][-1]
    assert head["name"] == "lm_head" and head["error"] < 0.9 * head["error_rtn"] and head["samples"] > 500
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    ours, tokenizer = ft.load(str(tmp_path / "out"), dtype="bf16", device="cpu")
    told = [json.loads(line)["text"] for line in rows.read_text("utf-8").splitlines()]
    reads: list[torch.Tensor] = []
    ours.lm_head.register_forward_pre_hook(lambda _module, args: reads.append(args[0].double().flatten(0, -2)))
    for row in told[:8]:
        with torch.no_grad():
            ours(**tokenizer(row, return_tensors="pt"), use_cache=False)
    x_MI, w_OI = torch.cat(reads), stock.lm_head.weight.detach().double()
    gone_OI = ours.lm_head.dequantize(torch.float32).double() - w_OI
    assert float((x_MI @ gone_OI.T).pow(2).sum() / (x_MI @ w_OI.T).pow(2).sum()) == pytest.approx(
        head["error"], rel=0.3
    )
    # What the dense model predicts is told of the dense head, not of the one in its place.
    measured = record["quality"]["loss_dense"]
    plain = run(base, rows, tmp_path / "plain", *settings[:2], "calibrator=gptq")["quality"]["loss_dense"]
    assert measured == pytest.approx(plain, rel=1e-6)


def test_a_head_with_a_static_scale(base: Path, tmp_path: Path) -> None:
    static = ("quant=w8a8", "quant.activations=tensor", "quant.static=true", "quant.head=true")
    run(base, text(tmp_path / "rows.jsonl"), tmp_path / "out", *static)
    model, _ = ft.load(str(tmp_path / "out"), dtype="fp32", device="cpu")
    assert model.lm_head.input_scale.shape == (1,) and float(model.lm_head.input_scale) > 0
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    assert (logits(model) - logits(stock)).norm() < 0.1 * logits(stock).norm()
