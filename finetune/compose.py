"""Composing a configuration from the command line, with every mistake told in one line.

Hydra prints several lines and exits 1 when it cannot compose, and accepts stray keys behind `+`. So the
configuration is composed once before Hydra takes over, with each plain `key=value` made tolerant (`++key=value`):
what no dataclass knows is then found by the walk over the tree, all of it at once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from finetune.config import PLUGGED, RunConfig, conversion_message, register_schemas, stray_keys, to_config
from finetune.errors import ConfigError, nearest

CONFIG_NAME = "train"


class UserConfigs(SearchPathPlugin):
    """Puts ./conf of the working directory behind ours, so that a user adds choices without touching the package."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append ./conf where the working directory has one."""
        local = f"file://{Path.cwd() / 'conf'}"
        known = [element.path for element in search_path.get_path()]
        if Path.cwd().joinpath("conf").is_dir() and local not in known:
            search_path.append("user", local)


def prepare_hydra() -> None:
    """Register schemas and the user's own config directory; safe to call more than once."""
    register_schemas()
    plugins = Plugins.instance()
    if UserConfigs not in plugins.discover(SearchPathPlugin):
        plugins.register(UserConfigs)


@contextmanager
def hydra_context(config_dir: Path) -> Iterator[None]:
    """Hydra's compose API over our configs, independent of any Hydra state before it."""
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir), version_base="1.3", job_name="finetune"):
        yield
    GlobalHydra.instance().clear()


def expand(overrides: list[str]) -> list[list[str]]:
    """Every job of a sweep: the product of the overrides that list several values (`adapter.rank=8,16`).

    Raises:
        ConfigError: when an override cannot be parsed.
    """
    choices: list[list[str]] = []
    for override in parse(overrides):
        line = override.input_line or ""
        if override.is_sweep_override() and not override.is_hydra_override():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([line])
    return [list(job) for job in itertools.product(*choices)]


def parse(overrides: list[str]) -> list[Override]:
    """Hydra's own parser, its errors in one line."""
    try:
        return OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise ConfigError(f"cannot read the override: {' '.join(str(error).split())}") from error


def compose_config(
    overrides: list[str],
    config_dir: Path,
    extra_dirs: list[str] | None = None,
    name: str = CONFIG_NAME,
    kind: type = RunConfig,
) -> DictConfig:
    """Compose and check the configuration tree of one job.

    Args:
        overrides: as on the command line, without sweeps.
        config_dir: the directory that holds train.yaml.
        extra_dirs: directories of `--config-dir`.
        name: of the tree: its file in `config_dir`.
        kind: of the tree: its dataclass.

    Raises:
        ConfigError: one line; unknown keys all at once.
    """
    for directory in extra_dirs or []:
        if not Path(directory).is_dir():
            raise ConfigError(f"--config-dir {directory} is not a directory")
    prepare_hydra()
    with hydra_context(config_dir):
        groups = group_choices([config_dir, Path.cwd() / "conf", *map(Path, extra_dirs or [])])
        tolerant = [_tolerant(override, groups) for override in parse(overrides)]
        if extra_dirs:
            tolerant.append("hydra.searchpath=[" + ",".join(f"file://{Path(d).resolve()}" for d in extra_dirs) + "]")
        try:
            config = compose(name, overrides=tolerant)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(_composition_message(error, overrides, groups)) from error
    strays = stray_keys(config)
    if strays:
        raise ConfigError("; ".join(strays))
    if not names_the_job(config):
        to_config(config, kind)
    return config


def names_the_job(config: DictConfig) -> bool:
    """Whether a value has none before Hydra starts the job (output_dir=x-${hydra:job.num}); the job itself checks."""
    return "${hydra:" in OmegaConf.to_yaml(config)


def help_text(overrides: list[str], config_dir: Path, extra_dirs: list[str]) -> str:
    """What `--help` says: the choices of each group, and every key with the value it has with these overrides.

    Hydra's own help reads its whole repository anew for each of its groups, which takes a second, and lists schemas.

    Raises:
        ConfigError: as `compose_config`.
    """
    tree = compose_config(overrides, config_dir, extra_dirs)
    groups = group_choices([config_dir, Path.cwd() / "conf", *map(Path, extra_dirs)])
    shown = [group for group in sorted(groups) if group in tree or group == "experiment"]
    choices = [f"  {'+' if group == 'experiment' else ''}{group}={' | '.join(groups[group])}" for group in shown]
    lines = [
        "usage: python train.py [GROUP=CHOICE ...] [KEY=VALUE ...]      (installed: finetune train ...)",
        "",
        "Choices:",
        *choices,
        "",
        f"Keys and their values now (the comments in {config_dir} say what each means):",
        *(f"  {line}" for line in OmegaConf.to_yaml(tree).splitlines()),
        "",
        "KEY=A,B --multirun runs every combination; --config-dir DIR adds choices of your own; --hydra-help says more.",
    ]
    return "\n".join(lines)


def group_choices(directories: list[Path]) -> dict[str, list[str]]:
    """Config groups and the names that can be chosen in each, over all config directories."""
    groups: dict[str, set[str]] = {group: set(names) for group, names in PLUGGED.items()}
    for directory in directories:
        if not directory.is_dir():
            continue
        for file in sorted(directory.glob("*/*.yaml")):
            groups.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(names) for group, names in groups.items()}


def _tolerant(override: Override, groups: dict[str, list[str]]) -> str:
    """Let an unknown key through to the walk that names it; group choices and Hydra's own settings stay as they are."""
    line = override.input_line or ""
    key = override.key_or_group
    plain = not (override.is_add() or override.is_force_add() or override.is_delete() or override.is_hydra_override())
    if plain and key not in groups:
        return f"++{line}"
    return line


def _composition_message(error: Exception, overrides: list[str], groups: dict[str, list[str]]) -> str:
    """One line out of what Hydra says over several, with the nearest right name."""
    for override in parse(overrides):
        group, value = override.key_or_group, override.value()
        if group in groups and isinstance(value, str) and value not in groups[group]:
            sign = "+" if override.is_add() else ""
            return (
                f"{sign}{group}={value}: there is no such choice; have {', '.join(groups[group])}"
                f"{nearest(value, groups[group])}"
            )
        if group in groups and override.is_add() and group != "experiment":
            return f"+{group}={value}: {group} has a default already; write {group}={value}"
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    where = str(error).splitlines()[0]
    if isinstance(cause, OmegaConfBaseException):
        fields = getattr(cause.object_type, "__dataclass_fields__", {}) if cause.object_type else {}
        hint = nearest(str(cause.key), fields) if fields and cause.key not in fields else ""
        detail = conversion_message(cause)
        return f"{where}: {detail}{hint}" if where not in detail and detail not in where else f"{detail}{hint}"
    return " ".join(str(error).split())
