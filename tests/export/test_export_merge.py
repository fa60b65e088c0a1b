"""Merged checkpoints against the adapted model in memory, opened by stock transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from export_tiny import Trained, llama
from safetensors.torch import load_file
from torch import Tensor

from finetune.export.formats import bnb_nf4, safetensors
from finetune.export.merge import Stock, merged_weights
from finetune.quant.affine import Int3Config
from finetune.quant.codebook4 import Codebook4Linear
from finetune.quant.dense import DenseConfig
from finetune.quant.int8_storage import Int8Config
from finetune.quant.nf4 import NF4Config

IDS = torch.tensor([[5, 8, 11, 14, 17, 20], [9, 12, 15, 18, 21, 24]])


def gpt2() -> Any:
    from transformers import GPT2Config

    return GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=64, n_inner=128)


def mixtral() -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip


def stock_logits(directory: Path, ids: Tensor = IDS) -> Tensor:
    """What stock transformers makes of a checkpoint; anything missing or unexpected fails."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.float()
    with torch.no_grad():
        return model.eval()(input_ids=ids, use_cache=False).logits


def live_logits(trained: Trained) -> Tensor:
    with torch.no_grad():
        return trained.source.model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize(
    "quant",
    [NF4Config(), DenseConfig(), Int8Config(threshold=0), Int3Config()],
    ids=["nf4", "dense", "int8", "int3"],
)
@pytest.mark.parametrize("config", [llama, gpt2, mixtral], ids=["llama", "gpt2", "mixtral"])
def test_merged_equals_the_adapted_model_that_has_run(
    make_trained: Callable[..., Trained], config: Callable[[], Any], quant: Any, tmp_path: Path
) -> None:
    trained = make_trained(config(), quant, steps=3)
    expected = live_logits(trained)
    safetensors.write(replace(trained.source, dtype=torch.float32), tmp_path)
    torch.testing.assert_close(stock_logits(tmp_path), expected, atol=2e-5, rtol=1e-4)
    with trained.adapter.disabled():
        assert (live_logits(trained) - expected).abs().max() > 1e-2, "the adapter does nothing, so nothing was tested"
    torch.testing.assert_close(live_logits(trained), expected, atol=0, rtol=0)


def test_a_mixtral_is_written_under_the_names_of_its_checkpoints(
    make_trained: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = make_trained(mixtral(), NF4Config(), steps=1)
    safetensors.write(trained.source, tmp_path)
    written, base = load_file(tmp_path / "model.safetensors"), Path(trained.source.base_path) / "model.safetensors"
    assert {name: tensor.shape for name, tensor in written.items()} == {
        name: tensor.shape for name, tensor in load_file(base).items()
    }
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in written


@pytest.mark.parametrize("config", [llama, gpt2, mixtral], ids=["llama", "gpt2", "mixtral"])
def test_bnb_nf4_opens_in_stock_transformers(
    make_trained: Callable[..., Trained], config: Callable[[], Any], tmp_path: Path
) -> None:
    trained = make_trained(config(), NF4Config(), steps=3)
    written = bnb_nf4.write(trained.source, tmp_path)
    assert bnb_nf4.check(written, _stored(tmp_path)) is None
    expected, found = torch.log_softmax(live_logits(trained), -1), torch.log_softmax(stock_logits(tmp_path), -1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    assert kl < 5e-3
    with trained.adapter.disabled():
        base = torch.log_softmax(live_logits(trained), -1)
    assert kl < 0.1 * (expected.exp() * (expected - base)).sum(-1).mean(), "no nearer than the base is"


@pytest.mark.parametrize("config", [llama, gpt2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("quant", [NF4Config(), DenseConfig()], ids=["nf4", "dense"])
def test_training_rows_make_the_rounding_better(
    make_trained: Callable[..., Trained], config: Callable[[], Any], quant: Any, tmp_path: Path
) -> None:
    """On the rows themselves, compensated codes move the logits less than the nearest ones do."""
    trained = make_trained(config(), quant, steps=3)
    heads = [row.input_ids[:4] for row in trained.rows if len(row.input_ids) >= 4]
    rows = torch.tensor([head.tolist() for head in heads[:16]])
    with torch.no_grad():
        expected = trained.source.model(input_ids=rows, use_cache=False).logits
    moved = {}
    for name, calibration in (("nearest", None), ("compensated", trained.rows)):
        (tmp_path / name).mkdir()
        bnb_nf4.write(replace(trained.source, calibration=calibration, pad_id=0), tmp_path / name)
        moved[name] = float((stock_logits(tmp_path / name, rows) - expected).square().mean())
    assert moved["compensated"] < 0.8 * moved["nearest"], moved
    with torch.no_grad():
        assert torch.equal(trained.source.model(input_ids=rows, use_cache=False).logits, expected)


def test_calibration_in_shares_is_the_same(
    make_trained: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A model whose products do not fit in the budget is run through several times, to the same codes."""
    from finetune.export import calibration

    trained = make_trained(llama(), NF4Config(), steps=2)
    source = replace(trained.source, calibration=trained.rows, pad_id=0)
    for name, budget in (("at_once", calibration.BUDGET_BYTES), ("in_shares", 1)):
        monkeypatch.setattr(calibration, "BUDGET_BYTES", budget)
        (tmp_path / name).mkdir()
        bnb_nf4.write(source, tmp_path / name)
    at_once, in_shares = (load_file(tmp_path / name / "model.safetensors") for name in ("at_once", "in_shares"))
    assert all(torch.equal(at_once[key], in_shares[key]) for key in at_once)


def test_zero_delta_keeps_every_code_bit_for_bit(make_trained: Callable[..., Trained], tmp_path: Path) -> None:
    trained = make_trained(llama(), NF4Config(), steps=0)
    bnb_nf4.write(trained.source, tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    modules = [(n, m) for n, m in trained.source.model.named_modules() if isinstance(m, Codebook4Linear)]
    assert len(modules) == 14
    for name, module in modules:
        for key, tensor in module.state_dict().items():
            assert torch.equal(written[f"{name.removesuffix('.base')}.{key}"], tensor), (name, key)


def test_a_dense_base_is_quantized_where_stock_would(make_trained: Callable[..., Trained], tmp_path: Path) -> None:
    trained = make_trained(llama(tie_word_embeddings=False), DenseConfig(), steps=1)
    written = bnb_nf4.write(trained.source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert config["bnb_4bit_use_double_quant"] is True and config["llm_int8_skip_modules"] == ["lm_head"]
    assert len(written.quantized) == 14 and bnb_nf4.check(written, _stored(tmp_path)) is None
    stock_logits(tmp_path)


def test_check_sees_what_was_not_quantized(make_trained: Callable[..., Trained], tmp_path: Path) -> None:
    trained = make_trained(llama(), NF4Config(), steps=0)
    promised = bnb_nf4.write(trained.source, tmp_path / "nf4") if (tmp_path / "nf4").mkdir() is None else None
    (tmp_path / "dense").mkdir()
    safetensors.write(trained.source, tmp_path / "dense")
    assert promised is not None
    assert bnb_nf4.check(promised, _stored(tmp_path / "dense")) == "0 modules are packed in the file, 14 were to be"


def test_shards_and_their_index(make_trained: Callable[..., Trained], tmp_path: Path) -> None:
    trained = make_trained(llama(), NF4Config(), steps=1)
    source = replace(trained.source, dtype=torch.float32, max_shard_bytes=60_000)
    safetensors.write(source, tmp_path)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for shard in shards for t in load_file(tmp_path / shard).values()
    )
    assert all(sum(t.numel() * 4 for t in load_file(tmp_path / s).values()) <= 60_000 for s in shards)
    torch.testing.assert_close(stock_logits(tmp_path), live_logits(trained), atol=2e-5, rtol=1e-4)


def test_what_belongs_to_a_checkpoint_survives(make_trained: Callable[..., Trained], tmp_path: Path) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    trained = make_trained(llama(), NF4Config(), steps=0)
    safetensors.write(trained.source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is True and "quantization_config" not in config
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    generation = GenerationConfig.from_pretrained(tmp_path)
    assert generation.eos_token_id == [1, 3] and generation.pad_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == trained.source.tokenizer.chat_template


def test_a_trained_tied_head_stays_tied(make_trained: Callable[..., Trained], tmp_path: Path) -> None:
    trained = make_trained(llama(), NF4Config(), steps=3, train_also=["lm_head", "embed_tokens"])
    safetensors.write(replace(trained.source, dtype=torch.float32), tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(stock_logits(tmp_path), live_logits(trained), atol=2e-5, rtol=1e-4)
    before = load_file(Path(trained.source.base_path) / "model.safetensors")["model.embed_tokens.weight"].float()
    assert not torch.equal(load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"], before)


def test_a_head_that_training_has_untied_is_written_untied(
    make_trained: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = make_trained(llama(), NF4Config(), steps=0)
    head = torch.randn(30, 64, generator=torch.Generator().manual_seed(3))

    class HeadAlone:
        @contextmanager
        def disabled(self) -> Iterator[None]:
            yield

        def merged(self) -> Iterator[tuple[str, Tensor]]:
            yield "lm_head.weight", head

    source = replace(trained.source, adapter=HeadAlone(), dtype=torch.float32)  # type: ignore[arg-type]
    safetensors.write(source, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    written = load_file(tmp_path / "model.safetensors")
    torch.testing.assert_close(written["lm_head.weight"], head)
    assert "model.embed_tokens.weight" in written
    stock_logits(tmp_path)


def test_weights_come_one_at_a_time_and_once(make_trained: Callable[..., Trained]) -> None:
    trained = make_trained(gpt2(), NF4Config(), steps=1)
    stock = Stock.of(trained.source.model)
    names = [name for name, _ in merged_weights(trained.source, stock)]
    assert sorted(names) == sorted(stock.names) and len(set(names)) == len(names)
    assert next(stock.model.parameters()).is_meta


def _stored(directory: Path) -> list[Any]:
    from finetune.export.export import stored_tensors

    return stored_tensors(directory)
