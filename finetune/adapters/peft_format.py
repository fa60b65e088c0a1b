"""PEFT's layout on disk: adapter_config.json beside adapter_model.safetensors.

Sources: peft 0.21 `utils/save_and_load.py`, `tuners/tuners_utils.py` (`check_target_module_exists`,
`_inject_parameters`), `utils/other.py` (`get_pattern_key`). Only safetensors and JSON are ever read.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune.adapters.documents import read_document, write_document
from finetune.errors import ModelError
from finetune.structure import Structure

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
OWN_METHOD = "finetune_method"
"""Key of adapter_config.json that names our method, where PEFT has none."""
LISTED = 5
"""How many faulty keys a message lists."""


def write(
    directory: Path,
    parameters: Mapping[str, Tensor],
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the two files. Tensors that several keys share are written once a key, as safetensors demands.

    Args:
        metadata: kept in the header of the tensors' file, where PEFT takes no notice of it.
    """
    from safetensors.torch import save

    seen: set[int] = set()
    tensors = {}
    for key, parameter in parameters.items():
        tensor = parameter.detach().contiguous().cpu()
        tensors[key] = tensor.clone() if id(parameter) in seen else tensor
        seen.add(id(parameter))
    directory.mkdir(parents=True, exist_ok=True)
    # Not save_file: it makes a file that its owner alone can read, whatever the umask.
    (directory / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"} | dict(metadata or {})))
    write_document(directory / CONFIG, dict(config))


def read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a saved adapter that has its weights beside it.

    Raises:
        ModelError: when the directory or the file is missing or unreadable, or the weights are a pickle.
    """
    config = read_settings(directory)
    if "parts" in config and not (directory / WEIGHTS).exists():
        raise ModelError(f"adapter {directory} is a stack: set adapter=stack, or adapter.path to one of its parts")
    if not (directory / WEIGHTS).is_file():
        pickled = f"; {PICKLE} is a pickle, which is never read: save it again with safe_serialization=True"
        raise ModelError(f"adapter {directory} has no {WEIGHTS}{pickled if (directory / PICKLE).exists() else ''}")
    return config


def read_settings(directory: Path) -> dict[str, Any]:
    """adapter_config.json of a saved adapter, whatever is beside it.

    Raises:
        ModelError: when the directory or the file is missing or unreadable.
    """
    if not directory.is_dir():
        raise ModelError(f"adapter {directory} is not a directory: expected one with {CONFIG} and {WEIGHTS}")
    path = directory / CONFIG
    if not path.is_file():
        inside = sorted(found.parent.name for found in directory.glob(f"*/{CONFIG}"))
        hint = f"; there is one in each of {', '.join(inside)}: name that directory" if inside else ""
        raise ModelError(f"adapter {directory} has no {CONFIG}: expected what finetune or PEFT saves{hint}")
    config = read_document(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds a {type(config).__name__}: expected an object with the adapter's settings")
    return config


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of adapter_model.safetensors, on the CPU.

    Raises:
        ModelError: when the file is truncated or corrupt.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(directory / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{directory / WEIGHTS} cannot be read: {error}") from error


def check_header(directory: Path) -> dict[str, str]:
    """Read the names and shapes of the tensors and nothing else, so that a truncated file is found early.

    Returns:
        The metadata of the header.

    Raises:
        ModelError: when the file is truncated or corrupt.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(directory / WEIGHTS, "pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{directory / WEIGHTS} cannot be read: {error}") from error


def method_of(config: Mapping[str, Any]) -> str:
    """What a saved adapter calls its method: PEFT's type, or our name where PEFT has none."""
    return str(config.get("peft_type") or config.get(OWN_METHOD))


def task_type(structure: Structure) -> str:
    """PEFT's name for what a model gives, by which it picks its wrapper: one answer a row, a text for a text, or text.

    Regression is `SEQ_CLS` too: to PEFT it is a classifier with one output. `FEATURE_EXTRACTION` hands through whatever
    the model gives: hidden states where it has no head, and what a masked one says of every token, for which there is
    no name of its own.
    """
    if structure.task_head:
        return "SEQ_CLS"
    if structure.head is None or not any(stack.causal for stack in structure.stacks):
        return "FEATURE_EXTRACTION"
    return "SEQ_2_SEQ_LM" if len(structure.stacks) > 1 else "CAUSAL_LM"


def stacks_by_output(config: Mapping[str, Any]) -> bool:
    """Whether the file lays stacked experts out as PEFT did before 0.20, with lora_A over the output features.

    That PEFT took the axes of a stack in the wrong order (`ParamWrapper`); the product it computed is the transpose
    of ours. Files without a `peft_version` are not PEFT's and have the layout of today.
    """
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    return version is not None and (int(version[1]), int(version[2])) < (0, 20)


def check_method(directory: Path, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse an adapter of another method.

    Raises:
        ModelError: naming both.
    """
    if method_of(saved) != method_of(expected):
        raise ModelError(f"adapter {directory} is of method {method_of(saved)}: expected {method_of(expected)}")


def base_of(model: nn.Module) -> str | None:
    """Path or hub id that a model was read from, as transformers notes it; None where it was made in memory."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def check_plain(config: Mapping[str, Any], path: Path, method: str, known: Collection[str]) -> None:
    """Refuse another method, and settings that we do not honour, also those that a later PEFT will invent.

    Raises:
        ModelError: naming what it is, and what was expected.
    """
    if method_of(config) != method:
        raise ModelError(f"{path} is of method {method_of(config)}: expected {method}")
    for key, value in sorted(config.items()):
        if key not in known and value not in (None, False, [], {}, 0):
            raise ModelError(f"{path} sets {key}={value!r}, which finetune does not compute: expected a plain {method}")


def check_tensors(directory: Path, expected: Mapping[str, Sequence[int]], found: Mapping[str, Tensor]) -> None:
    """Refuse a file whose tensors are not exactly those expected; an adapter that fills nothing would change nothing.

    Raises:
        ModelError: listing the first five keys that are missing, unexpected or mis-shaped.
    """
    path = directory / WEIGHTS
    faults = [f"{key} is missing (expected {_shape(expected[key])})" for key in expected if key not in found]
    faults += [f"{key} is unexpected ({_shape(found[key].shape)})" for key in found if key not in expected]
    faults += [
        f"{key} is {_shape(found[key].shape)}, expected {_shape(shape)}{_rank_hint(key, found[key].shape, shape)}"
        for key, shape in expected.items()
        if key in found and tuple(found[key].shape) != tuple(shape)
    ]
    if faults:
        more = f"; and {len(faults) - LISTED} more" if len(faults) > LISTED else ""
        raise ModelError(f"{path} does not fit this model and adapter: {'; '.join(faults[:LISTED])}{more}")
    strange = [key for key in expected if not found[key].is_floating_point()]
    if strange:
        raise ModelError(f"{path}: {strange[0]} is {found[strange[0]].dtype}: expected a floating point tensor")
    broken = [key for key in expected if not torch.isfinite(found[key]).all()]
    if broken:
        raise ModelError(f"{path}: {broken[0]} holds values that are not finite; the adapter is broken")


def without_base(
    tensors: Mapping[str, Tensor], bases: Mapping[str, nn.Module], trained: Collection[str]
) -> dict[str, Tensor]:
    """The tensors of a file without the copies of the base that PEFT saves of an adapted embedding or head.

    Args:
        bases: the modules of the base that are adapted, by name.
        trained: keys that are no copies: biases of the base that train.

    Raises:
        ModelError: where such a copy is of another base.
    """
    left = dict(tensors)
    for name, base in bases.items():
        for leaf in ("weight", "bias"):
            key = f"{PREFIX}{name}.base_layer.{leaf}"
            stored = getattr(base, leaf, None)
            copied = None if key in trained else left.pop(key, None)
            if copied is None or not (isinstance(stored, Tensor) and stored.is_floating_point()):
                continue
            mine = stored.detach().cpu()
            narrow = min((mine.dtype, copied.dtype), key=lambda dtype: dtype.itemsize)
            if mine.shape != copied.shape or not torch.equal(mine.to(narrow), copied.to(narrow)):
                raise ModelError(
                    f"the adapter brings {key} ({tuple(copied.shape)}), a copy of its base's {name}, and this base has"
                    f" other values ({tuple(mine.shape)}): load the base it was trained on"
                )
    return left


def without_twins(tensors: dict[str, Tensor], whole: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of a file without what PEFT saves of modules trained whole where it saves every bias: their biases
    before training, and once more after it.

    Args:
        whole: their names.
    """
    twins = tuple(f"{PREFIX}{name}.{part}." for name in whole for part in ("original_module", "modules_to_save"))
    return {key: tensor for key, tensor in tensors.items() if not (twins and key.startswith(twins))}


def torn(directory: Path, first: str, second: str) -> ModelError:
    """The error for two keys of one tied tensor that differ."""
    return ModelError(
        f"{directory / WEIGHTS} holds different values for {first} and {second},"
        f" but this model ties them: untie the base, or train them as one"
    )


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(str(size) for size in shape)


def _rank_hint(key: str, seen: Sequence[int], expected: Sequence[int]) -> str:
    """Name the rank where that is all that differs; it is the first axis of A and the second of B."""
    factors = {".lora_A.weight": 0, ".lora_B.weight": 1, ".lora_embedding_A": 0, ".lora_embedding_B": 1}
    for factor, axis in factors.items():
        if key.endswith(factor) and len(seen) == 2 and seen[1 - axis] == expected[1 - axis]:
            return f" (rank {seen[axis]} in the file, {expected[axis]} here)"
    return ""


def shorten(chosen: Iterable[str], every: Iterable[str], parts: int = 1) -> list[str]:
    """The shortest list of name endings that means exactly the chosen names: PEFT matches by ending.

    Args:
        chosen: dotted names.
        every: all names that PEFT would try.
        parts: how many trailing parts of a name an ending has.

    Returns:
        Endings, sorted; the whole names where some ending would also match a name that was not chosen.
    """
    wanted = set(chosen)
    endings = {".".join(name.split(".")[-parts:]) for name in wanted}
    matched = {name for name in every if any(name == e or name.endswith(f".{e}") for e in endings)}
    return sorted(endings if matched <= wanted else wanted)


def targeted(name: str, targets: str | Sequence[str] | None, patterns: Mapping[str, Any]) -> bool:
    """Whether PEFT would adapt the module `name`, as `check_target_module_exists` decides it.

    Args:
        name: dotted name of a module.
        targets: `target_modules`: a regular expression, or endings.
        patterns: the whole adapter_config.json, for what it excludes and the layers that it keeps to.
    """
    excluded = patterns.get("exclude_modules")
    if isinstance(excluded, str) and re.fullmatch(excluded, name):
        return False
    if not isinstance(excluded, str) and ends(name, excluded):
        return False
    if any(re.match(rf"(^|.*\.){re.escape(module)}($|\..*)", name) for module in patterns.get("modules_to_save") or []):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    # A module that is named in full is adapted whatever its layer.
    return name in (targets or ()) or (ends(name, targets) and _in_layers(name, patterns))


def _in_layers(name: str, patterns: Mapping[str, Any]) -> bool:
    """Whether a name is of the layers that `layers_to_transform` counts, in the lists that `layers_pattern` names."""
    layers, lists = patterns.get("layers_to_transform"), patterns.get("layers_pattern")
    if layers is None or layers == []:
        return True
    lists = [lists] if isinstance(lists, str) else lists
    tried = [rf"(?:^|.*?\.){one}\.(\d+)\." for one in lists] if lists and lists != [""] else [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for pattern in tried if (match := re.match(pattern, name))), None)
    return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def ends(name: str, endings: Sequence[str] | None) -> bool:
    """Whether a dotted name is, or ends with, one of the given names."""
    return any(name == ending or name.endswith(f".{ending}") for ending in endings or ())


def by_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value that `rank_pattern` or `alpha_pattern` gives a module, as `get_pattern_key` finds it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
