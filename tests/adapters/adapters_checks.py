"""What every adapter must keep to, as checks of one method on one storage format and family.

What they need of generation, padding and packing is in adapters_running.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import adapters_running as running
import pytest
import torch
from adapters_cover import cover, product
from adapters_float64 import in_float64, meet, meetings, sides, take_sides, widen
from adapters_models import (
    BASES,
    CANNOT_PACK,
    QUANTS,
    REFUSED,
    TINY,
    bits,
    config_for,
    frozen,
    logits,
    loss,
    make,
    randomize,
)  # fmt: skip
from torch import Tensor, nn

from finetune.adapters.attach import attach
from finetune.adapters.base import ADAPTERS, Adapter
from finetune.errors import ConfigError, ModelError, RunError
from finetune.structure import inspect

METHODS = tuple(ADAPTERS.types())
ANY = ("CausalLM", "SequenceClassification", "MaskedLM", "Seq2SeqLM")
WRITES = ("CausalLM", "Seq2SeqLM")


@dataclass(frozen=True)
class Case:
    """A method on a base."""

    method: str
    quant: str
    family: str

    def base(self) -> nn.Module:
        return frozen(self.family, self.quant)

    def attach(self, model: nn.Module, moved: bool = True, **settings: object) -> Adapter:
        config = config_for(ADAPTERS, self.method, self.family, **settings)
        torch.manual_seed(3)
        adapter = attach(model, config)
        if moved:
            randomize(adapter)
        return adapter

    def attached(self, moved: bool = True) -> tuple[nn.Module, Adapter]:
        model = self.base()
        return model, self.attach(model, moved)


CHECKS: dict[str, tuple[Callable[[Case, Path], None], tuple[str, ...]]] = {}


def check(*tasks: str) -> Callable:
    """Keep a check under its name, for families of these tasks."""

    def keep(function: Callable[[Case, Path], None]) -> Callable[[Case, Path], None]:
        CHECKS[function.__name__] = (function, tasks)
        return function

    return keep


def gradients(model: nn.Module, adapter: Adapter) -> dict[str, Tensor]:
    model.train()
    loss(model).backward()
    return {name: p.grad for name, p in adapter.trainable().items()}


@check(*ANY)
def starts_as_it_says(case: Case, _: Path) -> None:
    """As the base, bit for bit; what says that it does not starts the same way whenever the seed is the same."""
    model, adapter = case.attached(moved=False)
    assert isinstance(adapter, Adapter) and adapter.model is model
    wanted = case.base() if adapter.starts_as_base else case.attached(moved=False)[0]
    assert torch.equal(bits(logits(model)), bits(logits(wanted)))


@check(*ANY)
def disabled_and_detached_is_the_base(case: Case, _: Path) -> None:
    model, adapter = case.attached()
    base = case.base()
    wanted, moved = logits(base), logits(model)
    assert not torch.allclose(moved, wanted, atol=1e-3)
    with adapter.disabled():
        assert torch.equal(bits(logits(model)), bits(wanted))
    assert torch.equal(bits(logits(model)), bits(moved))
    with adapter.detached():
        assert torch.equal(bits(logits(model)), bits(wanted))
        assert list(model.state_dict()) == list(base.state_dict())
    assert torch.equal(bits(logits(model)), bits(moved))


@check(*ANY)
def only_the_named_tensors_train(case: Case, _: Path) -> None:
    model, adapter = case.attached()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = adapter.trainable()
    assert trainable
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(trainable)
    for name in inspect(case.base()).task_head:
        assert {f"{name}.trained.{n}" for n, _ in make(case.family).get_submodule(name).named_parameters()} <= {
            *trainable
        }
    model.train()
    first = loss(model)
    first.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in trainable), name
    for name, parameter in trainable.items():
        assert parameter.grad.dtype == parameter.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().max() > 0, name
    assert any(_steps_down(model, trainable, rate, first) for rate in (1e-3, 1e-4, 1e-2))
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor) == (name not in trainable), name


@torch.no_grad()
def _steps_down(model: nn.Module, trainable: dict[str, nn.Parameter], rate: float, first: Tensor) -> bool:
    """Whether a step along the gradients lowers the loss; where it does not, it is taken back.

    A long one may send a token to another expert, a short one may drown in what int8 and w8a8 round.
    """
    before = {name: parameter.clone() for name, parameter in trainable.items()}
    torch.optim.AdamW(trainable.values(), lr=rate).step()
    lower = bool(loss(model) < first)
    if not lower:
        for name, parameter in trainable.items():
            parameter.copy_(before[name])
    return lower


@check(*ANY)
def gradients_are_those_of_float64(case: Case, _: Path) -> None:
    model = case.base()
    twin = copy.deepcopy(model).double() if case.method in BASES else in_float64(model)
    adapter, other = case.attach(model), case.attach(twin)
    widen(twin, other.trainable())
    with torch.no_grad():  # a method may start as what it reads off the base, which rounds
        for name, parameter in other.trainable().items():
            parameter.copy_(adapter.trainable()[name])
    with meetings(model) as met, sides(model) as through:
        found = gradients(model, adapter)
    assert (case.quant in ("int8", "w8a8")) == bool(met)
    meet(twin, met)
    take_sides(twin, through)
    wanted = gradients(twin, other)
    assert found.keys() == wanted.keys()
    total = sum(g.norm() ** 2 for g in wanted.values()).sqrt()
    for name, gradient in found.items():
        error, size = (gradient.double() - wanted[name]).norm(), wanted[name].norm()
        # Some gradients are nothing but rounding: a key's bias moves all scores of a query alike.
        bar = 1e-6 * total if size < 1e-12 * total else 1e-5 * size + 1e-8 * total
        assert error <= bar, (name, error / size)


@check(*ANY)
def saved_and_loaded_gives_the_same_bits(case: Case, directory: Path) -> None:
    model, adapter = case.attached()
    adapter.save(directory)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {path.name for path in directory.rglob("*")}
    assert {path.suffix for path in directory.rglob("*") if path.is_file()} <= {".json", ".safetensors"}
    started = case.base()
    case.attach(started, moved=False, path=str(directory))
    assert torch.equal(bits(logits(started)), bits(logits(model)))
    other, fresh = case.attached(moved=False)
    try:
        fresh.load(directory)
    except ConfigError as error:
        assert "set adapter.path" in str(error)  # what made the tensors is not saved
    else:
        assert torch.equal(bits(logits(other)), bits(logits(model)))


@check(*ANY)
def a_file_that_lacks_a_tensor_is_refused(case: Case, directory: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, adapter = case.attached()
    adapter.save(directory)
    file = min(directory.rglob("adapter_model.safetensors"))
    tensors = load_file(file)
    gone = min(tensors)
    save_file({k: v for k, v in tensors.items() if k != gone}, file)
    with pytest.raises(ModelError, match=gone.replace(".", r"\.") + " is missing"):
        adapter.load(directory)


def merged_model(case: Case, model: nn.Module, adapter: Adapter) -> nn.Module:
    """A dense model that holds what was merged, and what the base decodes to elsewhere."""
    merged, again = dict(adapter.merged()), dict(adapter.merged())
    plain = frozen(case.family).to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
    state = dict(plain.state_dict())
    assert set(merged) <= set(state)
    with adapter.detached():
        stored = model.state_dict()
    for name in state:
        if name in merged:
            assert merged[name].dtype == torch.float32 and merged[name].shape == state[name].shape
            assert torch.equal(merged[name], again[name])
            state[name].copy_(merged[name])
        elif name in stored and stored[name].is_floating_point() and stored[name].shape == state[name].shape:
            state[name].copy_(stored[name])
        else:
            module = model.get_submodule(name.removesuffix(".weight"))
            weight = module.dequantize(torch.float32)
            state[name].copy_(weight.T if getattr(module, "transposed", False) and weight.dim() == 2 else weight)
    return plain


def compare_merged(case: Case, model: nn.Module, bar: float) -> None:
    adapter = case.attach(model)
    if not adapter.mergeable:
        assert adapter.obstacle
        with pytest.raises(ConfigError, match=f"adapter={case.method} does not merge: "):
            next(adapter.merged())
        return
    with running.uncoupled(model):
        gradients(model, adapter)  # whatever a forward and a backward leave behind must not change what is merged
        model.eval()
        before = logits(model)
        plain = merged_model(case, model, adapter)
        wide = [running.widened(each, torch.float32) for each in (model, plain)]
        here = running.routed_alike(*wide)
        wanted, found = (logits(each)[here] for each in wide)
        assert (found - wanted).norm() <= bar * wanted.norm(), (found - wanted).norm() / wanted.norm()
        assert torch.equal(bits(logits(model)), bits(before))


@check(*ANY)
def merged_equals_unmerged(case: Case, _: Path) -> None:
    compare_merged(case, case.base(), 1e-5)


@check(*ANY)
def merged_equals_unmerged_in_bf16(case: Case, _: Path) -> None:
    """What 16 bits hold of a merged weight; activations in float32, or twice their own rounding would be measured."""
    compare_merged(case, case.base().to(torch.bfloat16), 1e-2)


@check(*WRITES)
def generates_what_a_full_forward_says(case: Case, _: Path) -> None:
    running.cached_equals_full(case.attached()[0])


@check(*WRITES)
def beams_score_what_a_full_forward_says(case: Case, _: Path) -> None:
    running.beams_equal_full(case.attached()[0])


@check(*ANY)
def padded_rows_are_as_if_alone(case: Case, _: Path) -> None:
    running.padded_equals_single(case.attached()[0])


@check("CausalLM")
def packed_rows_are_as_if_alone(case: Case, _: Path) -> None:
    model, adapter = case.attached()
    if obstacle := adapter.training_obstacle(gradient_checkpointing=False, packing=True):
        assert "\n" not in obstacle
        return
    if case.family in CANNOT_PACK:
        with pytest.raises(RunError, match="set it to false"):
            running.packed_equals_single(model, adapter)
        return
    running.packed_equals_single(model, adapter)


@check(*ANY)
def checkpointed_blocks_learn_the_same(case: Case, _: Path) -> None:
    model, adapter = case.attached()
    if obstacle := adapter.training_obstacle(gradient_checkpointing=True, packing=False):
        assert "\n" not in obstacle
        return
    wanted = gradients(model, adapter)
    model, adapter = case.attached()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(model, adapter)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def makes_sense(combination: tuple[str, ...]) -> bool:
    """Whether a check, a method, a format and a family go together."""
    name, method, quant, family = combination
    fits = TINY[family][0] in CHECKS[name][1] and quant in BASES.get(method, tuple(QUANTS))
    return fits and (method, family) not in REFUSED


def cases(factors: tuple[tuple[str, ...], ...]) -> list:
    """Every combination as a case; those outside the cover of all pairs are slow."""
    quick = set(cover(factors, makes_sense))
    return [
        pytest.param(*c, marks=() if c in quick else pytest.mark.slow, id="-".join(c))
        for c in product(factors, makes_sense)
    ]
