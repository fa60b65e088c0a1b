"""What a base consists of, as digests: equal whenever the weights are, however they are cut into shards.

The base digest covers the tensors of the checkpoint as stored, before any quantization of ours, so that runs on the
same weights under different `quant` choices agree on it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from finetune.model.headers import Header

CHUNK = 4 << 20


def base_digest(headers: Iterable[Header], threads: int = 2) -> str:
    """sha256 over the sorted (name, dtype, shape, sha256 of the bytes) of every tensor of a checkpoint.

    Files are read in chunks (not mapped), in parallel by shard; hashing releases the interpreter lock.
    """
    with ThreadPoolExecutor(threads) as pool:
        entries = [entry for part in pool.map(_hash_file, headers) for entry in part]
    return _digest(sorted(entries))


def json_digest(value: Any) -> str:
    """sha256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return _digest(value)


def tokenizer_digest(tokenizer: Any) -> str:
    """What decides how a text becomes ids: vocabulary, merges, normalization, special tokens; not padding."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = json.loads(backend.to_str()) if backend is not None else {}
    settings = {key: value for key, value in model.items() if key not in ("padding", "truncation")}
    special = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if key != "pad_token"}
    return _digest({"model": settings, "vocab": tokenizer.get_vocab(), "special": special})


def _digest(value: Any) -> str:
    """sha256 of canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _hash_file(header: Header) -> list[tuple[str, str, tuple[int, ...], str]]:
    """One entry a tensor of a file."""
    entries = []
    with header.path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(CHUNK))
        for tensor in header.tensors:
            file.seek(tensor.start)
            digest, left = hashlib.sha256(), tensor.end - tensor.start
            while left and (count := file.readinto(buffer[: min(left, CHUNK)])):
                digest.update(buffer[:count])
                left -= count
            entries.append((tensor.name, tensor.dtype, tensor.shape, digest.hexdigest()))
    return entries
