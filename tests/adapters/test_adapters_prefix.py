"""Keys and values before those of the text: what holds besides the contract of every adapter."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import weakref
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
from adapters_models import bits, dense_twin, frozen, ids, loss, make, randomize, task_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune.adapters.attach import attach
from finetune.adapters.key_value import KeyValueAdapter
from finetune.adapters.p_tuning_v2 import PTuningV2Config
from finetune.adapters.prefix import PrefixConfig
from finetune.data.batching import packed_mask
from finetune.data.rows import Row, TokenRows
from finetune.errors import ConfigError, ModelError
from finetune.structure.attention import attending
from finetune.training.mode import training_mode
from finetune.training.separation import needs_mask

L = 5
BY_ATTENTION = ("llama", "gpt2", "opt", "qwen3", "gpt_oss", "bert", "roberta")
BY_CACHE = ("bloom", "falcon_new", "t5", "bart")
PEFTS = {"CausalLM": "CAUSAL_LM", "SequenceClassification": "SEQ_CLS", "Seq2SeqLM": "SEQ_2_SEQ_LM"}


def prefixed(family: str, attention: str = "sdpa", moved: bool = True, quant: str = "dense", **settings: object):
    """A frozen model with a prefix that has moved off its start."""
    model = frozen(family, quant)
    if attention != "eager" and model._can_set_attn_implementation() and family != "gpt_oss":
        model.set_attn_implementation(attention)
    torch.manual_seed(3)
    adapter = attach(model, PrefixConfig(**{"prefix_length": L, "width": 16, **settings}))
    if moved:
        randomize(adapter)
    return model, adapter


def fed(model: nn.Module, mask: Tensor | None = None, **more: object) -> dict[str, object]:
    """Inputs of two rows; a mask zero somewhere turns the tokens there into padding."""
    tokens = ids()
    inputs: dict[str, object] = {"input_ids": tokens if mask is None else tokens.masked_fill(mask == 0, 0)}
    if mask is not None:
        inputs["attention_mask"] = mask
    if task_of(model) == "Seq2SeqLM":
        inputs["decoder_input_ids"] = ids(length=7)
    return inputs | more


@torch.no_grad()
def said(model: nn.Module, mask: Tensor | None = None, **more: object) -> Tensor:
    """Logits at real tokens."""
    found = model(**fed(model, mask, **more)).logits
    return found[mask.bool()] if mask is not None and found.shape[1] == mask.shape[1] else found


def padded(side: str) -> Tensor:
    """A mask of two rows, the second of them three tokens shorter."""
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, slice(0, 3) if side == "left" else slice(8, None)] = 0
    return mask


@pytest.mark.parametrize("family", [*BY_ATTENTION, *BY_CACHE])
def test_files_of_peft_and_for_peft_say_the_same(family: str, tmp_path: Path) -> None:
    twin = dense_twin(family)
    settings = {"task_type": PEFTS[task_of(twin)], "num_virtual_tokens": L}
    torch.manual_seed(4)
    projected = peft.PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=24, **settings)
    theirs = peft.get_peft_model(twin, projected).eval()
    theirs.save_pretrained(str(tmp_path / "theirs"))
    model, adapter = prefixed(family, "eager", moved=False, path=str(tmp_path / "theirs"))
    assert isinstance(adapter, KeyValueAdapter)
    assert (adapter.way is None) == (family in BY_CACHE)
    adapter.save(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(dense_twin(family), str(tmp_path / "ours")).eval()
    with adapter.disabled():
        assert (said(model) - said(theirs)).abs().max() > 1e-3
    masks = [None, torch.ones(2, 11, dtype=torch.long), padded("left"), padded("right")]
    for mask, reader in itertools.product(masks, (theirs, back)):
        difference = (said(model, mask) - said(reader, mask)).abs().max()
        assert difference <= 2e-5, (mask, difference)
    if task_of(model) == "CausalLM":
        positions = torch.arange(4, 15).expand(2, -1)
        difference = said(model, position_ids=positions) - said(theirs, position_ids=positions)
        assert difference.abs().max() <= 2e-5


def test_a_file_without_projection_and_other_shapes(tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=L)
    theirs = peft.get_peft_model(dense_twin("llama"), config).eval()
    theirs.save_pretrained(str(tmp_path))
    model, adapter = prefixed("llama", moved=False, path=str(tmp_path))
    assert (said(model) - said(theirs)).abs().max() <= 2e-5
    values = model.prompt_encoder.values.detach()
    assert adapter.learning_rate_scales() == {"prompt_encoder.values": 50.0 * float(values.square().mean().sqrt())}
    with pytest.raises(ModelError, match="token_dim 32, but here it is 64"):
        attach(frozen("gpt2"), PrefixConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"prefix_length is 7, but the adapter .* has 5"):
        attach(frozen("llama"), PrefixConfig(path=str(tmp_path), prefix_length=7))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings | {"peft_type": "PROMPT_TUNING"}))
    with pytest.raises(ModelError, match="PROMPT_TUNING: expected PREFIX_TUNING"):
        PrefixConfig(path=str(tmp_path)).check_saved(tmp_path)


def test_heads_of_tasks_are_saved_as_peft_saves_them(tmp_path: Path) -> None:
    model = frozen("bert")
    adapter = attach(model, PTuningV2Config(prefix_length=L))
    randomize(adapter)
    adapter.save(tmp_path)
    theirs = peft.PeftModel.from_pretrained(dense_twin("bert"), str(tmp_path)).eval()
    assert (said(model) - said(theirs)).abs().max() <= 2e-5
    theirs.save_pretrained(str(tmp_path / "again"))
    again = frozen("bert")
    attach(again, PTuningV2Config(path=str(tmp_path / "again")))
    assert torch.equal(bits(said(again)), bits(said(model)))


def test_two_layers_and_what_comes_out_of_them_are_the_same(tmp_path: Path) -> None:
    model, adapter = prefixed("llama")
    adapter.save(tmp_path)
    other, materialised = prefixed("llama", moved=False, path=str(tmp_path))
    assert len(adapter.trainable()) == 6
    assert list(materialised.trainable()) == ["prompt_encoder.values"]
    assert torch.equal(bits(said(other)), bits(said(model)))


def test_it_is_attention_over_more_keys() -> None:
    """Against attention written out over the keys and values that a prefix is, in float64."""
    model, adapter = prefixed("mistral", "sdpa")
    block = model.model.layers[0]
    seen: dict[str, Tensor] = {}
    block.self_attn.o_proj.register_forward_pre_hook(lambda _m, args: seen.update(out=args[0]))
    block.register_forward_pre_hook(lambda _m, args, kwargs: seen.update(h=args[0]), with_kwargs=True)
    said(model)
    h = block.input_layernorm(seen["h"])
    attention, window = block.self_attn, model.config.sliding_window
    query, key, value = (
        p(h).unflatten(-1, (-1, 16)).transpose(1, 2) for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    from transformers.models.mistral.modeling_mistral import apply_rotary_pos_emb

    positions = torch.arange(11)[None] + L
    query, key = apply_rotary_pos_emb(query, key, *model.model.rotary_emb(h, positions))
    first, second = adapter.pair(0)
    keys = torch.cat([first.expand(2, -1, -1, -1), key], 2).repeat_interleave(2, 1).double()
    values = torch.cat([second.expand(2, -1, -1, -1), value], 2).repeat_interleave(2, 1).double()
    i, j = torch.arange(11)[:, None], torch.arange(11)[None]
    mask = torch.cat([torch.ones(11, L, dtype=torch.bool), (j <= i) & (i - j < window)], 1)
    wanted = F.scaled_dot_product_attention(query.double(), keys, values, mask).transpose(1, 2).flatten(2)
    assert window < 11
    assert (seen["out"].double() - wanted).abs().max() <= 1e-6


@pytest.mark.parametrize(("family", "attention"), [("llama", "sdpa"), ("gpt2", "eager"), ("opt", "sdpa"),
                                                   ("mistral", "sdpa"), ("mistral", "eager"), ("gpt_oss", "eager"),
                                                   ("falcon_new", "eager")])  # fmt: skip
def test_packed_rows_each_have_the_prefix(family: str, attention: str) -> None:
    model, _ = prefixed(family, attention)
    first, second = (np.random.default_rng(s).integers(3, 96, 11).astype(np.int32) for s in (0, 1))
    rows = TokenRows.of([Row(first, first), Row(second, second)])
    masked = needs_mask(model, rows, 0, torch.device("cpu"))
    packed = {"input_ids": torch.from_numpy(np.concatenate([first, second])).long()[None]}
    packed["position_ids"] = torch.arange(11).repeat(2)[None]
    if masked:
        from finetune.data.rows import Batch

        batch = Batch(packed["input_ids"], packed["input_ids"], packed["position_ids"], None)
        packed["attention_mask"] = packed_mask(batch, torch.float32)
    with torch.no_grad():
        together = model(**packed, use_cache=False).logits[0].unflatten(0, (2, 11))
        alone = model(torch.from_numpy(np.stack([first, second])).long(), use_cache=False).logits
    assert (together - alone).abs().max() <= 2e-5


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert"])
def test_recomputed_blocks_give_the_same_gradients(family: str) -> None:
    model, adapter = prefixed(family)
    found = []
    for checkpointing in (False, True):
        with training_mode(model, checkpointing):
            loss(model).backward()
        found.append([p.grad.clone() for p in adapter.trainable().values()])
        model.zero_grad()
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*found, strict=True))
    assert adapter.training_obstacle(gradient_checkpointing=True, packing=True) == ""


@pytest.mark.parametrize("family", BY_CACHE)
def test_a_cache_is_lost_on_recomputed_blocks(family: str) -> None:
    _, adapter = prefixed(family)
    assert "train.gradient_checkpointing=true" in adapter.training_obstacle(gradient_checkpointing=True, packing=False)
    assert adapter.training_obstacle(gradient_checkpointing=False, packing=True) == ""


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "mistral", "bloom", "falcon_new", "t5"])
def test_generation_by_cache_by_beams_and_in_batches(family: str) -> None:
    model, _ = prefixed(family)
    prompt, mask = ids(rows=2, length=9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :4] = 0
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for beams in (1, 3):
        batch = model.generate(prompt, attention_mask=mask, num_beams=beams, **settings)[:, -6:]
        plain = model.generate(prompt, attention_mask=mask, num_beams=beams, use_cache=False, **settings)[:, -6:]
        assert torch.equal(batch, plain)
        for row in range(2):
            alone = prompt[row : row + 1, mask[row].bool()]
            assert torch.equal(model.generate(alone, num_beams=beams, **settings)[0, -6:], batch[row])


def test_generation_with_a_cache_of_fixed_size() -> None:
    settings = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    model, _ = prefixed("llama")
    found = model.generate(ids(), **settings)
    assert torch.equal(found, model.generate(ids(), **settings | {"cache_implementation": None}))
    model, _ = prefixed("bloom")
    with pytest.raises(ConfigError, match="generate with a dynamic one"):
        model.generate(ids(), **settings)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "bloom", "t5"])
def test_detached_restores_everything(family: str, tmp_path: Path) -> None:
    base = frozen(family)
    model, adapter = prefixed(family, "eager")
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in base.modules()]
    with adapter.detached():
        assert model.config._attn_implementation == base.config._attn_implementation
        assert [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()] == hooks
        assert torch.equal(bits(said(model)), bits(said(base)))
    with adapter.disabled():
        assert torch.equal(bits(said(model)), bits(said(base)))
    assert not torch.equal(said(model), said(base))
    model.config.save_pretrained(str(tmp_path))
    assert "finetune" not in (tmp_path / "config.json").read_text()


def test_our_own_attention_and_rotation_stay_in_use() -> None:
    from finetune.model.exchange import exchange, why_not
    from finetune.model.fused_modules import FusedRotaryAttention, _ours

    def fused() -> nn.Module:
        torch.manual_seed(0)
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 96}  # fmt: skip
        model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes), attn_implementation="sdpa").eval()
        plain = copy.deepcopy(model)
        exchange(model)
        return model, plain

    model, plain = fused()
    if why_not(model):
        pytest.skip(why_not(model))
    assert any(isinstance(module, FusedRotaryAttention) for module in model.modules())
    wanted, name = said(model), model.config._attn_implementation
    torch.manual_seed(3)
    adapter = attach(model, PrefixConfig(prefix_length=L, width=16))
    with adapter.disabled():
        assert torch.equal(bits(said(model)), bits(wanted))
    assert name in model.config._attn_implementation
    assert _ours(model.config._attn_implementation) is not None
    torch.manual_seed(3)
    twin = attach(plain, PrefixConfig(prefix_length=L, width=16))
    with torch.no_grad():
        for mine, other in zip(adapter.trainable().values(), twin.trainable().values(), strict=True):
            other.copy_(mine)
    assert (said(model) - said(plain)).abs().max() <= 2e-5
    row = np.arange(3, 14, dtype=np.int32)
    assert needs_mask(model, TokenRows.of([Row(row, row), Row(row[::-1].copy(), row)]), 0, torch.device("cpu")) is False


def test_models_in_one_process_keep_their_own() -> None:
    first, _ = prefixed("llama")
    wanted = said(first)
    second, other = prefixed("llama", moved=False, init="random")
    assert not torch.allclose(said(second), wanted, atol=1e-3)
    other.unmount()
    assert torch.equal(bits(said(first)), bits(wanted))
    twin = copy.deepcopy(first)
    with pytest.raises(RuntimeError, match="copy of an adapted model"):
        said(twin)
    assert torch.equal(bits(said(first)), bits(wanted))
    known = weakref.ref(first)
    del first, twin, _
    gc.collect()
    assert known() is None


def test_the_start_is_what_the_base_keeps_of_a_text() -> None:
    """The first of the vocabulary's start: a model that reads on says what the base says of the whole text."""
    model, base = frozen("llama"), frozen("llama")
    torch.manual_seed(5)
    attach(model, PrefixConfig(prefix_length=L, width=16))
    torch.manual_seed(5)
    torch.empty(L, 2 * 2 * 32).normal_()
    text = torch.randint(96, (L,))
    with torch.no_grad():
        whole = base(torch.cat([text.expand(2, -1), ids()], 1), use_cache=False).logits[:, L:]
    assert (said(model) - whole).abs().max() <= 2e-5


def test_a_mask_that_is_absent_means_what_it_means_beneath() -> None:
    """Written-out attention hides nothing by itself; torch's, of a causal module, what follows a query."""
    from transformers import AttentionInterface

    for attention in ("eager", "sdpa"):
        model, adapter = prefixed("llama", attention)
        module, query = model.model.layers[0].self_attn, torch.randn(1, 4, 6, 16)
        key, value = torch.randn(2, 1, 2, 6, 16)
        attend = AttentionInterface()[model.config._attn_implementation]
        found, _ = attend(module, query, key, value, None, scaling=0.25)
        first, second = adapter.pair(0)
        keys, values = torch.cat([first[None], key], 2), torch.cat([second[None], value], 2)
        mask = torch.cat([torch.ones(6, L), torch.ones(6, 6).tril() if attention == "sdpa" else torch.ones(6, 6)], 1)
        wanted = F.scaled_dot_product_attention(query, keys, values, mask.bool(), scale=0.25, enable_gqa=True)
        assert (found - wanted.transpose(1, 2)).abs().max() <= 1e-6


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_dtypes_and_models_without_weights(family: str) -> None:
    model = frozen(family).to(torch.bfloat16)
    adapter = attach(model, PTuningV2Config(prefix_length=L))
    model.generate(ids(), max_new_tokens=3, pad_token_id=0)
    loss(model).backward()
    assert {p.grad.dtype for p in adapter.trainable().values()} == {torch.float32}
    adapter.unmount()
    adapter = attach(model, PTuningV2Config(prefix_length=L, dtype="bf16"))
    assert {p.dtype for p in adapter.trainable().values()} == {torch.bfloat16}
    loss(model).backward()
    assert {p.grad.dtype for p in adapter.trainable().values()} == {torch.bfloat16}
    with torch.device("meta"):
        bare = type(model)(model.config)
        assert all(p.is_meta for p in attach(bare, PrefixConfig()).trainable().values())
    assert said(model).dtype == torch.bfloat16


def test_attention_of_all_blocks_is_found_by_experiment() -> None:
    found = attending(make("t5"))
    assert [m.name for m in found.modules] == [f"decoder.block.{i}.layer.0.SelfAttention" for i in range(2)]
    assert "decoder.block.0.layer.1.EncDecAttention" in found.others
    assert attending(make("bloom")) is None
    (place,) = attending(make("roberta")).positions
    assert (place.name, place.argument) == ("roberta.embeddings.position_embeddings", 0)


@pytest.mark.parametrize(("settings", "words"), [
    ({"init": "vocabulry"}, "adapter.init is 'vocabulry': expected vocabulary | random; did you mean 'vocabulary'?"),
    ({"width": 0}, "adapter.width is 0: expected at least 1"),
    ({"ratio": 0.0}, "adapter.ratio is 0.0: expected more than 0"),
    ({"reparametrise": "yes"}, "adapter.reparametrise is 'yes': expected true or false"),
    ({"prefix_length": 0}, "adapter.prefix_length is 0: expected at least 1 virtual token"),
])  # fmt: skip
def test_settings_out_of_range(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        PrefixConfig(**settings)
    assert str(refused.value) == words


def test_a_model_that_attends_nowhere_is_refused() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=4))
    with pytest.raises(ConfigError, match="adapter=prefix needs attention in every block"):
        attach(model, PrefixConfig())
