"""What `load` gives back, and what it refuses once the weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune.errors import ConfigError, ModelError
from finetune.model.config import ModelConfig
from finetune.model.describe import storage_table, storage_text
from finetune.model.load import Loaded, context_length, load
from finetune.quant.base import FrozenExperts, FrozenLinear
from finetune.quant.dense import DenseConfig
from finetune.quant.fp4 import FP4Config
from finetune.quant.keep import KeepConfig
from finetune.quant.nf4 import NF4Config
from finetune.structure import inspect

Checkpoint = Callable[..., Path]


def ours(path: Path, quant: Any = None, dtype: torch.dtype = torch.float32, **settings: Any) -> Loaded:
    return load(ModelConfig(path=str(path), **settings), quant or NF4Config(), dtype, "cpu")


def plain(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


@pytest.fixture
def base(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("Llama"), tmp_path / "base"))


def rewrite(base: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(base / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, base / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Mixtral", "GptOss", "Falcon", "OPT", "Gemma2"])
@pytest.mark.parametrize("quant", [DenseConfig(), KeepConfig()], ids=["none", "keep"])
def test_a_dense_base_is_the_stock_model(checkpoint: Checkpoint, ids: torch.Tensor, family: str, quant: Any) -> None:
    path = checkpoint(family, **_extra(family))
    loaded = ours(path, quant)
    torch.testing.assert_close(loaded.model(ids).logits, plain(path)(ids).logits, rtol=0, atol=2e-5)
    assert loaded.quantization_config is None
    assert loaded.notes == [] or "model.attention=eager is used" in loaded.notes[0]
    assert not hasattr(loaded.model.config, "quantization_config")
    projections = inspect(loaded.model).projections
    assert projections
    for projection in projections:
        assert isinstance(loaded.model.get_submodule(projection.name), FrozenLinear | FrozenExperts)


@pytest.mark.parametrize("family", ["Llama", "GPT2", "Mixtral", "GptOss", "Falcon", "Qwen2Moe"])
def test_a_quantized_base_computes_with_its_decoded_weights(
    checkpoint: Checkpoint, ids: torch.Tensor, family: str
) -> None:
    path = checkpoint(family, **_extra(family))
    loaded, reference = ours(path, FP4Config(double_quant=False)), plain(path)
    for projection in inspect(reference).projections:
        module = loaded.model.get_submodule(projection.name)
        decoded = module.dequantize(torch.float32)
        if projection.kind == "experts":
            parent, _, leaf = projection.name.rpartition(".")
            target = getattr(reference.get_submodule(parent), leaf)
        else:
            target = reference.get_submodule(projection.name).weight
            decoded = decoded.T if projection.transposed else decoded
        assert 0 < (decoded - target).abs().max() < 0.2 * target.abs().max()
        target.data = decoded.contiguous()
    torch.testing.assert_close(loaded.model(ids).logits, reference(ids).logits, rtol=0, atol=3e-5)


def test_everything_is_frozen_and_in_order(checkpoint: Checkpoint) -> None:
    loaded = ours(checkpoint("Llama"), dtype=torch.bfloat16)
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.model.lm_head.weight.dtype == loaded.model.model.norm.weight.dtype == torch.bfloat16
    assert inspect(loaded.model) == inspect(plain(checkpoint("Llama")))
    assert loaded.pad_id == loaded.tokenizer.eos_token_id == 2 and loaded.tokenizer.pad_token is None


def test_most_weights_of_a_mixture_are_quantized(checkpoint: Checkpoint) -> None:
    loaded = ours(checkpoint("Mixtral", intermediate_size=512))
    rows = storage_table(loaded.model)
    blocks = [row for row in rows if row.block]
    assert sum(r.weights for r in blocks if not r.dense) / sum(r.weights for r in blocks) > 0.99
    assert sum(r.weights for r in rows if not r.dense) / sum(r.weights for r in rows) > 0.9
    router = next(row for row in rows if row.name.endswith("mlp.gate.weight"))
    assert (router.storage, router.dense) == ("float32", True) and "router" in router.reason
    assert loaded.notes == []
    assert "nf4" in storage_text(loaded.model) and "embeddings" in storage_text(loaded.model)
    dense = plain(checkpoint("Mixtral", intermediate_size=512))
    assert sum(r.weights for r in rows) == sum(p.numel() for p in dense.parameters())


def test_experts_left_dense_are_said(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Stock bitsandbytes leaves the experts of a mixture in 16 bits: read as they are, with a note."""
    from transformers import BitsAndBytesConfig

    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint("Mixtral"), quantization_config=settings, device_map="cpu")
    theirs.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint("Mixtral") / name, tmp_path / name)
    loaded = ours(tmp_path, KeepConfig())
    (note,) = loaded.notes
    assert "% of the block weights are not quantized" in note and "experts" in note


def test_overwriting_the_source_does_not_change_the_model(base: Path, ids: torch.Tensor) -> None:
    for quant in (NF4Config(), DenseConfig()):
        loaded = ours(base, quant)
        before = loaded.model(ids).logits.clone()
        file, saved = base / "model.safetensors", (base / "model.safetensors").read_bytes()
        with file.open("r+b") as handle:  # in place: a mapping of the file would see it
            handle.seek(len(saved) // 2)
            handle.write(b"\xff" * (len(saved) - len(saved) // 2))
        assert torch.equal(loaded.model(ids).logits, before)
        file.write_bytes(saved)


def test_digests_say_what_is_the_same(checkpoint: Checkpoint, base: Path) -> None:
    one, cut = ours(checkpoint("Llama")), ours(checkpoint("Llama", shard="200KB"), FP4Config())
    assert one.digests["base"] == cut.digests["base"]
    assert one.digests["tokenizer"] == cut.digests["tokenizer"]
    assert one.digests["quantization"] != cut.digests["quantization"]
    assert all(len(digest) == 64 for digest in one.digests.values())
    rewrite(base, lambda tensors: tensors["lm_head.weight"][0, 0].add_(1))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    other = ours(base)
    assert {key for key in one.digests if one.digests[key] != other.digests[key]} == {"base", "chat_template"}


def test_the_head_is_quantized_where_asked(checkpoint: Checkpoint, ids: torch.Tensor) -> None:
    loaded = ours(checkpoint("Llama"), NF4Config(head=True))
    assert isinstance(loaded.model.lm_head, FrozenLinear)
    assert torch.isfinite(loaded.model(ids).logits).all()
    assert loaded.quantization_config["llm_int8_skip_modules"] == []
    with pytest.raises(ConfigError, match=r"quant.head is true, but lm_head shares its weight with the embeddings"):
        ours(checkpoint("GPT2"), NF4Config(head=True))


def test_attention_is_the_one_asked_for(checkpoint: Checkpoint, ids: torch.Tensor) -> None:
    eager, sdpa = ours(checkpoint("Llama"), attention="eager"), ours(checkpoint("Llama"))
    # our own attention takes over from sdpa where the compiled kernels are on, never from eager
    assert eager.model.config._attn_implementation == "eager"
    assert sdpa.model.config._attn_implementation in ("sdpa", "finetune")
    torch.testing.assert_close(eager.model(ids).logits, sdpa.model(ids).logits, rtol=0, atol=2e-5)


def test_context_length(checkpoint: Checkpoint, base: Path) -> None:
    assert context_length(ModelConfig(path=str(checkpoint("Llama")))) == 64
    assert context_length(ModelConfig(path=str(checkpoint("GPT2")))) == 64
    config = json.loads((base / "config.json").read_text())
    del config["max_position_embeddings"]  # left to the default of its class
    (base / "config.json").write_text(json.dumps(config))
    assert context_length(ModelConfig(path=str(base))) == LlamaConfig().max_position_embeddings


def test_weights_that_do_not_fit_are_refused(base: Path) -> None:
    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "layers.1" in n]:
            del tensors[name]

    whole = (base / "model.safetensors").read_bytes()
    rewrite(base, drop)
    with pytest.raises(ModelError, match=r"missing: model.layers.1.input_layernorm.weight, .* and 4 more$"):
        ours(base)
    (base / "model.safetensors").write_bytes(whole)
    rewrite(base, lambda tensors: tensors.update({"model.extra.weight": torch.zeros(2)}))
    with pytest.raises(ModelError, match=r"do not fit its config.json: unexpected: model.extra.weight$"):
        ours(base)
    (base / "model.safetensors").write_bytes(whole)
    rewrite(base, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(2)}))
    with pytest.raises(ModelError, match=r"mismatched: model.norm.weight"):
        ours(base)
    (base / "model.safetensors").write_bytes(whole)
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(base, lambda tensors: tensors.update({name: torch.zeros(2, 2)}))
    with pytest.raises(
        ModelError, match=rf"{name} has shape \[2, 2\] in the checkpoint, config.json leads to \[192, 128\]"
    ):
        ours(base)


def test_a_weight_that_is_not_finite_is_named(base: Path) -> None:
    rewrite(base, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"][3, 3].fill_(float("nan")))
    with pytest.raises(ModelError, match=r"model.layers.0.mlp.up_proj.weight: .*NaN"):
        ours(base)


def test_configurations_that_cannot_be_used(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())

    def refused(words: str, **changes: Any) -> None:
        (base / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=words) as caught:
            ours(base)
        assert "\n" not in str(caught.value)

    refused("model_type 'lama', which this transformers does not know; did you mean 'llama", model_type="lama")
    refused(
        r"needs Python that comes with the checkpoint.*model.trust_remote_code=true",
        model_type="mine",
        auto_map={"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    )
    refused("holds a vit model, which is no causal language model", model_type="vit")
    (base / "config.json").write_text(json.dumps(config))
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be used"):
        ours(base)
    tokenizer = json.loads((base / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (base / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"the tokenizer in .* model\.trust_remote_code=true$"):
        ours(base)


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"model.path=nobody/nothing") as caught:
        ours(Path("nobody/nothing"))
    assert "\n" not in str(caught.value)


def test_a_hub_id_from_the_cache(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ids: torch.Tensor
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit, source = "0" * 40, checkpoint("Llama", shard="200KB")
    repository = tmp_path / "models--nobody--something"
    snapshot = Path(shutil.copytree(source, repository / "snapshots" / commit))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded = ours(Path("nobody/something"))
    assert loaded.base_path == loaded.model.config._name_or_path == "nobody/something"
    assert torch.equal(loaded.model(ids).logits, ours(source).model(ids).logits)
    assert context_length(ModelConfig(path="nobody/something")) == 64
    with pytest.raises(ModelError, match="at revision v2"):
        ours(Path("nobody/something"), revision="v2")
    next(snapshot.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="lacks the shard model-00002"):
        ours(Path("nobody/something"))


def test_sequential_modules_keep_their_order(checkpoint: Checkpoint) -> None:
    loaded, dense = ours(checkpoint("Llama")), plain(checkpoint("Llama"))
    names = [name for name, module in dense.named_modules() if isinstance(module, nn.Linear)]
    frozen = [name for name, module in loaded.model.named_modules() if isinstance(module, FrozenLinear | nn.Linear)]
    assert frozen == names


def _extra(family: str) -> dict[str, Any]:
    return {
        "Falcon": {"num_kv_heads": 4},
        "OPT": {"word_embed_proj_dim": 64, "ffn_dim": 192},
        "Gemma2": {"head_dim": 32},
    }.get(family, {})


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM


class MineConfig(LlamaConfig):
    model_type = "mine_of_the_tests"


class MineForCausalLM(LlamaForCausalLM):
    config_class = MineConfig
"""


def test_python_of_the_checkpoint_runs_only_where_allowed(
    base: Path, tmp_path: Path, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    expected = ours(base).model(ids).logits
    config = json.loads((base / "config.json").read_text())
    auto_map = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.MineForCausalLM"}
    (base / "mine.py").write_text(REMOTE)
    (base / "config.json").write_text(json.dumps(config | {"model_type": "mine_of_the_tests", "auto_map": auto_map}))
    with pytest.raises(ModelError, match=r"model\.trust_remote_code=true"):
        ours(base)
    assert torch.equal(ours(base, trust_remote_code=True).model(ids).logits, expected)


def test_native_code_is_preferred_to_the_checkpoints_own(base: Path, ids: torch.Tensor) -> None:
    """A checkpoint of a family that transformers knows loads without its Python, auto_map or not."""
    config = json.loads((base / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (base / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    (base / "evil.py").write_text("raise SystemExit('this ran')")
    assert torch.isfinite(ours(base).model(ids).logits).all()
