"""`finetune quantize`, from the checks that need no weights to the table at the end."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finetune.device import check_device, make_accelerator, torch_dtype
from finetune.errors import ConfigError
from finetune.export.base import ExportSource
from finetune.export.directory import published, write_json
from finetune.model.check import check_path, read_json
from finetune.model.headers import Header, usual_dtype
from finetune.quant.packed import PackedWeight
from finetune.quant.rounders.base import CALIBRATORS
from finetune.quant.transforms.base import TRANSFORMS
from finetune.quantize.config import QuantizeConfig
from finetune.quantize.text import batches_of, check_text, read_text

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
    headers = check_path(config.model)
    with published(target) as work:
        from finetune.quantize.report import table

        record = _make(config, headers, work)
        print(table(record))
    print(f"{target}: read by {record['read_by']}; fine-tune it with `train.py model.path={config.output} quant=keep`")
    return 0


def _make(config: QuantizeConfig, headers: list[Header], work: Path) -> dict[str, Any]:
    """Fill the directory; what the report says."""
    from finetune.model.hub import fetch
    from finetune.model.load import Task, context_length, load
    from finetune.model.pretrained import read_config, read_tokenizer
    from finetune.quant.dense import DenseConfig
    from finetune.quant.driver import Driver
    from finetune.quantize.measure import Reference
    from finetune.quantize.report import collect
    from finetune.quantize.write import compressed, write
    from finetune.structure import inspect

    directory = fetch(config.model, weights=False)
    dtype = torch_dtype(_dtype(config, headers, directory))
    tokenizer = read_tokenizer(directory, config.model)
    vocabulary = int(read_config(directory, config.model).get_text_config().vocab_size)
    text = read_text(config.data, tokenizer, vocabulary, context_length(config.model), config.quant)
    device = str(make_accelerator(config.device).device)
    # Fused modules multiply by weights without calling them, and so would hide what projections read.
    base = replace(config.model, fused="off")
    loaded = load(base, DenseConfig(), dtype, device, Task())
    model, structure = loaded.model, inspect(loaded.model)
    in_public = compressed(config.quant, structure)

    def prepare(module: PackedWeight) -> None:
        if in_public and hasattr(module, "scale_dtype"):
            module.scale_dtype = dtype  # type: ignore[assignment]

    begun = time.perf_counter()
    reference = Reference(model, text.eval) if text.eval else None
    batches = [{k: v.to(device) if hasattr(v, "to") else v for k, v in b.items()} for b in batches_of(text.calibration)]
    with Progress() as progress:
        rounder = CALIBRATORS.build(config.calibrator)
        transform = TRANSFORMS.build(config.transform)
        layers = Driver(model, structure, config.quant, rounder, batches, progress.layer, prepare, transform).go()
    quality = reference.compare(model) if reference is not None else None
    source = ExportSource(
        model=model,
        adapter=None,
        tokenizer=tokenizer,
        base_path=loaded.base_path,
        dtype=dtype,
        quantization_config=None,
        max_shard_bytes=int(config.max_shard_gb * 1e9),
    )
    read_by = write(source, config.quant, in_public, work)
    record = collect(work, model, layers, quality)
    record |= {
        "model": config.model.path,
        "base": loaded.digests["base"],
        "quant": asdict(config.quant),
        "calibrator": asdict(config.calibrator),
        "transform": asdict(config.transform) | ({} if transform is None else asdict(transform.summary)),
        "calibration_tokens": sum(map(len, text.calibration)),
        "seconds": round(time.perf_counter() - begun, 3),
        "read_by": read_by,
    }
    write_json(work / RECORD, record)
    return record


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


class Progress:
    """A bar on a terminal, a line a block's worth of projections elsewhere."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._begun = time.perf_counter()
        self._said = 0.0

    def __enter__(self) -> Progress:
        if sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(TextColumn("quantize"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
            self._bar.start()
            self._task = self._bar.add_task("")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def layer(self, layer: Any, done: int, of: int) -> None:
        """A projection is done."""
        seconds = time.perf_counter() - self._begun
        left = seconds / done * (of - done)
        errors = f"error {layer.error:.2e} (nearest {layer.error_rtn:.2e})"
        if self._bar is not None:
            told = f"{layer.name}: {errors}, {left:.0f} s left"
            self._bar.update(self._task, total=of, completed=done, description=told)
        elif done == of or seconds - self._said >= 2:
            self._said = seconds
            print(f"quantized {done} of {of}: {layer.name}: {errors}, {left:.0f} s left", flush=True)
        if layer.note:
            print(f"{layer.name}: {layer.note}", flush=True)
