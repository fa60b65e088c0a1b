"""What `finetune quantize` is told: a tree of its own (conf/quantize.yaml) of model, quant, methods and text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune.data.config import DataConfig
from finetune.errors import ConfigError
from finetune.model.config import ModelConfig
from finetune.quant.base import QuantConfig
from finetune.quant.dense import DenseConfig
from finetune.quant.distill import DistillConfig
from finetune.quant.keep import KeepConfig
from finetune.quant.pruners.base import PrunerConfig
from finetune.quant.rounders.base import CalibratorConfig
from finetune.quant.rounders.rtn import RTNConfig
from finetune.quant.transforms.base import TransformConfig
from finetune.quant.transforms.none import NoTransformConfig

DTYPES = ("auto", "bf16", "fp16", "fp32")


@dataclass
class CalibrationConfig:
    """Text to calibrate on, and to measure on.

    Rows are read as for training, put behind one another and cut into pieces, so that none is padded.

    Attributes:
        calibration: as `data.train`: a file, a directory, a hub dataset id, `pydocs`, a list or a mapping to weights;
            null where the calibrator needs none.
        eval: the same, to compare with the dense model on; null holds out every tenth piece of the calibration data.
        samples: pieces to calibrate on, at most; the first ones.
        max_length: tokens of a piece; null is min(the model's context, 2048).
        format, columns, template, chat_template, max_bad_fraction: as for training.
    """

    calibration: Any = None
    eval: Any = None
    samples: int = 128
    max_length: int | None = None
    format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    template: str | None = None
    chat_template: str = "auto"
    max_bad_fraction: float = 0.01

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"data.samples is {self.samples}: expected 1 or more pieces")
        for key in ("calibration", "eval"):
            if getattr(self, key) in ("", [], {}):
                raise ConfigError(f"data.{key} is empty: expected a file, a directory, a hub dataset id, or null")
        self.reading("pydocs")

    def reading(self, source: Any) -> DataConfig:
        """How the rows of a source become tokens; a long row is cut into several, never cut off."""
        return DataConfig(
            train=source,
            format=self.format,
            columns=dict(self.columns),
            template=self.template,
            chat_template=self.chat_template,
            max_length=self.max_length,
            too_long="split",
            max_bad_fraction=self.max_bad_fraction,
        )


@dataclass
class QuantizeConfig:
    """One quantization.

    Attributes:
        output: the directory to write; it must not exist.
        dtype: of what stays unquantized, and of the forward passes; auto is that of the checkpoint.
        device: auto | cpu | cuda | cuda:N | mps.
        max_shard_gb: largest safetensors file, in 10^9 bytes.
    """

    output: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    max_shard_gb: float = 4.0
    model: ModelConfig = field(default_factory=ModelConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    calibrator: CalibratorConfig = field(default_factory=CalibratorConfig)
    transform: TransformConfig = field(default_factory=TransformConfig)
    pruner: PrunerConfig = field(default_factory=PrunerConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    data: CalibrationConfig = field(default_factory=CalibrationConfig)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype is {self.dtype!r}: expected {' | '.join(DTYPES)}")
        if self.device.partition(":")[0] not in ("auto", "cpu", "cuda", "mps", "xpu"):
            raise ConfigError(f"device is {self.device!r}: expected auto, cpu, cuda, cuda:N, mps or xpu")
        if not self.max_shard_gb > 0:
            raise ConfigError(f"max_shard_gb is {self.max_shard_gb}: expected more than 0")
        prunes = self.pruner.prunes or self.pruner.cuts
        if isinstance(self.quant, KeepConfig) or (isinstance(self.quant, DenseConfig) and not prunes):
            raise ConfigError(f"quant={self.quant.name} stores nothing in fewer bits: expected nf4, int4, int8, ...")
        if not self.quant.rounds:
            self._check_exact()
        self.pruner.check_calibrator(self.calibrator)
        self.calibrator.check_format(self.quant)
        if self.data.calibration is None:
            self._check_without_text()

    def _check_without_text(self) -> None:
        """Refuse what looks at text, with what needs none in its place."""
        quant, calibrator, transform, pruner = self.quant, self.calibrator, self.transform, self.pruner
        for needed, what, instead in (
            (quant.needs_inputs, f"quant={quant.name} looks at inputs with quant.static=true", ""),
            (calibrator.needs_inputs, f"calibrator={calibrator.name} looks at inputs", ", or calibrator=rtn"),
            (pruner.cuts, f"pruner={pruner.name} looks at inputs", ""),
            (pruner.needs_inputs, f"pruner={pruner.name} looks at inputs", ", or pruner=magnitude"),
            (transform.needs_inputs, f"transform={transform.name} looks at inputs", ", or transform=none"),
            (self.distill.steps > 0, f"distill.steps={self.distill.steps} trains on text", ", or distill.steps=0"),
        ):
            if needed:
                raise ConfigError(f"{what}: set data.calibration=FILE{instead}")

    def _check_exact(self) -> None:
        """Refuse what has no say where nothing is rounded."""
        for group, choice, idle in (
            ("calibrator", self.calibrator.name, RTNConfig.name),
            ("transform", self.transform.name, NoTransformConfig.name),
        ):
            if choice != idle:
                raise ConfigError(
                    f"quant={self.quant.name} rounds nothing, so {group}={choice} has no say: expected {group}={idle}"
                )
        if self.distill.steps:
            raise ConfigError(f"quant={self.quant.name} has no codes, so distill.steps has no say: expected 0")

    def target(self) -> Path:
        """The directory to write.

        Raises:
            ConfigError: where none is named, or it exists.
        """
        if not self.output:
            raise ConfigError("output is not set: expected the directory to write, e.g. output=model-int4")
        path = Path(self.output)
        if path.exists() or path.is_symlink():
            raise ConfigError(f"output={path} exists already: expected a directory that does not")
        return path.absolute()
