"""The dense model that is to be quantized: one block at a time wherever that can be, else whole in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.rows import Batch as Rows
from finetune.model.blocks import BlockReader
from finetune.model.digest import base_digest
from finetune.model.headers import Header
from finetune.model.load import Task, load
from finetune.model.pretrained import read_config
from finetune.model.streaming import fixed_thresholds
from finetune.quant.dense import DenseConfig
from finetune.quant.replay import Batch
from finetune.quant.resident import Resident
from finetune.quant.standins import ANSWERS, Answer, answer_of
from finetune.quant.transforms.base import Summary, Transform
from finetune.quantize.config import QuantizeConfig
from finetune.quantize.measure import Reference, measured_on
from finetune.quantize.state import State
from finetune.quantize.stream import OneBlock
from finetune.quantize.text import Text, batches_of
from finetune.quantize.write import Stored
from finetune.structure import inspect
from finetune.structure.base import Structure

FREE = ("output", "max_shard_gb", "device", "model.path", "model.revision", "model.fused")
"""Settings that a run may go on with changed: what is done does not depend on them, or is compared by digests."""
Figures = dict[str, float | int | None]


@dataclass(frozen=True)
class Opened:
    """A dense model and how its blocks come into memory.

    Attributes:
        model: changed in place while it is quantized.
        structure: of it.
        resident: who has its blocks.
        batches: calibration data, on the device of the model.
        digest: of the checkpoint's weights.
        base_path: its directory, or its hub id.
        quality: measures, once everything is quantized; None where there is no text to measure on.
        stored: what is on disk by then.
    """

    model: Any
    structure: Structure
    resident: Resident
    batches: list[Batch]
    digest: str
    base_path: str
    quality: Callable[[], Figures | None]
    stored: Callable[[], Stored]


@dataclass(frozen=True)
class Source:
    """What is known before weights are touched.

    Attributes:
        directory: the checkpoint.
        headers: of its shards.
        dtype: of what stays dense.
        device: "cpu", "cuda:0", ...
        text: to calibrate and to measure on.
    """

    directory: Path
    headers: list[Header]
    dtype: torch.dtype
    device: str
    text: Text


@contextmanager
def opened(
    config: QuantizeConfig,
    source: Source,
    target: Path,
    in_public: Callable[[Structure], bool],
    transform: Transform | None,
) -> Iterator[Opened]:
    """The model for the time that it is worked on; what a run leaves behind that does not end is for the next one.

    Args:
        target: the output.
        in_public: as in `write`, of a structure.
        transform: what it has to say of finished blocks is kept with them.

    Raises:
        ModelError: for anything about the checkpoint that the user can mend.
        ConfigError: where what an earlier run left belongs to other settings.
    """
    batches = [_to(batch, source.device) for batch in batches_of(source.text.calibration)]
    streamed = _streamed(config, source, batches)
    if isinstance(streamed, str):
        print(
            f"{config.model.path} is held in memory as a whole, and if this is interrupted it starts anew: {streamed}",
            flush=True,
        )
        yield _whole(config, source, batches)
        return
    reader, structure, rows, answer = streamed
    digest = base_digest(source.headers)
    state = State(target, settings_of(config, source, digest))
    try:
        if state.finished:
            if transform is not None:
                transform.summary = Summary(**state.summary)
            print(f"going on after {state.finished} of {len(structure.blocks)} blocks ({state.path})", flush=True)
        said = (lambda: asdict(transform.summary)) if transform is not None else dict
        resident = OneBlock(reader, structure, state, answer, rows, in_public(structure), said)
        where = reader.model.config._name_or_path
        with fixed_thresholds():
            yield Opened(reader.model, structure, resident, batches, digest, where, resident.quality, state.stored)
    except BaseException:
        state.close(keep=state.finished > 0)
        raise
    state.close(keep=False)


def settings_of(config: QuantizeConfig, source: Source, digest: str) -> dict[str, Any]:
    """Whatever the bytes of the output depend on, by name."""
    tree = asdict(config)
    del tree["data"]
    told = {key: value for key, value in _flat(tree) if key not in FREE}
    told |= {"dtype": str(source.dtype).removeprefix("torch."), "device": source.device}
    told |= {"the weights of model.path": digest}
    told |= {f"the text of data.{key}": _text_digest(getattr(source.text, key)) for key in ("calibration", "eval")}
    return told | {package: version(package) for package in ("torch", "transformers")}


def _streamed(
    config: QuantizeConfig, source: Source, batches: list[Batch]
) -> tuple[Any, Structure, list[Rows], Answer] | str:
    """The checkpoint opened for reading block by block; or why it cannot be worked on so."""
    stock = read_config(source.directory, config.model)
    reader = BlockReader(source.directory, stock, config.model, source.dtype, source.device, source.headers)
    if reader.whole:
        return reader.whole
    model = reader.outside()
    structure = inspect(model)
    rows = measured_on(source.text.eval, model.get_output_embeddings().weight.shape[0]) if source.text.eval else []
    inputs: list[Batch] = [*batches[:1], *(_to(row.model_inputs(), source.device) for row in rows[:1])]
    answers = {answer_of(model, structure.blocks, each) for each in inputs} or {ANSWERS[0]}
    answer = answers.pop()
    if answer is None or answers:
        return "its blocks are called in a way that depends on what they put out"
    return reader, structure, rows, answer


def _whole(config: QuantizeConfig, source: Source, batches: list[Batch]) -> Opened:
    """The model in memory."""
    # Fused modules multiply by weights without calling them, and so would hide what projections read.
    loaded = load(replace(config.model, fused="off"), DenseConfig(), source.dtype, source.device, Task())
    model: nn.Module = loaded.model
    reference = Reference(model, source.text.eval) if source.text.eval else None

    def quality() -> Figures | None:
        return None if reference is None else reference.compare(model)

    structure, digest = inspect(model), loaded.digests["base"]
    return Opened(model, structure, Resident(), batches, digest, loaded.base_path, quality, dict)


def _to(batch: Mapping[str, Any], device: str) -> Batch:
    """A batch on a device."""
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings by their dotted names, as they are written on the command line; a group's name is the group's value."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield (prefix[:-1] if key == "name" else f"{prefix}{key}"), value


def _text_digest(pieces: Sequence[Tensor]) -> str:
    """Of tokens, and where they are cut."""
    digest = hashlib.sha256(repr([len(piece) for piece in pieces]).encode())
    for piece in pieces:
        digest.update(piece.numpy().tobytes())
    return digest.hexdigest()
