"""`finetune offsite split`: what the owner of a model ships, made in one directory that appears whole or not at all."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from finetune.adapters.emulator import Emulator
from finetune.data.config import DataConfig
from finetune.device import make_accelerator
from finetune.errors import ConfigError
from finetune.export.base import ExportSource
from finetune.export.directory import published
from finetune.model.check import check_directory, check_path
from finetune.model.config import ModelConfig
from finetune.model.headers import Header, usual_dtype
from finetune.offsite.config import NONE, OffsiteConfig
from finetune.offsite.cut import Cut, plan
from finetune.quant.base import QUANTIZERS, QuantConfig
from finetune.training.config import OptimConfig, TrainConfig

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Names of safetensors for the dtypes that a model can be split in."""
PLAIN = "plain"


@dataclass
class Job:
    """The rooms' settings that splitting and plugging take.

    Attributes:
        output_dir: the run directory of a distillation; None makes a new one under runs/offsite.
        max_shard_gb: largest safetensors file, in 10^9 bytes.
    """

    model: ModelConfig
    offsite: OffsiteConfig
    data: DataConfig
    train: TrainConfig
    optim: OptimConfig
    device: str = "auto"
    seed: int = 0
    output_dir: str | None = None
    max_shard_gb: float = 4.0


def split(job: Job) -> int:
    """Cut a model in three and write what is shipped; returns the exit code.

    Raises:
        UserError: for anything the user can mend; nothing is written then.
    """
    from finetune.data.sources import check_sources

    target = job.offsite.target()
    if job.offsite.distill_steps == 0 and job.offsite.quant == NONE and not job.offsite.verbatim:
        raise ConfigError(
            "offsite.distill_steps is 0 and offsite.quant is none: the kept blocks would leave as they are; set one of"
            " them, or allow it by offsite.verbatim=true"
        )
    dtype = stored_dtype(job.model, check_path(job.model))
    if job.offsite.distill_steps:
        check_sources(job.data)
    cut = plan(job.model, job.offsite)
    with published(target) as work:
        code = _make(job, cut, dtype, work)
        if code:
            raise SystemExit(code)
    print(
        f"{target}: {told(cut)}; fine-tune it with `train.py model.path={job.offsite.output} adapter=layers quant=keep`"
    )
    return 0


def told(cut: Cut) -> str:
    """The cut in words."""
    kept = ", ".join(map(str, cut.kept))
    return (
        f"{len(cut.blocks)} of {len(cut.full_names)} blocks, {cut.layers[0]} at the start and {cut.layers[1]} at the"
        f" end to be trained, between them {kept} of the middle's {len(cut.full_middle())}"
    )


def stored_dtype(model: ModelConfig, headers: list[Header]) -> Any:
    """The dtype that most of a checkpoint is stored in, as torch's.

    Raises:
        ConfigError: for a base that is not on this machine, or is not stored in a floating-point dtype.
    """
    import torch

    if not headers:
        raise ConfigError(f"model.path={model.path} is not on this machine: download it and name its directory")
    most = usual_dtype(headers)
    if most not in DTYPES:
        raise ConfigError(
            f"model.path={model.path} is stored as {most}: offsite needs the dense checkpoint ({', '.join(DTYPES)})"
        )
    return getattr(torch, DTYPES[most])


def source_of(loaded: Any, adapter: Any, dtype: Any, max_shard_gb: float) -> ExportSource:
    """What the writers need of a loaded model."""
    return ExportSource(
        model=loaded.model,
        adapter=adapter,
        tokenizer=loaded.tokenizer,
        base_path=loaded.base_path,
        dtype=dtype,
        quantization_config=None,
        max_shard_bytes=int(max_shard_gb * 1e9),
    )


def _make(job: Job, cut: Cut, dtype: Any, work: Path) -> int:
    """Fill the directory; a signal's exit code where distillation was interrupted."""
    from finetune.model.digest import base_digest
    from finetune.model.load import load
    from finetune.offsite.cut import prove
    from finetune.offsite.ship import Middle, write_emulator, write_plain
    from finetune.quant.dense import DenseConfig

    accelerator = make_accelerator(job.device)
    device = str(accelerator.device)
    full = load(job.model, DenseConfig(), dtype, device)
    middle = Middle.of(full.model, cut)
    plain = work / PLAIN
    plain.mkdir()
    write_plain(source_of(full, None, dtype, job.max_shard_gb), cut, plain)
    emulator = load(replace(job.model, path=str(plain), revision=None), DenseConfig(), dtype, device)
    shutil.rmtree(plain)
    prove(full.model, emulator.model, cut)
    distilled = _distilled(job, cut, full, emulator, accelerator)
    if distilled is not None and distilled.status == "interrupted":
        print("interrupted: no emulator is written")
        return 128 + (distilled.signal or 2)
    quant = quant_of(job.offsite.quant)
    config: Any = emulator.model.config
    config._name_or_path = ""  # the plain cut, which is gone
    source = source_of(emulator, distilled.adapter if distilled else None, dtype, job.max_shard_gb)
    source = replace(source, base_path=full.base_path)  # where Python of its own would be
    write_emulator(source, cut, quant, middle, work, round_rest=distilled is None)
    middle.judge(cut, job.offsite.verbatim)
    record = Emulator(
        full=full.digests["base"],
        full_blocks=len(cut.full_names),
        emulator=base_digest(check_directory(work)),
        layers=cut.layers,
        kept=cut.kept,
        distilled=distilled.record if distilled else None,
        quant=None if quant is None else asdict(quant),
        verbatim=bool(middle.seen),
    )
    record.write(work)
    return 0


def _distilled(job: Job, cut: Cut, full: Any, emulator: Any, accelerator: Any) -> Any:
    """The taught middle; None where none was asked for."""
    from finetune.offsite.distill import distill
    from finetune.training.run_directory import RunDirectory

    if not job.offsite.distill_steps:
        return None
    with RunDirectory.create("offsite", job.output_dir) as run:
        run.imports_done()
        run.start()
        print(f"teaching the kept blocks in {run.path}")
        result = distill(
            full,
            emulator,
            cut,
            job.offsite,
            model=job.model,
            data=job.data,
            train=job.train,
            optim=job.optim,
            accelerator=accelerator,
            run=run,
            seed=job.seed,
        )
        run.update(status="interrupted" if result.status == "interrupted" else "finished")
    return result


def quant_of(name: str) -> QuantConfig | None:
    """The storage format of a name with its default settings; None for `none`."""
    return None if name == NONE else QUANTIZERS.type_of(name)()
