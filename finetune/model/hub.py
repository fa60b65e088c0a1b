"""Bring a base from the Hugging Face hub: its JSON first, then the safetensors shards that its index names."""

from __future__ import annotations

from pathlib import Path

from finetune.errors import ModelError
from finetune.model.check import INDEX, SINGLE, local_directory, read_json
from finetune.model.config import ModelConfig

SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]


def fetch(model: ModelConfig, weights: bool = True) -> Path:
    """The directory of a base, downloaded to the hub's own cache where it is not here.

    Args:
        model: names a directory or a hub id.
        weights: False fetches configuration and tokenizer only.

    Raises:
        ModelError: where the repository does not exist, is closed to us, or cannot be reached and is not in the cache.
    """
    local = local_directory(model)
    if local is not None:
        return local
    patterns = [*SMALL_FILES, "*.py"] if model.trust_remote_code else SMALL_FILES
    directory = _download(model, patterns)
    if not weights:
        return directory
    index = directory / INDEX
    shards = [SINGLE]
    if index.exists():
        shards = sorted(set(map(str, read_json(index, f"{index} is missing").get("weight_map", {}).values())))
    return _download(model, [*patterns, *shards])


def _download(model: ModelConfig, patterns: list[str]) -> Path:
    """The hub's snapshot of those files."""
    import huggingface_hub
    from huggingface_hub import errors

    revision = f" at revision {model.revision}" if model.revision else ""
    try:
        return Path(huggingface_hub.snapshot_download(model.path, revision=model.revision, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        raise ModelError(
            f"model.path={model.path} asks for consent: accept its terms on the hub and `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(f"model.revision={model.revision} does not exist in {model.path} on the hub") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"model.path={model.path} is neither a directory here nor a model on the hub (or it is private)"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"model.path={model.path}{revision} is no directory here and not in the hub's cache, "
            "and the hub cannot be reached"
        ) from error
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"model.path={model.path}{revision} cannot be fetched from the hub: {line}") from error
