"""Preflight finds the faults it promises to find, says their cause, and leaves no trace."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import training_setup as setup
import transformers
from torch import nn

from finetune.adapters.attach import attach
from finetune.adapters.lora import LoRAConfig
from finetune.data.batching import collate
from finetune.data.rows import Row, TokenRows
from finetune.errors import RunError
from finetune.training import separation
from finetune.training.config import TrainConfig
from finetune.training.objectives.sft import SFTConfig, build
from finetune.training.preflight import preflight
from finetune.training.separation import needs_mask, with_mask

TOKENIZER = SimpleNamespace(
    eos_token_id=2, eos_token="</s>", decode=lambda ids, **_: "".join(f"<{int(i)}>" for i in ids)
)
HERE = SimpleNamespace(device=torch.device("cpu"))


def check(model, adapter, rows=None, packing=False, objective=None, **settings):
    return preflight(
        model,
        adapter,
        setup.rows() if rows is None else rows,
        objective=objective or build(SFTConfig(), model),
        tokenizer=TOKENIZER,
        config=TrainConfig(dtype="fp32", **settings),
        accelerator=HERE,
        pad_id=0,
        packing=packing,
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_healthy_run_passes_and_nothing_is_changed(checkpointing: bool) -> None:
    model = setup.tiny_model(dropout=0.1)
    adapter = attach(model, LoRAConfig(rank=2, dropout=0.1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random_state = torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    lines = check(model, adapter, packing=True, gradient_checkpointing=checkpointing)
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    text = "\n".join(lines)
    assert "tokens are learnt" in text and "[<" in text and "40 of 40 rows end in a learnt </s>" in text
    assert "28 of 28 trained tensors" in text and "stay apart by their positions" in text and "moves the logits" in text


def rows_with(change) -> TokenRows:
    return TokenRows.of([change(Row(row.input_ids.copy(), row.labels.copy())) for row in setup.rows()])


def masked(row: Row) -> Row:
    row.labels[:] = -100
    return row


def end_masked(row: Row) -> Row:
    row.labels[-1] = -100
    return row


def end_missing(row: Row) -> Row:
    return Row(row.input_ids[:-1], row.labels[:-1])


def first_only(row: Row) -> Row:
    row.labels[1:] = -100
    row.labels[0] = row.input_ids[0]
    return row


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (masked, r"no token of the 40 training rows is learnt: every label is masked"),
        (first_only, r"no token of the 40 training rows is learnt"),
        (end_masked, r"no row learns to stop: the EOS token '</s>' at their ends is masked"),
        (end_missing, r"no row learns to stop: the EOS token '</s>' at their ends is missing"),
    ],
)
def test_labels(change, words: str) -> None:
    model = setup.tiny_model()
    with pytest.raises(RunError, match=words) as caught:
        check(model, setup.HandMade(model), rows_with(change))
    assert "\n" not in str(caught.value)


def test_a_tensor_that_reaches_nothing() -> None:
    model = setup.tiny_model()
    adapter = setup.HandMade(model)
    model.register_parameter("idle", nn.Parameter(torch.zeros(3)))
    with pytest.raises(RunError, match=r"1 of 5 trained tensors get no gradient.*first idle"):
        check(model, adapter)


def test_a_gradient_that_is_not_finite() -> None:
    model = setup.tiny_model()
    adapter = setup.HandMade(model)
    wild = adapter.trainable()["model.layers.0.mlp.down_proj.delta"]
    wild.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(RunError, match=r"not finite, first model.layers.0.mlp.down_proj.delta"):
        check(model, adapter)


def test_starved_by_reentrant_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The classic: activations recomputed in the reentrant way, where no input needs a gradient."""
    original = transformers.modeling_utils.checkpoint
    monkeypatch.setattr(
        transformers.modeling_utils,
        "checkpoint",
        lambda *args, **kwargs: original(*args, **{**kwargs, "use_reentrant": True}),
    )
    monkeypatch.setattr(transformers.PreTrainedModel, "enable_input_require_grads", lambda self: None)
    model = setup.tiny_model()
    adapter = setup.HandMade(model)
    with pytest.raises(RunError, match="does not depend on any trained tensor"):
        check(model, adapter, gradient_checkpointing=True)


class Stuck(setup.HandMade):
    """An adapter that cannot be told apart from its base."""

    @contextmanager
    def disabled(self):
        yield


def test_an_adapter_that_changes_nothing() -> None:
    model = setup.tiny_model()
    with pytest.raises(RunError, match="the adapter changes nothing: after a step the logits"):
        check(model, Stuck(model))


def opt() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        hidden_size=16,
        ffn_dim=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=setup.VOCAB,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        dropout=0.0,
        pad_token_id=1,
    )
    return transformers.OPTForCausalLM(config).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_need_a_mask_where_positions_are_ignored(attention: str) -> None:
    llama = setup.tiny_model()
    llama.set_attn_implementation(attention)
    assert needs_mask(llama, setup.rows(), 0, HERE.device) is False
    model = opt()
    model.set_attn_implementation(attention)
    assert needs_mask(model, setup.rows(), 0, HERE.device) is True
    rows = setup.rows(3)
    packed = with_mask(collate(rows, [[0, 1, 2]], 0), model)
    together = model(**packed.model_inputs()).logits[0]
    alone = [model(**collate(rows, [[i]], 0).model_inputs()).logits[0] for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_separation_is_seen_in_16_bits(dtype: torch.dtype) -> None:
    assert needs_mask(setup.tiny_model().to(dtype), setup.rows(), 0, HERE.device) is False
    assert needs_mask(opt().to(dtype), setup.rows(), 0, HERE.device) is True


def test_experts_that_regroup_are_no_leak_where_a_mask_would_override_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """As seen of Mixtral with a sliding window: rounding of 2 eps without a mask, another window with one."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.MixtralConfig(vocab_size=32, num_hidden_layers=1, num_local_experts=2, **sizes)
    experts = transformers.MixtralForCausalLM(config)
    found = {False: (2.2, 0.03), True: (0.0, 4e4)}
    monkeypatch.setattr(separation, "_mixing", lambda *_, masked: found[masked])
    assert needs_mask(experts, setup.rows(), 0, HERE.device) is False
    with pytest.raises(RunError, match="mixes the rows"):  # where nothing regroups, it is a leak
        needs_mask(setup.tiny_model(), setup.rows(), 0, HERE.device)
    found[False] = (17.0, 0.03)
    with pytest.raises(RunError, match="mixes the rows"):
        needs_mask(experts, setup.rows(), 0, HERE.device)


def test_a_model_that_mixes_rows_whatever_is_done() -> None:
    model = setup.tiny_model()
    model.model.register_forward_hook(
        lambda module, args, output: type(output)(last_hidden_state=output[0] + output[0].mean(1, keepdim=True))
    )
    with pytest.raises(RunError, match=r"LlamaForCausalLM mixes the rows"):
        needs_mask(model, setup.rows(), 0, HERE.device)


def test_a_row_is_shown_with_its_mask() -> None:
    rows = TokenRows.of([Row(np.array([5, 6, 7, 2], np.int32), np.array([-100, -100, 7, 2], np.int32))])
    model = setup.tiny_model()
    lines = check(model, setup.HandMade(model), rows)
    assert "<5><6>[<7><2>]" in lines[0] and "2 of 4 tokens are learnt (50 %)" in lines[0]
