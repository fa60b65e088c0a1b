"""Make an environment that holds the lowest declared version of every dependency: `python scripts/floor.py DIR`.

The floors are read from pyproject.toml, so what is tested is what is declared.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def floors(project: dict) -> list[str]:
    """`name==lowest` for each dependency and development tool that declares a lowest version."""
    extras = project["optional-dependencies"]
    pins = []
    for requirement in [*project["dependencies"], *extras["dev"]]:
        match = re.match(r"([A-Za-z0-9_.-]+)(?:\[[^]]*\])?.*?>=\s*([0-9.]+)", requirement)
        if match:
            pins.append(f"{match[1]}=={match[2]}")
    return pins


def main() -> None:
    """Create DIR unless it already holds just these versions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    directory = parser.parse_args().directory
    pins = floors(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"])
    stamp, digest = directory / ".floors", hashlib.sha256("\n".join(pins).encode()).hexdigest()
    if stamp.is_file() and stamp.read_text("utf-8") == digest:
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True)
    constraints = directory / "floors.txt"
    constraints.write_text("\n".join(pins) + "\n", "utf-8")
    install = [
        str(directory / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "-q",
        "-c",
        str(constraints),
        "-e",
        f"{ROOT}[dev]",
    ]
    subprocess.run(install, check=True, cwd=ROOT)
    stamp.write_text(digest, "utf-8")


if __name__ == "__main__":
    main()
