"""Weights & Biases. Whatever goes wrong in it, the run goes on."""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlparse

from finetune.errors import ConfigError, nearest
from finetune.training.config import TRACKERS, TrackingConfig
from finetune.training.run_directory import RunDirectory
from finetune.training.trackers.off import Off

MODES = ("auto", "online", "offline")
PUBLIC_HOST = "api.wandb.ai"
INIT_TIMEOUT = 30.0
"""Seconds that a server gets to answer before the run is tracked offline; WANDB_INIT_TIMEOUT says otherwise."""


@dataclass
class WandbConfig(TrackingConfig):
    """Weights & Biases.

    Attributes:
        mode: auto | online | offline; auto is online where an API key is found (environment or ~/.netrc), else offline.
        project, entity, group, tags: as wandb knows them; null leaves them to its own settings (WANDB_PROJECT ...).
        log_adapter: upload the final adapter as an artifact.
    """

    name: str = "wandb"
    mode: str = "auto"
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    log_adapter: bool = False

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(
                f"tracking.mode is {self.mode!r}: expected {' | '.join(MODES)}{nearest(self.mode, MODES)}"
            )


def logged_in() -> bool:
    """Whether an API key is in the environment or in the netrc file, without asking anybody."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    hosts = {PUBLIC_HOST, urlparse(wandb.Settings().base_url).hostname or ""}
    try:
        kept = netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return False
    return any(kept.authenticators(host) for host in hosts)


def resolved_mode(config: WandbConfig) -> str:
    """online, offline or disabled. An explicit mode wins; `auto` honours WANDB_MODE and looks for a key."""
    if config.mode != "auto":
        return config.mode
    asked = os.environ.get("WANDB_MODE")
    if asked in ("online", "offline", "disabled"):
        return asked
    return "online" if logged_in() else "offline"


def resolved_config(path: Path) -> dict[str, Any] | None:
    """What the run's config.yaml says, None before it is written."""
    from omegaconf import OmegaConf

    file = path / "config.yaml"
    container: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.exists() else None
    return container if isinstance(container, dict) else None


@TRACKERS.register(WandbConfig)
def build(config: WandbConfig, run: RunDirectory) -> Wandb | Off:
    """Rank 0's tracker; other ranks track nothing."""
    return Wandb(config, run) if run.writable else Off()


class Wandb:
    """One wandb run. The first failure is said on stderr; after it nothing more is sent.

    Attributes:
        run_id: wandb's id, None where it could not be started.
        note: where the run can be seen.
    """

    def __init__(self, config: WandbConfig, run: RunDirectory) -> None:
        self.config, self.directory = config, run
        self.run_id: str | None = None
        self.note: str | None = None
        self._run: Any = None
        self._guarded(self._start)

    def log(self, metrics: dict[str, Any], step: int) -> None:
        """One metrics line; evaluation lines join the training line of their step."""
        self._guarded(
            lambda: self._run.log({key: value for key, value in metrics.items() if value is not None}, step=step)
        )

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Text in rows, e.g. samples before and after."""

        def send() -> None:
            import wandb

            self._run.log({name: wandb.Table(columns=list(columns), data=rows)})

        self._guarded(send)

    def summary(self, values: dict[str, Any]) -> None:
        """Final figures, e.g. the proofs."""
        self._guarded(lambda: self._run.summary.update(values))

    def artifact(self, directory: Path, name: str) -> None:
        """Upload the adapter, where `tracking.log_adapter` asks for it."""
        if not self.config.log_adapter:
            return

        def send() -> None:
            import wandb

            artifact = wandb.Artifact(f"{name}-{self.run_id}", type="adapter")
            artifact.add_dir(str(directory))
            self._run.log_artifact(artifact)

        self._guarded(send)

    def finish(self, exit_code: int) -> None:
        """Close the run; 0 marks it as finished, anything else as failed."""
        self._guarded(lambda: self._run.finish(exit_code=exit_code))
        self._run = None

    def _start(self) -> None:
        mode = resolved_mode(self.config)
        try:
            self._run = self._open(mode)
        except Exception as error:  # a server that is down, a key that is refused: what is kept can be sent later
            if mode != "online":
                raise
            print(f"wandb cannot be reached, tracking offline: {_first_line(error)}", file=sys.stderr, flush=True)
            mode = "offline"
            self._run = self._open(mode)
        self.run_id = self._run.id
        self.directory.update(tracker_id=self.run_id)
        where = (
            self._run.url
            if mode == "online"
            else f"{self._run.dir}, upload with: wandb sync {Path(self._run.dir).parent}"
        )
        self.note = f"tracking: wandb {mode}, {where}"

    def _open(self, mode: str) -> Any:
        import wandb

        config = self.config
        known = self.directory.record.get("tracker_id")
        settings: dict[str, Any] = {"silent": True, "console": "off"}
        if "WANDB_INIT_TIMEOUT" not in os.environ:
            settings["init_timeout"] = INIT_TIMEOUT
        return wandb.init(
            # inside a sweep the agent names project and entity
            project=None if "WANDB_SWEEP_ID" in os.environ else config.project or os.environ.get("WANDB_PROJECT"),
            entity=None if "WANDB_SWEEP_ID" in os.environ else config.entity,
            group=config.group,
            tags=config.tags or None,
            name=f"{self.directory.record.get('name', 'run')}-{self.directory.path.name}",
            config=resolved_config(self.directory.path),
            dir=str(self.directory.path),
            id=known,
            resume="allow" if known else None,
            mode=cast(Any, mode),
            settings=wandb.Settings(**settings),
        )

    def _guarded(self, action: Callable[[], None]) -> None:
        """Do something with wandb unless it has failed before; never raise."""
        if self._run is None and action != self._start:
            return
        try:
            action()
        except Exception as error:  # a tracker may fail in any way; the run must not
            self._run = None
            print(f"tracking stopped, the run goes on: {_first_line(error)}", file=sys.stderr, flush=True)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
