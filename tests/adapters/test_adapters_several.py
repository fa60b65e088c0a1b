"""Several adapters on one model: switching is exact, stacks compute what their order says, refusals leave no trace."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from adapters_models import FAMILIES, bits, config_for, dense_twin, frozen, logits, loss, make, randomize
from torch import nn

from finetune.adapters.attach import attach
from finetune.adapters.base import ADAPTERS, Adapter
from finetune.adapters.bitfit import BitFitConfig
from finetune.adapters.dora import DoRAConfig
from finetune.adapters.houlsby import HoulsbyConfig
from finetune.adapters.ia3 import IA3Config
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.lora_plus import LoRAPlusConfig
from finetune.adapters.mounting import Mounted
from finetune.adapters.norm_tuning import NormTuningConfig
from finetune.adapters.prefix import PrefixConfig
from finetune.adapters.prompt_tuning import PromptTuningConfig
from finetune.adapters.several import Adapters
from finetune.adapters.stack import StackConfig
from finetune.errors import ConfigError, ModelError

LORA, IA3 = LoRAConfig(rank=4), IA3Config()
OVER = ("ia3", "lora", "houlsby", "bitfit", "norm_tuning", "prompt_tuning", "prefix")
QUANTS = ("dense", "nf4")


def moved(adapter: Adapter) -> Adapter:
    """Off its start but for a head made for the task, which all parts of a stack have in common."""
    heads = {name: p.clone() for name, p in adapter.trainable().items() if "classifier" in name}
    randomize(adapter)
    with torch.no_grad():
        for name, values in heads.items():
            adapter.trainable()[name].copy_(values)
    return adapter


def alone(family: str, quant: str, config) -> torch.Tensor:
    """Logits of an adapter by itself."""
    model = frozen(family, quant)
    torch.manual_seed(3)
    moved(attach(model, config))
    return logits(model)


@pytest.mark.parametrize(("family", "quant"), [(family, QUANTS[i % 2]) for i, family in enumerate(FAMILIES)])
def test_switching_gives_each_adapter_its_own_bits(family: str, quant: str) -> None:
    configs = {"low": LORA, "scaled": IA3, "norms": NormTuningConfig()}
    model, base = frozen(family, quant), logits(frozen(family, quant))
    adapters = Adapters(model)
    for name, config in configs.items():
        torch.manual_seed(3)
        moved(adapters.attach(name, config))
        assert adapters.using == (name,)
    for name in ("scaled", "low", "norms", "low"):
        used = adapters.use(name)
        assert used is adapters[name] is adapters.adapter
        assert torch.equal(bits(logits(model)), bits(alone(family, quant, configs[name])))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(used.trainable())
    assert adapters.use() is None
    assert torch.equal(bits(logits(model)), bits(base))
    assert list(model.state_dict()) == list(frozen(family, quant).state_dict())
    with adapters.only("scaled"):
        assert adapters.using == ("scaled",)
    assert adapters.using == ()


def test_what_is_not_in_use_follows_mode_and_device() -> None:
    model = frozen("llama")
    adapters = Adapters(model)
    first = adapters.attach("first", LoRAConfig(rank=4, dropout=0.5))
    adapters.attach("second", LORA)
    model.train()
    adapters.use("first")
    assert all(module.training for module in first.places().values())
    adapters.use()
    model.eval()
    adapters.use("first")
    assert not any(module.training for module in first.places().values())
    adapters.use()
    model.to("meta")
    adapters.use("first")
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_switch_moves_no_tensor() -> None:
    adapters = Adapters(frozen("llama", "nf4"))
    places = {name: p.data_ptr() for name, p in adapters.attach("a", LORA).trainable().items()}
    adapters.attach("b", IA3)
    adapters.use("a")
    assert {name: p.data_ptr() for name, p in adapters["a"].trainable().items()} == places


def merged_twin(family: str, quant: str, adapter: Adapter) -> nn.Module:
    """A stock model with an adapter merged in."""
    twin = dense_twin(family, quant)
    state = twin.state_dict()
    for name, weight in adapter.merged():
        state[name].copy_(weight)
    return twin


CASES = [(f, QUANTS[(i + j) % 2], over) for i, f in enumerate(FAMILIES) for j, over in enumerate(OVER)]
CANNOT = [("t5", "bitfit"), ("bert", "prefix")]
"""Without norms T5 has no biases; prefixes in encoders are the prefix's own business."""


@pytest.mark.parametrize(("family", "quant", "over"), [case for case in CASES if (case[0], case[2]) not in CANNOT])
def test_a_stack_is_its_later_parts_on_what_the_earlier_made(family: str, quant: str, over: str) -> None:
    """The oracle: LoRA merged into a stock model by hand, and the other part alone on top of that."""
    model = frozen(family, quant)
    adapters = Adapters(model)
    low = moved(adapters.attach("low", LORA))
    twin = merged_twin(family, quant, low)
    settings = {"norms": False} if over in ("houlsby", "bitfit") else {}
    config = config_for(ADAPTERS, over, family, **settings)
    other, alike = moved(adapters.attach("other", config)), attach(twin, config)
    with torch.no_grad():
        for mine, theirs in zip(other.trainable().values(), alike.trainable().values(), strict=True):
            theirs.copy_(mine)
    stack = adapters.use("low", "other")
    mine, wanted = logits(model), logits(twin)
    assert (mine - wanted).norm() <= 1e-5 * wanted.norm()
    assert (mine - alone(family, quant, LORA)).abs().max() > 1e-3
    names = set(stack.trainable())
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    parts = [part.trainable().values() for part in adapters.values()]
    assert {id(p) for p in stack.trainable().values()} == {id(p) for tensors in parts for p in tensors}
    if stack.mergeable:
        merged = merged_twin(family, quant, stack)
        assert (logits(merged) - mine).norm() <= 1e-5 * mine.norm()
        assert len([n for n, _ in stack.merged()]) == len(dict(stack.merged()))
    else:
        assert "of its part other: " in stack.obstacle
        with pytest.raises(ConfigError, match="adapter=stack does not merge: of its part other"):
            next(stack.merged())
    with stack.disabled():
        assert torch.equal(bits(logits(model)), bits(logits(frozen(family, quant))))
    model.train()
    loss(model).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in stack.trainable().values())


@pytest.mark.parametrize(("inner", "outer"), [("ia3", "bitfit"), ("bitfit", "ia3"), ("bitfit", "bitfit")])
def test_biases_merge_through_one_another(inner: str, outer: str) -> None:
    """OPT has biases everywhere: l o (W x + b') is one thing, l o (W x + b) + b' - b another."""
    configs = {"ia3": IA3, "bitfit": BitFitConfig(norms=False)}
    model = frozen("opt")
    stack = moved(attach(model, StackConfig(parts=[configs[inner], configs[outer]])))
    merged = merged_twin("opt", "dense", stack)
    assert (logits(merged) - logits(model)).norm() <= 1e-5 * logits(model).norm()


def test_what_is_out_of_use_holds_on_to_nothing() -> None:
    adapters = Adapters(frozen("llama"))
    adapters.attach("low", LORA)
    scaled = adapters.attach("scaled", IA3)
    adapters.use("low", "scaled")
    assert any(isinstance(module.base, Mounted) for module in scaled.places().values())
    adapters.use("low")
    assert not any(isinstance(module.base, Mounted) for module in scaled.places().values())


def test_the_order_is_what_was_asked_for() -> None:
    model = frozen("opt")
    adapters = Adapters(model)
    low, scaled = moved(adapters.attach("low", LORA)), moved(adapters.attach("scaled", IA3))
    adapters.use("low", "scaled")
    inner = logits(model)
    adapters.use("scaled", "low")
    outer = logits(model)
    assert (inner - outer).abs().max() > 1e-3
    merged = merged_twin("opt", "dense", adapters.adapter)
    assert (logits(merged) - outer).norm() <= 1e-5 * outer.norm()
    for part in (low, scaled):  # also when one part is taken out by itself for a while
        with part.detached():
            assert (logits(model) - outer).abs().max() > 1e-3
        assert torch.equal(bits(logits(model)), bits(outer))


@pytest.mark.parametrize("family", ["llama", "mixtral", "bert"])
def test_a_stack_on_disk_is_a_directory_a_part(family: str, tmp_path: Path) -> None:
    parts = [LORA, IA3, LoRAConfig(rank=2)]
    model = frozen(family)
    stack = moved(attach(model, StackConfig(parts=parts)))
    stack.save(tmp_path)
    directories = ["ia3", "lora", "lora-2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter_config.json", *directories]
    again = frozen(family)
    attach(again, StackConfig(path=str(tmp_path)))
    assert torch.equal(bits(logits(again)), bits(logits(model)))
    for directory, config in (("lora-2", LoRAConfig), ("ia3", IA3Config)):
        adapters = Adapters(frozen(family))
        adapters.attach("part", config(path=str(tmp_path / directory)))
    with pytest.raises(ModelError, match=r"is a stack: set adapter=stack, or adapter.path to one of its parts"):
        attach(frozen(family), LoRAConfig(path=str(tmp_path)))
    with pytest.raises(ConfigError, match=r"has ia3, lora, but the adapter .* is a stack of lora, ia3, lora"):
        attach(frozen(family), StackConfig(path=str(tmp_path), parts=[{"name": "ia3"}, {"name": "lora"}]))
    other = attach(frozen(family), StackConfig(parts=[LORA, IA3]))
    with pytest.raises(ModelError, match="is a stack of lora, ia3, lora: expected lora, ia3"):
        other.load(tmp_path)


def test_parts_keep_their_rates_and_tokens() -> None:
    stack = attach(frozen("llama"), StackConfig(parts=[LoRAPlusConfig(rank=4), PrefixConfig(prefix_length=3)]))
    scales = stack.learning_rate_scales()
    assert set(scales) <= set(stack.trainable())
    usual = StackConfig().learning_rate
    fast = {name for name in stack.trainable() if name.endswith("lora_B.weight")}
    assert {scales[name] for name in fast} == {16.0 * LoRAPlusConfig().learning_rate / usual}
    prefix = stack.members["prefix"].learning_rate_scales()["prompt_encoder.start"]
    assert scales["prompt_encoder.start"] == prefix * PrefixConfig().learning_rate / usual
    assert stack.virtual_tokens == 3
    assert not stack.starts_as_base


def test_a_head_made_for_the_task_trains_in_all_parts_as_one(tmp_path: Path) -> None:
    model = frozen("bert")
    stack = attach(model, StackConfig(parts=[LORA, IA3]))
    heads = [name for name in stack.trainable() if "classifier" in name]
    assert heads == ["classifier.trained.weight", "classifier.trained.bias"]
    moved(stack)
    stack.save(tmp_path)
    wanted = logits(model)
    other = frozen("bert")
    adapters = Adapters(other)
    adapters.attach("low", LoRAConfig(path=str(tmp_path / "lora")))
    adapters.attach("scaled", IA3Config(path=str(tmp_path / "ia3")))
    adapters.use("low", "scaled")
    assert torch.equal(bits(logits(other)), bits(wanted))
    randomize(adapters.attach("third", NormTuningConfig()))
    with pytest.raises(ConfigError, match="low and third have learnt different heads classifier: use one of them"):
        adapters.use("low", "third")
    assert adapters.using == ("third",)


def test_a_stack_fits_a_model_without_weights() -> None:
    with torch.device("meta"):
        model = make("bert")
        stack = attach(model, StackConfig(parts=[LORA, {"name": "ia3", "dtype": "bf16"}, NormTuningConfig()]))
    assert {p.device.type for p in stack.trainable().values()} == {"meta"}


REFUSED = {
    "dora over ia3": ([IA3, DoRAConfig(rank=4)], "ia3.*dora|dora cannot stand over ia3 at .*, or put dora before ia3"),
    "norms twice": ([HoulsbyConfig(width=4), NormTuningConfig()], "norm_tuning cannot stand over houlsby at .*norm"),
    "head twice": ([LoRAConfig(train_also=["lm_head"]), LoRAConfig(targets=["lm_head"])], "lora-2 cannot .* lm_head"),
    "prompts twice": ([PromptTuningConfig(), PrefixConfig()], "prefix cannot stand over prompt_tuning"),
    "stack": ([StackConfig()], r"adapter.parts\[0\] is a stack itself"),
    "nothing": ([], "expected a list"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_parts_that_cannot_meet_are_refused_and_leave_no_trace(case: str) -> None:
    parts, words = REFUSED[case]
    model = frozen("llama")
    names = list(model.state_dict())
    with pytest.raises(ConfigError, match=words):
        attach(model, StackConfig(parts=parts))
    assert list(model.state_dict()) == names
    attach(model, LORA)


def test_a_refusal_keeps_what_was_in_use(tmp_path: Path) -> None:
    model = frozen("llama")
    adapters = Adapters(model)
    moved(adapters.attach("low", LORA))
    before = logits(model)
    attempts = {
        "'a/b' names no adapter": lambda: adapters.attach("a/b", IA3),
        "an adapter is called 'low' already": lambda: adapters.attach("low", IA3),
        "matches no projection": lambda: adapters.attach("x", LoRAConfig(targets=["q_prj"])),
        "is not a directory": lambda: adapters.attach("x", LoRAConfig(path=str(tmp_path / "none"))),
        "no adapter is called 'lwo': have low; did you mean 'low'": lambda: adapters.use("lwo"),
        "cannot be used twice": lambda: adapters.use("low", "low"),
        "the weight of low is 'a'": lambda: adapters.combine("x", {"low": "a"}),
    }
    for words, attempt in attempts.items():
        with pytest.raises((ConfigError, ModelError), match=words):
            attempt()
        assert adapters.using == ("low",) and list(adapters) == ["low"]
        assert torch.equal(bits(logits(model)), bits(before))
    _, broken = adapters.attach("broken", LoRAConfig(rank=2)), tmp_path / "broken"
    adapters.save("broken", broken)
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    adapters.use("low")
    with pytest.raises(ModelError, match="cannot be read"):
        adapters.attach("x", LoRAConfig(path=str(broken)))
    assert torch.equal(bits(logits(model)), bits(before))
    adapters.remove("low")
    assert adapters.using == () and list(adapters) == ["broken"]
    with pytest.raises(ConfigError, match="has adapter=lora attached already"):
        adapters.use("broken")
        Adapters(model)


def test_settings_of_parts_are_checked_as_those_of_the_tree() -> None:
    faults = {
        "no adapter is called 'lroa'.*did you mean 'lora'": [{"name": "lroa"}],
        r"'adapter.parts\[0\].rnak'; did you mean 'rank'.*'adapter.parts\[1\].targts'; did you mean 'targets'": [
            {"name": "lora", "rnak": 2},
            {"name": "ia3", "targts": []},
        ],
        r"adapter.parts\[0\].rank is 'x': expected a whole number": [{"name": "lora", "rank": "x"}],
        r"adapter.parts\[0\].rslora is 1: expected true or false": [{"name": "lora", "rslora": 1}],
        r"adapter.parts\[0\].path is 3: expected a word or null": [{"name": "lora", "path": 3}],
        r"adapter.parts\[0\].train_also is 'x': expected a list": [{"name": "lora", "train_also": "x"}],
        r"adapter.parts\[1\]: adapter.rank is 0": [{"name": "ia3"}, {"name": "lora", "rank": 0}],
        r"adapter.parts\[0\] is 'lora': expected a mapping with a name": ["lora"],
        r"adapter.parts\[0\] is \{'rank': 2\}: expected a mapping with a name": [{"rank": 2}],
    }
    for words, parts in faults.items():
        with pytest.raises(ConfigError, match=words):
            StackConfig(parts=copy.deepcopy(parts))
    config = StackConfig(parts=[{"name": "lora", "alpha": 8}, BitFitConfig()], dtype="bf16", train_also=["lm_head"])
    first, second = config.configs()
    assert (first.alpha, first.dtype, first.train_also) == (8, "bf16", ["lm_head"])
    assert (second.dtype, second.train_also) == ("fp32", [])
