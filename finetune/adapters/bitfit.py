"""BitFit: the biases train, and nothing else.

Ben Zaken et al. 2022 (arXiv:2106.10199): all bias terms of the projections and of the norms. Most recent families have
none; `bias: all` gives every projection one, starting at zero. Merged, such a bias would have no place in the base's
own layout, so these are refused; existing ones merge.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters import peft_format
from finetune.adapters.base import ADAPTERS
from finetune.adapters.own_format import as_saved
from finetune.adapters.select import BiasLinear, SelectAdapter
from finetune.adapters.targets import ALL_LINEAR
from finetune.adapters.weight import WeightConfig, choose
from finetune.errors import ConfigError, nearest
from finetune.structure import Projection, inspect
from finetune.structure.norms import norms

BIASES = ("existing", "all")
STRUCTURAL = ("bias", "norms", "targets", "train_also")
"""Settings that decide which tensors there are; a saved adapter brings its own."""


@dataclass
class BitFitConfig(WeightConfig):
    """BitFit. With `path`, the saved adapter decides everything but dtype.

    Attributes:
        bias: `existing` trains the biases that the targets have, `all` gives the others zeros to train.
        norms: whether the biases of norms train too.
        targets: projections whose biases train; with `all-linear`, stacked experts are left out.
    """

    name: str = "bitfit"
    learning_rate: float = 0.008
    bias: str = "existing"
    norms: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias not in BIASES:
            near = nearest(str(self.bias), BIASES)
            raise ConfigError(f"adapter.bias is {self.bias!r}: expected {' | '.join(BIASES)}{near}")
        if not isinstance(self.norms, bool):
            raise ConfigError(f"adapter.norms is {self.norms!r}: expected true or false")

    def check_saved(self, directory: Path) -> None:
        """Refuse another method and broken settings."""
        _as_saved(self, directory)


class BitFitAdapter(SelectAdapter):
    """BitFit attached to a model; see `BitFitConfig`."""

    config: BitFitConfig

    @property
    def added(self) -> list[str]:
        """Projections whose bias the base does not have."""
        return [name for name, module in self.adapted.items() if module.base.bias is None]

    @property
    def note(self) -> str:
        """What trains."""
        parts = [f"{len(self.adapted)} of projections ({len(self.added)} of them new ones, from zero)"]
        parts += [f"{len(self.parts)} of norms"] if self.parts else []
        left = sorted({p.leaf for p in self.structure.projections if p.kind == "experts"} - {*self.adapted})
        out = f"; stacked experts ({', '.join(left)}) have no place for one" if left else ""
        return f"bitfit trains {len(self.adapted) + len(self.parts)} biases: {', '.join(parts)}{out}"

    @property
    def mergeable(self) -> bool:
        """Where the base has every bias that trains."""
        return not self.added

    @property
    def obstacle(self) -> str:
        """Which biases have no place."""
        leaves = sorted({name.rpartition(".")[2] for name in self.added})
        return f"the layout of the base has no bias for {', '.join(leaves)}" if leaves else ""

    def file_keys(self) -> dict[str, nn.Parameter]:
        """Each under the name that the bias has, or would have, in the model."""
        biases = {
            f"{peft_format.PREFIX}{name}.bias": module.trained_bias
            for name, module in self.adapted.items()
            if isinstance(module, BiasLinear)
        }
        return biases | self.copy_keys()

    def file_config(self) -> dict[str, Any]:
        """Our own: PEFT has no BitFit. `targets` names the projections, so that any base finds the same ones."""
        return super().file_config() | {
            "targets": [*self.adapted],
            "train_also": [n for n in self.copies if n not in self.parts],
        }


@ADAPTERS.register(BitFitConfig)
def build(config: BitFitConfig, model: nn.Module) -> BitFitAdapter:
    """Attach BitFit to a model; `config.path` decides the structure here, its tensors are loaded by `attach`."""
    if config.path is not None:
        config = _as_saved(config, Path(config.path))
    plan = _planned(config, model)
    parts = {name: ("bias",) for name, leaves in norms(model).items() if "bias" in leaves} if config.norms else {}
    if not plan and not parts:
        raise ConfigError("adapter=bitfit: the model has no biases; adapter.bias=all adds some, from zero")
    return BitFitAdapter(config, model, plan, parts)


def _planned(config: BitFitConfig, model: nn.Module) -> list[Projection]:
    """Projections whose bias trains."""
    if not config.targets:  # of a saved adapter that has norms alone
        return []
    chosen = choose(model, inspect(model), config)
    everything = config.targets == ALL_LINEAR
    if everything:
        chosen = [p for p in chosen if p.kind != "experts"]
    if config.bias == "all":
        return chosen
    without = [p.name for p in chosen if p.kind != "experts" and model.get_submodule(p.name).bias is None]
    if without and not everything:
        raise ConfigError(
            f"adapter.targets names {without[0]}, which has no bias; adapter.bias=all adds one, from zero"
        )
    return [p for p in chosen if p.name not in without]


def _as_saved(config: BitFitConfig, directory: Path) -> BitFitConfig:
    """The configuration with a saved adapter's structure.

    Raises:
        ModelError: when it is of another method or its settings are broken.
    """
    trained = peft_format.read_config(directory).get("targets")
    agreed = as_saved(config, directory, [key for key in STRUCTURAL if trained or key != "targets"])
    if not trained:  # norms alone
        agreed.targets = []
    return agreed
