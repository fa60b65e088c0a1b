"""What benchmarks/results/offsite.json says is the published order."""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import bench_offsite  # noqa: E402

DOCUMENT = json.loads(bench_offsite.RESULT.read_text("utf-8"))


def test_every_seed_is_in_the_published_order() -> None:
    """Full zero-shot > emulator-tuned > plug-in > fully tuned."""
    rows = DOCUMENT["rows"]
    full = {row["seed"]: row["fully_tuned"] for row in rows if row["emulator"] == "none"}
    assert len(full) == 3
    for name in ("layer drop", "taught"):
        found = {row["seed"]: row for row in rows if row["emulator"] == name}
        assert found.keys() == full.keys()
        for seed, row in found.items():
            assert DOCUMENT["zero_shot"] > row["emulator_tuned"] > row["plugged_in"] > full[seed], (name, seed)
