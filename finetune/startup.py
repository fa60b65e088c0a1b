"""A quick start and a quick stop, so that a mistake on the command line is answered at once."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


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
