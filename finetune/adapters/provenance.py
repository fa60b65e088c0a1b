"""finetune.json: what an adapter was trained on, so that it is never put on something else without a word.

PEFT's own files say nothing about the base but its path. Beside them we keep digests of the weights, the tokenizer, the
chat template and the quantization, taken while the base was loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune.adapters.documents import read_document, write_document
from finetune.errors import ModelError

FORMAT_VERSION = 1
FILE = "finetune.json"


def write_provenance(
    directory: Path,
    digests: Mapping[str, Any],
    *,
    method: str,
    base: str | None = None,
    quantization: Mapping[str, Any] | None = None,
) -> Path:
    """Write finetune.json into the directory of an adapter.

    Args:
        directory: where the adapter was saved.
        digests: of `base` (the weights as the checkpoint has them), `tokenizer`, `chat_template` and `quantization`.
        method: `name` of the adapter's config.
        base: path or hub id of the base, for people to read.
        quantization: the settings behind that digest, for people to read.
    """
    document = {
        "format_version": FORMAT_VERSION,
        "method": method,
        "base": base,
        "quantization": None if quantization is None else dict(quantization),
        "digests": dict(digests),
    }
    path = directory / FILE
    write_document(path, document)
    return path


def read_provenance(directory: Path) -> dict[str, Any] | None:
    """The content of finetune.json; None where the directory has none (PEFT's own files).

    Raises:
        ModelError: when it cannot be read or is of a newer format.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    document = read_document(path)
    version = document.get("format_version") if isinstance(document, dict) else None
    if not isinstance(version, int) or isinstance(version, bool) or not isinstance(document.get("digests"), dict):
        raise ModelError(f"{path} has no format_version and digests: expected what finetune writes beside an adapter")
    if version > FORMAT_VERSION:
        raise ModelError(f"{path} has format_version {version}, newer than {FORMAT_VERSION}: update finetune")
    return document


def check_provenance(
    directory: Path,
    digests: Mapping[str, Any],
    allow_other_quant: bool = False,
    *,
    quantization: Mapping[str, Any] | None = None,
) -> list[str]:
    """Compare what an adapter was trained on with what is loaded now.

    A digest that either side lacks is not compared.

    Args:
        directory: of the saved adapter.
        digests: of what is loaded now, with the keys of `write_provenance`.
        allow_other_quant: accept the same weights quantized otherwise.
        quantization: the settings in force now, to name the difference.

    Returns:
        Lines that the user should read: no provenance; another tokenizer, template or (where allowed) quantization.

    Raises:
        ModelError: for other weights, or another quantization that was not allowed.
    """
    document = read_provenance(directory)
    if document is None:
        return [f"{directory} has no {FILE}: nothing says which base the adapter was trained on; loaded as it is"]
    trained: dict[str, Any] = document["digests"]
    shared = [key for key in trained if trained[key] is not None and digests.get(key) is not None]
    different = [key for key in shared if trained[key] != digests[key]]
    if "base" in different:
        where = f" ({document['base']})" if document.get("base") else ""
        raise ModelError(
            f"adapter {directory} was trained on other weights: base {_short(trained['base'])}{where}, loaded"
            f" {_short(digests['base'])}; set model.path to the base it was trained on"
        )
    lines = [
        f"adapter {directory} was trained with another {key.replace('_', ' ')}:"
        f" {_difference(trained[key], digests[key], *_settings(key, document, quantization))}"
        for key in different
    ]
    if "quantization" in different and not allow_other_quant:
        line = lines[different.index("quantization")]
        raise ModelError(f"{line}; set quant as it was, or adapter.allow_other_quant=true")
    return lines


def _settings(
    key: str, document: Mapping[str, Any], now: Mapping[str, Any] | None
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The settings behind a digest, then and now, where both are known."""
    before = document.get("quantization")
    if key != "quantization" or not isinstance(before, dict) or now is None:
        return {}, {}
    return before, now


def _difference(before: Any, now: Any, settings: Mapping[str, Any], settings_now: Mapping[str, Any]) -> str:
    """The settings that differ where they are known, else the digests."""
    keys = [k for k in sorted({*settings, *settings_now}) if settings.get(k) != settings_now.get(k)]
    if not keys:
        return f"{_short(before)}, loaded {_short(now)}"
    then, loaded = (", ".join(f"{k}={s.get(k)}" for k in keys) for s in (settings, settings_now))
    return f"{then}; loaded {loaded}"


def _short(digest: Any) -> str:
    """Enough of a digest for a person to compare."""
    return str(digest)[:12]
