"""residual.safetensors: residual bases beside an adapter, in the keys of their storage; see residual.py."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.adapters import peft_format
from finetune.errors import ModelError
from finetune.quant.base import FrozenWeight

FILE = "residual.safetensors"


def write_residuals(directory: Path, residuals: Mapping[str, FrozenWeight]) -> dict[str, Any]:
    """Write the state of residual bases by the names of their projections.

    Returns:
        What adapter_config.json says of the file, its sha256 for one.
    """
    from safetensors.torch import save_file

    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, residual in residuals.items()
        for key, tensor in residual.state_dict().items()
    }
    path = directory / FILE
    path.touch()
    mode = path.stat().st_mode  # as every new file's; save_file leaves its own to their owner alone
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)
    return {"file": FILE, "sha256": _digest(path)}


def read_residuals(directory: Path, told: Any, bases: Mapping[str, FrozenWeight]) -> dict[str, FrozenWeight]:
    """Residual bases by the names of their projections, each in the storage and on the device of its base.

    Args:
        told: what adapter_config.json says of the file.
        bases: what they stand in for; not every one has a residual.

    Raises:
        ModelError: for a file that is damaged, or of another base or storage.
    """
    from safetensors import SafetensorError, safe_open

    path = directory / FILE
    if not path.is_file():
        raise ModelError(f"adapter {directory} has no {FILE}, the residual base that its factors were trained on")
    if not isinstance(told, dict) or told.get("sha256") != _digest(path):
        raise ModelError(f"{path} is not the one that {peft_format.CONFIG} names by its sha256: it is damaged")
    found: dict[str, FrozenWeight] = {}
    try:
        with safe_open(path, "pt") as file:
            keys = set(file.keys())
            for name, base in bases.items():
                mine = {key for key in keys if key.startswith(f"{name}.")}
                keys -= mine
                if mine:
                    state = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in sorted(mine)}
                    found[name] = _filled(base, state, f"{path}: {name}")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if keys:
        raise ModelError(f"{path} holds {min(keys)}, which is of no adapted projection of this model")
    return found


def _filled(base: FrozenWeight, state: dict[str, Tensor], where: str) -> FrozenWeight:
    """A frozen weight like `base` that holds a saved state, and computes in the dtype of `base`."""
    residual = copy.deepcopy(base)
    try:
        residual.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).partition(":")[2].split())
        raise ModelError(f"{where} does not fit the base, stored as {base.extra_repr()}: {reason}") from error
    dtype: Any = getattr(base, "dtype", None)
    return residual.to(dtype=dtype)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
