"""How far OBQ, GPTQ and rounding to nearest are from the optimum: `python scripts/bench_obq.py`.

Problems small enough for brute force: a row of 6 normally distributed weights in 2 bits, asymmetric, and 40 inputs that
are mixed by I + .9 N; of 4^6 choices of codes on the same grid the best one is found. In each of eight draws of 200
problems, the geometric mean of the squared error over the optimum's. No damping. Writes benchmarks/results/obq.json and
the sentence of docs/quantization.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import tables  # noqa: E402

RESULT, PAGE = tables.RESULTS / "obq.json", tables.DOCS / "quantization.md"
DRAWS, PROBLEMS, WIDTH, INPUTS, MIXING = 8, 200, 6, 40, 0.9
NAMES = ("obq", "gptq", "gptq act-order", "rtn")


def problem(seed: int) -> dict[str, float]:
    """The squared error of each rounder over the least there is."""
    import torch

    from finetune.quant.affine import Int2Config
    from finetune.quant.base import QUANTIZERS
    from finetune.quant.rounders.gptq import GPTQ, GPTQConfig
    from finetune.quant.rounders.obq import eliminate

    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(1 + WIDTH + INPUTS, WIDTH, generator=generator, dtype=torch.float64)
    w_OI, mixing = draw[:1].float(), draw[1 : 1 + WIDTH]
    x_NI = draw[1 + WIDTH :] @ (torch.eye(WIDTH, dtype=torch.float64) + MIXING * mixing)
    gram_II = x_NI.T @ x_NI
    module: Any = QUANTIZERS.build(Int2Config(group_size=-1), 1, WIDTH, dtype=torch.float32)
    grid = module.fit(w_OI)
    codes = {"rtn": grid.round_columns(w_OI, 0), "obq": eliminate(grid, w_OI.double(), torch.linalg.inv(gram_II))[0]}
    for name, act_order in (("gptq", False), ("gptq act-order", True)):
        choice = GPTQ(GPTQConfig(act_order=act_order, damping=1e-9)).choose(grid, w_OI, gram_II.float())
        assert choice is not None
        codes[name] = choice.codes_OI
    every = torch.tensor(list(itertools.product(range(4), repeat=WIDTH)), dtype=torch.uint8)

    def least(codes_QI: torch.Tensor) -> float:
        delta_QI = w_OI.double() - grid.decode(codes_QI).double()
        return float(((delta_QI @ gram_II) * delta_QI).sum(dim=1).min())

    best = least(every)
    return {name: least(chosen) / best for name, chosen in codes.items()}


def made(draws: list[dict[str, float]]) -> str:
    """What the page says."""
    ends = {name: (min(draw[name] for draw in draws), max(draw[name] for draw in draws)) for name in NAMES}
    said = {name: f"{low:.2f} to {high:.2f}" for name, (low, high) in ends.items()}
    return (
        f"On {PROBLEMS} problems small enough for brute force its error is {said['obq']} times that of the optimum,\n"
        f"the geometric mean of each of {len(draws)} draws; that of GPTQ {said['gptq']}, of GPTQ by order of energy\n"
        f"{said['gptq act-order']}, of rounding to nearest {said['rtn']}\n"
        "(`benchmarks/results/obq.json`, `python scripts/bench_obq.py`)."
    )


def measure() -> list[dict[str, float]]:
    """All draws, and their file."""
    draws = []
    for number in range(DRAWS):
        found = [problem(number * PROBLEMS + each) for each in range(PROBLEMS)]
        draws.append({name: math.exp(sum(math.log(one[name]) for one in found) / PROBLEMS) for name in NAMES})
        print({name: round(value, 3) for name, value in draws[-1].items()}, flush=True)
    tables.write(RESULT, problems=PROBLEMS, draws=draws)
    return draws


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", action="store_true", help="write the sentence of what is there, and measure nothing")
    draws = tables.read_all(RESULT)["draws"] if parser.parse_args().page else measure()
    tables.put(PAGE, "bench_obq", made(draws))


if __name__ == "__main__":
    main()
