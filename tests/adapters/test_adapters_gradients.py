"""Gradients of every method on every storage format, against the same adapter on the decoded weights in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters_models import FAMILIES, config_for, ids, make, randomize
from torch import nn

from finetune.adapters.attach import attach
from finetune.adapters.base import ADAPTERS, Adapter
from finetune.quant.affine import Int4Config
from finetune.quant.base import QuantConfig
from finetune.quant.dense import DenseConfig
from finetune.quant.fp4 import FP4Config
from finetune.quant.freeze import freeze
from finetune.quant.int8 import Int8Config
from finetune.quant.nf4 import NF4Config
from finetune.structure import inspect

WEIGHT_ONLY: dict[str, QuantConfig] = {
    "dense": DenseConfig(), "nf4": NF4Config(), "fp4": FP4Config(), "int4": Int4Config(group_size=32)
}  # fmt: skip
METHODS = tuple(ADAPTERS.types())


def adapted(method: str, family: str, model: nn.Module) -> Adapter:
    torch.manual_seed(3)
    adapter = attach(model, config_for(ADAPTERS, method, family))
    randomize(adapter)
    return adapter


def frozen_in(config: QuantConfig, family: str) -> nn.Module:
    model = make(family)
    freeze(model, config, inspect(model))
    return model


def in_float64(model: nn.Module) -> nn.Module:
    """The decoded model, dense and in float64."""
    twin = copy.deepcopy(model)
    freeze_as = DenseConfig()
    for p in inspect(twin).projections:
        module = twin.get_submodule(p.name)
        plain = make_dense(module, p, freeze_as)
        twin.set_submodule(p.name, plain)
    return twin.double()


def make_dense(module: nn.Module, projection, config: DenseConfig) -> nn.Module:
    from finetune.quant.base import QUANTIZERS

    sizes, common = (module.out_features, module.in_features), {"dtype": torch.float64, "device": None}
    common["transposed"] = projection.transposed
    if projection.kind == "experts":
        plain = QUANTIZERS.build(config, *sizes, experts=module.num_experts, **common)
    else:
        plain = QUANTIZERS.build(config, *sizes, bias=module.bias is not None, **common)
        plain.bias = None if module.bias is None else nn.Parameter(module.bias.double(), requires_grad=False)
    plain.store(module.dequantize(torch.float64))
    return plain


def gradients(model: nn.Module, adapter: Adapter) -> dict[str, torch.Tensor]:
    model.train()
    model(ids(), labels=ids(), use_cache=False).loss.backward()
    return {name: p.grad for name, p in adapter.trainable().items()}


def cases():
    """Pairwise in `make test`, all of them in `make test-all`."""
    for i, method in enumerate(METHODS):
        for j, family in enumerate(FAMILIES):
            for k, quant in enumerate(WEIGHT_ONLY):
                yield pytest.param(method, family, quant, marks=() if (i + j + k) % 4 == 0 else pytest.mark.slow)


@pytest.mark.parametrize(("method", "family", "quant"), list(cases()))
def test_gradients_are_those_of_float64(method: str, family: str, quant: str) -> None:
    model = frozen_in(WEIGHT_ONLY[quant], family)
    twin = in_float64(model)
    found = gradients(model, adapted(method, family, model))
    other = adapted(method, family, twin)
    for parameter in other.trainable().values():
        parameter.data = parameter.data.double()
    for module in twin.modules():  # what trains in copies computes in the dtype of what it stands for
        if hasattr(module, "steps"):
            module.dtype, module.steps = torch.float64, ()
    wanted = gradients(twin, other)
    assert found.keys() == wanted.keys()
    total = sum(g.norm() ** 2 for g in wanted.values()).sqrt()
    for name, gradient in found.items():
        # Some gradients are nothing but rounding: a key's bias moves all scores of a query alike.
        error = (gradient.double() - wanted[name]).norm()
        assert error <= 1e-5 * wanted[name].norm() + 1e-8 * total, name


@pytest.mark.parametrize("method", METHODS)
def test_bases_that_round_activations(method: str) -> None:
    """LLM.int8() rounds inputs: the start is the base's bits all the same, and everything learns."""
    model = frozen_in(Int8Config(), "llama").eval()
    with torch.no_grad():
        wanted = model(ids(), use_cache=False).logits
    torch.manual_seed(3)
    adapter = attach(model, config_for(ADAPTERS, method, "llama"))
    with torch.no_grad():
        assert torch.equal(model(ids(), use_cache=False).logits, wanted)
    randomize(adapter)
    assert all(bool(g.isfinite().all()) for g in gradients(model, adapter).values())
    with torch.no_grad(), adapter.disabled():
        assert torch.equal(model.eval()(ids(), use_cache=False).logits, wanted)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointed_blocks_learn_the_same(method: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = frozen_in(NF4Config(), "llama")
        adapter = adapted(method, "llama", model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        found.append(gradients(model, adapter))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
