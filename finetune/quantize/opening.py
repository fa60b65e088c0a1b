"""The dense model that is to be quantized: one block at a time wherever that can be, else whole in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.data.rows import Batch as Rows
from finetune.errors import ModelError
from finetune.model.blocks import BlockReader
from finetune.model.digest import base_digest
from finetune.model.exchange import exchange_norms
from finetune.model.headers import Header
from finetune.model.held import Held, candidates
from finetune.model.load import load
from finetune.model.pretrained import read_config
from finetune.model.streaming import fixed_thresholds
from finetune.quant.dense import DenseConfig
from finetune.quant.distill import Distilled
from finetune.quant.pruners.cut import Summary as CutSummary
from finetune.quant.recipe import Recipe
from finetune.quant.replay import Batch
from finetune.quant.resident import Resident
from finetune.quant.standins import ANSWERS, Answer, answer_of
from finetune.quant.transforms.base import Summary
from finetune.quantize.config import QuantizeConfig
from finetune.quantize.measure import Classes, Figures, Measure, Remembered, Tokens, Vectors
from finetune.quantize.state import State
from finetune.quantize.stream import OneBlock
from finetune.quantize.text import BATCH_TOKENS, Text
from finetune.quantize.write import Stored
from finetune.structure import inspect
from finetune.structure.base import Structure

FREE = ("output", "max_shard_gb", "device", "model.path", "model.revision")
"""Settings that a run may go on with changed: what is done does not depend on them, or is compared by digests."""


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
        reader: of the checkpoint.
        held: what it holds.
        text: to calibrate and to measure on.
    """

    reader: BlockReader
    held: Held
    text: Text

    @property
    def dtype(self) -> torch.dtype:
        """Of what stays dense."""
        return self.reader.loading.dtype

    @property
    def device(self) -> str:
        """ "cpu", "cuda:0", ..."""
        return self.reader.device


def reader_of(
    config: QuantizeConfig, directory: Path, headers: list[Header], dtype: torch.dtype, device: str
) -> tuple[BlockReader, Held]:
    """The checkpoint opened as what it is: by the first class of transformers in which each tensor has its place.

    Raises:
        ModelError: where there is none, saying why the likeliest one does not fit.
    """
    stock = read_config(directory, config.model)
    refused: ModelError | None = None
    for held in candidates(stock):
        try:
            reader = BlockReader(directory, stock, config.model, dtype, device, headers, held)
        except ModelError as error:
            refused = refused or error
            continue
        if held.kind == "encoder" and len(inspect(reader.empty).stacks) > 1:
            raise ModelError(
                f"{directory} holds an encoder and a decoder without their head: expected the checkpoint of the whole"
                " model, whose answers tell what quantizing costs"
            )
        return reader, held
    assert refused is not None
    raise refused


@contextmanager
def opened(
    config: QuantizeConfig,
    source: Source,
    target: Path,
    in_public: Callable[[Structure], bool],
    recipe: Recipe,
) -> Iterator[Opened]:
    """The model for the time that it is worked on; what a run leaves behind that does not end is for the next one.

    Args:
        target: the output.
        in_public: as in `write`, of a structure.
        recipe: what its transform, distiller and cut have to say of finished blocks is kept with them.

    Raises:
        ModelError: for anything about the checkpoint that the user can mend.
        ConfigError: where what an earlier run left belongs to other settings.
    """
    transform, distiller, cut = recipe.transform, recipe.distiller, recipe.cut
    tokens = BATCH_TOKENS if distiller is None else distiller.config.batch_tokens
    batches = [_to(batch, source.device) for batch in source.text.batches(tokens)]
    streamed = _streamed(source, batches)
    if isinstance(streamed, str):
        print(
            f"{config.model.path} is held in memory as a whole, and if this is interrupted it starts anew: {streamed}",
            flush=True,
        )
        yield _whole(config, source, batches)
        return
    reader, (structure, rows, measure, answer) = source.reader, streamed
    digest = base_digest(reader.headers)
    state = State(target, settings_of(config, source, digest))
    try:
        if state.finished:
            if transform is not None:
                transform.summary = Summary(**state.summary["transform"])
            if distiller is not None:
                distiller.done = [Distilled(**each) for each in state.summary["distill"]]
            if cut is not None:
                cut.summary = CutSummary(**state.summary["cut"])
            print(f"going on after {state.finished} of {len(structure.blocks)} blocks ({state.path})", flush=True)

        def said() -> dict[str, Any]:
            return {
                "transform": {} if transform is None else asdict(transform.summary),
                "distill": [] if distiller is None else [asdict(each) for each in distiller.done],
                "cut": {} if cut is None else asdict(cut.summary),
            }

        resident = OneBlock(reader, structure, state, answer, rows, measure, in_public(structure), said)
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
    told |= {f"the text of data.{key}": digest for key, digest in source.text.digests().items()}
    return told | {package: version(package) for package in ("torch", "transformers")}


def _streamed(source: Source, batches: list[Batch]) -> tuple[Structure, list[Rows], Measure, Answer] | str:
    """What it takes to work on the checkpoint block by block; or why that cannot be."""
    reader = source.reader
    if reader.whole:
        return reader.whole
    model = reader.outside()
    structure = inspect(model)
    rows, measure = _measured(model, structure, source)
    inputs: list[Batch] = [*batches[:1], *(_to(row.model_inputs(), source.device) for row in rows[:1])]
    answers = {answer_of(model, structure.blocks, each) for each in inputs} or {ANSWERS[0]}
    answer = answers.pop()
    if answer is None or answers:
        return "its blocks are called in a way that depends on what they put out"
    return structure, rows, measure, answer


def _whole(config: QuantizeConfig, source: Source, batches: list[Batch]) -> Opened:
    """The model in memory."""
    # Fused modules multiply by weights without calling them, and so would hide what projections read.
    loaded = load(replace(config.model, fused="off"), DenseConfig(), source.dtype, source.device, source.held)
    model: nn.Module = loaded.model
    structure, digest = inspect(model), loaded.digests["base"]
    for block in structure.blocks if config.model.fused != "off" else ():
        exchange_norms(model.get_submodule(block), source.dtype)
    rows, measure = _measured(model, structure, source)
    reference = Remembered(model, rows, measure) if rows else None

    def quality() -> Figures | None:
        return None if reference is None else reference.compare(model)

    return Opened(model, structure, Resident(), batches, digest, loaded.base_path, quality, dict)


def _measured(model: Any, structure: Structure, source: Source) -> tuple[list[Rows], Measure]:
    """The held-out rows, and what of a model's answers to them is compared."""
    held, text = source.held, source.text
    if held.kind == "classification":
        measure: Measure = Classes(len(held.labels), text.labelled)
    elif held.kind == "regression":
        measure = Vectors(model, 1)
    elif held.kind == "encoder":
        measure = Vectors(model.get_submodule(structure.stacks[-1].name), model.config.get_text_config().hidden_size)
    else:
        measure = Tokens(int(model.get_output_embeddings().weight.shape[0]))
    return text.measured(measure.width) if text.measures else [], measure


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
