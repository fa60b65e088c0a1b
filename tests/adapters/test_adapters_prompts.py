"""Virtual tokens before every row: prompt tuning, P-tuning v1, PreLayer. Oracles: PEFT, a float64 model written out here,
and the rows themselves, alone and without a cache."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_models import bits, dense_twin, frozen, ids, inputs, logits, make, randomize, task_of
from torch import Tensor, nn
from transformers import DynamicCache

from finetune.adapters.attach import attach
from finetune.adapters.input import InputAdapter
from finetune.adapters.p_tuning import PTuningConfig
from finetune.adapters.prelayer import PreLayerConfig
from finetune.adapters.prompt_tuning import PromptTuningConfig
from finetune.errors import ConfigError, ModelError, UserError

L = 5
KINDS: dict[str, Any] = {
    "prompt_tuning": lambda **s: PromptTuningConfig(**{"prefix_length": L, **s}),
    "lstm": lambda **s: PTuningConfig(**{"prefix_length": L, "encoder": "lstm", "encoder_hidden_size": 24, **s}),
    "mlp": lambda **s: PTuningConfig(**{"prefix_length": L, "encoder": "mlp", **s}),
    "prelayer": lambda **s: PreLayerConfig(**{"prefix_length": L, **s}),
}
IN_PEFT = ("prompt_tuning", "lstm", "mlp")
DECODERS = ("llama", "gpt2", "opt", "gpt_neox", "bloom", "falcon", "mixtral", "gemma", "gemma2")

each = pytest.mark.parametrize("kind", list(KINDS))


def attached(kind: str, family: str, quant: str = "dense", **settings: object) -> tuple[Any, InputAdapter]:
    """A frozen model with an adapter that has moved off its start."""
    model = frozen(family, quant)
    torch.manual_seed(3)
    adapter = attach(model, KINDS[kind](**settings))
    randomize(adapter)
    return model, adapter


def padded(side: str, missing: int = 3, length: int = 11) -> Tensor:
    """A mask of two rows, the second of them shorter."""
    mask = torch.ones(2, length, dtype=torch.long)
    cut = slice(length - missing, None) if side == "right" else slice(0, missing)
    mask[1, cut] = 0
    return mask


def said(model: nn.Module, mask: Tensor | None, **more: Any) -> Tensor:
    """Logits where the mask has tokens, as far as they have columns."""
    fed = inputs(model) | more | ({} if mask is None else {"attention_mask": mask})
    with torch.no_grad():
        found = model(**fed).logits
    if found.dim() == 3 and found.shape[1] == L + fed["input_ids"].shape[1]:
        found = found[:, L:]
    columns = found.dim() == 3 and found.shape[1] == fed["input_ids"].shape[1]
    return found[mask.bool()] if mask is not None and columns else found


# PEFT, both ways


@pytest.mark.parametrize("family", [*DECODERS, "bert", "roberta", "t5", "bart", "llama_score"])
@pytest.mark.parametrize("kind", IN_PEFT)
def test_peft_computes_what_we_save(kind: str, family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    model, adapter = attached(kind, family)
    adapter.save(tmp_path)
    theirs = PeftModel.from_pretrained(dense_twin(family), tmp_path)
    assert not torch.allclose(logits(model), logits(frozen(family)), atol=1e-3)
    for mask in (None, padded("right"), padded("left")):
        if mask is not None and family == "llama_score":
            continue  # without tokens to look at, PEFT's classifier takes the last column, padded or not
        wanted = said(theirs, mask)
        assert (said(model, mask) - wanted).abs().max() <= 2e-5, mask


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
@pytest.mark.parametrize("kind", IN_PEFT)
def test_we_compute_what_peft_saves(kind: str, family: str, tmp_path: Path) -> None:
    from peft import PromptEncoderConfig, PromptTuningConfig as Theirs, get_peft_model

    task = {"bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}.get(family, "CAUSAL_LM")
    torch.manual_seed(4)
    if kind == "prompt_tuning":
        config = Theirs(task_type=task, num_virtual_tokens=L, prompt_tuning_init="SAMPLE_VOCAB")
    else:
        config = PromptEncoderConfig(
            task_type=task, num_virtual_tokens=L, encoder_reparameterization_type=kind.upper(), encoder_hidden_size=24
        )
    theirs = get_peft_model(dense_twin(family), config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    theirs.save_pretrained(tmp_path)
    model = frozen(family)
    adapter = attach(model, KINDS[kind](path=str(tmp_path), prefix_length=20))
    assert adapter.virtual_tokens == L
    if family == "t5":  # PEFT keeps a second set for the decoder, and does not use it
        from safetensors.torch import load_file

        assert len(load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]) == 2 * L
    assert (said(model, None) - said(theirs, None)).abs().max() <= 2e-5
    again = tmp_path / "again"
    adapter.save(again)
    assert json.loads((again / "adapter_config.json").read_text())["num_virtual_tokens"] == L


def test_the_network_computes_what_pefts_does() -> None:
    from peft import PromptEncoder, PromptEncoderConfig

    for kind, layers in (("lstm", 2), ("lstm", 1), ("mlp", 2)):
        _, adapter = attached(kind, "llama", encoder_layers=layers)
        config = PromptEncoderConfig(
            num_virtual_tokens=L, token_dim=64, num_transformer_submodules=1, encoder_num_layers=layers,
            encoder_hidden_size=adapter.config.encoder_hidden_size or 64, encoder_reparameterization_type=kind.upper(),
        )  # fmt: skip
        theirs = PromptEncoder(config)
        theirs.load_state_dict(adapter.encoder.state_dict())
        assert torch.equal(bits(theirs(torch.arange(L)[None])[0]), bits(adapter.encoder()))


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_modules_trained_whole_are_in_files_as_pefts(family: str, tmp_path: Path) -> None:
    from peft import PeftModel, PromptTuningConfig as Theirs, get_peft_model
    from safetensors.torch import load_file

    whole = ["lm_head"] if family == "llama" else []
    model, adapter = attached("prompt_tuning", family, train_also=whole)
    adapter.save(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(dense_twin(family), tmp_path / "ours")
    assert (said(model, None) - said(theirs, None)).abs().max() <= 2e-5
    task = "SEQ_CLS" if family == "bert" else "CAUSAL_LM"
    config = Theirs(task_type=task, num_virtual_tokens=L, modules_to_save=whole or None)
    other = get_peft_model(dense_twin(family), config).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    other.save_pretrained(tmp_path / "theirs")
    both = [load_file(tmp_path / side / "adapter_model.safetensors") for side in ("ours", "theirs")]
    assert both[0].keys() == both[1].keys()
    assert len(both[0]) == (2 if family == "llama" else 3)
    loaded = frozen(family)
    attach(loaded, PromptTuningConfig(path=str(tmp_path / "theirs")))
    assert (said(loaded, None) - said(other, None)).abs().max() <= 2e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "is of method PREFIX_TUNING: expected PROMPT_TUNING"),
        ({"num_ranks": 4}, "sets num_ranks=4, which finetune does not compute: expected a plain PROMPT_TUNING"),
        ({"num_virtual_tokens": "5"}, "num_virtual_tokens is '5': expected a number from 1"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is 2: expected 1, or 2 for SEQ_2_SEQ_LM"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head': expected a list of names"),
        ({"token_dim": 32}, "has token_dim 32, but here it is 64"),
    ],
)
def test_settings_of_a_file_that_we_do_not_compute_are_refused_by_name(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    _, adapter = attached("prompt_tuning", "llama")
    adapter.save(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=words) as caught:
        attach(frozen("llama"), PromptTuningConfig(path=str(tmp_path)))
    assert "\n" not in str(caught.value)


def test_another_length_than_the_files_is_refused(tmp_path: Path) -> None:
    for kind, words in (("prompt_tuning", "adapter.prefix_length is 7, but the adapter .* has 5"), ("mlp", "has 5")):
        _, adapter = attached(kind, "llama")
        adapter.save(tmp_path / kind)
        with pytest.raises(ConfigError, match=words):
            attach(frozen("llama"), KINDS[kind](path=str(tmp_path / kind), prefix_length=7))


# Masks, padding, packing


@each
@pytest.mark.parametrize("family", DECODERS)
def test_a_padded_row_reads_what_it_reads_alone(kind: str, family: str) -> None:
    model, _ = attached(kind, family)
    tokens, alone = ids(), ids()[1:, 3:]
    with torch.no_grad():
        wanted = model(alone).logits
        right = torch.cat([alone, torch.zeros_like(alone[:, :3])], 1)
        found = model(torch.cat([tokens[:1], right]), attention_mask=padded("right")).logits[1:, :8]
        assert (found - wanted).abs().max() <= 1e-4
        mask = padded("left")
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        takes = "position_ids" in inspect.signature(model.forward).parameters
        found = model(tokens, attention_mask=mask, **({"position_ids": positions} if takes else {})).logits[1:, 3:]
        assert (found - wanted).abs().max() <= 1e-4


def rows_of(lengths: tuple[int, ...]):
    import numpy as np

    from finetune.data.rows import Row, TokenRows

    generator = np.random.default_rng(0)
    return TokenRows.of([Row(t, t) for t in (generator.integers(3, 96, n).astype(np.int32) for n in lengths)])


@each
@pytest.mark.parametrize("attention", ["eager", "sdpa", "finetune"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_packed_rows_read_what_each_reads_alone(kind: str, family: str, attention: str) -> None:
    from finetune.data.batching import collate
    from finetune.model.attention import register
    from finetune.training.separation import needs_mask, with_mask

    register()
    model, _ = attached(kind, family)
    model.set_attn_implementation(attention)
    rows = rows_of((6, 1, 4, 9))
    masked = needs_mask(model, rows, 0, torch.device("cpu"))
    assert masked == (family == "opt")
    batch = collate(rows, [[0, 1, 2], [3]], 0)
    batch = with_mask(batch, model) if masked else batch
    with torch.no_grad():
        packed = model(**batch.model_inputs()).logits
        assert packed.shape[:2] == batch.input_ids_BS.shape
        for b, (start, row) in enumerate([(0, 0), (6, 1), (7, 2), (0, 3)]):
            wanted = model(**collate(rows, [[row]], 0).model_inputs()).logits[0]
            found = packed[b // 3, start : start + len(wanted)]
            assert (found - wanted).abs().max() <= 1e-4


# Gradients


def plain_llama(config: Any, weights: dict[str, Tensor], trained: list[Tensor], kind: str, tokens: Tensor) -> Tensor:
    """Logits [B, S, V] of a Llama with virtual positions before the row, written out in float64."""
    embedded = weights["model.embed_tokens.weight"][tokens]
    first = trained[0][0] if kind == "prelayer" else trained[0]
    hidden = torch.cat([first.expand(len(tokens), -1, -1), embedded], 1)
    total, heads, groups = hidden.shape[1], config.num_attention_heads, config.num_key_value_heads
    size = config.hidden_size // heads
    inverse = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2).double() / size)
    angle = torch.arange(total)[:, None] * torch.cat([inverse, inverse])

    def norm(x: Tensor, name: str) -> Tensor:
        return weights[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    def turned(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], -1)
        return x * angle.cos() + half * angle.sin()

    for i in range(config.num_hidden_layers):
        name = f"model.layers.{i}"
        if kind == "prelayer":
            hidden = torch.cat([trained[0][i].expand(len(tokens), -1, -1), hidden[:, L:]], 1)
        x = norm(hidden, f"{name}.input_layernorm")
        q, k, v = (
            (x @ weights[f"{name}.self_attn.{p}_proj.weight"].T).unflatten(-1, (-1, size)).transpose(1, 2)
            for p in "qkv"
        )
        k, v = (t.repeat_interleave(heads // groups, 1) for t in (turned(k), v))
        scores = turned(q) @ k.transpose(-1, -2) / size**0.5
        scores = scores.masked_fill(~torch.ones(total, total, dtype=torch.bool).tril(), -torch.inf)
        attended = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        hidden = hidden + attended @ weights[f"{name}.self_attn.o_proj.weight"].T
        x = norm(hidden, f"{name}.post_attention_layernorm")
        gate, up, down = (weights[f"{name}.mlp.{p}_proj.weight"] for p in ("gate", "up", "down"))
        hidden = hidden + (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return norm(hidden, "model.norm")[:, L:] @ weights["lm_head.weight"].T


@each
@pytest.mark.parametrize("quant", ["dense", "nf4"])
def test_gradients_are_those_of_a_plain_float64_model(kind: str, quant: str) -> None:
    model, adapter = attached(kind, "llama", quant)
    nn.functional.cross_entropy(model(ids()).logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).backward()
    weights = {name: tensor.double() for name, tensor in dense_twin("llama", quant).state_dict().items()}
    encoder = copy.deepcopy(adapter.encoder).double()
    for parameter in encoder.parameters():
        parameter.grad = None
    wide = plain_llama(model.config, weights, [encoder()], kind, ids())
    nn.functional.cross_entropy(wide[:, :-1].flatten(0, 1), ids()[:, 1:].flatten()).backward()
    for name, parameter in encoder.named_parameters():
        mine = dict(adapter.encoder.named_parameters())[name].grad
        assert (mine - parameter.grad).norm() / parameter.grad.norm() <= 1e-5, name


@each
@pytest.mark.parametrize("packed", [False, True])
def test_recomputed_activations_give_the_same_gradients(kind: str, packed: bool) -> None:
    from finetune.data.batching import collate
    from finetune.training.mode import training_mode

    rows = rows_of((6, 2, 9))
    batch = collate(rows, [[0, 1], [2]] if packed else [[0], [2]], 0)
    found = []
    for again in (False, True):
        model, adapter = attached(kind, "llama")
        with training_mode(model, again):
            first, second = (model(**batch.model_inputs()).logits.square().sum() for _ in range(2))
            (first + 2 * second).backward()  # two graphs alive at a time
        found.append([p.grad for p in adapter.trainable().values()])
        assert all(gradient.abs().max() > 0 for gradient in found[-1])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-7)


@each
def test_the_chunked_cross_entropy_is_the_models_own(kind: str) -> None:
    from finetune.data.batching import collate
    from finetune.training.objectives.sft import SFTConfig, build

    for family in ("llama", "gpt2", "mixtral"):
        model, adapter = attached(kind, family)
        objective = build(SFTConfig(), model)
        assert objective.head is not None
        batch = collate(rows_of((6, 9)), [[0], [1]], 0)
        loss, count = objective.loss_sum(batch)
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapter.trainable().values())
        with torch.no_grad():
            spoken = model(**batch.model_inputs()).logits
        labels = batch.shifted_labels_BS()
        wanted = nn.functional.cross_entropy(spoken.flatten(0, 1), labels.flatten(), reduction="sum")
        aux = objective.head.aux_coefficient
        assert count == 13
        assert abs(loss.item() - wanted.item()) <= 1e-4 * wanted.item() if not aux else loss > wanted


# Generation


@each
@pytest.mark.parametrize("family", DECODERS)
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
        with pytest.raises(ConfigError, match="virtual tokens of adapter=prompt_tuning, but .*: generate without past"):
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
    model, adapter = attached("prompt_tuning", "bert")
    types = torch.cat([torch.zeros(2, 5), torch.ones(2, 6)], 1).long()
    moved = model(ids(), token_type_ids=types).logits
    assert not torch.allclose(moved, model(ids()).logits, atol=1e-4)
    assert torch.equal(model(ids(), token_type_ids=torch.zeros_like(types)).logits, model(ids()).logits)


# The adapter itself


@each
@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_disabled_and_detached_are_the_base(kind: str, family: str) -> None:
    model, adapter = attached(kind, family)
    base = frozen(family)
    wanted, moved = logits(base), logits(model)
    with adapter.disabled():
        assert torch.equal(bits(logits(model)), bits(wanted))
    with adapter.detached():
        assert torch.equal(bits(logits(model)), bits(wanted))
        assert list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(bits(logits(model)), bits(moved))
    assert not adapter.mergeable
    with pytest.raises(ConfigError, match="does not merge"):
        list(adapter.merged())


@each
def test_saved_and_loaded_gives_the_same_bits(kind: str, tmp_path: Path) -> None:
    model, adapter = attached(kind, "llama")
    adapter.save(tmp_path)
    other = frozen("llama")
    again = attach(other, KINDS[kind](path=str(tmp_path)))
    assert torch.equal(bits(logits(other)), bits(logits(model)))
    again.save(tmp_path / "again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes() or kind == "lstm"


@each
def test_attaches_where_there_are_no_weights(kind: str) -> None:
    for family in ("llama", "bert", "t5", "opt"):
        with torch.device("meta"):
            model = make(family)
            adapter = attach(model, KINDS[kind]())
        real = attach(frozen(family), KINDS[kind]())
        assert {n: p.shape for n, p in adapter.trainable().items()} == {n: p.shape for n, p in real.trainable().items()}
        assert all(p.is_meta for p in adapter.trainable().values())


@each
def test_trains_in_bf16_where_asked(kind: str) -> None:
    model, adapter = attached(kind, "llama", dtype="bf16")
    model.to(torch.bfloat16)
    model(ids(), labels=ids()).loss.backward()
    for parameter in adapter.trainable().values():
        assert parameter.dtype == parameter.grad.dtype == torch.bfloat16
        assert parameter.grad.isfinite().all()


def test_lengths_and_counts() -> None:
    for kind, count in (("prompt_tuning", L * 64), ("prelayer", 2 * L * 64)):
        _, adapter = attached(kind, "llama")
        assert sum(p.numel() for p in adapter.trainable().values()) == count
        assert adapter.virtual_tokens == L


# Starts


class Letters:
    """A tokenizer of the letters a to z."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - 87 for letter in text]}


def test_a_start_from_text_is_its_tokens_repeated_or_cut() -> None:
    for text, letters in (("abc", "abcab"), ("abcdefg", "abcde")):
        model = frozen("gemma")
        config = PromptTuningConfig(prefix_length=L, init="text", init_text=text)
        config.read_tokenizer(Letters())
        adapter = attach(model, config)
        tokens = torch.tensor([Letters()(letters)["input_ids"]])
        assert torch.equal(adapter.encoder(), model.get_input_embeddings()(tokens)[0])
        # They then stand before the row as the tokens would.
        joined = frozen("gemma")(torch.cat([tokens.expand(2, -1), ids()], 1)).logits[:, L:]
        assert torch.equal(logits(model), joined)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_prelayer_starts_as_the_tokens_it_is_made_of(family: str) -> None:
    model = frozen(family)
    config = PreLayerConfig(prefix_length=L, init="text", init_text="abcde")
    config.read_tokenizer(Letters())
    attach(model, config)
    tokens = torch.tensor([Letters()("abcde")["input_ids"]])
    joined = frozen(family)(torch.cat([tokens.expand(2, -1), ids()], 1)).logits[:, L:]
    assert (logits(model) - joined).abs().max() <= 1e-5


def test_a_start_from_the_vocabulary_is_drawn_by_the_seed() -> None:
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        starts.append(attach(frozen("llama"), PromptTuningConfig(prefix_length=L)).encoder().detach())
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    rows = frozen("llama").get_input_embeddings().weight
    assert all(any(torch.equal(row, other) for other in rows) for row in starts[0])


@pytest.mark.parametrize(
    ("make_config", "words"),
    [
        (lambda: PromptTuningConfig(prefix_length=0), "adapter.prefix_length is 0"),
        (lambda: PromptTuningConfig(init="vocab"), "did you mean 'vocabulary'"),
        (lambda: PromptTuningConfig(init="text"), "expected init=text with a text, or neither"),
        (lambda: PreLayerConfig(init_text="a"), "expected init=text with a text, or neither"),
        (lambda: PTuningConfig(encoder="gru"), "adapter.encoder is 'gru': expected lstm | mlp"),
        (lambda: PTuningConfig(encoder_hidden_size=0), "encoder_hidden_size is 0"),
        (lambda: PTuningConfig(encoder_layers=0), "encoder_layers is 0"),
        (lambda: PTuningConfig(encoder_dropout=1.0), "encoder_dropout is 1.0"),
        (lambda: attach(frozen("llama"), PromptTuningConfig(init="text", init_text="a")), "needs a tokenizer"),
        (
            lambda: PromptTuningConfig(init="text", init_text="").read_tokenizer(Letters()),
            "in which the tokenizer finds no token",
        ),
    ],
)
def test_bad_settings_are_one_line(make_config: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        make_config()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_must_leave_room_for_virtual_tokens() -> None:
    from finetune.checks import check_fit, check_training
    from finetune.config import RunConfig
    from finetune.model.load import context_length

    config = RunConfig()
    config.adapter = PromptTuningConfig(prefix_length=40)
    config.export.formats = ["peft"]
    context = context_length(config.model)
    config.data.max_length = context - 39
    with pytest.raises(ConfigError, match=f"data.max_length is {context - 39} and adapter=prompt_tuning puts 40 "):
        check_fit(config)
    config.data.max_length = context - 40
    check_fit(config)
    adapter = attach(frozen("llama"), config.adapter)
    assert check_training(config, adapter) == context - 40


def test_a_method_that_cannot_train_so_says_it_before_anything_is_loaded() -> None:
    from finetune.checks import check_training
    from finetune.config import RunConfig

    adapter = attach(frozen("llama"), PromptTuningConfig())
    adapter.training_obstacle = lambda gradient_checkpointing, packing: "not so" if packing else ""
    config = RunConfig()
    check_training(config, adapter)
    config.data.packing = True
    with pytest.raises(ConfigError, match="not so"):
        check_training(config, adapter)


def test_a_model_that_takes_tokens_alone_is_refused() -> None:
    model = frozen("llama")

    class Deaf(type(model.model)):
        def forward(self, input_ids: Tensor) -> Tensor:
            raise NotImplementedError

    model.__class__ = model.model.__class__ = Deaf
    with pytest.raises(ConfigError, match="adapter=prompt_tuning needs"):
        attach(model, PromptTuningConfig())
