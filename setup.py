"""Builds the optional CPU kernels; everything else is in pyproject.toml.

A plain shared library with C functions, loaded by ctypes: no headers of torch or Python, so that one wheel serves every
torch and every Python 3. Without a compiler the installation succeeds and the kernels in plain torch serve; `finetune
doctor` says so.
"""

from __future__ import annotations

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("finetune/kernels/csrc")
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno"]
EXACT = ["-ffp-contract=off"]
"""No fused multiply-add behind our back: decoded weights are the bits that separate operations give."""


class BuildNative(build_ext):
    """A library that no Python looks for by the name of its own version."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class AnyPython(bdist_wheel):
    """The wheel depends on the platform, not on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "finetune.kernels._native",
            sources=sorted(map(str, SOURCES.glob("*.cpp"))),
            depends=sorted(map(str, SOURCES.glob("*.h"))),
            extra_compile_args=[*FLAGS, *EXACT, *os.environ.get("FINETUNE_CFLAGS", "").split()],
            extra_link_args=["-fopenmp", *os.environ.get("FINETUNE_CFLAGS", "").split()],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
)
