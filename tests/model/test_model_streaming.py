"""The memory cure: pages of mapped checkpoints go back, and nothing in the model depends on them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from finetune.model.streaming import PageRelease, fixed_thresholds, mapped_ranges, own_memory

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mappings are read from /proc")


def resident(file: Path) -> int:
    """Bytes of a file's mappings that are in memory, by /proc/self/smaps."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += 1024 * int(line.split()[1])
    return total


@linux
def test_pages_are_given_back_and_read_again(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    saved = torch.arange(2_000_000, dtype=torch.float32)
    save_file({"x": saved}, file)
    with safe_open(file, "pt") as handle:
        tensor = handle.get_slice("x")[...]
        tensor.sum()
        assert any(start <= tensor.data_ptr() < end for start, end in mapped_ranges())
        assert resident(file) > 7_000_000
        pages = PageRelease(every=9_000_000)
        pages.consumed(tensor)
        assert resident(file) > 7_000_000
        pages.consumed(tensor)
        assert resident(file) < 1_000_000
        assert torch.equal(tensor, saved)


@linux
def test_only_what_is_mapped_is_copied(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"x": torch.ones(1000)}, file)
    with safe_open(file, "pt") as handle:
        module = nn.Linear(2, 2)
        module.mapped = nn.Parameter(handle.get_slice("x")[...])
        module.tied = module.mapped
        mapped, own = module.mapped.data_ptr(), module.weight.data_ptr()
        own_memory(module, PageRelease())
    assert module.mapped.data_ptr() != mapped and module.weight.data_ptr() == own
    assert module.tied is module.mapped and module.mapped.sum() == 1000


def test_thresholds_are_left_in_working_order() -> None:
    with fixed_thresholds():
        assert torch.ones(1 << 20).sum() == 1 << 20
    assert torch.ones(1 << 20).sum() == 1 << 20
