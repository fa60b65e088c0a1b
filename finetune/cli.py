"""The verbs of the `finetune` command, and the entry that `train.py` shares with it.

Every expected failure becomes one line on stderr and an exit code: 0 done, 2 the user can mend it, 3 an export failed
its proof, 130/143 interrupted with a checkpoint, 1 a bug of ours.
"""

from __future__ import annotations

import copy
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from finetune.errors import ConfigError, UserError, nearest
from finetune.startup import share_cores

PACKAGED_CONFIGS = Path(__file__).parent / "conf"
CHECKOUT_CONFIGS = Path(__file__).parents[1] / "conf"


@dataclass
class Job:
    """What became of one job: its overrides, exit code, run directory, and the loss that a sweep is ranked by."""

    overrides: list[str]
    exit_code: int = 0
    directory: str = ""
    eval_loss: float | None = None
    message: str = ""


@dataclass
class Jobs:
    """Jobs of this process, in order. Hydra's own entry returns nothing, so the outcomes are kept here.

    Attributes:
        checked: whether the only job was checked before Hydra started it.
    """

    done: list[Job] = field(default_factory=list)
    checked: bool = False


JOBS = Jobs()


def main() -> None:
    """The installed command: `finetune VERB [key=value ...]`."""
    share_cores()
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        sys.exit(0)
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        sys.exit(fail(ConfigError(f"there is no verb {verb!r}: have {', '.join(VERBS)}{nearest(verb, VERBS)}")))
    sys.exit(guarded(lambda: VERBS[verb][0](rest)))


def usage() -> str:
    """The verbs, a line each."""
    lines = [f"  finetune {verb:<8} {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(
        ["usage: finetune VERB [key=value ...]", "", *lines, "", "`finetune train --help` lists every key."]
    )


def guarded(work: Callable[[], int]) -> int:
    """Run `work`; an expected failure becomes one line and its exit code, anything else is a bug and is shown whole."""
    try:
        return work()
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        print("finetune: this is a bug of ours; `finetune doctor` prints what a report needs", file=sys.stderr)
        return 1


def fail(error: UserError) -> int:
    """Say what is wrong in one line on stderr; returns the exit code."""
    print(f"finetune: {' '.join(str(error).split())}", file=sys.stderr)
    return error.exit_code


def train(arguments: list[str]) -> int:
    """`finetune train`: the same as `python train.py`, over the packaged configs."""
    import hydra

    config_dir = CHECKOUT_CONFIGS if CHECKOUT_CONFIGS.joinpath("train.yaml").is_file() else PACKAGED_CONFIGS
    sys.argv = ["finetune train", *arguments]
    entry = hydra.main(version_base="1.3", config_path=str(config_dir), config_name="train")(run)
    return _launch(entry, config_dir, arguments)


def launch(entry: Callable[[], None], config_dir: Path) -> None:
    """Run a Hydra entry after the whole command line was checked, and exit with the code of what happened."""
    share_cores()
    sys.exit(guarded(lambda: _launch(entry, config_dir, sys.argv[1:])))


def _launch(entry: Callable[[], None], config_dir: Path, arguments: list[str]) -> int:
    from finetune.startup import importing, leave

    try:
        with importing():
            code, multirun = _before(config_dir.resolve(), arguments)
    except UserError as error:
        leave(fail(error))
    if code is not None:
        return code
    # Hydra's launchers read the command line again; a job that fails is recorded in JOBS and never raises into them.
    sys.argv[1:] = [_filling(argument) for argument in arguments]
    entry()
    if multirun and JOBS.done and os.environ.get("RANK", "0") == "0":
        print(sweep_table(JOBS.done))
    codes = [job.exit_code for job in JOBS.done]
    return next((code for code in codes if code), 0)


def _filling(argument: str) -> str:
    """An override as Hydra takes it: names get into an empty mapping (`data.columns={text: review}`) only by `++`."""
    key, _, value = argument.partition("=")
    return f"++{argument}" if value.startswith("{") and key[:1].isalpha() else argument


def _before(config_dir: Path, arguments: list[str]) -> tuple[int | None, bool]:
    """What can be done before Hydra takes over, which takes its time: help, and every complaint about a single job.

    Returns:
        The exit code where everything is done already, else None; and whether there are several jobs.
    """
    from hydra._internal.utils import get_args_parser

    from finetune.compose import compose_config, expand, help_text, prepare_hydra
    from finetune.processes import asked_for, start

    prepare_hydra()
    parsed = get_args_parser().parse_args(arguments)
    extra = [parsed.config_dir] if parsed.config_dir else []
    if parsed.help:
        print(help_text(parsed.overrides, config_dir, extra))
        return 0, False
    asks_only = parsed.hydra_help or parsed.cfg or parsed.info or parsed.shell_completion
    if asks_only and not parsed.cfg:
        return None, False
    jobs = expand(parsed.overrides) if parsed.multirun else [parsed.overrides]
    trees = [compose_config(overrides, config_dir, extra) for overrides in jobs]
    if not (asks_only or parsed.multirun):  # a failed job of a sweep does not stop the rest: each checks itself
        _check_now(trees[0], parsed.overrides)
    count = 1 if asks_only else asked_for()
    return (start(count) if count > 1 else None), bool(parsed.multirun)


def _check_now(tree: DictConfig, overrides: list[str]) -> None:
    """Check a single job before Hydra starts it, where its configuration is known by then."""
    from finetune.checks import check
    from finetune.compose import names_the_job
    from finetune.config import to_run_config

    if not names_the_job(tree):
        check(to_run_config(_restored(tree, _own(overrides))))
        JOBS.checked = True


def _own(overrides: list[str]) -> list[str]:
    """The overrides that are ours, not Hydra's."""
    return [override for override in overrides if not override.startswith("hydra")]


def _restored(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration of the run to go on with, where `resume` names one; else as composed, with `_kept`."""
    from finetune.config import load_config, resumed

    if not config.resume:
        return _kept(config, overrides)
    return resumed(load_config(Path(config.resume) / "config.yaml"), config, overrides, config.resume)


def _kept(config: DictConfig, overrides: list[str]) -> DictConfig:
    """The configuration with quant=keep where the base is quantized already and nobody chose a storage."""
    from omegaconf import OmegaConf

    from finetune.model.check import local_directory, told_of
    from finetune.model.config import ModelConfig
    from finetune.quant.keep import KeepConfig

    if any(override.lstrip("+~").startswith(("quant=", "quant.", "experiment=")) for override in overrides):
        return config
    directory = local_directory(ModelConfig(path=str(config.model.path)))
    if directory is None or not (directory / "config.json").is_file() or told_of(directory) is None:
        return config
    config = copy.deepcopy(config)
    config.quant = OmegaConf.structured(KeepConfig)
    return config


def run(config: DictConfig) -> float | None:
    """One job: what Hydra calls with the composed configuration. Returns the best held-out loss, for sweepers."""
    from hydra.core.hydra_config import HydraConfig

    job = Job(_own(list(HydraConfig.get().overrides.task)))
    JOBS.done.append(job)
    job.exit_code = guarded(lambda: _run(config, job))
    return job.eval_loss


def _run(config: DictConfig, job: Job) -> int:
    from finetune.checks import check
    from finetune.config import to_run_config
    from finetune.pipeline import run_job

    try:
        tree = _restored(config, job.overrides)
        run_config = to_run_config(tree)
        if not JOBS.checked:
            check(run_config)
        outcome = run_job(run_config, tree, job.overrides)
    except UserError as error:
        job.message = str(error)
        raise
    job.directory, job.eval_loss = str(outcome.directory), outcome.eval_loss
    return outcome.exit_code


def sweep_table(jobs: list[Job]) -> str:
    """The jobs of a sweep, a row each: what sets it apart, exit code, held-out loss, directory or what went wrong."""
    from rich.console import Console
    from rich.table import Table

    common = set.intersection(*(set(job.overrides) for job in jobs))
    table = Table("job", "overrides", "exit", "eval loss", "run directory")
    for number, job in enumerate(jobs):
        loss = "" if job.eval_loss is None else f"{job.eval_loss:.4f}"
        table.add_row(
            str(number),
            " ".join(o for o in job.overrides if o not in common),
            str(job.exit_code),
            loss,
            job.directory or job.message,
        )
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def doctor(arguments: list[str]) -> int:
    """`finetune doctor [model.path=... adapter=...]`: versions, device, backends, what of a model would be adapted."""
    from finetune.compose import compose_config
    from finetune.config import to_run_config
    from finetune.doctor import report

    config_dir = CHECKOUT_CONFIGS if CHECKOUT_CONFIGS.joinpath("train.yaml").is_file() else PACKAGED_CONFIGS
    tree = compose_config(arguments, config_dir.resolve()) if arguments else None
    print(report(None if tree is None else to_run_config(_kept(tree, arguments))))
    return 0


def offsite(arguments: list[str]) -> int:
    """`finetune offsite split|plug`: ship an emulator of a model in its place; put in what comes back trained."""
    from finetune.compose import compose_config
    from finetune.config import to_run_config
    from finetune.startup import importing

    action, rest = (arguments[0] if arguments else ""), arguments[1:]
    if action not in ("split", "plug"):
        hint = nearest(action, ("split", "plug"))
        raise ConfigError(f"finetune offsite {action or '(nothing)'}: expected split or plug{hint}")
    config_dir = CHECKOUT_CONFIGS if CHECKOUT_CONFIGS.joinpath("train.yaml").is_file() else PACKAGED_CONFIGS
    with importing():
        config = to_run_config(compose_config(rest, config_dir.resolve()))
        from finetune.offsite.plug import plug
        from finetune.offsite.split import Job, split
    job = Job(
        model=config.model,
        offsite=config.offsite,
        data=config.data,
        train=config.train,
        optim=config.optim,
        device=config.device,
        seed=config.seed,
        output_dir=config.output_dir,
        max_shard_gb=config.export.max_shard_gb,
    )
    return split(job) if action == "split" else plug(job, config.adapter.path)


def quantize(arguments: list[str]) -> int:
    """`finetune quantize model.path=... quant=int4 calibrator=gptq data.calibration=FILE output=DIR`."""
    from finetune.compose import compose_config
    from finetune.config import to_config
    from finetune.quantize.config import QuantizeConfig
    from finetune.startup import importing

    config_dir = CHECKOUT_CONFIGS if CHECKOUT_CONFIGS.joinpath("train.yaml").is_file() else PACKAGED_CONFIGS
    with importing():
        tree = compose_config(arguments, config_dir.resolve(), name="quantize", kind=QuantizeConfig)
        from finetune.quantize.run import quantize as make
    return make(to_config(tree, QuantizeConfig))


def combine(arguments: list[str]) -> int:
    """`finetune combine adapters=[A,B] weights=[0.7,0.3] output=DIR`: one LoRA that is the weighted sum of others."""
    from finetune.combine import configured, run
    from finetune.compose import parse

    overrides = parse(arguments)
    for override in overrides:
        if override.is_sweep_override():
            raise ConfigError(f"{override.input_line}: expected one value, or a list in brackets")
    return run(configured({override.get_key_element(): override.value() for override in overrides}))


VERBS: dict[str, tuple[Callable[[list[str]], int], str]] = {
    "train": (train, "fine-tune, merge, export and prove (the same as python train.py)"),
    "offsite": (offsite, "split a model into an emulator to ship; plug in what comes back"),
    "quantize": (quantize, "a dense checkpoint in fewer bits, calibrated and measured, ready to train on"),
    "combine": (combine, "one LoRA that is the weighted sum of saved ones, exact or at a smaller rank"),
    "doctor": (doctor, "versions, device and backends, ready to paste into a bug report"),
}
