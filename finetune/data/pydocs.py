"""Question and answer rows made at run time from the standard library of the running interpreter.

A row asks what a public function or class does, by its qualified name and signature, and answers with
the first paragraph of its docstring. Everything is read from source text by `ast`; nothing is imported.
The same module hands `scripts/pretrain_tiny.py` its text, with everything the evaluation rows ask for cut out.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from finetune.errors import DataError

# Tests, installed packages, and packages that are gone from (or optional in) newer interpreters.
SKIP = frozenset(
    "test tests idlelib tkinter lib2to3 distutils turtle turtledemo site-packages dist-packages __pycache__".split()
)
MIN_CHARACTERS = 40
EVAL_PERCENT = 6

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


class Row(NamedTuple):
    """One documented object: qualified name, the question about it, and its answer (whitespace normalised)."""

    name: str
    question: str
    answer: str


class Source(NamedTuple):
    """One module for pretraining: its text without evaluation docstrings, and the docstrings that were left."""

    module: str
    text: str
    docstrings: list[str]


def is_eval(qualified_name: str) -> bool:
    """Say whether a qualified name belongs to the evaluation side: about 6 % of names, by sha256, on any Python."""
    digest = hashlib.sha256(qualified_name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % 100 < EVAL_PERCENT


def stdlib_directory() -> Path:
    """Return the directory that holds the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def pydocs_rows(split: Literal["train", "eval"], stdlib: Path | None = None) -> list[dict[str, Any]]:
    """Return the rows of one side, sorted by qualified name: `{"messages": [user, assistant], "name": ...}`.

    Args:
        split: "train", or "eval" for the names that `is_eval` chooses.
        stdlib: directory to read; the running interpreter's standard library unless given.

    Raises:
        DataError: the directory holds no Python sources with docstrings.
        ValueError: `split` is neither of the two.
    """
    if split not in ("train", "eval"):
        raise ValueError(f"split must be 'train' or 'eval', not {split!r}")
    return [
        {
            "messages": [{"role": "user", "content": row.question}, {"role": "assistant", "content": row.answer}],
            "name": row.name,
        }
        for row in _rows(stdlib or stdlib_directory())
        if is_eval(row.name) == (split == "eval")
    ]


def pretraining_sources(stdlib: Path | None = None) -> Iterator[Source]:
    """Yield every module, private ones too, sorted by name, without the docstrings of the evaluation side.

    A docstring goes where its object's name is on the evaluation side, and where its text contains an
    evaluation answer (private modules copy docstrings from public ones). A module that still spells out an
    evaluation answer elsewhere, say in a comment or a help text, is left out whole.
    """
    stdlib = stdlib or stdlib_directory()
    answers = [row.answer for row in _rows(stdlib) if is_eval(row.name)]
    for module, path in _modules(stdlib):
        if (parsed := _parse(path)) is None:
            continue
        text, docstrings = _without_eval(module, *parsed, answers)
        if not spells_out(text, answers):
            yield Source(module, text, docstrings)


def normalised(text: str) -> str:
    """Return `text` with every run of whitespace as one space."""
    return " ".join(text.split())


def spells_out(text: str, answers: list[str]) -> bool:
    """Say whether a text contains one of the answers, however its lines are broken."""
    flat = normalised(text)
    words = set(flat.split(" "))
    # All words but an answer's first and last stand alone in such a text: a test far cheaper than the search.
    return any(words.issuperset(answer.split(" ")[1:-1]) and answer in flat for answer in answers)


@functools.lru_cache(maxsize=2)
def _rows(stdlib: Path) -> tuple[Row, ...]:
    """Return all rows of both sides, sorted by name, each answer once."""
    found: dict[str, Row] = {}
    for module, path in _modules(stdlib):
        if any(part.startswith("_") for part in module.split(".")) or (parsed := _parse(path)) is None:
            continue
        for name, node in _definitions(parsed[1].body, module):
            local = name[len(module) + 1 :]
            if any(part.startswith("_") for part in local.split(".")) or name in found:
                continue
            answer = _first_paragraph(node)
            if len(answer) >= MIN_CHARACTERS:
                found[name] = Row(name, _question(name, node), answer)
    if not found:
        raise DataError(
            f"data=pydocs found no Python sources with docstrings in {stdlib} (a standard library shipped only as "
            ".pyc or zip has none); give your own rows instead: data.train=your.jsonl"
        )
    # Where names of both sides share an answer, the training side keeps it: no evaluation answer is ever trained on.
    by_answer: dict[str, Row] = {}
    for row in sorted(found.values(), key=lambda row: (is_eval(row.name), row.name)):
        by_answer.setdefault(row.answer, row)
    return tuple(sorted(by_answer.values()))


def _modules(stdlib: Path) -> Iterator[tuple[str, Path]]:
    """Yield (dotted module name, path) of every source file outside SKIP, sorted by name."""
    modules = []
    for path in stdlib.rglob("*.py"):
        parts = path.relative_to(stdlib).with_suffix("").parts
        # _sysconfigdata holds the paths and compiler flags of one machine; names with "-" cannot be imported.
        if SKIP.isdisjoint(parts) and not parts[-1].startswith("_sysconfigdata") and all(map(str.isidentifier, parts)):
            modules.append((".".join(parts[:-1] if parts[-1] == "__init__" else parts), path))
    return iter(sorted(modules))


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    """Return a file's text and syntax tree, or None where it cannot be read as Python."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        return text, ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return None


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, Definition]]:
    """Yield (qualified name, node) of functions and classes, through classes, if, try and with, not into functions."""
    for node in body:
        if isinstance(node, DEFINITIONS):
            name = f"{prefix}.{node.name}"
            yield name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, name)
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            for block in ("body", "orelse", "finalbody"):
                yield from _definitions(getattr(node, block, []), prefix)
            for handler in getattr(node, "handlers", []):
                yield from _definitions(handler.body, prefix)


def _first_paragraph(node: Definition) -> str:
    """Return the first paragraph of a docstring, whitespace normalised; empty where there is none."""
    return normalised(re.split(r"\n\s*\n", (ast.get_docstring(node) or "").strip(), maxsplit=1)[0])


def _question(name: str, node: Definition) -> str:
    """Return the question about one object, with its signature as the source spells it."""
    if not isinstance(node, ast.ClassDef):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        return f"What does {name}({ast.unparse(node.args)}){returns} do?"
    for child in node.body:
        if isinstance(child, ast.FunctionDef) and child.name == "__init__":
            return f"What is the class {name}({ast.unparse(child.args)})?"
    bases = ", ".join(map(ast.unparse, node.bases))
    return f"What is the class {name}, a kind of {bases}?" if bases else f"What is the class {name}?"


def _without_eval(module: str, text: str, tree: ast.Module, answers: list[str]) -> tuple[str, list[str]]:
    """Return a module's text without evaluation docstrings, and the docstrings that stay, in source order."""
    names = {id(node): name for name, node in _definitions(tree.body, module)}
    lines = text.encode().splitlines(keepends=True)  # ast counts columns in UTF-8 bytes
    kept: list[str] = []
    cuts: list[tuple[ast.Expr, bool]] = []
    for node in ast.walk(tree):
        if not isinstance(node, (*DEFINITIONS, ast.Module)) or (docstring := ast.get_docstring(node)) is None:
            continue
        if is_eval(names.get(id(node), "")) or spells_out(docstring, answers):
            assert isinstance(node.body[0], ast.Expr)
            cuts.append((node.body[0], len(node.body) == 1))
        else:
            kept.append(docstring)
    # From the last to the first, so that the positions of those still to come stay true.
    for expression, alone in sorted(cuts, key=lambda cut: cut[0].lineno, reverse=True):
        first, last = expression.lineno - 1, (expression.end_lineno or expression.lineno) - 1
        head, tail = lines[first][: expression.col_offset], lines[last][expression.end_col_offset :]
        left = head + (b"pass" if alone else b"") + tail.lstrip(b" ;")
        lines[first : last + 1] = [left] if left.strip() else []
    return b"".join(lines).decode(), kept
