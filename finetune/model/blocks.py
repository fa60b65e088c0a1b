"""A dense checkpoint one block at a time, for work on models that are larger than memory.

transformers' own loader reads the tensors, so that renamed, joined and stacked ones come out as they always do. It is
given what lies outside the blocks first, the blocks taken out of the model; then each block, with tensors of no size
for all the rest. Which tensors of the checkpoint are read for what is seen by what the loader asks for.

Weights on CPU stay mapped from the checkpoint's files, which therefore must not change meanwhile. Written against
transformers 5.17 to 5.23, as model/quantizer.py.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import GenerationConfig
from transformers.quantizers.auto import register_quantization_config, register_quantizer

from finetune.errors import ModelError
from finetune.model.config import ModelConfig
from finetune.model.exchange import exchange_norms
from finetune.model.headers import Header
from finetune.model.loading import Loading
from finetune.model.pretrained import attention_for, empty_model, judge, native_class, quiet
from finetune.model.quantizer import FrozenBaseConfig, FrozenBaseQuantizer
from finetune.model.streaming import fixed_thresholds
from finetune.model.task import CAUSAL_LM, Task
from finetune.quant.dense import DenseConfig
from finetune.structure import inspect
from finetune.structure.base import Structure

METHOD = "finetune_blocks"
DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32,
    "I64": torch.int64, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
}  # fmt: skip
"""Names of safetensors for the dtypes that dense checkpoints hold."""


class BlockReader:
    """Opens a dense checkpoint without its blocks, and reads these when they are wanted.

    Args:
        directory: the checkpoint.
        config: its configuration, as `pretrained.read_config` gives it.
        model: how it is to be opened.
        dtype: of the weights in memory.
        device: where they go.
        headers: of its shards.
        task: with which head it is opened.

    Attributes:
        empty: the model on the meta device.
        blocks: their names.
        whole: why the blocks cannot be taken apart; empty where they can.
        model: once `outside` has been called: the model, its blocks on the meta device.

    Raises:
        ModelError: where the checkpoint's tensors are not those of the model.
    """

    def __init__(
        self,
        directory: Path,
        config: Any,
        model: ModelConfig,
        dtype: torch.dtype,
        device: str,
        headers: list[Header],
        task: Task = CAUSAL_LM,
    ) -> None:
        self.directory, self.device, self.headers, self.task = directory, device, headers, task
        self.loading, self._fused = Loading(DenseConfig(), dtype), model.fused != "off"
        native = native_class(config, model, task, str(directory))
        self._attention = attention_for(native, model, self.loading)
        self._config = copy.deepcopy(config)
        self.empty = empty_model(config, model, task)
        structure = inspect(self.empty)
        self.blocks = structure.blocks
        self.whole = _why_whole(self.empty, structure)
        self._outside: set[str] = set()
        self._rehearse()

    def _rehearse(self) -> None:
        """Load everything on the meta device, by which every name and shape is judged before hours are spent."""
        nothing = {
            t.name: torch.empty(t.shape, dtype=_dtype(t), device="meta") for h in self.headers for t in h.tensors
        }
        _, report = self._load(nothing, (), "meta")
        judge(report, self.directory)

    def outside(self) -> Any:
        """The model with everything in memory but its blocks, which are on the meta device; frozen, in evaluation."""
        lazy = self._lazy(())
        self.model, _ = self._load(lazy, self.blocks, self.device)
        self._outside = {name for name, tensor in lazy.items() if tensor.read}
        try:
            self.model.generation_config = GenerationConfig.from_pretrained(self.directory, local_files_only=True)
        except OSError:
            pass  # the checkpoint has none: what the configuration implies stands
        self.model.config._name_or_path = str(self.directory)
        return self.model.requires_grad_(False).eval()

    def read(self, block: str) -> nn.Module:
        """A block with its weights, its projections dense frozen modules, its norms fused ones where they may be.

        Raises:
            ModelError: where a weight cannot be read.
        """
        others = [name for name in self.blocks if name != block]
        loaded, _ = self._load(self._lazy(self._outside), others, self.device)
        module = loaded.get_submodule(block)
        absent = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
        if absent:
            raise ModelError(f"{self.directory} holds no {block}.{absent[0]}")
        module.requires_grad_(False).eval()
        if self._fused:
            exchange_norms(module, self.loading.dtype)
        return module

    def release(self) -> None:
        """Give the pages of the checkpoint back that are mapped in memory."""
        self.loading.pages.release()

    def _lazy(self, sizeless: Collection[str]) -> dict[str, _Lazy]:
        """Every tensor of the checkpoint, to be read when it is asked for; those named take up no room."""
        return {
            tensor.name: _Lazy(header.path, tensor.name, tensor.shape, _dtype(tensor), tensor.name in sizeless)
            for header in self.headers
            for tensor in header.tensors
        }

    def _load(self, state: dict[str, Any], without: Sequence[str], device: str) -> tuple[Any, dict[str, Any]]:
        """What transformers makes of tensors, and what it reports."""
        options: dict[str, Any] = {}
        if device != "meta":
            options["quantization_config"] = _BlocksConfig(self.loading, without)
        with fixed_thresholds(), quiet(), torch.random.fork_rng(devices=[]):
            try:
                return type(self.empty).from_pretrained(
                    None,
                    config=copy.deepcopy(self._config),
                    state_dict=state,
                    dtype=self.loading.dtype,
                    device_map={"": device},
                    attn_implementation=self._attention,
                    experts_implementation="eager",
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                    **options,
                )
            except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
                if self.loading.failure is not None:
                    raise self.loading.failure from None
                first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
                raise ModelError(f"{self.directory} cannot be loaded: {first}") from error


class _Lazy:
    """A tensor of a file that is mapped when the loader asks for it.

    Attributes:
        read: whether it did.
    """

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, sizeless: bool) -> None:
        self.path, self.name, self.shape, self.dtype, self.sizeless = path, name, shape, dtype, sizeless
        self.read = False

    def __getitem__(self, index: Any) -> Tensor:
        self.read = True
        if self.sizeless:
            return torch.zeros(1, dtype=self.dtype).expand(self.shape)[index]
        with safe_open(self.path, framework="pt", device="cpu") as file:
            return file.get_slice(self.name)[index]


@register_quantization_config(METHOD)
class _BlocksConfig(FrozenBaseConfig):
    """What transformers passes around while it loads.

    Args:
        without: names of the blocks that are left out.
    """

    def __init__(self, loading: Loading, without: Sequence[str] = (), **_: Any) -> None:
        super().__init__(loading)
        self.quant_method = METHOD  # type: ignore[assignment]
        self.without = tuple(without)


@register_quantizer(METHOD)
class _BlocksQuantizer(FrozenBaseQuantizer):
    """Takes blocks out of the model before weights arrive, and puts them back, empty, after."""

    quantization_config: _BlocksConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        self.taken = {name: model.get_submodule(name) for name in self.quantization_config.without}
        super()._process_model_before_weight_loading(model, **kwargs)
        for name in self.taken:
            _put(model, name, nn.Module())

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for name, block in self.taken.items():
            _put(model, name, block)
        return super()._process_model_after_weight_loading(model, **kwargs)


def _why_whole(model: Any, structure: Structure) -> str:
    """Why the blocks of a model cannot be read one by one; empty where they can."""
    if len(structure.stacks) != 1 or structure.stacks[0].blocks != structure.blocks:
        return "it has several stacks of blocks"
    inside = tuple(f"{block}." for block in structure.blocks)
    tied = [name for pair in model.all_tied_weights_keys.items() for name in pair if name.startswith(inside)]
    return f"its blocks share weights ({tied[0]})" if tied else ""


def _put(model: nn.Module, name: str, block: nn.Module) -> None:
    """Exchange a block, in place, so that the order of modules stays."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, block)


def _dtype(tensor: Any) -> torch.dtype:
    """The dtype of a stored tensor; one that no dense checkpoint has counts as bytes."""
    return DTYPES.get(tensor.dtype, torch.uint8)
