"""`finetune quantize`, from the checks that need no weights to the table at the end."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.device import check_device, make_accelerator, torch_dtype
from finetune.errors import ConfigError
from finetune.export.base import ExportSource
from finetune.export.directory import published, write_json
from finetune.model.check import check_path, read_json
from finetune.model.headers import Header, usual_dtype
from finetune.quant.packed import PackedWeight
from finetune.quant.pruned import KEY as PRUNED
from finetune.quant.rounders.base import CALIBRATORS
from finetune.quant.transforms.base import TRANSFORMS
from finetune.quantize.config import QuantizeConfig
from finetune.quantize.pruning import check_pattern, cut_of, moved, pruner_of, settings, sparsity
from finetune.quantize.text import Text, check_text, read_text
from finetune.training.signals import StopSignals

if TYPE_CHECKING:
    from finetune.model.held import Held
    from finetune.quant.recipe import Recipe
    from finetune.quantize.opening import Opened, Source
    from finetune.structure.base import Structure

DTYPES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
"""Names of safetensors for the dtypes that a dense checkpoint can be in."""
RECORD = "quantization.json"
"""The report's file beside the checkpoint."""


def quantize(config: QuantizeConfig) -> int:
    """Quantize a checkpoint; the output directory appears whole or not at all. Returns the exit code.

    Raises:
        UserError: for anything the user can mend, before weights are loaded where that can be.
    """
    target = config.target()
    check_device(config.device)
    check_text(config.data)
    if config.pruner.prunes:
        pruner_of(config, {})
    headers = check_path(config.model)
    from finetune.quantize.progress import Stopped
    from finetune.quantize.state import partial

    with StopSignals() as signals:
        try:
            record = _make(config, headers, target, signals)
        except Stopped as stopped:
            later = "goes on after the last finished block" if partial(target).exists() else "starts anew"
            print(f"interrupted; the same command {later}")
            return 128 + stopped.number
    objective = {"causal_lm": "", "encoder": "objective=classification "}.get(
        record["holds"], f"objective={record['holds']} "
    )
    command = f"train.py {objective}model.path={config.output} quant=keep"
    print(f"{target}: read by {record['read_by']}; fine-tune it with `{command}`")
    return 0


def _make(config: QuantizeConfig, headers: list[Header], target: Path, signals: StopSignals) -> dict[str, Any]:
    """Everything from the text to the published directory; what the report says."""
    from finetune.model.hub import fetch
    from finetune.model.pretrained import read_tokenizer
    from finetune.quant.distill import Distiller
    from finetune.quant.recipe import Recipe
    from finetune.quantize.opening import Source, opened, reader_of
    from finetune.quantize.plot import plot
    from finetune.quantize.report import table
    from finetune.quantize.write import compressed
    from finetune.structure import inspect

    directory = fetch(config.model, weights=False)
    dtype = torch_dtype(_dtype(config, headers, directory))
    pruner = pruner_of(config, read_json(directory / "config.json", ""))
    reader, held = reader_of(config, directory, headers, dtype, str(make_accelerator(config.device).device))
    if getattr(config.quant, "head", False) and inspect(reader.empty).head is None:
        raise ConfigError(
            f"quant.head=true, but {config.model.path} holds a {held.words} without an output head over tokens:"
            " expected false"
        )
    if config.pruner.prunes:
        check_pattern(config.pruner, inspect(reader.empty))
    cut = cut_of(config, reader.empty, held)
    tokenizer = read_tokenizer(directory, config.model)
    source = Source(reader, held, _text(config, reader.empty, held, tokenizer))
    recipe = Recipe(
        config.quant,
        CALIBRATORS.build(config.calibrator),
        cut,
        TRANSFORMS.build(config.transform),
        pruner,
        Distiller(config.distill) if config.distill.steps else None,
    )

    def in_public(structure: Structure) -> bool:
        return compressed(config.quant, structure if cut is None else cut.structure)

    with opened(config, source, target, in_public, recipe) as base, published(target) as work:
        job = Job(config, base, source, tokenizer, in_public(base.structure), recipe)
        record = _quantize(job, work, signals)
        print(table(record))
        if left_out := plot(record, work):
            print(left_out)
    return record


def _text(config: QuantizeConfig, model: Any, held: Held, tokenizer: Any) -> Text:
    """What to calibrate and to measure on, as the model reads it."""
    from finetune.model.load import context_length
    from finetune.model.task_head import reads_segments
    from finetune.quantize.rows import BATCH_ROWS, Reader, read_rows

    told = model.config.get_text_config()
    vocabulary, context = int(told.vocab_size), context_length(config.model)
    if not held.reads_rows:
        return read_text(config.data, tokenizer, vocabulary, context, config.quant)
    caches = "use_cache" in signature(model.forward).parameters
    reader = Reader(config.data, held, tokenizer, context, reads_segments(model), caches)
    pad = told.pad_token_id  # a decoder's classifier takes one row at a time without
    return read_rows(reader, vocabulary, config.quant, pad or 0, BATCH_ROWS if pad is not None else 1)


@dataclass(frozen=True)
class Job:
    """What is to be done, all checks passed."""

    config: QuantizeConfig
    base: Opened
    source: Source
    tokenizer: Any
    in_public: bool
    recipe: Recipe


def _quantize(job: Job, work: Path, signals: StopSignals) -> dict[str, Any]:
    """Fill the directory; what the report says."""
    from finetune.quant.driver import Driver
    from finetune.quantize.progress import Progress
    from finetune.quantize.report import collect
    from finetune.quantize.write import write

    config, base, recipe, dtype = job.config, job.base, job.recipe, job.source.dtype

    def prepare(module: PackedWeight) -> None:
        if job.in_public and hasattr(module, "scale_dtype"):
            module.scale_dtype = dtype  # type: ignore[assignment]

    begun = time.perf_counter()
    with Progress(signals, len(base.resident.layers)) as progress:
        for worker in (recipe.distiller, recipe.cut):
            if worker is not None:
                worker.told = progress.step
        driver = Driver(
            base.model, base.structure, recipe, base.batches, base.resident, progress=progress.layer, prepare=prepare
        )
        layers = driver.go()
    quality = base.quality()
    stored = base.stored()
    if recipe.cut is not None:
        stored = moved(stored, recipe.cut.finish(base.model))
    source = ExportSource(
        model=base.model,
        adapter=None,
        tokenizer=job.tokenizer,
        base_path=base.base_path,
        dtype=dtype,
        quantization_config=None,
        max_shard_bytes=int(config.max_shard_gb * 1e9),
    )
    reached = sparsity(layers, base.structure) if recipe.pruner is not None else 0.0
    if config.pruner.prunes:
        setattr(base.model.config, PRUNED, settings(config.pruner, reached))
    read_by = write(source, config.quant, job.in_public, work, stored)
    record = collect(work, base.model, layers, quality) | _settings(job)
    record |= {"sparsity": reached, "seconds": round(time.perf_counter() - begun, 3), "read_by": read_by}
    write_json(work / RECORD, record)
    return record


def _settings(job: Job) -> dict[str, Any]:
    """What was asked for, each method with what it has to say of its work."""
    config, transform, cut, distiller = job.config, job.recipe.transform, job.recipe.cut, job.recipe.distiller
    return {
        "model": config.model.path,
        "holds": job.source.held.kind,
        "base": job.base.digest,
        "quant": asdict(config.quant),
        "calibrator": asdict(config.calibrator),
        "transform": asdict(config.transform) | ({} if transform is None else asdict(transform.summary)),
        "pruner": asdict(config.pruner) | ({} if cut is None else asdict(cut.summary)),
        "distill": asdict(config.distill) | {"blocks": [asdict(b) for b in distiller.done] if distiller else []},
        "calibration_tokens": job.source.text.tokens,
    }


def _dtype(config: QuantizeConfig, headers: list[Header], directory: Path) -> str:
    """The dtype of what stays dense.

    Raises:
        ConfigError: where the checkpoint is not dense, or not on this machine.
    """
    if not headers:
        raise ConfigError(f"model.path={config.model.path} is not on this machine: download it and name its directory")
    stored = usual_dtype(headers)
    told = read_json(directory / "config.json", "").get("quantization_config")
    if told is not None or stored not in DTYPES:
        how = (told or {}).get("quant_method", stored)
        raise ConfigError(
            f"model.path={config.model.path} is stored as {how} already: quantizing starts from a dense checkpoint"
            f" ({', '.join(DTYPES)})"
        )
    return DTYPES[stored] if config.dtype == "auto" else config.dtype
