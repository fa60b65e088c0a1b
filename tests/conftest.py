"""What every test runs under: one thread a process, no network, no trace in the user's own directories."""

from __future__ import annotations

import os
import tempfile

# Tests run side by side; two OpenMP teams on the same cores spin at each other's barriers and run fifty times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("FINETUNE_CACHE", tempfile.mkdtemp(prefix="finetune-tests-"))
