"""A second device for machines that have none: its tensors live on the CPU but may not meet the CPU's.

Code that was only ever run on a CPU breaks on an accelerator mostly in one way: it makes a tensor on the wrong side.
Here tensors of device "pretend" hold a CPU tensor, every operator is computed on that, and an operator that is handed
tensors of both devices fails as it would on CUDA. What an accelerator does otherwise (kernels, streams, memory) is not
pretended.

Also a program: it trains, resumes, proves and merges on that device, and prints what it did.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(f"{NAME}:0")
_CROSSES = (torch.ops.aten.copy_.default,)
"""Operators that read from the other device."""


class Pretend(Tensor):
    """A tensor that says it is elsewhere; `held` is its value on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Pretend:
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def is_pretend(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def inner(value: Any) -> Any:
    if isinstance(value, Pretend):
        return value.held
    return torch.device("cpu") if isinstance(value, torch.device) and is_pretend(value) else value


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operator on the values, and put its results where they belong."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretend)]
    if func is torch.ops.aten._to_copy.default:
        target = kwargs.get("device")
        there = is_pretend(target) if target is not None else bool(ours)
        result = func(inner(args[0]), dtype=kwargs.get("dtype"), memory_format=kwargs.get("memory_format"))
        return Pretend(result) if there else result
    if func is torch.ops.aten._local_scalar_dense.default:
        return func(inner(args[0]))
    # As on CUDA: a CPU scalar may take part, and an index may come from the CPU, anything else may not.
    foreign = [t for t in tensors if not isinstance(t, Pretend) and t.dim() > 0]
    indexes = "index" in str(func) and isinstance(args[0], Pretend)
    if ours and foreign and func not in _CROSSES and not indexes:
        raise RuntimeError(f"{func}: a tensor of shape {list(foreign[0].shape)} is on the CPU, another is not")
    result = func(*tree_map(inner, args), **tree_map(inner, kwargs))
    there = is_pretend(kwargs["device"]) if kwargs.get("device") is not None else bool(ours)
    if not there:
        return result
    same = {id(tensor.held): tensor for tensor in ours}  # what was written in place stays the tensor it was

    def outer(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return same[id(value)] if id(value) in same else Pretend(value)

    return tree_map(outer, result)


class _Operators(TorchDispatchMode):
    """Sees operators that make a tensor from nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class _Moves(TorchFunctionMode):
    """Sees what torch would do in C++ before any operator: moving a tensor, making one from a list."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor) and is_pretend(kwargs.get("device")):
            target = kwargs.pop("device")
            return torch.ops.aten._to_copy(func(*args, **kwargs), device=torch.device(target))
        if func is Tensor.tolist:
            return func(inner(args[0]))
        if func not in (Tensor.to, Tensor.cpu):
            return func(*args, **kwargs)
        source, *rest = args
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for given in ["cpu"] if func is Tensor.cpu else rest:
            if isinstance(given, torch.dtype):
                dtype = given
            elif isinstance(given, Tensor):
                device, dtype = given.device, given.dtype
            elif not isinstance(given, bool):
                device = given
        target = source.device if device is None else torch.device(device)
        if target.type == source.device.type and dtype in (None, source.dtype) and not kwargs.get("copy"):
            return source
        return torch.ops.aten._to_copy(source, dtype=dtype, device=target)


@contextmanager
def pretending() -> Iterator[None]:
    with _Moves(), _Operators():
        yield


def move(model: nn.Module) -> None:
    """Move a model's parameters and buffers, in place, so that whoever holds a parameter sees it moved."""
    seen: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                there = nn.Parameter(Pretend(parameter.data), requires_grad=parameter.requires_grad)
                torch.utils.swap_tensors(parameter, there)
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = Pretend(buffer)


def rows(tokenizer: Any) -> Any:
    from finetune.data.rows import Row, TokenRows

    draw = np.random.default_rng(0)
    ids = [np.append(draw.integers(5, 3000, n), tokenizer.eos_token_id).astype(np.int32) for n in (20, 33, 17, 40, 25)]
    return TokenRows.of([Row(row, row) for row in ids])


def main() -> None:
    import finetune as ft
    from finetune.evaluation import predictions
    from finetune.export.calibration import Calibration
    from finetune.export.verify import Panel
    from finetune.samples import answer
    from finetune.training.config import TrainConfig
    from finetune.training.loop import train
    from finetune.training.objectives.sft import SFTConfig, build
    from finetune.training.optimizers.adamw import AdamWConfig
    from finetune.training.preflight import preflight
    from finetune.training.run_directory import RunDirectory, shared_run
    from finetune.training.trackers.off import Off

    torch.set_num_threads(1)
    directory = Path(sys.argv[1])
    model, tokenizer = ft.load("embedded", quant=ft.NF4Config(), dtype="fp32", device="cpu")
    adapter = ft.attach(model, ft.LoRAConfig(rank=4, dropout=0.1))
    move(model)
    accelerator = SimpleNamespace(num_processes=1, process_index=0, is_main_process=True, device=DEVICE)
    learnt = rows(tokenizer)
    with pretending():
        objective = build(SFTConfig(), model)

        def run(steps: int) -> Any:
            config = TrainConfig(dtype="fp32", max_steps=steps, batch_size=2, grad_accumulation=2, save_every=2)
            start = RunDirectory.resume if (directory / "run.json").exists() else None
            with shared_run(
                accelerator, lambda: start(directory) if start else RunDirectory.create("t", directory)
            ) as at:
                common: dict[str, Any] = {"objective": objective, "config": config, "optim": AdamWConfig(), "run": at}
                common |= {"tracker": Off(), "accelerator": accelerator, "pad_id": 0, "packing": True}
                return train(model, adapter, learnt, learnt, max_length=64, seed=0, **common)

        settings: dict[str, Any] = {"objective": objective, "tokenizer": tokenizer, "config": TrainConfig(dtype="fp32")}
        settings |= {"accelerator": accelerator, "pad_id": 0, "packing": True}
        print("preflight", len(preflight(model, adapter, learnt, **settings)))
        first, second = run(2), run(4)
        print("trained", first.steps, second.steps, second.last_eval < first.first_eval)
        print("answered", len(answer(model, tokenizer, [[5, 6, 7], [8, 9]], 4)))
        print("predicted", len(list(predictions(model, Panel.of(learnt, 4, 4096, 0).batches(), DEVICE))))
        name = "model.layers.0.self_attn.q_proj"
        gram = Calibration(model, [name], learnt, 0).gram(name)
        print("calibrated", None if gram is None else gram.device.type)
        base = model.get_submodule(name).base
        print("requantized", base.requantize(base.dequantize(torch.float32)).weight.device.type)
        print("merged", {weight.device.type for _, weight in adapter.merged()})
        adapter.save(directory / "adapter")


if __name__ == "__main__":
    main()
