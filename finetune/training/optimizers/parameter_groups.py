"""Parameters in groups, so that an adapter may let some of its tensors learn faster than others (LoRA+)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

SCALE = "learning_rate_scale"
"""Key of a group's factor on the learning rate of the step; groups without it take that rate as it is."""

Parameters = list[Tensor] | list[dict[str, Any]]
"""What optimizers are built from: parameters, or groups of them."""


def grouped(parameters: Mapping[str, Tensor], scales: Mapping[str, float]) -> Parameters:
    """The parameters of an optimizer: in one list where nothing is scaled, else in a group for each factor.

    Args:
        parameters: by name.
        scales: factors on the learning rate by name; 1 where a name is missing.

    Raises:
        KeyError: for a scale of a tensor that does not train.
    """
    if strangers := sorted(scales.keys() - parameters.keys()):
        raise KeyError(f"a learning rate is scaled for {strangers[0]}, which does not train")
    factors = sorted({scales.get(name, 1.0) for name in parameters})
    if factors in ([], [1.0]):
        return list(parameters.values())
    return [
        {"params": [p for name, p in parameters.items() if scales.get(name, 1.0) == factor], SCALE: factor}
        for factor in factors
    ]
