"""RunConfig: the whole configuration tree, assembled from the dataclasses of the rooms.

Hydra composes it from `conf/` over the schemas registered here; `to_run_config` turns the result into dataclasses
once, at the door. No room ever sees OmegaConf or RunConfig.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.adapters.base import ADAPTERS, AdapterConfig
from finetune.atomic import write_text
from finetune.data.config import DataConfig
from finetune.data.labels import for_labels, refuse_labels
from finetune.data.pairs import check_pairs
from finetune.errors import ConfigError, nearest_or_all
from finetune.export.config import ExportConfig
from finetune.model.config import ModelConfig
from finetune.model.task import judges_rows
from finetune.offsite.config import OffsiteConfig
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.quant.pruners.base import PRUNERS
from finetune.quant.rounders.base import CALIBRATORS
from finetune.quant.transforms.base import TRANSFORMS
from finetune.quantize.config import QuantizeConfig
from finetune.registry import Registry
from finetune.training.config import (
    OBJECTIVES,
    OPTIMIZERS,
    TRACKERS,
    ObjectiveConfig,
    OptimConfig,
    TrackingConfig,
    TrainConfig,
)

Tree = TypeVar("Tree")

FORMAT_VERSION = 1
GROUPS: dict[str, Registry[Any]] = {
    "quant": QUANTIZERS,
    "adapter": ADAPTERS,
    "objective": OBJECTIVES,
    "optim": OPTIMIZERS,
    "tracking": TRACKERS,
}
"""Config groups whose choices are found by a scan; the key is the group's name in `conf/` and in the tree."""

VERB_GROUPS: dict[str, Registry[Any]] = {"calibrator": CALIBRATORS, "transform": TRANSFORMS, "pruner": PRUNERS}
"""The same for groups that only a verb's own tree has: `finetune quantize`."""

PLUGGED: dict[str, list[str]] = {}
"""Choices that installed plug-ins brought, by group."""
_REGISTERED: list[tuple[str, str, type]] = []
"""Group, name and type of the choices that Hydra was handed last."""

RESUMABLE = ("train.max_steps", "train.epochs", "tracking", "export", "device")
"""What may be changed on the command line when a run is resumed; anything else would make it another run."""


@dataclass
class RunConfig:
    """One run.

    Attributes:
        name: what the run is called; its directory is runs/<name>/<timestamp>.
        seed: of the adapter's initialisation, of dropout and of the order of the rows.
        device: auto | cpu | cuda | cuda:N | mps.
        output_dir: the run directory itself; null makes a new one under runs/.
        resume: a run directory to go on with; its own configuration is restored.
    """

    name: str = "run"
    seed: int = 0
    device: str = "auto"
    output_dir: str | None = None
    resume: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    offsite: OffsiteConfig = field(default_factory=OffsiteConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        if not self.name or "/" in self.name or "\\" in self.name or self.name in (".", ".."):
            raise ConfigError(f"name is {self.name!r}: expected a plain name without slashes")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}: expected 0 to 2^63 - 1")
        if self.device.partition(":")[0] not in ("auto", "cpu", "cuda", "mps", "xpu"):
            raise ConfigError(f"device is {self.device!r}: expected auto, cpu, cuda, cuda:N, mps or xpu")
        if self.resume is not None and self.output_dir is not None:
            raise ConfigError("resume and output_dir conflict: resume=DIR names the run directory already")
        if judges_rows(self.objective.task):
            self.data = for_labels(self.data, self.objective.name)
        else:
            refuse_labels(self.data)
        if self.objective.task == "seq2seq":
            check_pairs(self.data, self.objective.name)


def register_schemas() -> None:
    """Hand Hydra a schema for the tree and one for each choice of each scanned group (`/schema/<group>/<name>`)."""
    choices = [
        (group, name, config_type)
        for group, registry in (GROUPS | VERB_GROUPS).items()
        for name, config_type in registry.types().items()
    ]
    if choices == _REGISTERED:  # to do it again takes long enough to be felt
        return
    _REGISTERED[:] = choices
    store = ConfigStore.instance()
    PLUGGED.clear()
    store.store(name="schema", node=RunConfig)
    store.store(name="quantize_schema", node=QuantizeConfig)
    for group, name, config_type in choices:
        store.store(group=f"schema/{group}", name=name, node=config_type)
        if not config_type.__module__.startswith("finetune."):
            # A plug-in without a YAML of its own can be chosen all the same, with its dataclass's defaults.
            store.store(group=group, name=name, node=config_type)
            PLUGGED.setdefault(group, []).append(name)
    for group, config_type in (("model", ModelConfig), ("data", DataConfig), ("train", TrainConfig)):
        store.store(group="schema", name=group, node=config_type)


def stray_keys(config: DictConfig) -> list[str]:
    """A message for every key that no dataclass of the tree has, each with the nearest right key.

    Hydra accepts `+adapter.rnak=4` without a word, also into structured configs; this is what closes the hole.
    """
    found: list[str] = []

    def walk(node: Any, path: str) -> None:
        if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
            return
        node_type = OmegaConf.get_type(node)
        typed = node_type is not None and dataclasses.is_dataclass(node_type)
        known = [f.name for f in dataclasses.fields(node_type)] if typed else []  # type: ignore[arg-type]
        for key in map(str, node):
            full = f"{path}.{key}" if path else key
            if typed and key not in known:
                found.append(f"unknown key {full!r}{nearest_or_all(key, known)}")
            elif not OmegaConf.is_missing(node, key):
                walk(node._get_node(key), full)

    walk(config, "")
    return found


def to_run_config(config: DictConfig) -> RunConfig:
    """As `to_config`, of the tree of a run."""
    return to_config(config, RunConfig)


def to_config(config: DictConfig, kind: type[Tree]) -> Tree:
    """Dataclasses from a composed tree; ranges are checked by each dataclass itself.

    Raises:
        ConfigError: with every unknown key at once, or the first value of a wrong type or out of range.
    """
    strays = stray_keys(config)
    if strays:
        raise ConfigError("; ".join(strays))
    try:
        tree = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(conversion_message(error)) from error
    assert isinstance(tree, kind)
    return tree


def conversion_message(error: OmegaConfBaseException) -> str:
    """One line out of OmegaConf's several: the key and what is wrong with it."""
    first = str(error).splitlines()[0]
    key = getattr(error, "full_key", None)
    return f"{key}: {first}" if key and str(key) not in first else first


def save_config(config: DictConfig, overrides: list[str], path: Path) -> None:
    """Write config.yaml: every value of the run, resolved, with the overrides that made it, those of resumes last."""
    earlier = OmegaConf.load(path) if path.is_file() else None
    if isinstance(earlier, DictConfig):
        overrides = [*earlier.get("overrides", []), *overrides]
    tree = OmegaConf.to_container(config, resolve=True)
    assert isinstance(tree, dict)
    # Type names would tie saved runs to module paths; `name` in each group is what rebuilds them.
    document = {"format_version": FORMAT_VERSION, "overrides": list(overrides), **tree}
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(document)))


def load_config(path: Path) -> DictConfig:
    """Read config.yaml back into a typed tree.

    Raises:
        ConfigError: when the file is missing, of a newer format, or has keys that this version does not know.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing: {path.parent} is not a run directory")
    saved = OmegaConf.load(path)
    if isinstance(saved, ListConfig) or "format_version" not in saved:
        raise ConfigError(f"{path} has no format_version: expected the config.yaml of a run")
    version = saved.pop("format_version")
    if version > FORMAT_VERSION:
        raise ConfigError(f"{path} has format_version {version}, newer than {FORMAT_VERSION}: update finetune")
    saved.pop("overrides", None)
    tree = OmegaConf.structured(RunConfig)
    for group, registry in GROUPS.items():
        tree[group] = OmegaConf.structured(registry.type_of(saved[group]["name"]))
    try:
        return OmegaConf.merge(tree, saved)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {conversion_message(error)}") from error


def resumed(saved: DictConfig, given: DictConfig, overrides: list[str], directory: str) -> DictConfig:
    """The saved configuration with the few things that a resumed run may change.

    Args:
        saved: config.yaml of the run.
        given: what the command line composes to; values of allowed overrides are taken from it.
        overrides: the command line's own, e.g. ["resume=runs/x", "train.max_steps=50"].
        directory: the run directory, kept as `resume`.

    Raises:
        ConfigError: naming each override that would make it another run, with both values.
    """
    result = OmegaConf.create(saved)
    assert isinstance(result, DictConfig)
    different = []
    for override in overrides:
        key = override.lstrip("+~").partition("=")[0].partition("@")[0].replace("/", ".")
        if key == "resume":
            continue
        if any(key == allowed or key.startswith(allowed + ".") for allowed in RESUMABLE):
            # A node of another type (tracking=off) replaces the old one; merging would refuse it.
            OmegaConf.update(result, key, OmegaConf.select(given, key), merge=False, force_add=True)
            continue
        before, after = OmegaConf.select(saved, key), OmegaConf.select(given, key)
        if before != after:
            different.append(f"{key} was {_plain(before)} and would be {_plain(after)}")
    if different:
        allowed = ", ".join(RESUMABLE)
        raise ConfigError(
            f"resume={directory} restores the run's own configuration; {'; '.join(different)}"
            f" (only {allowed} may change)"
        )
    result.resume = directory
    result.output_dir = None
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, (DictConfig, ListConfig)):
        return OmegaConf.to_container(value)
    return value
