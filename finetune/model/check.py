"""Judge a base model by its files alone, in milliseconds, before torch or transformers are imported."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import finetune.assets
from finetune.errors import ModelError, nearest
from finetune.model.config import ModelConfig
from finetune.model.headers import LFS_START, Header, read_header

EMBEDDED = "embedded"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZERS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
    "tokenizer_config.json",
)
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Where AutoGPTQ and AutoAWQ wrote their settings before config.json had a place for them, and of which method."""
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def check_path(model: ModelConfig) -> list[Header]:
    """Judge the base a configuration names: a directory by its files, a hub id by its form.

    Returns:
        The judged headers of the shards that hold the model; none for a hub id.

    Raises:
        ModelError: one line that names the file and what is wrong with it.
    """
    directory = local_directory(model)
    return [] if directory is None else check_directory(directory)


def local_directory(model: ModelConfig) -> Path | None:
    """The directory of a base that is on this machine; None where `model.path` is a hub id.

    Raises:
        ModelError: where it is neither, naming the nearest directory.
    """
    if model.path == EMBEDDED:
        return Path(finetune.assets.__file__).parent / "tiny"
    path = Path(model.path).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(
            f"model.path={model.path} is a file: expected the directory that holds config.json and the weights"
        )
    looks_like_a_path = model.path.startswith((".", "/", "~")) or model.path.count("/") > 1 or "\\" in model.path
    parent_is_here = "/" in model.path and path.parent.is_dir()
    if looks_like_a_path or parent_is_here or not HUB_ID.fullmatch(model.path):
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        raise ModelError(
            f"model.path={model.path} does not exist: expected a directory or a hub id{nearest(path.name, siblings)}"
        )
    return None


def check_directory(directory: Path) -> list[Header]:
    """Judge a checkpoint directory: configuration, tokenizer and the header of every shard.

    Returns:
        The judged headers of the shards that hold the model.

    Raises:
        ModelError: naming the file and what is wrong with it.
    """
    adapter = (directory / "adapter_config.json").exists()
    hint = "; it holds an adapter: name it with adapter.path, and its base with model.path" if adapter else ""
    config = read_json(directory / "config.json", f"{directory} is not a model: it has no config.json{hint}")
    if adapter:  # transformers would silently load the adapter, on whatever base that names
        raise ModelError(f"{directory} holds an adapter (adapter_config.json) beside a model: move one of them away")
    if not config.get("model_type") and not config.get("architectures"):
        raise ModelError(
            f"{directory / 'config.json'} names no model_type: expected the config.json of a transformers model"
        )
    headers = [read_header(path) for path in shards(directory)]
    _check_index(directory, headers)
    if not any((directory / name).exists() for name in TOKENIZERS):
        raise ModelError(f"{directory} has no tokenizer: expected tokenizer.json or tokenizer.model beside config.json")
    return headers


def shards(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, the one transformers would take or those of the index, all inside.

    Raises:
        ModelError: for pickle-only weights, no weights, an index that names a file outside, and missing shards or
            tensors.
    """
    index, single = directory / INDEX, directory / SINGLE
    if single.exists() or single.is_symlink():
        return [_inside(directory, SINGLE, "the directory")]
    if not index.exists():
        raise ModelError(_no_weights(directory))
    weight_map = read_json(index, f"{index} is missing").get("weight_map")
    if not isinstance(weight_map, dict) or not {type(file) for file in weight_map.values()} == {str}:
        raise ModelError(f"{index} has no weight_map: expected a JSON object from tensor names to file names")
    paths: list[Path] = []
    for file in dict.fromkeys(weight_map.values()):
        if Path(file).is_absolute() or ".." in Path(file).parts or "\\" in file:
            raise ModelError(f"{index} names {file!r}, which is outside its directory: refused")
        if not file.endswith(".safetensors"):
            raise ModelError(f"{index} names {file!r}: expected safetensors files only")
        paths.append(_inside(directory, file, INDEX))
    return paths


def _check_index(directory: Path, headers: list[Header]) -> None:
    """Every tensor that the index promises is in the shard it promises; else a ModelError names the first."""
    index = directory / INDEX
    if not index.exists() or (directory / SINGLE).exists():
        return
    held = {(header.path, tensor.name) for header in headers for tensor in header.tensors}
    for name, file in read_json(index, f"{index} is missing")["weight_map"].items():
        if (directory / file, name) not in held:
            raise ModelError(f"{directory / file} does not hold {name!r}, which {INDEX} says it does: fetch it again")


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ModelError: saying `missing` where there is no file, or what is wrong with it.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelError(missing) from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if raw.startswith(LFS_START):
        raise ModelError(f"{path} is a Git LFS pointer: run `git lfs pull` in that directory")
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} holds a JSON {type(value).__name__}: expected an object")
    return value


def told_of(directory: Path) -> dict[str, Any] | None:
    """What a checkpoint says of its quantization, in config.json or in a file beside it; None where it says nothing.

    Raises:
        ModelError: where a file cannot be read.
    """
    told = read_json(directory / "config.json", f"{directory} is not a model: it has no config.json")
    if isinstance(told.get("quantization_config"), dict):
        return told["quantization_config"]
    for name, method in BESIDE.items():
        if (directory / name).exists():
            return {"quant_method": method} | read_json(directory / name, "")
    return None


def _no_weights(directory: Path) -> str:
    """Say what a directory without safetensors holds instead."""
    found = sorted(
        entry.name for entry in directory.iterdir() if entry.suffix in (*PICKLES, ".gguf", ".h5", ".msgpack")
    )
    pickles = sorted((name for name in found if name.endswith(PICKLES)), key=lambda name: "model" not in name)
    if pickles:
        return (
            f"{directory} has only pickle weights ({pickles[0]}), which run code when they are read: refused; "
            "convert them to safetensors (save_pretrained) where you trust them, or use a revision that has safetensors"
        )
    also = f", only {found[0]}" if found else ""
    return f"{directory} has no weights: expected {SINGLE} or {INDEX}{also}"


def _inside(directory: Path, name: str, who: str) -> Path:
    """A weight file that exists and whose links stay in its directory; the hub's cache links within its repository."""
    path, root = directory / name, directory.resolve()
    snapshots = root.parent
    if snapshots.name == "snapshots" and (snapshots.parent / "blobs").is_dir():
        root = snapshots.parent
    target = Path(os.path.realpath(path))
    if not target.is_relative_to(root):
        raise ModelError(f"{path} is a link to {target}, which is outside its directory: refused")
    if not path.is_file():
        raise ModelError(f"{directory} lacks the shard {name}, which {who} names: fetch it again")
    return path
