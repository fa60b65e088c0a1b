"""What every adapter must keep to, over every method there is, storage formats and families."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapters_models import FAMILIES, QUANTS, bits, config_for, frozen, ids, logits, randomize

from finetune.adapters.attach import attach
from finetune.adapters.base import ADAPTERS, Adapter
from finetune.errors import ConfigError, ModelError

METHODS = tuple(ADAPTERS.types())


def case(method: str, quant: str, family: str):
    """Every pair of method, format and family is in `make test`, every combination in `make test-all`."""
    paired = (METHODS.index(method) + FAMILIES.index(family) + list(QUANTS).index(quant)) % 2 == 0
    return pytest.param(method, quant, family, marks=() if paired else pytest.mark.slow)


cases = pytest.mark.parametrize(
    ("method", "quant", "family"),
    [case(method, quant, family) for method in METHODS for quant in QUANTS for family in FAMILIES],
)


def attached(method: str, quant: str, family: str, moved: bool = True):
    model = frozen(family, quant)
    torch.manual_seed(3)
    adapter = attach(model, config_for(ADAPTERS, method, family))
    if moved:
        randomize(adapter)
    return model, adapter


def loss(model: torch.nn.Module) -> torch.Tensor:
    return model(ids(), labels=ids(), use_cache=False).loss


@cases
def test_starts_as_the_base_bit_for_bit(method: str, quant: str, family: str) -> None:
    model, adapter = attached(method, quant, family, moved=False)
    assert torch.equal(bits(logits(model)), bits(logits(frozen(family, quant))))
    assert isinstance(adapter, Adapter)
    assert adapter.model is model


@cases
def test_disabled_and_detached_are_the_base_bit_for_bit(method: str, quant: str, family: str) -> None:
    model, adapter = attached(method, quant, family)
    base = frozen(family, quant)
    wanted, moved = logits(base), logits(model)
    assert not torch.allclose(moved, wanted, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(bits(logits(model)), bits(wanted))
    assert torch.equal(bits(logits(model)), bits(moved))
    with adapter.detached():
        assert torch.equal(bits(logits(model)), bits(wanted))
        assert list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(bits(logits(model)), bits(moved))


@cases
def test_only_the_named_tensors_train(method: str, quant: str, family: str) -> None:
    model, adapter = attached(method, quant, family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = adapter.trainable()
    assert trainable
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trainable)
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    model.train()
    first = loss(model)
    first.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trainable), name
    for name, parameter in trainable.items():
        assert parameter.grad.dtype == parameter.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().max() > 0, name
    optimizer.step()
    assert loss(model) < first
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor) == (name not in trainable), name


@cases
def test_saved_and_loaded_gives_the_same_bits(method: str, quant: str, family: str, tmp_path: Path) -> None:
    model, adapter = attached(method, quant, family)
    adapter.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    other, fresh = attached(method, quant, family, moved=False)
    fresh.load(tmp_path)
    assert torch.equal(bits(logits(other)), bits(logits(model)))
    started = frozen(family, quant)
    attach(started, config_for(ADAPTERS, method, family, path=str(tmp_path)))
    assert torch.equal(bits(logits(started)), bits(logits(model)))


@cases
def test_a_file_that_lacks_a_tensor_is_refused(method: str, quant: str, family: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, adapter = attached(method, quant, family)
    adapter.save(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = sorted(tensors)[0]
    save_file({k: v for k, v in tensors.items() if k != gone}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=gone.replace(".", r"\.") + " is missing"):
        adapter.load(tmp_path)


@cases
def test_merged_equals_unmerged(method: str, quant: str, family: str) -> None:
    model, adapter = attached(method, quant, family)
    if not adapter.mergeable:
        assert adapter.obstacle
        with pytest.raises(ConfigError, match=f"adapter={method} does not merge: "):
            next(adapter.merged())
        return
    model.train()
    loss(model).backward()  # whatever a forward and a backward leave behind must not change what is merged
    model.eval()
    wanted = logits(model)
    merged = dict(adapter.merged())
    again = dict(adapter.merged())
    plain = frozen(family)
    names = set(plain.state_dict())
    for name, weight in merged.items():
        assert name in names
        assert weight.dtype == torch.float32
        assert torch.equal(weight, again[name])
    state = dict(plain.state_dict())
    with adapter.detached():
        stored = model.state_dict()
    for name in names:
        if name in merged:
            assert merged[name].shape == state[name].shape
            state[name].copy_(merged[name])
        elif name in stored and stored[name].shape == state[name].shape:
            state[name].copy_(stored[name])
        else:
            module = model.get_submodule(name.removesuffix(".weight"))
            weight = module.dequantize(torch.float32)
            state[name].copy_(weight.T if getattr(module, "transposed", False) and weight.dim() == 2 else weight)
    difference = (logits(plain) - wanted).norm() / wanted.norm()
    assert difference <= 1e-5, difference
    assert torch.equal(bits(logits(model)), bits(wanted))


@cases
def test_generates_what_a_full_forward_says(method: str, quant: str, family: str) -> None:
    model, _ = attached(method, quant, family)
    prompt = ids(rows=1, length=5)
    out = model.generate(
        prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        full = model(out.sequences[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
    cached = torch.stack(out.logits, dim=1)
    assert torch.allclose(cached, full, atol=1e-4)
