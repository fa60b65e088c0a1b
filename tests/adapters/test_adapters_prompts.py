"""Adapters of virtual tokens before every row: attaching, starting, saving, refusing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_models import bits, frozen, ids, logits, make
from adapters_prompts import KINDS, L, attached, each
from torch import Tensor
from transformers import AutoTokenizer

from finetune.adapters.attach import attach
from finetune.adapters.p_tuning import PTuningConfig
from finetune.adapters.prelayer import PreLayerConfig
from finetune.adapters.prompt_start import COMMON, LARGE, common_words
from finetune.adapters.prompt_tuning import PromptTuningConfig
from finetune.assets import EMBEDDED
from finetune.errors import ConfigError, UserError


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


class Letters:
    """A tokenizer of the letters a to z, and of what else stands before the words of a vocabulary."""

    words = (*"abcdefghijklmnopqrstuvwxyz", "[unused0]", "##ed", "12", " the", " of")

    def __len__(self) -> int:
        return len(self.words)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[token] for token in ids)

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
    rows = LARGE * frozen("llama").get_input_embeddings().weight
    assert all(any(torch.equal(row, other) for other in rows) for row in starts[0])


@pytest.mark.parametrize("kind", [PromptTuningConfig, PTuningConfig])
def test_a_start_is_as_large_as_is_asked(kind: Any) -> None:
    """Drawn words are large, a text says what it says."""

    def start(**settings: Any) -> Tensor:
        torch.manual_seed(0)
        config = kind(prefix_length=L, **settings)
        config.read_tokenizer(Letters())
        return attach(frozen("llama"), config).encoder().detach()

    words, text = start(start_scale=1.0), start(init="text", init_text="abcde")
    assert torch.equal(start(), LARGE * words) and torch.equal(start(start_scale=3.0), 3 * words)
    assert torch.equal(text, start(init="text", init_text="abcde", start_scale=1.0))
    assert torch.equal(2 * text, start(init="text", init_text="abcde", start_scale=2.0))


def test_a_start_from_the_vocabulary_is_of_its_common_words() -> None:
    """Rare tokens draw attention away from the text."""
    config = PromptTuningConfig(prefix_length=64)
    config.read_tokenizer(Letters())
    assert set(config.drawn_ids(96).tolist()) == {29, 30}
    config.word_ids = list(range(90, 200))
    assert config.drawn_ids(96).max() < 96, "tokens that were added and have no row yet"


def test_the_common_words_of_a_real_tokenizer() -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    words = [tokenizer.decode([token]) for token in common_words(tokenizer)]
    assert len(words) == COMMON and {" the", " of"} <= set(words)


@pytest.mark.parametrize(
    ("make_config", "words"),
    [
        (lambda: PromptTuningConfig(prefix_length=0), "adapter.prefix_length is 0"),
        (lambda: PromptTuningConfig(init="vocab"), "did you mean 'vocabulary'"),
        (lambda: PromptTuningConfig(init="text"), "expected init=text with a text, or neither"),
        (lambda: PromptTuningConfig(start_scale=0.0), "start_scale is 0.0: expected more than 0, or null"),
        (lambda: PTuningConfig(start_scale=float("inf")), "start_scale is inf: expected more than 0, or null"),
        (lambda: PTuningConfig(init="random", start_scale=2.0), "start_scale is 2.0 and adapter.init random"),
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
    words = f"data.max_length is {context - 39} and adapter=prompt_tuning puts 40 .* expected rows of {context - 40} "
    with pytest.raises(ConfigError, match=words):
        check_fit(config)
    config.data.max_length = context - 40
    check_fit(config)
    adapter = attach(frozen("llama"), config.adapter)
    assert check_training(config, adapter) == context - 40
    config.adapter, config.data.max_length = PromptTuningConfig(prefix_length=5000), None
    with pytest.raises(ConfigError, match=f"expected at most {context - 2} virtual tokens"):
        check_fit(config)


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


def test_p_tuning_starts_as_the_tokens_that_its_network_is_added_to() -> None:
    torch.manual_seed(7)
    model = frozen("llama")
    adapter = attach(model, PTuningConfig(prefix_length=L, ratio=8.0))
    encoder = adapter.encoder
    assert torch.equal(encoder(), encoder.start)  # the network gives nothing yet
    rows = LARGE * model.get_input_embeddings().weight
    assert all(bool((rows == row).all(-1).any()) for row in encoder.start)
    scales, size = adapter.learning_rate_scales(), float(encoder.start.detach().square().mean().sqrt())
    assert scales["prompt_encoder.start"] == 8.0 * size
    last = f"prompt_encoder.mlp_head.{len(encoder.mlp_head) - 1}.weight"
    assert scales[last] == size  # what is added moves by a share of what it is added to
    assert {scale for name, scale in scales.items() if "lstm" in name} == {1.0}
    model(ids(), use_cache=False).logits.square().mean().backward()
    assert encoder.start.grad.any() and encoder.mlp_head[-1].weight.grad.any()


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf")])
def test_a_ratio_that_is_none_is_refused(ratio: float) -> None:
    with pytest.raises(ConfigError, match=r"adapter\.ratio is"):
        PTuningConfig(ratio=ratio)
