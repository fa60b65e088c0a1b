"""offsite.json: what an emulator says of itself, and of the model that it stands for.

Offsite-tuning (Xiao, Lin and Han 2023, arXiv:2302.04870) cuts a model in three: the blocks at both ends train away from
home (the paper's adapters), and fewer blocks stand for the middle (its emulator). `finetune offsite split` writes this
file beside the emulator's weights; training reads in it which blocks train, `finetune offsite plug` where they belong.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finetune.adapters.documents import read_document, write_document
from finetune.errors import ModelError

FILE = "offsite.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Emulator:
    """An emulator and the full model that it stands for; blocks are counted from 0.

    Attributes:
        full: sha256 over the full model's weights, as `finetune.model.digest` takes it.
        full_blocks: how many blocks the full model has.
        emulator: the same digest of the emulator's own weights.
        layers: how many blocks train at either end.
        kept: which blocks of the full model the middle is made of, by their number there.
        distilled: how the middle was taught to stand for the full one; None where it was not.
        quant: the storage of the middle by its settings; None where it is dense.
        verbatim: whether weights of the middle were shipped exactly as they are, as plain layer drop does.
    """

    full: str
    full_blocks: int
    emulator: str
    layers: tuple[int, int]
    kept: tuple[int, ...]
    distilled: dict[str, Any] | None = None
    quant: dict[str, Any] | None = None
    verbatim: bool = False
    format_version: int = field(default=FORMAT_VERSION)

    @property
    def blocks(self) -> int:
        """How many blocks the emulator has."""
        return sum(self.layers) + len(self.kept)

    @property
    def train(self) -> tuple[int, ...]:
        """The emulator's blocks that train."""
        first, last = self.layers
        return (*range(first), *range(self.blocks - last, self.blocks))

    def in_full(self, block: int) -> int | None:
        """Which block of the full model a block of the emulator that trains is; None for one of the middle."""
        if block not in self.train:
            return None
        return block if block < self.layers[0] else self.full_blocks - (self.blocks - block)

    def write(self, directory: Path) -> None:
        """Write offsite.json."""
        write_document(directory / FILE, asdict(self))


def read_emulator(directory: Path) -> Emulator | None:
    """What offsite.json in a directory says; None where there is none.

    Raises:
        ModelError: when it cannot be read, is of a newer format, or says nothing that can be.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    return as_emulator(read_document(path), str(path))


def as_emulator(document: Any, where: str) -> Emulator:
    """An `Emulator` out of JSON.

    Args:
        where: what messages name.

    Raises:
        ModelError: for a newer format, and for what no split writes.
    """
    version = document.get("format_version") if isinstance(document, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise ModelError(f"{where} has no format_version: expected what `finetune offsite split` writes")
    if version > FORMAT_VERSION:
        raise ModelError(f"{where} has format_version {version}, newer than {FORMAT_VERSION}: update finetune")
    try:
        found = Emulator(**{**document, "layers": tuple(document["layers"]), "kept": tuple(document["kept"])})
        counts = (found.full_blocks, *found.layers, *found.kept)
        sound = len(found.layers) == 2 and all(type(count) is int and count >= 0 for count in counts)
        sound = sound and all(isinstance(digest, str) for digest in (found.full, found.emulator))
    except (KeyError, TypeError) as error:
        raise ModelError(f"{where} is broken ({error}): expected what `finetune offsite split` writes") from error
    if not sound or not found.layers[0] <= min(found.kept, default=-1) <= max(found.kept) < found.full_blocks:
        raise ModelError(f"{where} is broken: its blocks contradict one another; split the model again")
    return found
