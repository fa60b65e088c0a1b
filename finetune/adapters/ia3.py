"""(IA)^3: keys, values and intermediate activations of feed-forwards, rescaled by learnt vectors.

Liu et al. 2022 (arXiv:2205.05638) section 3.3: `softmax(Q (l_k o K)^T) (l_v o V)` and `(l_ff o f(W_1 x)) W_2`. So a key
or value projection is scaled at its output, bias included, and the last projection of a feed-forward at its input; all
vectors start as ones. As in PEFT, a projection that computes queries, keys and values together is scaled whole.

Shape suffixes: B leading dimensions, O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from finetune.adapters import peft_format
from finetune.adapters.adapted import AdaptedLinear
from finetune.adapters.base import ADAPTERS
from finetune.adapters.full_copy import saved_whole
from finetune.adapters.peft_modules import read_saved, written
from finetune.adapters.targets import ALL_LINEAR, matches
from finetune.adapters.weight import WeightAdapter, WeightConfig, choose
from finetune.errors import ConfigError, ModelError, nearest
from finetune.quant.base import FrozenLinear
from finetune.structure import Projection, Structure, head_projection, inspect, other_projections
from finetune.structure.flow import Flow, trace

METHOD = "IA3"
"""PEFT's name."""
AUTO = "auto"


@dataclass
class IA3Config(WeightConfig):
    """(IA)^3.

    With `path`, the saved adapter decides targets, feedforward and train_also.

    Attributes:
        targets: `auto` for keys, values and feed-forward outputs, as activations flow through the model; stacked
            experts, which have no form here, are then left out.
        feedforward: which targets are scaled at their input: `auto` for feed-forward outputs, or a list of names.
    """

    target_words: ClassVar[tuple[str, ...]] = (AUTO, ALL_LINEAR)

    name: str = "ia3"
    learning_rate: float = 0.04
    targets: Any = AUTO
    # OmegaConf has no type for "a string or a list of strings".
    feedforward: Any = AUTO

    def __post_init__(self) -> None:
        super().__post_init__()
        names = isinstance(self.feedforward, list) and all(isinstance(n, str) and n for n in self.feedforward)
        if self.feedforward != AUTO and not names:
            raise ConfigError(
                f"adapter.feedforward is {self.feedforward!r}: expected {AUTO} or a list of names or globs"
            )

    def check_saved(self, directory: Path) -> None:
        """Refuse another method and settings that we do not compute."""
        read_saved(directory, METHOD)


class IA3Linear(AdaptedLinear):
    """A frozen linear layer with a scaled output, or a scaled input where `feedforward`.

    Attributes:
        ia3_l: the vector, laid out as PEFT does: [O, 1], or [1, I] where it scales the input.
    """

    over: ClassVar[bool] = True

    def __init__(self, base: FrozenLinear, feedforward: bool) -> None:
        super().__init__(base)
        self.feedforward = feedforward
        self.ia3_l = nn.Parameter(torch.ones((1, base.in_features) if feedforward else (base.out_features, 1)))

    def adapted(self, x_BI: Tensor) -> Tensor:
        """Multiplied in the wider dtype: next to one, 16 bits have steps of a percent."""
        if self.feedforward:
            return self.base((x_BI * self.ia3_l.flatten()).to(x_BI.dtype))
        y_BO = self.base(x_BI)
        return (y_BO * self.ia3_l.flatten()).to(y_BO.dtype)

    def merge(self, weight: Tensor) -> Tensor:
        """Columns of w_OI scaled, or its rows; the vector's layout says which."""
        return weight * self.ia3_l.float()

    def merged(self) -> Iterator[tuple[str, Tensor]]:
        """The weight, and the bias where the output is scaled."""
        changed = dict(super().merged())
        bias = changed.get("bias", self.bias)
        if bias is not None and not self.feedforward:
            changed["bias"] = bias.float() * self.ia3_l.float().flatten()
        yield from changed.items()


class IA3Adapter(WeightAdapter):
    """(IA)^3 attached to a model; see `IA3Config`.

    Args:
        feedforward: names of the projections that are scaled at their input.
    """

    config: IA3Config

    def __init__(self, config: IA3Config, model: nn.Module, plan: list[Projection], feedforward: set[str]) -> None:
        self.feedforward = feedforward
        super().__init__(config, model, plan)

    def wrap(self, base: FrozenLinear, projection: Projection) -> IA3Linear:
        """A scaled output, or input."""
        return IA3Linear(base, projection.name in self.feedforward)

    def check_settings(self, directory: Path, saved: Mapping[str, Any]) -> None:
        """Refuse a file that scales the other side of a projection; where it is square its tensor does not tell."""
        theirs = read_saved(directory, METHOD)
        for p in self.projections:
            if theirs.is_feedforward(p.name) != (p.name in self.feedforward):
                mine, other = ("input", "output") if p.name in self.feedforward else ("output", "input")
                raise ModelError(f"adapter {directory} scales the {other} of {p.name}, but here it is the {mine}")

    def from_file(self, config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Leaves out PEFT's copy of an adapted head of the base."""
        return peft_format.without_base(tensors, {name: module.base for name, module in self.adapted.items()}, ())

    def file_config(self) -> dict[str, Any]:
        """adapter_config.json as stock PEFT reads it."""
        outputs, inputs = ([p.name for p in self.projections if (p.name in self.feedforward) == f] for f in (0, 1))
        # PEFT takes for feed-forward whatever ends in one of these, also in the middle of a word.
        endings = peft_format.shorten(inputs, self.names)
        if any(name.endswith(tuple(endings)) for name in outputs):
            endings = inputs
        lists = {
            "target_modules": [*peft_format.shorten(outputs, self.names), *endings],
            "feedforward_modules": endings,
            "modules_to_save": self.copies,
        }
        base = peft_format.base_of(self.model)
        conv1d = any(p.kind == "conv1d" for p in self.projections)
        kind = peft_format.task_type(self.structure)
        return written(METHOD, lists, base, kind, fan_in_fan_out=conv1d) | {"feedforward_modules": endings}


@ADAPTERS.register(IA3Config)
def build(config: IA3Config, model: nn.Module) -> IA3Adapter:
    """Attach (IA)^3 to a model; `config.path` decides the structure here, its tensors are loaded by `attach`."""
    structure = inspect(model)
    if config.path is not None:
        config, plan, feedforward = _saved(config, model, structure)
        return IA3Adapter(config, model, plan, feedforward)
    flow = trace(model) if AUTO in (config.targets, config.feedforward) else None
    if flow is None and AUTO in (config.targets, config.feedforward):
        key = "targets" if config.targets == AUTO else "feedforward"
        raise ConfigError(
            f"adapter.{key} is {AUTO}, but this model's attention is not understood: name the projections of keys,"
            f" values and feed-forward outputs in adapter.targets, the last ones also in adapter.feedforward"
        )
    plan = _planned(config, model, structure, flow)
    return IA3Adapter(config, model, plan, _feedforward(config, plan, flow))


def _planned(config: IA3Config, model: nn.Module, structure: Structure, flow: Flow | None) -> list[Projection]:
    """The targeted projections, in module order."""
    if config.targets != AUTO or flow is None:
        return choose(model, structure, config)
    wanted = {*flow.key_value, *flow.feedforward_output}
    return [p for p in structure.projections if p.name in wanted and p.kind != "experts"]


def _feedforward(config: IA3Config, plan: list[Projection], flow: Flow | None) -> set[str]:
    """Names of those of the plan that are scaled at their input."""
    if config.feedforward == AUTO and flow is not None:
        return {p.name for p in plan} & set(flow.feedforward_output)
    for pattern in config.feedforward:
        if not any(matches(pattern, p.name) for p in plan):
            leaves = sorted({p.leaf for p in plan})
            raise ConfigError(
                f"adapter.feedforward: {pattern!r} matches no target;"
                f" have {', '.join(leaves)}{nearest(pattern, leaves)}"
            )
    return {p.name for p in plan if any(matches(pattern, p.name) for pattern in config.feedforward)}


def _saved(config: IA3Config, model: nn.Module, structure: Structure) -> tuple[IA3Config, list[Projection], set[str]]:
    """The configuration, the projections and those scaled at their input, as a saved adapter has them."""
    saved = read_saved(Path(config.path or ""), METHOD)
    head = head_projection(model, structure)
    plain = [p for p in (*structure.projections, *([head] if head else [])) if p.kind != "experts"]
    if saved.target_modules == ALL_LINEAR:
        plan = [p for p in plain if p is not head]
    else:
        plain += other_projections(model, structure)
        plan = [p for p in plain if saved.adapts(p.name)]
    if not plan and not saved.modules_to_save:
        raise ModelError(
            f"adapter {config.path} adapts {saved.target_modules}, of which this model has nothing:"
            f" have {', '.join(sorted({p.leaf for p in plain}))}"
        )
    whole = saved_whole(model, structure, saved.modules_to_save)
    feedforward = {p.name for p in plan if saved.is_feedforward(p.name)}
    agreed = replace(config, targets=[p.name for p in plan] or AUTO, feedforward=sorted(feedforward), train_also=whole)
    return agreed, plan, feedforward
