"""`finetune offsite plug`: the owner puts what came back into the full model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.adapters import peft_format
from finetune.adapters.emulator import Emulator, as_emulator
from finetune.adapters.provenance import read_provenance
from finetune.errors import ConfigError, ModelError
from finetune.export.directory import published
from finetune.model.check import check_path
from finetune.offsite.cut import renamed
from finetune.offsite.split import Job, source_of, stored_dtype

METHOD = "layers"


def plug(job: Job, adapter: str | None) -> int:
    """Write the full model with an adapter's blocks in the place of its own; returns the exit code.

    Args:
        adapter: `adapter.path`, the directory that came back.

    Raises:
        UserError: for an adapter of another model or emulator, and anything else the user can mend.
    """
    from finetune.model.load import load
    from finetune.offsite.ship import write_model
    from finetune.quant.dense import DenseConfig

    target = job.offsite.target()
    if adapter is None:
        raise ConfigError("adapter.path is not set: expected the adapter directory that came back")
    directory = Path(adapter)
    emulator, blocks = returned(directory)
    dtype = stored_dtype(job.model, check_path(job.model))
    device = "cpu" if job.device == "auto" else job.device  # nothing is computed
    full = load(job.model, DenseConfig(), dtype, device)
    check_full(directory, emulator, job.model.path, full.digests["base"])
    attached = put_in(full.model, directory, emulator, blocks)
    with published(target) as work:
        write_model(source_of(full, attached, dtype, job.max_shard_gb), work)
    places = ", ".join(str(emulator.in_full(block)) for block in blocks)
    print(f"{target}: {job.model.path} with the trained blocks {places} of {emulator.full_blocks}")
    return 0


def returned(directory: Path) -> tuple[Emulator, list[int]]:
    """The emulator that an adapter was trained on, and the numbers of its blocks there.

    Raises:
        ModelError: for an adapter of another method, one that was not trained on an emulator or on another one than it
            says, and one that holds more than the blocks that were to be trained.
    """
    saved = peft_format.read_config(directory)
    path = directory / peft_format.CONFIG
    peft_format.check_method(directory, saved, {peft_format.OWN_METHOD: METHOD})
    if "offsite" not in saved:
        raise ModelError(
            f"{path} names no emulator: expected an adapter trained on what `finetune offsite split` wrote"
        )
    emulator = as_emulator(saved["offsite"], f"{path}: offsite")
    blocks = saved.get("layers")
    if not isinstance(blocks, list) or not blocks:
        raise ModelError(f"{path} has no layers: expected what finetune writes for adapter={METHOD}")
    strange = [block for block in blocks if emulator.in_full(block) is None]
    if strange:
        raise ModelError(
            f"adapter {directory} trained block {strange[0]} of the emulator, which is its middle: expected"
            f" {', '.join(map(str, emulator.train))}"
        )
    if saved.get("train_also"):
        raise ModelError(f"adapter {directory} also trained {', '.join(saved['train_also'])}: expected blocks alone")
    provenance = read_provenance(directory)
    trained = (provenance or {}).get("digests", {}).get("base")
    if trained is not None and trained != emulator.emulator:
        raise ModelError(
            f"adapter {directory} was trained on weights {trained[:12]}, not on the emulator {emulator.emulator[:12]}"
            " that it names"
        )
    return emulator, blocks


def check_full(directory: Path, emulator: Emulator, path: str, digest: str) -> None:
    """Refuse a full model that the emulator does not stand for.

    Raises:
        ModelError: naming both.
    """
    if digest != emulator.full:
        raise ModelError(
            f"adapter {directory} was trained on an emulator of {emulator.full[:12]}, but model.path={path} is"
            f" {digest[:12]}: set model.path to the model that was split"
        )


def put_in(model: Any, directory: Path, emulator: Emulator, blocks: list[int]) -> Any:
    """Attach the blocks at their places in the full model and fill them.

    Raises:
        ModelError: for tensors that do not fit.
    """
    from finetune.adapters.attach import attach
    from finetune.adapters.layers import LayersConfig
    from finetune.structure import inspect

    places = [place for block in blocks if (place := emulator.in_full(block)) is not None]
    names = inspect(model).blocks
    owner = names[0].rpartition(".")[0]
    attached = attach(model, LayersConfig(layers=places))
    tensors = peft_format.read_tensors(directory)
    theirs = [f"{peft_format.PREFIX}{owner}.{block}" for block in blocks]
    ours = [f"{peft_format.PREFIX}{names[place]}" for place in places]
    attached.fill(directory, {renamed(key, theirs, ours): tensor for key, tensor in tensors.items()})  # type: ignore[attr-defined]
    return attached
