"""`finetune combine`: saved LoRAs become one that computes their weighted sum, without a model in between.

    finetune combine adapters=[runs/a/adapter,runs/b/adapter] weights=[0.7,0.3] output=both
    finetune combine adapters=[a,b] weights=[1,-1] mode=sum rank=8 output=difference

The arithmetic is in adapters/combination.py; here are the files. They may be ours or PEFT's, and what is written PEFT
opens as well.
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from finetune.adapters import peft_format
from finetune.adapters.combination import MODES, Loss, Product, check_combination, combine
from finetune.adapters.peft_lora import Saved, read_saved
from finetune.adapters.provenance import read_provenance, write_provenance
from finetune.errors import ConfigError, ModelError, nearest_or_all
from finetune.export import servers
from finetune.export.directory import published

FACTORS = ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B"))
"""Endings of PEFT's keys for A and B."""
COPY_OF_BASE = ".base_layer.weight"
"""Ending of the keys under which PEFT saves an adapted embedding of the base too."""
ROUNDING = 1e-6
"""Relative loss below which a re-factorisation is exact: the factors are saved in float32."""
TOKENIZER = re.compile(r"(tokenizer|special_tokens|added_tokens|vocab|merges|chat_template|spiece)[\w.]*")
"""Names of the files beside an adapter that belong to its tokenizer."""


Key = tuple[str, tuple[str, str]]


@dataclass
class CombineConfig:
    """What `finetune combine` is told.

    Attributes:
        adapters: directories of saved LoRAs.
        weights: a number for each, in the same order; negative ones subtract.
        mode: `concat` joins the factors, exact, with the ranks' sum; `sum` factorises the sum anew at `rank`.
        rank: for `sum`; the largest of the adapters' unless given.
        output: directory to write, which must not exist.
        allow_other_quant: accept adapters trained on one base quantized in different ways.
    """

    adapters: list[str] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    mode: str = MODES[0]
    rank: int | None = None
    output: str | None = None
    allow_other_quant: bool = False

    def __post_init__(self) -> None:
        for key, example in (("adapters", "[runs/a/adapter,runs/b/adapter]"), ("weights", "[0.7,0.3]")):
            if not isinstance(getattr(self, key), list) or not getattr(self, key):
                raise ConfigError(f"{key} is {getattr(self, key)!r}: expected a list, e.g. {key}={example}")
        self.adapters = [str(directory) for directory in self.adapters]
        if len(self.weights) != len(self.adapters):
            raise ConfigError(f"weights is {self.weights}: expected {len(self.adapters)}, one for each adapter")
        if twice := [name for name, count in Counter(self.adapters).items() if count > 1]:
            raise ConfigError(f"adapters names {twice[0]} twice: add its weights up")
        check_combination(dict(zip(self.adapters, self.weights, strict=True)), self.mode, self.rank)
        if not isinstance(self.output, str) or not self.output:
            raise ConfigError(f"output is {self.output!r}: expected a directory to write, e.g. output=both")
        if Path(self.output).exists():
            raise ConfigError(f"output is {self.output}, which exists already: name a new directory")


@dataclass(frozen=True)
class Source:
    """A saved LoRA.

    Attributes:
        directory: where it is.
        saved: its settings.
        products: scaled, by the stem of their keys and the endings of A and B.
        experts: stems of those that are stacks of experts.
        origin: finetune.json; None where there is none.
    """

    directory: Path
    saved: Saved
    products: dict[Key, Product]
    experts: frozenset[str]
    origin: dict[str, Any] | None

    @classmethod
    def read(cls, directory: Path, weight: float) -> Source:
        """Read a directory, its products multiplied by a weight.

        Raises:
            ModelError: where it is no plain LoRA, or its tensors are not those of one.
        """
        saved, path = read_saved(directory), directory / peft_format.WEIGHTS
        if saved.modules_to_save:
            whole = ", ".join(saved.modules_to_save)
            raise ModelError(f"adapter {directory} also trains {whole} whole, which is no product to combine")
        if saved.besides:
            raise ModelError(f"adapter {directory} also has {saved.besides}, which is no product to combine")
        tensors = peft_format.read_tensors(directory)
        pairs: dict[Key, dict[int, Tensor]] = {}
        for name, tensor in tensors.items():
            endings = next((pair for pair in FACTORS if name.endswith(pair)), None)
            if endings is not None:
                ending = next(ending for ending in endings if name.endswith(ending))
                stem = name.removesuffix(ending).removeprefix(peft_format.PREFIX)
                pairs.setdefault((stem, endings), {})[endings.index(ending)] = tensor
            elif not name.endswith(COPY_OF_BASE):
                raise ModelError(f"{path}: {name} is unexpected: expected a plain LoRA")
        products: dict[Key, Product] = {}
        experts: set[str] = set()
        for place, factors in pairs.items():
            rank, alpha = _size(saved, place[0], directory)
            a, b = factors.get(0), factors.get(1)
            if a is None or b is None or a.dim() != 2 or b.dim() != 2 or len(a) != b.shape[1] or len(a) % rank:
                raise ModelError(
                    f"{path}: {place[0]} has no two factors of rank {rank}: expected its lora_A and lora_B"
                )
            if len(a) != rank:
                experts.add(place[0])
            scaling = alpha / (math.sqrt(rank) if saved.rslora else rank)
            products[place] = Product.of(a, b, rank, weight * scaling)
        if experts and peft_format.stacks_by_output(saved.settings):
            raise ModelError(f"adapter {directory} has experts in the layout of PEFT before 0.20: save it anew")
        return cls(directory, saved, products, frozenset(experts), read_provenance(directory))

    @property
    def base(self) -> str | None:
        """What the adapter says of its base, as people read it."""
        found = (self.origin or {}).get("base") or self.saved.settings.get("base_model_name_or_path")
        return None if found is None else str(found)

    def digest(self, key: str) -> Any:
        """A digest of what it was trained on; None where nobody knows."""
        return (self.origin or {}).get("digests", {}).get(key)


def configured(given: Mapping[str, Any]) -> CombineConfig:
    """The settings from the command line's.

    Raises:
        ConfigError: for every unknown key at once, with the nearest right one, or the first wrong value.
    """
    known = [f.name for f in fields(CombineConfig)]
    strays = [f"unknown key {key!r}{nearest_or_all(key, known)}" for key in given if key not in known]
    if strays:
        raise ConfigError("; ".join(strays))
    return CombineConfig(**given)


def run(config: CombineConfig) -> int:
    """Read, combine, write; prints what became of it and, last, the directory.

    Raises:
        UserError: for adapters that cannot be combined, naming both.
    """
    pairs = zip(config.adapters, config.weights, strict=True)
    sources = [Source.read(Path(directory), weight) for directory, weight in pairs]
    notes = check_origins(sources, config.allow_other_quant)
    check_alike(sources)
    products: dict[Key, list[Product]] = {}
    for source in sources:
        for key, product in source.products.items():
            products.setdefault(key, []).append(product)
    loss = Loss()
    rank = config.rank or max(product.rank for found in products.values() for product in found)
    results = {key: combine(found, config.mode, rank, loss) for key, found in products.items()}
    output = Path(config.output or "")
    with published(output) as work:
        write(work, sources, results)
    ranks = sorted({product.rank for product in results.values()})
    exact = "exact" if loss.relative < ROUNDING else f"{loss.relative:.2%} of the weighted sum is lost"
    print(f"combined {len(sources)} adapters at {len(results)} places, rank {', '.join(map(str, ranks))}: {exact}")
    for note in notes + servers.notes(servers.read_saved(output), mergeable=True):
        print(note)
    print(output)
    return 0


def check_origins(sources: Sequence[Source], allow_other_quant: bool) -> list[str]:
    """Refuse adapters of different bases; returns lines that the user should read.

    Raises:
        ModelError: naming both.
    """
    first, notes = sources[0], []
    for other in sources[1:]:
        both = f"adapters {first.directory} and {other.directory} were trained"
        for key in ("base", "quantization", "tokenizer", "chat_template"):
            mine, theirs = first.digest(key), other.digest(key)
            if mine is None or theirs is None or mine == theirs:
                continue
            seen = f"{str(mine)[:12]} and {str(theirs)[:12]}"
            if key == "base":
                raise ModelError(f"{both} on different bases: {seen} ({first.base} and {other.base})")
            if key == "quantization" and not allow_other_quant:
                raise ModelError(f"{both} on one base quantized differently: {seen}; set allow_other_quant=true")
            notes.append(f"{both} with different {key.replace('_', ' ')}s: {seen}; the first one's is kept")
        if first.digest("base") is None or other.digest("base") is None:
            if first.base != other.base:
                raise ModelError(f"{both} on different bases: {first.base} and {other.base}")
            if first.base is None and not first.products.keys() & other.products.keys():
                where = f"adapters {first.directory} and {other.directory}"
                raise ModelError(f"{where} have no place in common and name no base: expected adapters of one model")
            notes.append(f"nothing but its name, {first.base}, says that {both[9:]} on one base")
    return notes


def check_alike(sources: Sequence[Source]) -> None:
    """Refuse products of other shapes at one place, and stacked experts that their keys do not tell apart.

    Raises:
        ModelError: naming both adapters.
    """
    for first, other in itertools.combinations(sources, 2):
        both = f"adapters {first.directory} and {other.directory}"
        for key in first.products.keys() & other.products.keys():
            mine, theirs = (_shape(source.products[key]) for source in (first, other))
            if mine != theirs:
                raise ModelError(f"{both} do not fit one model: {key[0]} is {mine} in one, {theirs} in the other")
        stacks = [sorted(source.saved.target_parameters) if source.experts else None for source in (first, other)]
        if stacks[0] != stacks[1] and None not in stacks:
            raise ModelError(f"{both} adapt different parameters of stacked experts: {stacks[0]} and {stacks[1]}")


def write(directory: Path, sources: Sequence[Source], results: Mapping[Key, Product]) -> None:
    """Write the combination as PEFT lays out a LoRA, with the first one's tokenizer and origin."""
    first = sources[0]
    tensors: dict[str, Tensor] = {}
    modules: list[str] = []
    parameters: list[str] = []
    ranks: dict[str, int] = {}
    for (stem, endings), product in results.items():
        for ending, factor in zip(endings, product.factors(), strict=True):
            tensors[f"{peft_format.PREFIX}{stem}{ending}"] = factor
        owner = next((source for source in sources if stem in source.experts), None)
        names = [stem] if owner is None else _parameters(owner.saved, stem)
        (modules if owner is None else parameters).extend(names)
        ranks |= dict.fromkeys(names, product.rank)
    common = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != common}
    saved = Saved(
        rank=common,
        alpha=float(common),
        target_modules=modules,
        target_parameters=sorted({*parameters}),
        rank_pattern=others,
        alpha_pattern={name: float(rank) for name, rank in others.items()},
    )
    settings = first.saved.settings
    config = saved.to_peft(
        settings.get("base_model_name_or_path"),
        fan_in_fan_out=bool(settings.get("fan_in_fan_out")),
        task_type=settings.get("task_type"),
    )
    peft_format.write(directory, tensors, config)
    if all(source.origin is not None for source in sources) and first.origin is not None:
        storage = first.origin.get("quantization")
        write_provenance(directory, first.origin["digests"], method="lora", base=first.base, quantization=storage)
    for path in first.directory.iterdir():
        if path.is_file() and TOKENIZER.fullmatch(path.name):
            shutil.copy(path, directory / path.name)


def _size(saved: Saved, stem: str, directory: Path) -> tuple[int, float]:
    """Rank and alpha of the product at a stem; that of stacked experts is told by the parameters it may stand for.

    Raises:
        ModelError: where these have different ones.
    """
    found = {saved.size_of(name) for name in _parameters(saved, stem) or [stem]}
    if len(found) > 1:
        raise ModelError(
            f"adapter {directory} has ranks of their own for the parameters of {stem}: combine it by finetune.Adapters"
        )
    return next(iter(found))


def _parameters(saved: Saved, stem: str) -> list[str]:
    """The stacked parameters that keys of a module may stand for; PEFT nests several of one module as base layers."""
    if peft_format.targeted(stem, saved.target_modules, saved.settings):
        return []
    module = re.sub(r"(\.base_layer)+$", "", stem)
    names = [f"{module}.{entry.rpartition('.')[2]}" for entry in saved.target_parameters]
    return [n for n, entry in zip(names, saved.target_parameters, strict=True) if peft_format.ends(n, [entry])]


def _shape(product: Product) -> str:
    experts, _, inputs = product.a_ERI.shape
    size = f"{product.b_EOR.shape[1]} x {inputs}"
    return size if experts == 1 else f"{experts} x {size}"
