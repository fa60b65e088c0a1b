"""Our way into transformers' loader: every weight is frozen into its storage format the moment it arrives.

transformers builds the model on the meta device, then walks over the checkpoint's tensors (renaming, merging the
experts of a mixture, casting to the model's dtype) and hands each finished one to the quantizer's operation. Ours
builds the frozen module that the weight belongs in, stores the weight and puts the module in the model; until then the
model keeps its ordinary modules, so that names, shapes and conversions are those of the dense model on every version of
transformers.

Written against `transformers.quantizers.base.HfQuantizer` and `transformers.core_model_loading` of 5.17 to 5.23.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from finetune.errors import ConfigError, ModelError
from finetune.model.expert_stacks import merges_experts, stacked, with_packed_names
from finetune.model.loading import Loading
from finetune.model.stored import METHOD
from finetune.quant.affine_ordered import in_order
from finetune.quant.base import QUANTIZERS, FrozenWeight, QuantConfig
from finetune.quant.dense import DenseConfig, DenseLinear
from finetune.quant.freeze import empty_frozen, replace_projection
from finetune.quant.packed import PackedExperts, PackedLinear, PackedWeight
from finetune.structure import Projection, Structure, inspect
from finetune.structure.inspect import projection_of


@register_quantization_config(METHOD)
class FrozenBaseConfig(QuantizationConfigMixin):
    """What transformers passes around while it loads."""

    def __init__(self, loading: Loading, **_: Any) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.loading = loading

    def to_dict(self) -> dict[str, Any]:
        """What config.json says of a model saved as it is; in transformers' own terms where stock can read it."""
        return self.loading.told() or {"quant_method": METHOD}


@register_quantizer(METHOD)
class FrozenBaseQuantizer(HfQuantizer):
    """Freezes the projections of a model while its tensors stream in."""

    quantization_config: FrozenBaseConfig

    def __init__(self, quantization_config: FrozenBaseConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.loading = quantization_config.loading
        self.targets: dict[str, Projection] = {}
        self.shapes: dict[str, torch.Size] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Note which parameters are to be frozen, by name, and what shapes the others should have."""
        structure = inspect(model)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.targets = {parameter_name(p): p for p in structure.projections}
        if getattr(self.loading.quant, "head", False) and self.loading.stored is None:
            self.targets.update(_head(model, structure))
        if self.loading.stored is not None:
            self._expect_packed(model, self.loading.stored.packed)

    def _expect_packed(self, model: nn.Module, packed: dict[str, torch.dtype]) -> None:
        """Make room for the weights of a prequantized checkpoint, so that transformers passes them untouched."""
        for projection in self.targets.values():
            # The keys of a packed stack are no parameter's name in the dense model: an empty stack makes them known.
            # On disk only the end of a name is sure to be the same.
            end = ".".join([*projection.name.split(".")[-2:], "weight"])
            if projection.kind == "experts" and any(name.endswith(f".{end}") for name in packed):
                _place(model, projection, self._empty(model, projection, self.loading.quant, torch.device("meta")))
        modules = dict(model.named_modules())
        for name, storage in packed.items():
            # 5.17 casts a float tensor to the dtype of the parameter it is for; packed bytes must pass untouched.
            module = modules.get(name.removesuffix(".weight"))
            if storage.is_floating_point and module is not None and projection_of(module, name) is not None:
                meta = torch.empty_like(module.weight, dtype=storage, device="meta")  # type: ignore[arg-type]
                module.weight = nn.Parameter(meta, requires_grad=False)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Freeze what did not come by our operation, so that all projections honour one contract, and tidy up."""
        # With a quantizer 5.17 does not compare shapes itself. A frozen module has checked its weight.
        for name, parameter in model.named_parameters():
            frozen = name.endswith(".weight") and isinstance(_owner(model, name)[0], FrozenWeight)
            if not frozen and parameter.shape != self.shapes.get(name, parameter.shape):
                self.loading.mismatched.append(name)
        structure = inspect(model)
        quant = DenseConfig() if self.pre_quantized else self.loading.quant
        for projection in structure.projections:
            replace_projection(model, quant, projection)
        if self.pre_quantized and hasattr(self.loading.quant, "head"):
            self._compare_head(model, structure)
        self.loading.kept = [
            name for name, module in model.named_modules() if isinstance(module, nn.Linear | DenseLinear)
        ]
        stacks = [name for name, module in model.named_modules() if isinstance(module, PackedExperts)]
        self.loading.stacks = bool(stacks)
        self.loading.conv1ds = any(isinstance(m, PackedLinear) and m.transposed for m in model.modules())
        # Their operations cannot be undone (saving would try); what is saved is packed as it was.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [c for c in conversions if not packs(c, stacks)]  # type: ignore[assignment]
        if self.loading.told() is None:
            self.remove_quantization_config(model)
        return model

    def _compare_head(self, model: nn.Module, structure: Structure) -> None:
        """Note whether a prequantized checkpoint packs its head; refuse where it was to be and is not."""
        packed = structure.head is not None and isinstance(model.get_submodule(structure.head), FrozenWeight)
        if self.loading.quant.head and not packed:  # type: ignore[attr-defined]
            raise ModelError(f"quant.head=true conflicts with the checkpoint, which holds {structure.head} unquantized")
        self.loading.quant = replace(self.loading.quant, head=packed)  # type: ignore[call-arg]

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.targets

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes a weight will take, so that a CUDA warm-up does not reserve the dense model."""
        if param_name not in self.targets:
            return super().param_element_size(model, param_name, param)
        trial = QUANTIZERS.build(self.loading.quant, 256, 256, bias=False, dtype=self.loading.dtype, device="meta")
        return trial.bits_per_weight() / 8

    def get_quantize_ops(self) -> ConversionOps:
        return Freeze(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Prequantized: gather a weight and its scales, longest names first (5.17 takes the first match)."""
        if not self.pre_quantized:
            return []
        assert self.loading.stored is not None
        return [WeightConverter([*self.loading.stored.format.companions, "weight"], "weight", [Unpack(self)])]

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Prequantized: let what merges experts gather their packed parts."""
        if not self.pre_quantized or self.loading.stored is None or not self.loading.stored.format.packs_experts_singly:
            return super().update_weight_conversions(weight_conversions, *model)
        form = self.loading.stored.format
        widened = [
            with_packed_names(one, form, UnpackStack(self, one)) if merges_experts(one) else one
            for one in weight_conversions
        ]
        return widened + self.get_weight_conversions()

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    def freeze(self, model: nn.Module, name: str, weight: Tensor) -> None:
        """Store a dense weight, laid out as the model's parameter, and put the frozen module in its place.

        Raises:
            ModelError: where the checkpoint's shape is not the model's, or a weight is not finite.
        """
        projection = self.targets[name]
        expected = _memory_shape(projection)
        if tuple(weight.shape) != expected:
            raise ModelError(
                f"{name} has shape {list(weight.shape)} in the checkpoint, config.json leads to {list(expected)}"
            )
        # transformers widens some weights that must stay in floating point; those keep the dtype they come in.
        dtype = weight.dtype if projection.dense else self.loading.dtype
        frozen = self._empty(model, projection, self.loading.quant, weight.device, dtype)
        try:
            # A Conv1D becomes an ordinary [O, I] matrix, as in bitsandbytes; experts keep the layout of their loop.
            frozen.store(weight.T if projection.kind == "conv1d" else weight)
        except ModelError as error:
            raise ModelError(f"{name}: {error}") from error
        _place(model, projection, frozen)
        self.loading.pages.consumed(weight)

    def unpack(self, model: nn.Module, name: str, stored: dict[str, Tensor]) -> None:
        """Put a frozen module in place that holds a weight as the checkpoint packed it.

        Raises:
            ModelError: where the parts do not make a weight, or not one that fits here.
        """
        assert self.loading.stored is not None
        path = name.removesuffix(".weight")
        projection = self.targets.get(name) or self.targets.get(path) or projection_of(model.get_submodule(path), path)
        if projection is None:
            raise ModelError(f"{name} is packed in the checkpoint, but the model has no linear layer there")
        quant = self.loading.stored.format.settings_of(stored, name, self.loading.quant)
        if projection.dense:
            raise ModelError(f"{name} is packed in the checkpoint, but the model's own code wants it in floating point")
        stored = self.loading.stored.format.state(stored, name, quant, self.loading.dtype)
        frozen = self._empty(model, projection, quant, stored["weight"].device)
        assert isinstance(frozen, PackedWeight)
        frozen = in_order(frozen, stored)
        frozen.take_state(stored, f"{path}.")
        _place(model, projection, frozen)

    def unpack_stack(self, model: nn.Module, name: str, collected: dict[str, list[Tensor]], sources: list[str]) -> None:
        """Put a frozen stack in place that holds experts as the checkpoint packed each of them.

        Raises:
            ModelError: as `unpack`, and where they make no stack.
        """
        assert self.loading.stored is not None
        projection = self.targets.get(name)
        if projection is None or projection.dense or projection.transposed:
            raise ModelError(f"{name} is packed in the checkpoint, but the model does not read it as a stack of codes")
        form, quant = self.loading.stored.format, self.loading.quant
        state = stacked(collected, sources, form, name, quant, self.loading.dtype)
        frozen = self._empty(model, projection, quant, state["weight"].device)
        assert isinstance(frozen, PackedWeight)
        frozen.take_state(state, f"{name}.")
        _place(model, projection, frozen)

    def _empty(
        self,
        model: nn.Module,
        projection: Projection,
        quant: QuantConfig,
        device: torch.device,
        dtype: torch.dtype | None = None,
    ) -> FrozenWeight:
        """The empty frozen module of a projection that is dense so far."""
        parent, leaf = _owner(model, projection.name)
        dtype = dtype or self.loading.dtype
        return empty_frozen(quant, projection, getattr(parent, leaf), dtype=dtype, device=device)


class Freeze(ConversionOps):
    """Operation on arriving dense weights. transformers copies an operation for every tensor; the copies are one."""

    def __init__(self, hf_quantizer: FrozenBaseQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Freeze:
        return self

    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, Any]:
        """Freeze what is to be frozen; hand the rest (a converter may yield several tensors) back to transformers."""
        rest = {}
        for name, value in input_dict.items():
            if name not in self.hf_quantizer.targets:
                rest[name] = value
                continue
            with self.hf_quantizer.loading.keeping_failure():
                self.hf_quantizer.freeze(model, name, _single(value))
            if missing_keys is not None:
                missing_keys.discard(name)
        return rest


class Unpack(Freeze):
    """Operation on the parts of an already packed weight; a dense weight passes, in the model's dtype."""

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        full_layer_name: str = "",
        **_: Any,
    ) -> dict[str, Any]:
        """Build the frozen module from a weight and its companions."""
        parts = {name: _single(value) for name, value in input_dict.items()}
        if len(parts) > 1:
            with self.hf_quantizer.loading.keeping_failure():
                self.hf_quantizer.unpack(model, full_layer_name, parts)
            if missing_keys is not None:
                missing_keys.discard(full_layer_name)
            return {}
        (name, value), keep_fp32 = *parts.items(), getattr(model, "_keep_in_fp32_modules", None) or ()
        if value.is_floating_point() and not any(part in keep_fp32 for part in full_layer_name.split(".")):
            value = value.to(self.hf_quantizer.loading.dtype)
        return {name: value}


class UnpackStack(Freeze):
    """Operation on experts that are packed one by one; dense ones are merged as they would have been."""

    def __init__(self, hf_quantizer: FrozenBaseQuantizer, converter: Any) -> None:
        super().__init__(hf_quantizer)
        self.sources, self.merge = list(converter.source_patterns), list(converter.operations)

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        *,
        model: nn.Module,
        missing_keys: set[str] | None = None,
        full_layer_name: str = "",
        **rest: Any,
    ) -> dict[str, Any]:
        """Build the frozen stack."""
        if input_dict.keys() <= set(self.sources):
            rest |= {"source_patterns": self.sources, "model": model, "full_layer_name": full_layer_name}
            for operation in self.merge:
                input_dict = operation.convert(input_dict, **rest)
            return {name: _single(value).to(self.hf_quantizer.loading.dtype) for name, value in input_dict.items()}
        with self.hf_quantizer.loading.keeping_failure():
            self.hf_quantizer.unpack_stack(model, full_layer_name, input_dict, self.sources)
        if missing_keys is not None:
            missing_keys.discard(full_layer_name)
        return {}


def parameter_name(projection: Projection) -> str:
    """Full name of the parameter that holds a projection in the dense model."""
    return projection.name if projection.kind == "experts" else f"{projection.name}.weight"


def _head(model: nn.Module, structure: Structure) -> dict[str, Projection]:
    """The output head as a target, where it can be one."""
    if structure.tied:
        raise ConfigError(
            f"quant.head is true, but {structure.head} shares its weight with the embeddings: set it to false"
        )
    projection = projection_of(model.get_submodule(structure.head), structure.head) if structure.head else None
    return {parameter_name(projection): replace(projection, block=None)} if projection else {}


def _place(model: nn.Module, projection: Projection, frozen: FrozenWeight) -> None:
    """Exchange a module, or a 3-D parameter, for its frozen stand-in, which transformers must not initialize."""
    for piece in (frozen, *frozen.parameters()):  # some families initialize parameters by their names, deep below
        piece._is_hf_initialized = True  # type: ignore[attr-defined]
    frozen.requires_grad_(False)
    parent, leaf = _owner(model, projection.name)
    if isinstance(getattr(parent, leaf), nn.Parameter):
        delattr(parent, leaf)
    setattr(parent, leaf, frozen)  # over a module: in place, so that the order of modules stays


def _memory_shape(projection: Projection) -> tuple[int, ...]:
    """Shape of the parameter in the dense model."""
    matrix = (projection.out_features, projection.in_features)
    matrix = matrix[::-1] if projection.transposed else matrix
    return (projection.experts, *matrix) if projection.kind == "experts" else matrix


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a dotted name, and the last part of it."""
    parent, _, leaf = name.rpartition(".")
    return model.get_submodule(parent), leaf


def _single(value: Any) -> Tensor:
    """transformers collects tensors in lists, of one where nothing is merged."""
    return value[0] if isinstance(value, list) else value


def packs(conversion: Any, stacks: list[str]) -> bool:
    """Whether a conversion is one of ours, or makes one of the stacks that are packed now."""
    operations = getattr(conversion, "operations", ())
    if any(isinstance(operation, Freeze) for operation in operations):
        return True
    targets = [pattern.replace("*", ".*") for pattern in conversion.target_patterns] if operations else []
    return any(re.search(target, name) for target in targets for name in stacks)
