"""A quick start and a quick stop, so that a mistake is answered at once; and threads that leave room for others."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SPINS = "2000"
"""Of a thread of GNU's OpenMP that waits for work, some tens of microseconds, before it sleeps."""


def share_cores() -> None:
    """Have idle threads sleep soon. To be called before torch is imported, whose OpenMP reads it then.

    By default they spin for milliseconds after every loop. Where others work on the same cores that takes turns from
    the threads that have something to do, and a run many times as long; alone it takes as long as before.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


@contextmanager
def importing() -> Iterator[None]:
    """For a stretch of work that mostly imports: no garbage collection within, and none of what it leaves behind.

    Importing torch and transformers makes about a million objects that live as long as the process. Searching them
    for garbage again and again takes a fifth of the imports' time, and once more as long when the interpreter ends;
    frozen (`gc.freeze`) they are out of the collector's sight for good, during the run as well.
    """
    gc.disable()
    atexit.register(_settle)
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def leave(code: int) -> NoReturn:
    """Exit without freeing what was imported, object by object, for which somebody who mistyped would wait.

    For a process that has started nothing yet: no handler of `atexit` runs.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _settle() -> None:
    """Triton's bindings count what they made, and complain of leaks where the collector does not see it at the end."""
    if "triton" in sys.modules:
        gc.unfreeze()
