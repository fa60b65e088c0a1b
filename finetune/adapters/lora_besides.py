"""What a LoRA of PEFT's may train beside its products: biases, and single rows of the token embedding.

Sources: peft 0.21 `tuners/tuners_utils.py` (`_get_learnable_bias_state_dict`, `_mark_only_adapters_as_trainable`),
`tuners/lora/layer.py` (`lora_bias`), `utils/other.py` (`set_additional_trainable_modules`). There are no settings of
ours for it: a saved adapter that has it is loaded, trained on and saved again with it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from finetune.adapters.lookup import is_scaled_lookup
from finetune.adapters.token_rows import EmbeddingRows, HeadRows, TokenRows
from finetune.errors import ModelError
from finetune.structure import Projection, Structure
from finetune.structure.inspect import projection_of

BIASES = ("none", "all", "lora_only")
TOKENS = "trainable_token_indices"
ROWS_KEY = "token_adapter.trainable_tokens_delta"
"""PEFT's name for trained rows, behind that of their module."""


@dataclass(frozen=True)
class Besides:
    """The settings, named as in PEFT.

    Attributes:
        bias: which biases of the base train: none, all, or lora_only, those of adapted projections.
        lora_bias: whether B has a bias of its own.
        trainable_token_indices: tokens, or tokens by the name of a module; None for none.
        parameters: modules, no linear layers, whose weight has factors; see lora_parameter.py.
    """

    bias: str = "none"
    lora_bias: bool = False
    trainable_token_indices: Any = None
    parameters: tuple[str, ...] = ()

    @classmethod
    def read(cls, config: Mapping[str, Any], path: Path) -> Besides:
        """From adapter_config.json.

        Raises:
            ModelError: for values that PEFT does not write, naming the key.
        """
        found = cls(config.get("bias") or "none", config.get("lora_bias") or False, config.get(TOKENS) or None)
        if found.bias not in BIASES:
            raise ModelError(f"{path}: bias is {found.bias!r}: expected {' | '.join(BIASES)}")
        if not isinstance(found.lora_bias, bool):
            raise ModelError(f"{path}: lora_bias is {found.lora_bias!r}: expected true or false")
        said = found.trainable_token_indices
        lists = [] if said is None else [*said.values()] if isinstance(said, dict) else [said]
        if not all(_are_tokens(tokens) for tokens in lists):
            raise ModelError(f"{path}: {TOKENS} is {said!r}: expected tokens, each once, or these by module")
        return found

    def to_peft(self) -> dict[str, Any]:
        """The keys of adapter_config.json; without any, as files have always been."""
        more = {"lora_bias": True} if self.lora_bias else {}
        rows = {} if self.trainable_token_indices is None else {TOKENS: self.trainable_token_indices}
        return {"bias": self.bias, **more, **rows}

    def __str__(self) -> str:
        """Whatever is not as usual, as a message names it."""
        said = [f"{key}={value!r}" for key, value in self.to_peft().items() if value != "none"]
        return ", ".join(said + [f"target_parameters=[{name}.weight]" for name in self.parameters[:1]])

    def __bool__(self) -> bool:
        return bool(str(self))


NOTHING = Besides()


def _are_tokens(value: Any) -> bool:
    whole = isinstance(value, list) and bool(value) and all(type(token) is int and token >= 0 for token in value)
    return whole and len({*value}) == len(value)


def biases(
    model: nn.Module, besides: Besides, plan: list[Projection], whole: Collection[str]
) -> tuple[list[Projection], dict[str, tuple[str, ...]]]:
    """What has a bias that trains, besides the adapted projections: further projections, and other modules.

    Args:
        plan: the adapted projections.
        whole: modules that train whole, whose biases are theirs.

    Raises:
        ModelError: for a bias of a module that cannot stand in place of another: it holds modules with weights.
    """
    if besides.bias != "all":
        return [], {}
    projections: list[Projection] = []
    others: dict[str, tuple[str, ...]] = {}
    adapted = {p.name for p in plan}
    for name, module in model.named_modules():
        inside = any(name == other or name.startswith(f"{other}.") for other in whole)
        if inside or name in adapted or module._parameters.get("bias") is None:
            continue
        found = projection_of(module, name)
        if found is not None:
            projections.append(found)
        elif any(True for child in module.children() for _ in child.parameters()):
            raise ModelError(f"the adapter trains every bias (bias='all'), which {name}.bias of this model cannot do")
        else:
            others[name] = ("bias",)
    return projections, others


def token_rows(model: nn.Module, structure: Structure, besides: Besides) -> dict[str, TokenRows]:
    """What stands for the token embedding and the head where rows of them train, by name.

    Whatever shares the table of the input embedding uses the rows that train there.

    Raises:
        ModelError: for a module or a token that the model does not have, and one whose rows cannot train.
    """
    said = besides.trainable_token_indices
    if said is None:
        return {}
    modules = dict(model.named_modules())
    table = model.get_input_embeddings()  # type: ignore[operator]
    lead = next(name for name, module in modules.items() if module is table)
    given = said if isinstance(said, dict) else {lead: said}
    chosen = {name: ids for ending, ids in given.items() for name in modules if name.endswith(ending)}
    for ending in given:
        if not any(name.endswith(ending) for name in modules):
            raise ModelError(f"the adapter trains tokens of {ending}, which this model does not have")
    rows: dict[str, TokenRows] = {}
    for name in sorted(chosen, key=lambda name: name != lead):
        rows[name] = _rows(modules[name], name, chosen[name])
    if lead in rows:
        for name in structure.ties if lead in structure.ties else ():
            if chosen.get(name, chosen[lead]) == chosen[lead] and name != lead:
                rows[name] = _rows(modules[name], name, chosen[lead], rows[lead].rows_NH)
    return rows


def _rows(module: nn.Module, name: str, ids: list[int], shared: nn.Parameter | None = None) -> TokenRows:
    size = module.weight.shape[0] if isinstance(module, nn.Embedding | nn.Linear) else 0
    if not (isinstance(module, nn.Linear) or is_scaled_lookup(module)):
        raise ModelError(
            f"the adapter trains tokens of {name}, which is no table of them here: {type(module).__name__}"
        )
    if max(ids) >= size:
        raise ModelError(f"the adapter trains token {max(ids)} of {name}, which has {size} here: resize the base first")
    if isinstance(module, nn.Embedding):
        return EmbeddingRows(module, ids, shared)
    return HeadRows(module, ids, shared)  # type: ignore[arg-type]
