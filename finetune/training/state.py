"""Everything that a run is between two steps: what a checkpoint holds and a resume restores, bit for bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.errors import RunError
from finetune.training import checkpoint
from finetune.training.group import Group
from finetune.training.optimizers.bitsandbytes_state import to_pages

PARAMETERS, OPTIMIZER, RANDOM = "parameters", "optimizer", "random"


@dataclass
class LoopState:
    """The loop's own counters, after `step` steps.

    Attributes:
        step: optimizer steps done, skipped ones included.
        epoch, cursor: where the next window starts.
        progress: epochs done, as a fraction.
        tokens: real tokens seen.
        loss_sum, loss_tokens: since the last log line.
        first_eval, last_eval, best_eval: held-out loss, in the objective's unit.
        first_metrics, best_metrics: what was measured beside `first_eval` and `best_eval`.
        evaluated_step: step of `last_eval`; -1 for none.
        best_step: step of `best_eval`; -1 for none.
        evals_without_best: evaluations since `best_eval`.
        skipped_steps, skipped_in_a_row: steps left out because something was not finite.
        tracker_id: the tracker's name of the run.
    """

    step: int = 0
    epoch: int = 0
    cursor: int = 0
    progress: float = 0.0
    tokens: int = 0
    loss_sum: float = 0.0
    loss_tokens: int = 0
    first_eval: float | None = None
    last_eval: float | None = None
    best_eval: float | None = None
    first_metrics: dict[str, float | None] = field(default_factory=dict)
    best_metrics: dict[str, float | None] = field(default_factory=dict)
    evaluated_step: int = -1
    best_step: int = -1
    evals_without_best: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    tracker_id: str | None = None


@dataclass
class Live:
    """The live objects whose state a checkpoint holds."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    group: Group


def save(directory: Path, state: LoopState, live: Live, *, keep: int) -> Path:
    """Write a checkpoint and rotate; all processes take part, rank 0 writes. Returns its path.

    Raises:
        RunError: on every process, where rank 0 cannot write.
    """
    random = _random_states(live.group)
    path = directory / checkpoint.name_of(state.step)
    with live.group.together():
        if live.group.main:
            tensors, scalars = _optimizer_state(live)
            groups: dict[str, dict[str, Tensor]] = {
                PARAMETERS: dict(live.parameters),
                OPTIMIZER: tensors,
                RANDOM: random,
            }
            record = {
                "loop": asdict(state),
                "optimizer": scalars,
                "scaler": live.scaler.state_dict(),
                "threads": torch.get_num_threads(),
                "processes": live.group.world,
            }
            checkpoint.write(directory, state.step, {key: value for key, value in groups.items() if value}, record)
            checkpoint.rotate(directory, keep, {state.best_step, state.step})
    return path


def restore(path: Path, live: Live) -> tuple[LoopState, list[str]]:
    """Fill the live objects from a valid checkpoint; returns the counters and lines that a user should read.

    Raises:
        RunError: when it holds other tensors than the run trains.
    """
    record = checkpoint.read_state(path)
    restore_parameters(path, live.parameters)
    _restore_optimizer(path, record["optimizer"], live)
    if record["scaler"]:
        live.scaler.load_state_dict(record["scaler"])
    notes = _restore_random(path, record, live.group)
    if record["threads"] != torch.get_num_threads():
        notes.append(
            f"resumed with {torch.get_num_threads()} threads after {record['threads']}: sums may round differently, so "
            "the run is not bit for bit what it would have been"
        )
    known = {field.name for field in fields(LoopState)}
    return LoopState(**{key: value for key, value in record["loop"].items() if key in known}), notes


def restore_parameters(path: Path, parameters: dict[str, nn.Parameter]) -> None:
    """Fill the trained tensors from a valid checkpoint.

    Raises:
        RunError: when names or shapes differ.
    """
    stored = checkpoint.read_tensors(path, PARAMETERS)
    if odd := sorted(stored.keys() ^ parameters.keys()):
        raise RunError(f"checkpoint {path} does not hold what this run trains: {odd[0]} is in only one of them")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if stored[name].shape != parameter.shape:
                found, wanted = tuple(stored[name].shape), tuple(parameter.shape)
                raise RunError(f"checkpoint {path} holds {name} of shape {found}, expected {wanted}")
            parameter.copy_(stored[name])


def _optimizer_state(live: Live) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The optimizer's state by parameter name: tensors as `name/key`, plain numbers apart."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for name, parameter in live.parameters.items():
        for key, value in live.optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                # bitsandbytes shares its code tables between parameters, which safetensors does not store
                tensors[f"{name}/{key}"] = value.detach().cpu().clone()
            else:
                scalars.setdefault(name, {})[key] = value
    return tensors, scalars


def _restore_optimizer(path: Path, scalars: dict[str, dict[str, Any]], live: Live) -> None:
    """Assigned by name, never through `load_state_dict`, which casts to the parameter's dtype."""
    stored = checkpoint.read_tensors(path, OPTIMIZER) if (path / f"{OPTIMIZER}.safetensors").exists() else {}
    live.optimizer.state.clear()
    for key, tensor in stored.items():
        name, _, entry = key.rpartition("/")
        parameter = live.parameters[name]
        # torch keeps its step counters on the CPU
        value = tensor if entry == "step" else tensor.to(parameter.device)
        live.optimizer.state[parameter][entry] = value
    for name, entries in scalars.items():
        live.optimizer.state[live.parameters[name]].update(entries)
    to_pages(live.optimizer)


def _random_states(group: Group) -> dict[str, Tensor]:
    """The generators that dropout draws from, one row a process."""
    states = {"cpu": group.gather(torch.get_rng_state()).cpu()}
    if group.device.type == "cuda":
        states["cuda"] = group.gather(torch.cuda.get_rng_state(group.device)).cpu()
    return states


def _restore_random(path: Path, record: dict[str, Any], group: Group) -> list[str]:
    states = checkpoint.read_tensors(path, RANDOM)
    if record["processes"] != group.world:
        note = (
            f"resumed with {group.world} processes after {record['processes']}: dropout draws other numbers and steps "
            "hold other rows than they would have"
        )
        return [note]
    torch.set_rng_state(states["cpu"][group.rank].contiguous())
    if group.device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"][group.rank].contiguous(), group.device)
    return []
