"""Generation with virtual tokens before every row: a cache changes nothing, a batch is its rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters_models import frozen, ids
from adapters_prompts import CASES, L, attached, each, padded
from transformers import DynamicCache

from finetune.errors import ConfigError


@pytest.mark.parametrize(("kind", "family"), CASES)
def test_a_cache_changes_nothing(kind: str, family: str) -> None:
    model, _ = attached(kind, family)
    prompt = ids(rows=2, length=6)
    mask = padded("left", 2, 6)
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **asked)
    plain = model.generate(prompt, attention_mask=mask, use_cache=False, **asked)
    assert torch.equal(cached.sequences, plain)
    with torch.no_grad():
        full = model(cached.sequences[:1, :-1], use_cache=False).logits[0, 5:]
        assert (torch.stack(cached.logits, 1)[0] - full).abs().max() <= 1e-4
    single = model.generate(prompt[1:, 2:], **asked)
    assert torch.equal(single[0], cached.sequences[1, 2:])
    assert torch.equal(model.generate(prompt[:1], **asked)[0], cached.sequences[0])


@each
def test_beams_samples_and_chunks_go_through_the_cache(kind: str) -> None:
    model, _ = attached(kind, "llama")
    prompt, mask = ids(rows=2, length=6), padded("left", 2, 6)
    asked: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}
    beams = [model.generate(prompt, num_beams=3, do_sample=False, use_cache=cache, **asked) for cache in (True, False)]
    assert torch.equal(*beams)
    samples = []
    for cache in (True, False):
        torch.manual_seed(0)
        samples.append(model.generate(prompt, do_sample=True, use_cache=cache, **asked))
    assert torch.equal(*samples)
    chunked = model.generate(prompt, do_sample=False, prefill_chunk_size=4, **asked)
    plain = model.generate(prompt, do_sample=False, **asked)
    assert torch.equal(chunked, plain)
    helped = {key: value for key, value in asked.items() if key != "attention_mask"} | {"do_sample": False}
    for helper in ({"assistant_model": frozen("llama")}, {"prompt_lookup_num_tokens": 2}):
        assert torch.equal(model.generate(prompt[:1], **helper, **helped), plain[:1])


@each
def test_an_encoder_and_decoder_generate_as_without_a_cache(kind: str) -> None:
    for family in ("t5", "bart"):
        model, adapter = attached(kind, family)
        asked: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        batch = [model.generate(ids(), attention_mask=padded("right"), use_cache=c, **asked) for c in (True, False)]
        assert torch.equal(*batch)
        single = model.generate(ids()[1:, :8], **asked)
        assert torch.equal(single[0], batch[0][1])
        with adapter.disabled():
            base = model.generate(ids()[1:, :8], **asked)
        assert torch.equal(base, frozen(family).generate(ids()[1:, :8], **asked))


def test_a_cache_that_would_be_misread_is_refused() -> None:
    model, _ = attached("prompt_tuning", "llama")
    prompt = ids(rows=1, length=6)
    asked: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with pytest.raises(ConfigError, match="needs a cache that grows"):
        model.generate(prompt, cache_implementation="static", **asked)
    for mask in (None, padded("left", 2, 9)[1:]):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(prompt, past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == 6 + L
        longer = torch.cat([prompt, ids(rows=1, length=3)], 1)
        with pytest.raises(ConfigError, match=r"virtual tokens of adapter=prompt_tuning, but .*: generate without"):
            model.generate(longer, past_key_values=cache, **asked, **({} if mask is None else {"attention_mask": mask}))


def test_what_comes_out_has_the_columns_of_the_tokens() -> None:
    for family in ("llama", "mixtral", "bert", "bert_mlm"):
        model, _ = attached("prelayer", family)
        more = {"output_router_logits": True} if family == "mixtral" else {}
        with torch.no_grad():
            out = model(ids(), output_hidden_states=True, output_attentions=True, **more)
        assert all(h.shape[1] == 11 for h in out.hidden_states)
        assert all(a.shape[2:] == (11, 11 + L) for a in out.attentions)
        if family == "mixtral":
            assert all(r.shape == (22, 4) for r in out.router_logits)
        named, listed = model(ids()).to_tuple()[0], model(ids(), return_dict=False)[0]
        assert torch.equal(named, listed)


def test_token_types_are_kept() -> None:
    model, _ = attached("prompt_tuning", "bert")
    types = torch.cat([torch.zeros(2, 5), torch.ones(2, 6)], 1).long()
    moved = model(ids(), token_type_ids=types).logits
    assert not torch.allclose(moved, model(ids()).logits, atol=1e-4)
    assert torch.equal(model(ids(), token_type_ids=torch.zeros_like(types)).logits, model(ids()).logits)
