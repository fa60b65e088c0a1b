"""What the driver says of one projection."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layer:
    """What became of one projection.

    Attributes:
        name: of the module, or of the 3-D parameter of experts.
        error_rtn, error: as in `rounders.base.Rounded`; with a pruner, as in `pruners.apply.Outcome`.
        damping: as there; None where rounding to nearest was kept.
        bits_per_weight: of its storage.
        samples: inputs that it was calibrated on, of all its experts together; 0 without calibration.
        unseen: experts that saw none of them.
        seconds: that its codes took.
        note: what the user should know, empty for nothing.
        sparsity: share of the stored weights that are exactly zero; None without a pruner.
    """

    name: str
    error_rtn: float
    error: float
    damping: float | None
    bits_per_weight: float
    samples: int
    unseen: int
    seconds: float
    note: str
    sparsity: float | None = None
