"""PiSSA: the principal part, the base it stands on, PEFT's logits, and what is saved of it."""

from __future__ import annotations

import json
import stat
import warnings
from pathlib import Path

import pytest
import torch
from adapters_models import bits, dense_twin, frozen, logits, make, randomize
from safetensors import safe_open
from torch import Tensor, nn

from finetune.adapters.attach import attach, check_path
from finetune.adapters.loftq import LoftQConfig
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.pissa import PiSSAConfig
from finetune.adapters.principal import principal
from finetune.adapters.residual_layers import Weight
from finetune.checks import check_exports
from finetune.errors import ConfigError, ModelError
from finetune.quant.affine import Int3Config
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.freeze import freeze
from finetune.quant.nf4 import NF4Config
from finetune.structure import inspect

pytestmark = pytest.mark.filterwarnings("ignore")
BAR = 2e-5
SETTINGS = {"rank": 4, "alpha": 8.0}
STORED: dict[str, QuantConfig] = {"nf4": NF4Config(), "int3": Int3Config(group_size=32)}


def correlated(out_features: int, in_features: int, seed: int = 0) -> Tensor:
    """A weight whose singular values fall as those of trained ones do."""
    generator = torch.Generator().manual_seed(seed)
    shape = (out_features, in_features)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    values = torch.arange(1, min(shape) + 1) ** -0.7
    return u @ torch.diag(values) @ v


def pretrained(family: str) -> nn.Module:
    """A dense model with such weights."""
    model = make(family)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if parameter.dim() > 1 and "layers" in name + "layers" * ("h." in name) and "gate.weight" not in name:
                parts = parameter if parameter.dim() == 3 else parameter[None]
                for expert, part in enumerate(parts):
                    part.copy_(correlated(*part.shape, seed=100 * number + expert))
    return model


def stored(family: str, quant: str):
    """A quantized model, and what reads its weights as they were."""
    dense, model = pretrained(family), pretrained(family)
    freeze(model, STORED[quant], inspect(model))

    def originals(visit) -> None:
        for name, parameter in reversed(list(dense.named_parameters())):
            visit(name, parameter.detach())

    return dense, model, originals


def off(dense: nn.Module, weights: dict[str, Tensor]) -> float:
    """Relative distance of some weights from those of the dense model, Frobenius norm."""
    state = dense.state_dict()
    ends = [sum(w.square().sum() for w in (each(n) for n in weights)) for each in
            (lambda n: weights[n] - state[n], lambda n: state[n])]  # fmt: skip
    return float((ends[0] / ends[1]).sqrt())


def as_stored(dense: nn.Module, quant: str) -> dict[str, Tensor]:
    """What the projections of a dense model decode to once they are quantized."""
    found = {}
    for p in inspect(dense).projections:
        parent, _, leaf = p.name.rpartition(".")
        weight = getattr(dense.get_submodule(parent), leaf)
        weight = (weight if p.kind == "experts" else weight.weight).detach()
        sizes = {"experts": p.experts} if p.kind == "experts" else {}
        empty = QUANTIZERS.build(STORED[quant], p.out_features, p.in_features, dtype=torch.float32, **sizes)
        empty.store(weight.T if p.kind == "conv1d" else weight)
        decoded = empty.dequantize(torch.float32)
        key = p.name if p.kind == "experts" else f"{p.name}.weight"
        found[key] = decoded.T if p.kind == "conv1d" else decoded
    return found


def started(family: str, quant: str, config):
    dense, model, originals = stored(family, quant)
    torch.manual_seed(3)
    return dense, model, attach(model, config, originals)


def assert_same_files(one: Path, other: Path) -> None:
    """The same settings, tensors and headers; safetensors orders the entries of a header as it likes."""
    for path in one.glob("*.*"):
        if path.suffix == ".json":
            found, wanted = (json.loads(p.read_text()) for p in (other / path.name, path))
            assert {k: v for k, v in found.items() if k != "residual"} == {
                k: wanted[k] for k in found if k != "residual"
            }
            continue
        with safe_open(path, "pt") as wanted, safe_open(other / path.name, "pt") as found:
            assert found.metadata() == wanted.metadata() and set(found.keys()) == set(wanted.keys())
            assert all(torch.equal(found.get_tensor(key), wanted.get_tensor(key)) for key in wanted.keys())


@pytest.mark.parametrize("shape", [(96, 64), (64, 96), (3, 48, 40)])
def test_the_randomized_decomposition_is_near_the_exact_one(shape: tuple[int, ...]) -> None:
    w = torch.stack([correlated(*shape[-2:], seed=i) for i in range(3)]) if len(shape) == 3 else correlated(*shape)
    before = torch.random.get_rng_state()
    found = [principal(w, 8, niter, torch.Generator().manual_seed(7)) for niter in (4, 4, None)]
    assert torch.equal(torch.random.get_rng_state(), before)
    errors = [(w - b @ a).norm() for a, b in found]
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert errors[2] <= errors[0] <= 1.001 * errors[2]
    values = torch.linalg.svdvals(w.double())
    assert torch.allclose(errors[2].double(), values[..., 8:].norm(), rtol=1e-5)
    for a, b in found:
        assert torch.allclose(a.norm(dim=-1), b.norm(dim=-2), rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_on_a_dense_base_the_principal_part_trains_and_the_start_is_the_base(family: str) -> None:
    model = frozen(family)
    adapter = attach(model, PiSSAConfig(**SETTINGS, niter=None))
    assert torch.equal(bits(logits(model)), bits(logits(frozen(family))))
    for p in adapter.projections:
        module = adapter.adapted[p.name]
        weight = Weight.of(module, p, None, None)
        a, b = module.matrices(module.lora_A.weight, module.lora_B.weight)
        u, s, v = torch.linalg.svd(weight.w_OI.double(), full_matrices=False)
        best = (u[..., :4] * s[..., None, :4]) @ v[..., :4, :]
        assert (2 * b @ a - best).norm() <= 1e-4 * best.norm()  # values that lie close mix
    randomize(adapter)
    wanted, plain = logits(model), frozen(family)
    merged = dict(adapter.merged())
    state = plain.state_dict()
    for name in merged:
        state[name].copy_(merged[name])
    assert (logits(plain) - wanted).norm() <= 1e-5 * wanted.norm()


def test_peft_starts_and_moves_as_we_do() -> None:
    """The same factors on PEFT's residual base, which it makes itself, give the same logits."""
    peft = pytest.importorskip("peft")
    model = frozen("llama")
    adapter = attach(model, PiSSAConfig(rank=4, alpha=4.0, targets=["q_proj", "down_proj"], niter=None))
    start = {name: parameter.detach().clone() for name, parameter in adapter.trainable().items()}
    settings = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": "pissa"}
    theirs = peft.get_peft_model(dense_twin("llama"), peft.LoraConfig(**settings)).eval()
    assert (logits(theirs) - logits(model)).abs().max() <= BAR
    mine = {f"base_model.model.{name.replace('.weight', '.default.weight')}": p for name, p in start.items()}
    others = dict(theirs.named_parameters())
    for name in mine:
        if "lora_A" in name:
            b = name.replace("lora_A", "lora_B")
            assert torch.allclose(mine[b] @ mine[name], others[b] @ others[name], atol=1e-5)
    randomize(adapter)
    with torch.no_grad():
        for name, parameter in adapter.trainable().items():
            others[f"base_model.model.{name.replace('.weight', '.default.weight')}"].copy_(parameter)
    assert (logits(theirs) - logits(model)).abs().max() <= BAR


@pytest.mark.parametrize(
    ("family", "quant", "rslora"), [("llama", "nf4", False), ("gpt2", "dense", True), ("mixtral", "dense", False)]
)
def test_without_a_residual_it_is_a_plain_lora_of_twice_the_rank(
    family: str, quant: str, rslora: bool, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = frozen(family, quant)
    adapter = attach(model, PiSSAConfig(**SETTINGS, rslora=rslora))
    randomize(adapter)
    adapter.save(tmp_path)
    wanted = logits(model)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (saved["peft_type"], saved["r"]) == ("LORA", 8) and adapter.in_peft
    check_exports(["peft"], adapter)
    with warnings.catch_warnings(record=True) as caught:
        theirs = peft.PeftModel.from_pretrained(dense_twin(family, quant), str(tmp_path)).eval()
    assert not [w for w in caught if "nexpected" in str(w.message)]
    assert (logits(theirs) - wanted).abs().max() <= BAR
    plain = frozen(family, quant)
    attach(plain, LoRAConfig(path=str(tmp_path)))
    assert (logits(plain) - wanted).abs().max() <= BAR
    again = frozen(family, quant)
    other = attach(again, PiSSAConfig(path=str(tmp_path)))
    assert torch.equal(bits(logits(again)), bits(wanted)) and not other.note
    for name, parameter in adapter.trainable().items():
        assert torch.equal(parameter, other.trainable()[name])
    other.save(tmp_path / "again")
    assert_same_files(tmp_path, tmp_path / "again")


def test_a_lora_that_does_not_say_what_it_is_made_of_is_read_as_two_halves(tmp_path: Path) -> None:
    model = frozen("llama")
    lora = attach(model, LoRAConfig(**SETTINGS, rslora=True))
    randomize(lora)
    lora.save(tmp_path)
    other = frozen("llama")
    adapter = attach(other, PiSSAConfig(path=str(tmp_path)))
    assert (logits(other) - logits(model)).abs().max() <= BAR
    assert "does not say what it started from: its first half trains on" in adapter.note
    attach(frozen("llama"), LoRAConfig(rank=3)).save(tmp_path / "odd")
    with pytest.raises(ModelError, match="is a plain LoRA of rank 3, without initial factors: set adapter=lora"):
        attach(frozen("llama"), PiSSAConfig(path=str(tmp_path / "odd")))


@pytest.mark.parametrize(
    ("family", "quant"), [("llama", "nf4"), ("llama", "int3"), ("gpt2", "int3"), ("mixtral", "nf4"), ("opt", "nf4")]
)
def test_what_is_left_stored_anew_is_nearer_to_the_original(family: str, quant: str) -> None:
    dense = pretrained(family)
    before = off(dense, as_stored(dense, quant))
    found = []
    for iterations in (1, 5):
        _, model, adapter = started(family, quant, PiSSAConfig(rank=8, iterations=iterations))
        found.append(off(dense, dict(adapter.merged())))
        assert (adapter.residuals.keys() == adapter.adapted.keys()) and adapter.keeps_start
        words = f"off them by {100 * before:.2f} % (Frobenius norm), with the factors by {100 * found[-1]:.2f} %"
        assert words in adapter.note and "a residual base of " in adapter.note
        base = pretrained(family)
        freeze(base, STORED[quant], inspect(base))
        with adapter.disabled():
            assert torch.equal(bits(logits(model)), bits(logits(base)))
        with adapter.detached():
            assert torch.equal(bits(logits(model)), bits(logits(base)))
            assert list(model.state_dict()) == list(base.state_dict())
    assert found[1] < 0.95 * found[0] < 0.9 * before, (before, found)


@pytest.mark.parametrize("iterations", [1, 4])
def test_the_iterations_are_the_papers(iterations: int) -> None:
    """Against the alternation written out in float64: a code on a border may fall to its other side."""
    dense, _, adapter = started("llama", "int3", PiSSAConfig(rank=8, iterations=iterations, niter=None))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        w, module = dense.get_submodule(name).weight.detach().double(), adapter.adapted[name]
        q = torch.zeros_like(w)
        for _ in range(iterations):
            u, s, v = torch.linalg.svd(w - q, full_matrices=False)
            low = (u[:, :8] * s[:8]) @ v[:8]
            q = module.base.requantize((w - low).float()).dequantize(torch.float64)
        error = (w - module.merge(module.dequantize(torch.float32)).double()).norm()
        assert abs(error / (w - q - low).norm() - 1) <= (1e-3 if iterations == 1 else 0.02)
        if iterations == 1:
            assert (module.residual.dequantize(torch.float64) == q).double().mean() > 0.99


def test_gradients_beside_a_residual_base_are_those_of_float64() -> None:
    _, _, adapter = started("llama", "nf4", PiSSAConfig(rank=4))
    module = adapter.adapted["model.layers.0.mlp.down_proj"].train()
    x, grad = torch.randn(5, 96, requires_grad=True), torch.randn(5, 64)
    module(x).backward(grad)
    leaves = [t.detach().double().requires_grad_() for t in (x, module.lora_A.weight, module.lora_B.weight)]
    y = leaves[0] @ (module.residual.dequantize(torch.float64) + module.scaling * leaves[2] @ leaves[1]).T
    assert torch.allclose(module(x).double(), y, rtol=1e-5, atol=1e-5)
    y.backward(grad.double())
    for found, wanted in zip((x, module.lora_A.weight, module.lora_B.weight), leaves, strict=True):
        assert (found.grad - wanted.grad).norm() <= 1e-5 * wanted.grad.norm()


@pytest.mark.parametrize("method", [PiSSAConfig, LoftQConfig])
@pytest.mark.parametrize(("family", "quant"), [("llama", "nf4"), ("gpt2", "int3"), ("mixtral", "nf4")])
def test_a_residual_base_is_saved_and_loads_bit_for_bit(family: str, quant: str, method, tmp_path: Path) -> None:
    _, model, adapter = started(family, quant, method(rank=4, iterations=2))
    randomize(adapter)
    wanted = logits(model)
    adapter.save(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "peft_type" not in saved and saved["finetune_method"] == method.name and not adapter.in_peft
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1 and len(list(tmp_path.iterdir())) == 3
    check_path(method(path=str(tmp_path)))
    _, other, again = started(family, quant, method(path=str(tmp_path)))
    assert torch.equal(bits(logits(other)), bits(wanted))
    again.save(tmp_path / "again")
    assert_same_files(tmp_path, tmp_path / "again")
    words = f"peft cannot be written of adapter={method.name}: PEFT knows no residual base, which adapter.iterations="
    with pytest.raises(ConfigError, match=f"{words}{method.fewest} does without; set export.formats="):
        check_exports(["peft"], adapter)


def test_a_residual_base_that_is_damaged_missing_or_of_another_storage(tmp_path: Path) -> None:
    _, _, adapter = started("llama", "nf4", PiSSAConfig(rank=4))
    adapter.save(tmp_path)
    config, path = PiSSAConfig(path=str(tmp_path)), tmp_path / "residual.safetensors"
    with pytest.raises(
        ModelError, match=r"residual.safetensors: model.layers.0.self_attn.q_proj does not fit the base"
    ):
        started("llama", "int3", config)
    with pytest.raises(ModelError, match="is of method pissa: expected loftq"):
        started("llama", "nf4", LoftQConfig(path=str(tmp_path)))
    with pytest.raises(ModelError, match="is of method pissa: expected LORA"):
        started("llama", "nf4", LoRAConfig(path=str(tmp_path)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ModelError, match=r"is not the one that adapter_config.json names by its sha256"):
        started("llama", "nf4", config)
    path.unlink()
    with pytest.raises(ModelError, match=r"has no residual.safetensors, the residual base that its factors"):
        started("llama", "nf4", config)


def test_where_the_originals_cannot_be_read_or_the_base_is_to_stay() -> None:
    _, model, originals = stored("llama", "nf4")
    base = logits(model)
    adapter = attach(model, PiSSAConfig(rank=4))
    assert torch.equal(bits(logits(model)), bits(base))
    assert "cannot be read as before quantization: it starts there from the stored weights" in adapter.note
    _, model, originals = stored("llama", "nf4")
    adapter = attach(model, PiSSAConfig(rank=4, iterations=0), originals)
    assert torch.equal(bits(logits(model)), bits(base)) and not adapter.note and adapter.keeps_start
    _, model, originals = stored("llama", "nf4")

    def some(visit) -> None:
        originals(lambda name, weight: visit(name, weight) if "q_proj" not in name else None)

    adapter = attach(model, PiSSAConfig(rank=4), some)
    assert len(adapter.residuals) == 12 and "q_proj and 1 more cannot be read" in adapter.note


def test_projections_with_and_without_a_residual_are_saved_together(tmp_path: Path) -> None:
    def begun(config):
        _, model, originals = stored("mixtral", "nf4")

        def some(visit) -> None:
            originals(lambda name, weight: visit(name, weight) if "gate_up" not in name else None)

        return model, attach(model, config, some)

    model, adapter = begun(PiSSAConfig(rank=4))
    randomize(adapter)
    adapter.save(tmp_path)
    other, _ = begun(PiSSAConfig(path=str(tmp_path)))
    assert torch.equal(bits(logits(other)), bits(logits(model)))


@pytest.mark.parametrize("iterations", [0, 1])
def test_in_bf16(iterations: int, tmp_path: Path) -> None:
    dense, model, originals = stored("llama", "nf4")
    model.to(torch.bfloat16)
    base = logits(model)
    config = {"rank": 4, "iterations": iterations, "dtype": "bf16"}
    adapter = attach(model, PiSSAConfig(**config), originals)
    if iterations:
        assert off(dense, dict(adapter.merged())) < 0.95 * off(dense, as_stored(dense, "nf4"))
    else:
        assert torch.equal(bits(logits(model)), bits(base))
    randomize(adapter)
    adapter.save(tmp_path)
    _, other, _ = stored("llama", "nf4")
    attach(other.to(torch.bfloat16), PiSSAConfig(path=str(tmp_path), dtype="bf16"))
    assert torch.equal(bits(logits(other)), bits(logits(model)))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"adapter.iterations is -1: expected at least 0"):
        PiSSAConfig(iterations=-1)
    with pytest.raises(ConfigError, match=r"adapter.iterations is 0: expected at least 1"):
        LoftQConfig(iterations=0)
    with pytest.raises(ConfigError, match=r"adapter.niter is -2: expected at least 0, or null for the exact"):
        PiSSAConfig(niter=-2)
    with pytest.raises(ConfigError, match="token embedding, for which adapter=pissa has no form"):
        attach(frozen("llama", tied=False), PiSSAConfig(targets=["embed_tokens"]))


def test_the_same_seed_starts_the_same_and_draws_nothing() -> None:
    starts = []
    for _ in range(2):
        _, _, adapter = started("llama", "nf4", PiSSAConfig(rank=4))
        starts.append(({n: p.detach() for n, p in adapter.trainable().items()}, torch.random.get_rng_state()))
    assert all(torch.equal(p, starts[1][0][name]) for name, p in starts[0][0].items())
    started("llama", "nf4", LoRAConfig(rank=4))
    assert torch.equal(starts[0][1], torch.random.get_rng_state())
