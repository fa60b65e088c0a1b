"""One run of the table of methods, in a process of its own: train as a user would, measure on rows never seen.

`python -m methods.measure JOB` with the job as JSON; the last line printed is the row.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT)]
from methods.bleu import bleu, words  # noqa: E402
from methods.grid import EXTRA, OURS, PEFT, SHORT_ROWS  # noqa: E402
from methods.peft_lora import take_place  # noqa: E402
from methods.tasks import TASKS, Task, write_rows  # noqa: E402

COMMON = (
    "train.samples=0", "train.preflight=false", "train.save_every=null", "export.formats=[]", "tracking=off",
    "train.dtype=bf16", "device=cpu", "name=methods",
)  # fmt: skip
ANSWERED = 48
"""Test rows of a task that is measured by what is generated."""
LONGEST = 56
"""Tokens of an answer."""


def overrides_of(job: dict[str, Any], task: Task, files: dict[str, Path], folder: Path) -> list[str]:
    """What the run is asked for on the command line."""
    own = [
        f"adapter={OURS if job['method'] == PEFT else job['method']}", f"quant={job['quant']}", f"seed={job['seed']}",
        f"output_dir={folder / 'run'}",
        f"data.train={files['train']}", f"data.eval={files['dev']}", f"train.max_steps={job['steps']}",
        f"train.eval_every={job['steps']}", "data.cache_dir=" + str(folder / "cache"),
    ]  # fmt: skip
    if job.get("learning_rate") is not None:
        own.append(f"adapter.learning_rate={job['learning_rate']}")
    base = [f"model.path={job['encoder']}"] if task.encoder else []
    first = [override for override in task.overrides if override.startswith("objective=")]
    own += EXTRA.get(job["method"], ()) + (SHORT_ROWS.get(job["method"], ()) if task.encoder else ())
    return [*first, *COMMON, *(o for o in task.overrides if o not in first), *base, *own]


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Train and measure."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder, task = Path(place), TASKS[job["task"]]
        files = write_rows(task, Path(job["data"]), folder)
        with trained(overrides_of(job, task, files, folder), by_peft=job["method"] == PEFT) as (runner, result):
            phases = runner.run.record["phases"]
            row: dict[str, Any] = {
                "dev_loss_first": result.first_eval,
                "dev_loss": result.last_eval,
                "trainable": sum(p.numel() for p in runner.adapter.trainable().values()),
                "peak_memory_bytes": max(phase["peak_memory_bytes"] for phase in phases.values()),
                "cpu_seconds": runner.cpu_seconds,
            }
            if job["test"]:
                row |= tested(runner, files["test"], task)
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in row.items()}


@contextlib.contextmanager
def trained(overrides: list[str], by_peft: bool) -> Iterator[tuple[Any, Any]]:
    """A run from its command line to its last step."""
    from finetune.compose import compose_config
    from finetune.config import to_run_config
    from finetune.device import make_accelerator
    from finetune.pipeline import Runner
    from finetune.training.run_directory import RunDirectory

    tree = compose_config(overrides, ROOT / "conf")
    config = to_run_config(tree)
    with RunDirectory.create(config.name, config.output_dir) as directory:
        runner: Any = Runner(config, tree, make_accelerator(config.device), directory)
        with directory.phase("load"):
            runner.load()
            if by_peft:
                take_place(runner)
        with directory.phase("data"):
            runner.prepare()
        runner.track()
        begun = time.process_time()
        result = runner.train()
        runner.cpu_seconds = time.process_time() - begun
        yield runner, result


def tested(runner: Any, file: Path, task: Task) -> dict[str, float | None]:
    """The held-out loss on the test rows, and what the task is measured by."""
    import torch

    from finetune.checks import check_training
    from finetune.data.prepare import prepare
    from finetune.pipeline import labelling_of
    from finetune.training.group import Group
    from finetune.training.held_out import HeldOut
    from finetune.training.signals import StopSignals

    data = replace(runner.config.data, train=str(file), eval=str(file))
    context = check_training(runner.config, runner.adapter)
    tokenizer, model = runner.loaded.tokenizer, runner.loaded.model
    rows = prepare(data, tokenizer, context=context, seed=0, labelling=labelling_of(runner.loaded)).eval
    held = HeldOut(model, rows, runner.objective, Group(runner.accelerator), batch_size=16, pad_id=runner.loaded.pad_id)
    model.eval()
    with torch.no_grad(), StopSignals() as signals:
        found: dict[str, float | None] = {"test_loss": held.loss(signals)}
        if held.metrics:
            return found | {task.metric: held.metrics[task.metric]}
        if task.metric == "token_accuracy":
            return found | agreement(model, rows, runner.loaded.pad_id)
        references = [json.loads(line)["references"] for line in file.read_text("utf-8").splitlines()]
        return found | {"bleu": bleu_of_answers(model, tokenizer, rows, references)}


def agreement(model: Any, rows: Any, pad_id: int) -> dict[str, float]:
    """Share of the answers' tokens that are the likeliest after those before them, and of answers of which all are:
    those that greedy generation gives word for word."""
    from finetune.data.batching import eval_batches
    from finetune.evaluation import predictions

    wrong: set[int] = set()
    seen = hits = tokens = 0
    for part in predictions(model, eval_batches(rows, 16, pad_id), "cpu"):
        hit_P = part.log_probs_PV.argmax(-1) == part.targets_P
        hits, tokens = hits + int(hit_P.sum()), tokens + len(hit_P)
        wrong |= {int(row) for row in part.rows_P[~hit_P]}
        seen = int(part.rows_P[-1]) + 1
    return {"token_accuracy": hits / tokens, "exact_match": 1 - len(wrong) / seen}


def bleu_of_answers(model: Any, tokenizer: Any, rows: Any, references: list[list[str]]) -> float:
    """BLEU of greedy answers to the first rows."""
    from finetune.data.rows import IGNORE
    from finetune.samples import answer

    assert len(rows) == len(references), "a test row was left out: answers would be compared with another's"
    chosen = rows[:ANSWERED]
    prompts = [row.input_ids[: int((row.labels != IGNORE).argmax())].tolist() for row in chosen]
    answers = answer(model, tokenizer, prompts, LONGEST)
    several = [[words(one) for one in every] for every in references[:ANSWERED]]
    return bleu([words(one) for one in answers], several)


def main(job: dict[str, Any]) -> None:
    """Print the row; a method that the base cannot carry says why, and so does a run that diverges."""
    from finetune.errors import RunError, UserError

    try:
        row = run(job)
    except RunError as error:
        row = {"diverged": str(error)}
    except UserError as error:
        row = {"refused": str(error)}
    print(json.dumps(row))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
