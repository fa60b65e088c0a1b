"""Writes what llm-compressor makes of a small layer: tests/quant/vectors/llmcompressor.safetensors.

An oracle whose pins conflict with ours, so it runs once in an environment of its own, which this script needs nothing
else of, not even this package:

    python3.11 -m venv oracle && oracle/bin/pip install llmcompressor==0.14.0.1 torch==2.13.0
    oracle/bin/python scripts/make_vectors.py

The layer has 64 outputs and 256 inputs that are correlated, with six heavy channels. In the file, with O outputs, I
inputs, N samples and G groups of a row:

- `weight` [O, I] and `inputs` [N, I], float16, both taken as float32 by who reads them;
- for each setting of GPTQ `<setting>.codes` uint8 [O, I], `<setting>.scale` float32 [O, G] and, where asymmetric,
  `<setting>.zero` uint8 [O, G]: a weight is scale * (code - zero), and zero is 2^(bits - 1) where it is not said;
- for SparseGPT `<setting>.kept` uint8 [O, I], one where a weight is kept;
- `<setting>.error`, float64: tr(D H D^T) / tr(W H W^T) with H = X^T X, of what it left.

The file's metadata holds the settings and the versions.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = Path(__file__).parents[1] / "tests" / "quant" / "vectors" / "llmcompressor.safetensors"
OUTPUTS, INPUTS, SAMPLES, HEAVY = 64, 256, 288, 6
GPTQ: dict[str, dict[str, Any]] = {
    "gptq-4-128": {"num_bits": 4, "symmetric": False, "group_size": 128},
    "gptq-4-32-symmetric": {"num_bits": 4, "symmetric": True, "group_size": 32},
    "gptq-3-row": {"num_bits": 3, "symmetric": False, "group_size": -1},
    "gptq-4-128-act_order": {"num_bits": 4, "symmetric": False, "group_size": 128, "actorder": "static"},
}
SPARSEGPT: dict[str, dict[str, Any]] = {
    "sparsegpt-50": {"sparsity": 0.5, "prune_n": 0, "prune_m": 0},
    "sparsegpt-2-4": {"sparsity": 0.5, "prune_n": 2, "prune_m": 4},
}


def layer() -> tuple[Tensor, Tensor]:
    """A weight [O, I] and its inputs [N, I], which float16 holds exactly: a spectrum that falls off as a power."""
    generator = torch.Generator().manual_seed(0)
    spectrum = torch.arange(1, INPUTS + 1, dtype=torch.float32) ** -0.7
    mix, _ = torch.linalg.qr(torch.randn(INPUTS, INPUTS, generator=generator))
    x_NI = (torch.randn(SAMPLES, INPUTS, generator=generator) * spectrum) @ mix
    x_NI[:, :HEAVY] *= 5
    return torch.randn(OUTPUTS, INPUTS, generator=generator).half().float(), x_NI.half().float()


def error(w_OI: Tensor, left_OI: Tensor, x_NI: Tensor) -> Tensor:
    """Relative squared error of the output."""
    exact_NO = x_NI.double() @ w_OI.double().T
    return (exact_NO - x_NI.double() @ left_OI.double().T).square().sum() / exact_NO.square().sum()


def gptq(w_OI: Tensor, x_NI: Tensor, settings: dict[str, Any]) -> dict[str, Tensor]:
    """As GPTQModifier.compress_module_list goes about it: its observer's ranges, its Hessian, its sweep."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.modifiers.gptq.helpers import accumulate_hessian, make_empty_hessian
    from llmcompressor.observers import Observer

    size = settings["group_size"]
    strategy = {"strategy": "channel", "group_size": None} if size < 0 else {"strategy": "group"}
    arguments = QuantizationArgs(**(settings | strategy))
    observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=arguments)
    observer(w_OI)
    ranges = observer.get_qparams()
    linear = nn.Linear(INPUTS, OUTPUTS, bias=False)
    hessian, seen = accumulate_hessian(x_NI, linear, make_empty_hessian(linear), torch.zeros(()))
    scale_OG, zero_OG = ranges["scale"], ranges["zero_point"]
    left_1OI, _, gave_up = quantize_weight(
        w_OI[None].clone(), (hessian / seen)[None], scale_OG[None], zero_OG[None], None, arguments
    )
    assert not gave_up.any()
    left_OI, middle = left_1OI[0], 2 ** (settings["num_bits"] - 1)
    wide = INPUTS if size < 0 else size
    scale_OI, zero_OI = (part.float().repeat_interleave(wide, dim=1) for part in (scale_OG, zero_OG))
    codes_OI = (left_OI / scale_OI + zero_OI).round() + middle
    assert torch.equal((codes_OI - middle - zero_OI) * scale_OI, left_OI)
    found = {"codes": codes_OI.to(torch.uint8), "scale": scale_OG.float(), "error": error(w_OI, left_OI, x_NI)}
    return found if settings["symmetric"] else found | {"zero": (zero_OG + middle).to(torch.uint8)}


def sparsegpt(w_OI: Tensor, x_NI: Tensor, settings: dict[str, Any]) -> dict[str, Tensor]:
    """Its Hessian and its sweep."""
    from llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify import (
        accumulate_hessian,
        make_empty_hessian,
        sparsify_weight,
    )

    linear = nn.Linear(INPUTS, OUTPUTS, bias=False)
    linear.weight.data = w_OI.clone()
    hessian, _ = accumulate_hessian(x_NI, linear, make_empty_hessian(linear), 0)
    with torch.no_grad():
        _, left_OI = sparsify_weight(
            linear, {linear: hessian}, **settings, block_size=128, dampening_frac=0.01, preserve_sparsity_mask=False
        )
    return {"kept": (left_OI != 0).to(torch.uint8), "error": error(w_OI, left_OI, x_NI)}


def main() -> None:
    """Write the file."""
    from safetensors.torch import save_file

    w_OI, x_NI = layer()
    tensors = {"weight": w_OI.half(), "inputs": x_NI.half()}
    for made, by in ((GPTQ, gptq), (SPARSEGPT, sparsegpt)):
        for name, settings in made.items():
            found = by(w_OI, x_NI, settings)
            tensors |= {f"{name}.{key}": value.contiguous() for key, value in found.items()}
            print(f"{name}: error {float(found['error']):.4e}")
    packages = ("llmcompressor", "compressed-tensors", "torch")
    facts = {"format_version": 1, "settings": GPTQ | SPARSEGPT, "versions": {name: version(name) for name in packages}}
    FILE.parent.mkdir(exist_ok=True)
    save_file(tensors, FILE, metadata={"facts": json.dumps(facts)})
    print(f"{FILE.name}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
