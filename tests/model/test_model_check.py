"""Bad checkpoints, each refused in one line that says what is wrong, from the files alone."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune.errors import ModelError
from finetune.model.check import check_directory, check_path
from finetune.model.config import ModelConfig
from finetune.model.headers import read_header

Checkpoint = Callable[..., Path]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A good checkpoint of several shards, to be broken."""
    return Path(shutil.copytree(checkpoint("Llama", shard="200KB"), tmp_path / "base"))


def refused(path: Path | str, words: str) -> str:
    with pytest.raises(ModelError, match=words) as caught:
        check_path(ModelConfig(path=str(path)))
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not None}))


def first_shard(base: Path) -> Path:
    return sorted(base.glob("model-*.safetensors"))[0]


def with_header(path: Path, header: Any, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def test_a_good_checkpoint_passes(base: Path) -> None:
    assert len(list(base.glob("model-*.safetensors"))) > 3
    check_path(ModelConfig(path=str(base)))
    assert {t.name for h in check_directory(base) for t in h.tensors} >= {"lm_head.weight", "model.norm.weight"}


def test_a_missing_directory_names_the_nearest(base: Path) -> None:
    refused(base.parent / "bass", "does not exist.*did you mean 'base'")
    refused("./nowhere", "does not exist")
    refused(base / "config.json", "is a file: expected the directory")


def test_what_looks_like_a_hub_id_is_left_to_the_hub() -> None:
    check_path(ModelConfig(path="huggyllama/llama-30b"))
    check_path(ModelConfig(path="gpt2"))
    refused("not a hub id!", "does not exist")


def test_not_a_model(base: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "not a model: it has no config.json")
    (empty / "adapter_config.json").write_text("{}")
    refused(empty, "holds an adapter: name it with adapter.path")
    (base / "config.json").write_text("{broken")
    refused(base, "config.json is not JSON")
    (base / "config.json").write_text("[1]")
    refused(base, "config.json holds a JSON list")
    (base / "config.json").write_text("{}")
    refused(base, "names no model_type")
    (base / "config.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(base, "config.json is a Git LFS pointer")


def test_an_adapter_beside_a_model_is_not_loaded_with_it(base: Path) -> None:
    (base / "adapter_config.json").write_text("{}")
    refused(base, "holds an adapter .* beside a model")


def test_pickle_weights_are_refused_by_name(base: Path) -> None:
    for file in base.glob("*.safetensors*"):
        file.unlink()
    refused(base, "has no weights: expected model.safetensors")
    (base / "optimizer.pt").write_bytes(b"x")
    (base / "pytorch_model.bin").write_bytes(b"x")
    refused(base, r"only pickle weights \(pytorch_model.bin\).*convert them to safetensors")


def test_an_index_may_not_leave_its_directory(base: Path, tmp_path: Path) -> None:
    weights = json.loads((base / INDEX).read_text())["weight_map"]
    shutil.copy(first_shard(base), tmp_path / "outside.safetensors")
    for evil in ("../outside.safetensors", str(tmp_path / "outside.safetensors"), "a/../../outside.safetensors"):
        edit(base / INDEX, weight_map=weights | {"lm_head.weight": evil})
        refused(base, "is outside its directory: refused")
    edit(base / INDEX, weight_map=weights | {"lm_head.weight": "pytorch_model.bin"})
    refused(base, "expected safetensors files only")
    edit(base / INDEX, weight_map=weights | {"lm_head.weight": 7})
    refused(base, "has no weight_map")
    edit(base / INDEX, weight_map=None)
    refused(base, "has no weight_map")


def test_a_link_may_not_leave_its_directory(base: Path, tmp_path: Path) -> None:
    shard = first_shard(base)
    shutil.move(shard, tmp_path / "outside.safetensors")
    shard.symlink_to(tmp_path / "outside.safetensors")
    refused(base, "is a link to .*outside.safetensors, which is outside")


def test_the_hub_cache_links_within_its_repository(base: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "0123", repository / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in base.iterdir():
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(os.path.relpath(blobs / file.name, snapshot))
    check_path(ModelConfig(path=str(snapshot)))


def test_a_missing_shard_or_tensor(base: Path) -> None:
    weights = json.loads((base / INDEX).read_text())["weight_map"]
    other = next(file for file in weights.values() if file != weights["lm_head.weight"])
    edit(base / INDEX, weight_map=weights | {"lm_head.weight": other})
    refused(base, "does not hold 'lm_head.weight'")
    shard = first_shard(base)
    shard.unlink()
    refused(base, f"lacks the shard {shard.name}")


def test_truncated_and_corrupt_shards(base: Path) -> None:
    shard = first_shard(base)
    whole = shard.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    entries = json.loads(whole[8 : 8 + length])
    names = [name for name in entries if name != "__metadata__"]
    for cut in (0, 5):
        shard.write_bytes(whole[:cut])
        refused(base, "is truncated: . bytes")
    for cut in (8 + length - 1, 8 + length, len(whole) - 1):
        shard.write_bytes(whole[:cut])
        refused(base, f"{shard.name} is truncated: .*fetch it again")
    shard.write_bytes(whole + b"x")
    refused(base, "1 bytes after its last tensor")
    shard.write_bytes(struct.pack("<Q", 1 << 60) + whole[8:])
    refused(base, "announces a header of 1152921504606846976 bytes")
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    refused(base, "is a Git LFS pointer, not weights: run `git lfs pull`")
    data = whole[8 + length :]
    with_header(shard, b"{not json", data)
    refused(base, "its header is not JSON")
    with_header(shard, b'{"a": 1, "a": 2}')
    refused(base, "'a' appears twice")
    with_header(shard, [1])
    refused(base, "its header is a list")
    with_header(shard, entries | {names[0]: {"dtype": "F32"}}, data)
    refused(base, f"tensor '{names[0]}' lacks dtype, shape or data_offsets")
    with_header(shard, entries | {names[0]: entries[names[0]] | {"shape": [-1]}}, data)
    refused(base, r"has shape \[-1\]")
    with_header(shard, entries | {names[0]: entries[names[0]] | {"shape": [3]}}, data)
    refused(base, "needs 12 bytes, its data_offsets give")


def test_overlaps_and_holes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    a = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}
    for offsets, words in [([2, 6], "'b' overlaps"), ([5, 9], "1 bytes before tensor 'b' belong to none")]:
        with_header(path, {"a": a, "b": a | {"data_offsets": offsets}}, bytes(offsets[1]))
        with pytest.raises(ModelError, match=words):
            read_header(path)
    with_header(path, {"a": a, "b": a | {"data_offsets": [4, 8]}, "__metadata__": {"format": "pt"}}, bytes(range(8)))
    header = read_header(path)
    assert [header.read(tensor) for tensor in header.tensors] == [bytes(range(4)), bytes(range(4, 8))]


def test_a_missing_tokenizer(base: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    refused(base, "has no tokenizer: expected tokenizer.json or tokenizer.model")


def test_the_check_imports_neither_torch_nor_transformers(base: Path) -> None:
    code = (
        "import sys; from finetune.model.check import check_path; from finetune.model.config import ModelConfig; "
        "check_path(ModelConfig(path=sys.argv[1])); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    )
    assert (
        subprocess.run([sys.executable, "-c", code, str(base)], timeout=60, cwd=Path(__file__).parents[2]).returncode
        == 0
    )
