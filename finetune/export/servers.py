"""What servers make of a saved adapter, said when it is saved and not when it is deployed.

Facts about programs that are not ours, each with its source; all were read on 2026-11-21, and those marked "tried" were
seen on vLLM 0.32 and llama-cpp-python. A merged model is a plain one, which all of them serve.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.adapters.peft_format import CONFIG, WEIGHTS
from finetune.model.headers import read_header

VLLM, LLAMA_CPP = "vLLM", "llama.cpp"
BOTH = (VLLM, LLAMA_CPP)
REFUSED = "will not load this adapter"
DIFFERENT = "would load this adapter and compute something else"
SOMETIMES = "may load this adapter, for some models"
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Choices of --max-lora-rank (vllm/config/lora.py, `MaxLoRARanks`)."""
VLLM_RANK = 16
"""What it is unless it is set (same place)."""


@dataclass(frozen=True)
class Saved:
    """What servers look at: adapter_config.json, and the names of the tensors beside it."""

    config: Mapping[str, Any]
    keys: tuple[str, ...] = ()

    @property
    def is_lora(self) -> bool:
        """Whether it is of LoRA's kind at all."""
        return self.config.get("peft_type") == "LORA"

    @property
    def has_biases(self) -> bool:
        """Whether biases train, of the base or of B."""
        return (self.config.get("bias") or "none") != "none" or bool(self.config.get("lora_bias"))

    @property
    def rank(self) -> int:
        """The largest of any module; 0 where it has none."""
        return max([int(self.config.get("r") or 0), *(self.config.get("rank_pattern") or {}).values()])

    @property
    def scalings(self) -> set[float]:
        """Factors on the products, as PEFT computes them: alpha / rank, or alpha / sqrt(rank)."""
        ranks, alphas = (self.config.get(key) or {} for key in ("rank_pattern", "alpha_pattern"))
        rank, alpha = int(self.config["r"]), float(self.config["lora_alpha"])
        power = 0.5 if self.config.get("use_rslora") else 1.0
        pairs = [(rank, alpha), *((ranks.get(name, rank), alphas.get(name, alpha)) for name in {*ranks, *alphas})]
        return {float(alpha) / int(rank) ** power for rank, alpha in pairs}


@dataclass(frozen=True)
class Rule:
    """Something of an adapter that a server has no use for.

    Attributes:
        servers: which.
        effect: REFUSED, DIFFERENT or SOMETIMES.
        what: in words that follow "it has".
        applies: whether an adapter has it.
        source: where that is said.
    """

    servers: tuple[str, ...]
    effect: str
    what: str
    applies: Callable[[Saved], bool]
    source: str


RULES = (
    Rule(
        BOTH,
        REFUSED,
        "something else than LoRA's factors, and LoRA is all they read",
        lambda saved: not saved.is_lora,
        "vllm/lora/peft_helper.py `from_dict` (r, lora_alpha, target_modules are required; IA3, prefix, prompts tried);"
        " llama.cpp/convert_lora_to_gguf.py `get_tensors`",
    ),
    Rule(
        BOTH,
        REFUSED,
        "magnitudes (DoRA)",
        lambda saved: saved.is_lora and bool(saved.config.get("use_dora")),
        "vllm/lora/peft_helper.py, tried; vllm/lora/lora_model.py `from_lora_tensors`; llama.cpp: 'Not a lora_A or"
        " lora_B tensor', tried",
    ),
    Rule(
        BOTH,
        REFUSED,
        "modules trained whole (modules_to_save: heads, embeddings)",
        lambda saved: saved.is_lora and bool(saved.config.get("modules_to_save")),
        "vllm/lora/peft_helper.py `_validate_features`, vllm#9280; llama.cpp#11554",
    ),
    Rule(
        BOTH,
        REFUSED,
        "biases that train (bias, lora_bias)",
        lambda saved: saved.is_lora and saved.has_biases,
        "vllm/lora/peft_helper.py `validate_legal`: 'Adapter bias is not supported'; lora_model.py `from_lora_tensors`;"
        " llama.cpp: 'Not a lora_A or lora_B tensor'",
    ),
    Rule(
        BOTH,
        REFUSED,
        "rows of the token embedding that train (trainable_token_indices)",
        lambda saved: saved.is_lora and bool(saved.config.get("trainable_token_indices")),
        "vllm/lora/lora_model.py `from_lora_tensors` reads lora_A and lora_B alone; llama.cpp: 'Not a lora_A or lora_B"
        " tensor'",
    ),
    Rule(
        (LLAMA_CPP,),
        REFUSED,
        "LoRA on stacked experts (target_parameters)",
        lambda saved: saved.is_lora and bool(saved.config.get("target_parameters")),
        "llama.cpp/convert_lora_to_gguf.py `get_base_tensor_name` knows no base_layer among the experts",
    ),
    Rule(
        (VLLM,),
        SOMETIMES,
        "LoRA on stacked experts (target_parameters)",
        lambda saved: saved.is_lora and bool(saved.config.get("target_parameters")),
        "vllm/lora/lora_model.py `check_unexpected_modules`: for models whose experts it keeps stacked; vllm#55545"
        " (rsLoRA's scaling of experts)",
    ),
    Rule(
        (VLLM,),
        SOMETIMES,
        "LoRA on the token embedding",
        lambda saved: any(".lora_embedding_A" in key for key in saved.keys),
        "vllm/lora/lora_model.py `check_unexpected_modules`: for models that list it among what LoRA may stand beside",
    ),
    Rule(
        (VLLM,),
        REFUSED,
        f"a rank above {VLLM_RANKS[-1]}",
        lambda saved: saved.is_lora and saved.rank > VLLM_RANKS[-1],
        "vllm/config/lora.py `MaxLoRARanks`",
    ),
    Rule(
        (VLLM,),
        DIFFERENT,
        "more than one scaling (rank_pattern, alpha_pattern)",
        lambda saved: saved.is_lora and len(saved.scalings) > 1,
        "vllm/lora/peft_helper.py: one `vllm_lora_scaling_factor`, lora_alpha / r; the patterns are no fields of it",
    ),
    Rule(
        (LLAMA_CPP,),
        DIFFERENT,
        "more than one alpha (alpha_pattern)",
        lambda saved: saved.is_lora and len({saved.config["lora_alpha"], *_alphas(saved)}) > 1,
        "llama.cpp/convert_lora_to_gguf.py writes lora_alpha alone",
    ),
    Rule(
        (LLAMA_CPP,),
        DIFFERENT,
        "rsLoRA's scaling",
        lambda saved: saved.is_lora and bool(saved.config.get("use_rslora")) and saved.rank > 1,
        "llama.cpp/convert_lora_to_gguf.py writes lora_alpha alone; llama-adapter.h `get_scale` divides by the rank",
    ),
)


def _alphas(saved: Saved) -> tuple[float, ...]:
    return tuple((saved.config.get("alpha_pattern") or {}).values())


def notes(saved: Saved, mergeable: bool) -> list[str]:
    """Lines on what servers will not do with an adapter, and what to do; none where all of them serve it as it is."""
    lines = []
    for effect in (REFUSED, DIFFERENT, SOMETIMES):
        found: dict[str, list[str]] = {}
        for rule in RULES:
            if rule.effect == effect and rule.applies(saved):
                found.setdefault(" and ".join(rule.servers), []).append(rule.what)
        lines += [f"{servers} {effect}: it has {', '.join(w)}" for servers, w in found.items()]
    if lines:
        advice = "serve a merged export (safetensors)" if mergeable else "it does not merge: serve it by transformers"
        return [f"{'; '.join(lines)}; {advice}"]
    needed = next((rank for rank in VLLM_RANKS if rank >= saved.rank), 0)
    return [f"vLLM serves this adapter with --max-lora-rank {needed}"] if needed > VLLM_RANK else []


def read_saved(directory: Path) -> Saved:
    """What servers find in the directory of an adapter."""
    config = json.loads((directory / CONFIG).read_text("utf-8"))
    weights = directory / WEIGHTS
    keys = tuple(tensor.name for tensor in read_header(weights).tensors) if weights.is_file() else ()
    return Saved(config, keys)
