"""Channels, heads and blocks cut out of models of many families: a stock model that computes the same is left."""

from __future__ import annotations

from typing import Any

import cut_families as families
import pytest
import torch

from finetune.errors import ConfigError, ModelError, UserError
from finetune.quant.pruners.base import PRUNERS
from finetune.quant.pruners.channels import ChannelsConfig
from finetune.quant.pruners.heads import HeadsConfig
from finetune.quant.pruners.layers import LayersConfig
from finetune.structure import inspect

CHANNELS = ["Llama", "Gemma", "GPT2", "OPT", "GPTNeoX", "Phi3", "Falcon", "Mixtral", "GptOss", "Qwen2Moe"]
HEADS = ["Llama", "Qwen2", "Qwen3", "Gemma", "Phi3", "Mixtral", "GptOss"]
LAYERS = ["Llama", "Gemma2", "GPT2", "OPT", "Bloom"]


@pytest.mark.parametrize("family", CHANNELS)
def test_channels_that_say_nothing_go_and_nothing_changes(family: str) -> None:
    model = families.model_of(family)
    families.silence(model, families.readers_of(model, "channels"), units=0)
    wanted = families.logits(model)
    widths = {p.name: p.in_features for p in families.readers_of(model, "channels")}
    pruner = families.cut(model, ChannelsConfig(sparsity=0.5, multiple_of=1))
    stock = families.stock_of(model)
    assert {p.name: 2 * p.in_features for p in families.readers_of(stock, "channels")} == widths
    torch.testing.assert_close(families.logits(stock), wanted, atol=1e-5, rtol=1e-5)
    assert all(part["error"] < 1e-9 for part in pruner.summary.parts)


@pytest.mark.parametrize("family", HEADS)
def test_heads_that_say_nothing_go_and_nothing_changes(family: str) -> None:
    model = families.model_of(family)
    families.silence(model, families.readers_of(model, "heads"), units=2)
    wanted = families.logits(model)
    families.cut(model, HeadsConfig(sparsity=0.5))
    stock = families.stock_of(model)
    assert (stock.config.num_attention_heads, stock.config.num_key_value_heads) == (2, 1)
    torch.testing.assert_close(families.logits(stock), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", LAYERS)
def test_a_block_that_does_nothing_goes_and_nothing_changes(family: str) -> None:
    model = families.model_of(family)
    structure = inspect(model)
    number = len(structure.blocks) // 2
    with torch.no_grad():
        for name, parameter in model.get_submodule(structure.blocks[number]).named_parameters():
            if "norm" not in name and "ln" not in name:
                parameter.zero_()
    wanted = families.logits(model)
    pruner = families.cut(model, LayersConfig(sparsity=1 / len(structure.blocks)))
    assert [part["name"] for part in pruner.summary.parts if part["dropped"]] == [structure.blocks[number]]
    stock = families.stock_of(model)
    assert len(inspect(stock).blocks) == len(structure.blocks) - 1
    torch.testing.assert_close(families.logits(stock), wanted, atol=1e-5, rtol=1e-5)


def test_the_influence_of_a_block_is_what_it_turns_the_hidden_states_by() -> None:
    model = families.model_of("Gemma2")
    with torch.no_grad():
        seen = [model(**batch, output_hidden_states=True).hidden_states for batch in families.batches()]
    wanted = []
    for before, after in [(0, 1), (1, 2), (2, 3)]:  # what comes behind the last block is normed already
        cosines = [torch.cosine_similarity(states[before], states[after], dim=-1) for states in seen]
        wanted.append(1 - float(torch.cat(cosines).mean()))
    found = families.cut(model, LayersConfig(sparsity=0.5)).summary.parts
    assert [part["influence"] for part in found[:3]] == pytest.approx(wanted, abs=1e-6)
    gone = sorted(found, key=lambda part: part["influence"])[:2]
    assert all(part["dropped"] == (part in gone) for part in found)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Phi3", ChannelsConfig(sparsity=0.3, multiple_of=1)),
        ("GPT2", ChannelsConfig(sparsity=0.25, choice="activation", refit=False)),
        ("Qwen2Moe", ChannelsConfig(sparsity=0.5, multiple_of=1, choice="magnitude")),
        ("Qwen3", HeadsConfig(sparsity=0.5)),
        ("Phi3", HeadsConfig(sparsity=0.5, choice="magnitude", refit=False)),
        ("Gemma2", LayersConfig(sparsity=0.5)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_what_is_left_computes_what_was_measured(family: str, settings: Any) -> None:
    model = families.model_of(family)
    wanted = families.logits(model)
    families.cut(model, settings)
    stock = families.stock_of(model)
    torch.testing.assert_close(families.logits(stock), families.logits(model), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(families.logits(stock), wanted, atol=1e-3)


def test_fitting_what_is_left_comes_nearer_and_the_choice_by_loss_nearest() -> None:
    errors = {}
    for name, told in (("size", ("magnitude", False)), ("fitted", ("magnitude", True)), ("loss", ("loss", True))):
        model = families.model_of("Llama")
        pruner = families.cut(model, ChannelsConfig(sparsity=0.5, multiple_of=1, choice=told[0], refit=told[1]))
        errors[name] = pruner.summary.parts[0]["error"]  # of the first block, whose inputs are the same in all three
    assert errors["loss"] < errors["fitted"] < errors["size"]
    assert pruner.summary.parts[0]["error_magnitude"] == pytest.approx(errors["size"], rel=1e-5)


@torch.no_grad()
def outputs_of(model: Any, name: str) -> torch.Tensor:
    """What a module gives for the text that was calibrated on."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _m, _a, output: seen.append(output.flatten(0, -2)))
    for batch in families.batches():
        model(**batch)
    handle.remove()
    return torch.cat(seen).double()


@pytest.mark.parametrize(
    ("family", "settings"), [("OPT", ChannelsConfig(sparsity=0.5, multiple_of=1)), ("Llama", HeadsConfig(sparsity=0.5))]
)
def test_the_error_that_is_told_is_the_one_that_there_is(family: str, settings: Any) -> None:
    """A bias that took part in the fit included."""
    model = families.model_of(family)
    (first, *_) = families.readers_of(model, settings.name)
    wanted = outputs_of(model, first.name)
    bias = getattr(model.get_submodule(first.name), "bias", None)
    size = (wanted if bias is None else wanted - bias.detach().double()).square().sum()
    (told, *_) = families.cut(model, settings).summary.parts
    error = (outputs_of(model, first.name) - wanted).square().sum() / size
    assert told["name"] == first.name and told["error"] == pytest.approx(float(error), rel=1e-3)


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("GPT2", HeadsConfig(), "no entries of its configuration give 3 of its 4 heads"),
        ("OPT", HeadsConfig(), "no entries of its configuration give 3 of its 4 heads"),
        ("GPTNeoX", HeadsConfig(), "no entries of its configuration give 3 of its 4 heads"),
        ("Falcon", HeadsConfig(), "its attention does not come by transformers' attention interface"),
        ("Bloom", HeadsConfig(), "its attention does not come by transformers' attention interface"),
        ("Bloom", ChannelsConfig(), "says that transformer.h.0.mlp.dense_4h_to_h reads 128"),
        ("DeepseekV3", ChannelsConfig(), "what its projections are for is not understood"),
        ("Llama", HeadsConfig(), "pruner.sparsity is 0.25, which is none of the 2 heads"),
        ("Llama", ChannelsConfig(sparsity=0.01), "pruner.sparsity is 0.01, which is none of the 48 channels"),
        ("Llama", LayersConfig(), "pruner.sparsity is 0.25, which is none of the 2 layers"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else getattr(value, "name", ""),
)
def test_what_cannot_be_cut_is_refused_without_weights(family: str, settings: Any, words: str) -> None:
    from finetune.model.pretrained import quiet

    with pytest.raises(UserError, match=words) as caught, quiet():
        PRUNERS.build(settings).plan(families.build(families.config_of(family)), families.build)
    assert "\n" not in str(caught.value)


def test_a_share_that_the_family_cannot_have_names_one_that_it_can() -> None:
    """Llama's configuration wants its width to be a multiple of its heads, so it can have 4 of 8, but not 6."""
    config = families.config_of("Llama")
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 64, 8, 4
    with pytest.raises(ConfigError, match=r"3 of its 4 heads of keys and values: expected 0\.5, which leaves 2"):
        PRUNERS.build(HeadsConfig()).plan(families.build(config), families.build)


def test_heads_that_a_norm_sees_together_are_refused_by_the_first_block() -> None:
    with pytest.raises(ModelError, match=r"Olmo2ForCausalLM cannot lose heads: a smaller model\.layers\.0 does not"):
        families.cut(families.model_of("Olmo2"), HeadsConfig(sparsity=0.5))


def test_blocks_that_depend_on_their_place_are_refused() -> None:
    model = families.model_of("GPT2")
    model.config.scale_attn_by_inverse_layer_idx = True
    for number, block in enumerate(model.transformer.h):
        block.attn.scaling = block.attn.scaling / (number + 1) if hasattr(block.attn, "scaling") else None
        block.attn.scale_attn_by_inverse_layer_idx = True
    with torch.no_grad():  # the first is the one that goes
        for parameter in model.transformer.h[0].parameters():
            parameter.mul_(0.01)
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel cannot lose layers: transformer\.h\.1 depends on its place"):
        families.cut(model, LayersConfig(sparsity=0.5))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ChannelsConfig(sparsity=0.0), "pruner.sparsity is 0.0: expected a share above 0 and below 1"),
        (lambda: LayersConfig(sparsity=1.0), "pruner.sparsity is 1.0"),
        (lambda: HeadsConfig(choice="size"), "pruner.choice is 'size': expected loss | activation | magnitude"),
        (lambda: HeadsConfig(damping=0.0), "pruner.damping is 0.0"),
        (lambda: ChannelsConfig(multiple_of=0), "pruner.multiple_of is 0: expected 1 or more"),
    ],
)
def test_settings_out_of_range_are_named(make: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("width", "share", "multiple", "kept"), [(448, 0.25, 32, 352), (448, 0.25, 1, 336), (90, 0.5, 32, 45)]
)
def test_what_stays_is_a_multiple_where_the_width_is_one(width: int, share: float, multiple: int, kept: int) -> None:
    assert ChannelsConfig(sparsity=share, multiple_of=multiple).kept(width) == kept
