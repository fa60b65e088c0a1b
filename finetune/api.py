"""The same rooms from Python: `load`, `attach`, `train`, `export`.

What belongs to a loaded model (digests, its adapter, the held-out rows of its training) is kept beside it, weakly, so
that the four calls need not hand it round.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters import several
from finetune.adapters.base import Adapter, AdapterConfig, Originals
from finetune.config import RunConfig
from finetune.data.config import DataConfig
from finetune.data.rows import TokenRows
from finetune.errors import ConfigError
from finetune.export.base import Proof
from finetune.export.config import ExportConfig
from finetune.model.config import ModelConfig
from finetune.model.task import Task
from finetune.quant.base import QuantConfig
from finetune.training.config import OBJECTIVES, ObjectiveConfig, OptimConfig, TrainConfig
from finetune.training.protocols import TrainResult


@dataclass
class Known:
    """What is known of a loaded model. `loaded` holds everything but the model, which stays the caller's alone."""

    loaded: Any
    dtype: str
    path: ModelConfig
    adapter: Adapter | None = None
    train_rows: TokenRows | None = None
    eval_rows: TokenRows | None = None


_known: weakref.WeakKeyDictionary[nn.Module, Known] = weakref.WeakKeyDictionary()


def load(
    path: str | ModelConfig,
    quant: QuantConfig | None = None,
    *,
    task: Task | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> tuple[Any, Any]:
    """A frozen base and its tokenizer, streamed from a directory or hub id.

    Args:
        path: directory, hub id, `embedded`, or a whole ModelConfig.
        quant: how its projections are stored; None keeps the checkpoint's own storage.
        task: what the base is opened for; None is a causal language model.
        dtype: auto | bf16 | fp16 | fp32, of what is not quantized.
        device: auto | cpu | cuda | cuda:N | mps.

    Raises:
        UserError: in one line, for anything the caller can mend.
    """
    from finetune.device import check_device, make_accelerator, resolve_dtype, torch_dtype
    from finetune.model.load import load as load_model
    from finetune.quant.keep import KeepConfig

    check_device(device)
    config = path if isinstance(path, ModelConfig) else ModelConfig(path=str(path))
    target = make_accelerator(device).device
    resolved = resolve_dtype(dtype, target)
    loaded = load_model(config, quant or KeepConfig(), torch_dtype(resolved), str(target), task or Task())
    _known[loaded.model] = Known(replace(loaded, model=nn.Identity()), resolved, config)
    return loaded.model, loaded.tokenizer


def attach(model: Any, config: AdapterConfig) -> Adapter:
    """Attach what is trained; everything else in the model is frozen.

    Raises:
        UserError: for a pattern that matches nothing, a rank above the matrix, a saved adapter that does not fit.
    """
    from finetune.adapters.attach import attach as attach_adapter

    known = _of(model)
    _check_origin(known.loaded, config)
    config.read_tokenizer(known.loaded.tokenizer)
    known.adapter = attach_adapter(model, config, known.loaded.originals)
    return known.adapter


class Adapters(several.Adapters):
    """The adapters of one model from `load`, by name; what is in use is what `train` saves and `export` merges.

    A saved adapter that was trained on another base is refused, as by `attach`.
    """

    def attach(self, name: str, config: AdapterConfig) -> Adapter:
        """As `finetune.adapters.several.Adapters.attach`."""
        known = _of(self.model)
        _check_origin(known.loaded, config)
        config.read_tokenizer(known.loaded.tokenizer)
        return super().attach(name, config)

    def save(self, name: str, directory: str | Path) -> None:
        """Write one adapter, in use or not, with its origin and the tokenizer, replacing an older one."""
        from finetune.export.adapter import save_adapter

        with self.only(name):
            save_adapter(self[name], _of(self.model).loaded, Path(directory))

    def _originals(self) -> Originals | None:
        return _of(self.model).loaded.originals  # type: ignore[no-any-return]

    def _changed(self) -> None:
        _of(self.model).adapter = self.adapter


def _check_origin(loaded: Any, config: AdapterConfig) -> None:
    """Compare what saved adapters were trained on with what is loaded; print what should be read."""
    from finetune.adapters.provenance import check_provenance

    notes: list[str] = []
    for part in config.starts():
        saved, allow = Path(part.path or ""), part.allow_other_quant
        notes += check_provenance(saved, loaded.digests, allow, quantization=loaded.storage)
    for note in dict.fromkeys(notes):
        print(note)


def train(
    model: Any,
    tokenizer: Any,
    data: Any,
    adapter: Adapter,
    *,
    train: TrainConfig | None = None,
    optim: OptimConfig | None = None,
    objective: ObjectiveConfig | None = None,
    seed: int = 0,
    name: str = "run",
    output_dir: str | Path | None = None,
) -> TrainResult:
    """Fine-tune with the same loop as the command line; metrics, checkpoints and the adapter go to a run directory.

    Args:
        model, tokenizer: from `load`.
        data: a path, hub id or list of rows, or a whole DataConfig.
        adapter: from `attach`.
        train, optim, objective: settings; by default one epoch of AdamW, for the task that the model was loaded for.
        seed: of dropout and of the order of the rows.
        name, output_dir: the run directory is runs/<name>/<timestamp> unless `output_dir` names it.

    Raises:
        UserError: in one line, for anything the caller can mend.
    """
    from omegaconf import OmegaConf

    from finetune.device import make_accelerator
    from finetune.pipeline import Runner
    from finetune.training.optimizers.adamw import AdamWConfig
    from finetune.training.run_directory import RunDirectory
    from finetune.training.trackers.off import OffConfig

    known = _of(model)
    settings = replace(train or TrainConfig(), dtype=known.dtype)
    config = RunConfig(
        name=name,
        seed=seed,
        model=known.path,
        adapter=adapter.config,
        train=settings,
        data=data if isinstance(data, DataConfig) else DataConfig(train=data),
        optim=optim or AdamWConfig(),
        objective=_objective(objective, known.loaded.task),
        tracking=OffConfig(),
    )
    accelerator = make_accelerator(str(next(model.parameters()).device))
    with RunDirectory.create(name, None if output_dir is None else str(output_dir)) as run:
        runner = Runner(config, OmegaConf.create({}), accelerator, run)
        runner.loaded, runner.adapter = replace(known.loaded, model=model, tokenizer=tokenizer), adapter
        runner.prepare()
        runner.track()
        if settings.preflight:
            runner.preflight()
        result = runner.train()
        runner.save_adapter()
        run.update(status="interrupted" if result.status == "interrupted" else "finished")
    known.train_rows, known.eval_rows = runner.data.train, runner.data.eval
    return result


def export(
    model: Any,
    tokenizer: Any,
    directory: str | Path,
    formats: str | Sequence[str] = "auto",
    *,
    data: Any = None,
    config: ExportConfig | None = None,
) -> list[Proof]:
    """Write merged models and prove each in a fresh interpreter.

    Args:
        model, tokenizer: from `load`, adapted and trained or not.
        directory: gets one directory a format, each with its export.json.
        formats: of `safetensors`, `bnb-nf4`, `peft`; `auto` writes all that the adapter can be written as.
        data: rows for the proof (a DataConfig: its held-out ones); None takes the held-out rows of the last training.
        config: gates; its `formats` are replaced by `formats`.

    Raises:
        ConfigError: for an unknown format, or when there are no held-out rows to prove on.
    """
    from finetune.checks import export_formats
    from finetune.data.labels import for_labels
    from finetune.data.prepare import prepare
    from finetune.export.export import export as write
    from finetune.model.load import context_length
    from finetune.pipeline import export_source, labelling_of

    known = _of(model)
    rows = known.eval_rows
    if data is not None:
        source_of_rows = data if isinstance(data, DataConfig) else DataConfig(train=data, eval=data)
        context = context_length(known.path) - (known.adapter.virtual_tokens if known.adapter else 0)
        labelling = labelling_of(replace(known.loaded, model=model))
        if labelling is not None:
            source_of_rows = for_labels(source_of_rows, known.loaded.task.kind)
        rows = prepare(source_of_rows, tokenizer, context=context, seed=0, labelling=labelling).eval
    if rows is None:
        raise ConfigError("export has no held-out rows to prove on: train first, or give data=")
    names, left_out = export_formats(formats, known.adapter)
    if left_out:
        print(left_out)
    settings = replace(config or ExportConfig(), formats=names)
    loaded = replace(known.loaded, model=model)
    source = export_source(loaded, known.adapter, tokenizer, known.dtype, settings, known.train_rows)
    return write(source, Path(directory), settings, rows, loaded.pad_id)


def _objective(given: ObjectiveConfig | None, task: Task) -> ObjectiveConfig:
    """The objective for what a model was loaded for.

    Raises:
        ConfigError: for one that needs another model.
    """
    if given is None:
        types = OBJECTIVES.types()
        return types["sft"]() if task == Task() else next(t for t in types.values() if t.task == task.kind)()
    if given.task != task.kind:
        raise ConfigError(
            f"objective={given.name} needs a model loaded with task=Task({given.task!r}, ...), and this one was loaded"
            f" for {task.kind}"
        )
    return given


def _of(model: Any) -> Known:
    if model not in _known:
        raise ConfigError("this model was not loaded by finetune.load: its storage and digests are not known")
    return _known[model]
