"""`finetune quantize pruner=channels | heads | layers`: a smaller checkpoint, which others open and which trains on."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import quantize_models
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

import finetune as ft
from finetune.cli import quantize
from finetune.errors import ConfigError, ModelError, UserError
from finetune.quant.dense import DenseConfig
from finetune.quant.keep import KeepConfig
from finetune.quantize import opening
from finetune.quantize.config import CalibrationConfig
from finetune.quantize.text import read_text

CHANNELS = ("pruner=channels", "pruner.sparsity=0.5", "quant=none")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three blocks, the middle one does least: those behind it move up where it goes."""

    def quieten(model: Any) -> None:
        for parameter in model.model.layers[1].parameters():
            parameter.mul_(0.1 if parameter.dim() > 1 else 1)

    sizes = {"num_hidden_layers": 3, "tie_word_embeddings": False}
    path = tmp_path_factory.mktemp("base") / "model"
    return quantize_models.save(path, dtype=torch.float32, change=quieten, **sizes)


def opened(directory: Path) -> Any:
    """By stock transformers, with nothing to remark."""
    model, told = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@pytest.mark.parametrize(
    ("family", "pruner", "sizes"),
    [
        ("llama", ("pruner=channels", "pruner.sparsity=0.5"), {"intermediate_size": 64}),
        ("llama", ("pruner=heads", "pruner.sparsity=0.5"), {"num_attention_heads": 2, "num_key_value_heads": 1}),
        ("llama", ("pruner=layers", "pruner.sparsity=0.5"), {"num_hidden_layers": 1}),
        ("gpt2", ("pruner=channels", "pruner.sparsity=0.5"), {"n_inner": 128}),
        ("mixtral", ("pruner=channels", "pruner.sparsity=0.25"), {"intermediate_size": 96}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stock_transformers_opens_it_and_computes_what_we_do(
    family: str, pruner: tuple[str, ...], sizes: dict[str, int], text: Path, tmp_path: Path
) -> None:
    base = quantize_models.save(tmp_path / "base", family, torch.float32)
    record = quantize_models.run(base, text, tmp_path / "cut", *pruner, "quant=none")
    config = json.loads((tmp_path / "cut" / "config.json").read_text("utf-8"))
    assert {key: config[key] for key in sizes} == sizes and "pruning" not in config
    assert {key: record["pruner"]["after"][key] for key in sizes} == sizes
    stock = opened(tmp_path / "cut")
    ours, _ = ft.load(str(tmp_path / "cut"), DenseConfig(), dtype="fp32", device="cpu")
    torch.testing.assert_close(quantize_models.logits(ours), quantize_models.logits(stock), atol=1e-5, rtol=1e-5)
    assert record["quality"]["kl_mean"] > 0 and record["layers"] == [] and record["sparsity"] == 0


def test_what_is_measured_is_what_was_written(base: Path, text: Path, tmp_path: Path) -> None:
    """The same held-out pieces, in the checkpoint, by stock transformers."""
    record = quantize_models.run(base, text, tmp_path / "cut", *CHANNELS)
    stock, tokenizer = opened(tmp_path / "cut"), quantize_models.tokenizer()
    settings = CalibrationConfig(calibration=str(text), max_length=64)
    pieces = read_text(settings, tokenizer, len(tokenizer), 128, DenseConfig()).eval
    with torch.no_grad():
        losses = [stock(input_ids=p[None], labels=p[None]).loss * (len(p) - 1) for p in pieces]
    tokens = sum(len(piece) - 1 for piece in pieces)
    assert record["quality"]["tokens"] == tokens
    assert record["quality"]["loss"] == pytest.approx(float(sum(losses)) / tokens, rel=1e-4)


@pytest.mark.parametrize("pruner", ["channels", "heads", "layers"])
def test_cut_first_then_quantized(pruner: str, base: Path, text: Path, tmp_path: Path) -> None:
    settings = (f"pruner={pruner}", "pruner.sparsity=0.5", "quant=int4", "quant.group_size=32", "calibrator=gptq")
    record = quantize_models.run(base, text, tmp_path / "cut", *settings)
    model, _ = ft.load(str(tmp_path / "cut"), KeepConfig(), dtype="fp32", device="cpu")
    assert quantize_models.logits(model).isfinite().all()
    left = 2 if pruner == "layers" else 3
    assert pruner != "layers" or [part["dropped"] for part in record["pruner"]["parts"]] == [False, True, False]
    assert len(record["layers"]) == 7 * left and len(model.model.layers) == left
    assert record["read_by"].startswith("transformers")
    assert all(0 < layer["error"] < layer["error_rtn"] for layer in record["layers"])


def files_of(directory: Path) -> dict[str, Any]:
    record = json.loads((directory / "quantization.json").read_text("utf-8"))
    return {
        "weights": {path.name: load_file(path) for path in sorted(directory.glob("*.safetensors"))},
        "config": json.loads((directory / "config.json").read_text("utf-8")),
        "parts": record["pruner"]["parts"],
        "kl": round(record["quality"]["kl_mean"], 7),
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, tensors in one.pop("weights").items():
        theirs = other["weights"][name]
        assert tensors.keys() == theirs.keys()
        assert all(torch.equal(tensors[key], theirs[key]) for key in tensors)
    del other["weights"]
    assert one == other


@pytest.mark.parametrize("pruner", ["channels", "layers"])
def test_an_interrupted_run_goes_on_and_memory_as_a_whole_gives_the_same(
    pruner: str, base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.model.blocks import BlockReader

    settings = (f"pruner={pruner}", "pruner.sparsity=0.5", "quant=none")
    quantize_models.run(base, text, tmp_path / "straight", *settings)
    read, seen = BlockReader.read, []

    def reading(self: BlockReader, name: str) -> nn.Module:
        seen.append(name)
        if len(seen) == (5 if pruner == "layers" else 2):  # the survey has read three
            signal.raise_signal(signal.SIGTERM)
        return read(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(BlockReader, "read", reading)
        arguments = quantize_models.arguments(base, text, tmp_path / "out", *settings)
        assert quantize(arguments) == 128 + signal.SIGTERM
    assert (tmp_path / ".out.partial" / "block-00000.safetensors").is_file()
    quantize_models.run(base, text, tmp_path / "out", *settings)
    same(files_of(tmp_path / "out"), files_of(tmp_path / "straight"))
    with monkeypatch.context() as patch:
        patch.setattr(opening, "_streamed", lambda *_: "the test says so")
        quantize_models.run(base, text, tmp_path / "whole", *settings)
    same(files_of(tmp_path / "whole"), files_of(tmp_path / "straight"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight", "whole"]


def test_a_cut_base_trains(base: Path, text: Path, tmp_path: Path) -> None:
    quantize_models.run(base, text, tmp_path / "cut", *CHANNELS)
    model, _ = ft.load(str(tmp_path / "cut"), DenseConfig(), dtype="fp32", device="cpu")
    ft.attach(model, ft.LoRAConfig(rank=4))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, ids = torch.optim.Adam(trained, lr=1e-2), torch.arange(40, 72).reshape(2, 16)
    losses = []
    for _ in range(4):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("overrides", "words", "kind"),
    [
        (("pruner=layers", "calibrator=gptq", "quant=none"), "rounds nothing, so calibrator=gptq", ConfigError),
        (("pruner=heads", "pruner.sparsity=0.1", "quant=none"), "none of the 2 heads of keys and values", ConfigError),
        (("pruner=channels", "pruner.sparsity=0.1", "quant=none"), "none of the 128 channels", ConfigError),
        (("pruner=chanels", "quant=none"), "channels", UserError),
        (("pruner=layers", "pruner.refit=false", "quant=none"), "refit", UserError),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_mistakes_are_one_line(
    overrides: tuple[str, ...], words: str, kind: type[UserError], base: Path, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=words) as raised:
        quantize(quantize_models.arguments(base, text, tmp_path / "out", *overrides))
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir())


def test_text_is_needed_and_so_are_sizes_that_the_configuration_names(base: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pruner=channels looks at inputs: set data\.calibration=FILE$"):
        quantize(quantize_models.arguments(base, None, tmp_path / "out", *CHANNELS))
    gpt2 = quantize_models.save(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ModelError, match="GPT2LMHeadModel cannot lose heads: no entries of its configuration"):
        quantize(quantize_models.arguments(gpt2, text, tmp_path / "out", "pruner=heads", "quant=none"))


def test_a_pruned_base_keeps_its_zeros_or_is_refused(base: Path, text: Path, tmp_path: Path) -> None:
    quantize_models.run(base, text, tmp_path / "pruned", "pruner=magnitude", "pruner.sparsity=0.5", "quant=none")
    with pytest.raises(ConfigError, match=r"would fill its zeros: expected pruner\.refit=false"):
        quantize(quantize_models.arguments(tmp_path / "pruned", text, tmp_path / "out", *CHANNELS))
    quantize_models.run(tmp_path / "pruned", text, tmp_path / "cut", *CHANNELS, "pruner.refit=false")
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    zeros = float((weights["model.layers.0.self_attn.q_proj.weight"] == 0).float().mean())
    assert zeros == pytest.approx(0.5, abs=1e-3)
    assert json.loads((tmp_path / "cut" / "config.json").read_text("utf-8"))["pruning"]["method"] == "magnitude"
