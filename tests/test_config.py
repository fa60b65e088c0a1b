"""Every YAML composes; every mistake on the command line is one line that names the key and the nearest right one."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from finetune.compose import compose_config, expand
from finetune.config import VERB_GROUPS, load_config, resumed, save_config, to_run_config
from finetune.errors import ConfigError

CONF = Path(__file__).parents[1] / "conf"
CHOICES = sorted(p.relative_to(CONF).with_suffix("") for p in CONF.glob("*/*.yaml") if p.parent.name not in VERB_GROUPS)


def override_for(choice: Path) -> str:
    group, name = choice.parts
    return f"+{group}={name}" if group == "experiment" else f"{group}={name}"


@pytest.mark.parametrize("choice", CHOICES, ids=str)
def test_every_yaml_composes_and_survives_the_disk(choice: Path, tmp_path: Path) -> None:
    config = compose_config([override_for(choice)], CONF)
    save_config(config, [override_for(choice)], tmp_path / "config.yaml")
    assert to_run_config(load_config(tmp_path / "config.yaml")) == to_run_config(config)


def test_yaml_holds_every_field_of_its_schema() -> None:
    """Defaults are written where the user meets them: a field that no YAML shows is a hidden setting."""
    config = compose_config([], CONF)
    text = {
        group: (CONF / group / f"{name}.yaml").read_text("utf-8")
        for group, name in (
            ("model", "embedded"),
            ("quant", "nf4"),
            ("adapter", "lora"),
            ("data", "pydocs"),
            ("train", "default"),
            ("export", "default"),
            ("tracking", "wandb"),
            ("optim", "adamw"),
        )
    }
    for group, body in text.items():
        shown = {line.partition(":")[0].strip(" {") for line in body.splitlines()}
        assert set(config[group]) - {"name"} <= shown, group


def test_yaml_names_no_code() -> None:
    for path in CONF.rglob("*.yaml"):
        assert "_target_" not in path.read_text("utf-8"), path


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["adapter.rnak=4"], ["unknown key 'adapter.rnak'", "did you mean 'rank'?"]),
        (
            ["adapter=prefix", "adapter.virtual_tokens=4"],
            ["unknown key 'adapter.virtual_tokens'; have ", "prefix_length"],
        ),
        (["+adapter.rnak=4"], ["unknown key 'adapter.rnak'", "did you mean 'rank'?"]),
        (["+quant.blok_size=4"], ["unknown key 'quant.blok_size'", "did you mean 'block_size'?"]),
        (["adaptr=lora"], ["unknown key 'adaptr'", "did you mean 'adapter'?"]),
        (["train.batchsize=4", "+data.trian=x"], ["'train.batchsize'", "'batch_size'", "'data.trian'", "'train'"]),
        (["adapter=lroa"], ["adapter=lroa", "have", "did you mean 'lora'?"]),
        (["+experiment=qlora_33"], ["+experiment=qlora_33", "did you mean 'qlora_33b'?"]),
        (["+quant=fp4"], ["+quant=fp4", "write quant=fp4"]),
        (["train.batch_size=abc"], ["train.batch_size", "'abc'", "Integer"]),
        (["train.batch_size=0"], ["train.batch_size is 0", "at least 1"]),
        (["train.schedule=cosin"], ["train.schedule is 'cosin'", "did you mean 'cosine'?"]),
        (["quant.block_size=48"], ["quant.block_size", "48"]),
        (["adapter.rank=-1"], ["adapter.rank", "-1"]),
        (["data.too_long=cut"], ["data.too_long is 'cut'", "truncate | drop | split | error"]),
        (["device=gpu"], ["device is 'gpu'", "cuda"]),
        (["name=a/b"], ["name is 'a/b'"]),
        (["resume=runs/x", "output_dir=runs/y"], ["resume and output_dir conflict"]),
        (["train.early_stopping=2", "train.eval_every=null"], ["train.early_stopping needs train.eval_every"]),
        (["export.min_retained=1.5"], ["export.min_retained is 1.5"]),
        (["a b"], ["cannot read the override"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) and "=" in value[0] else None,
)
def test_mistakes_are_named_in_one_line(overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config(overrides, CONF)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def test_a_typo_in_an_experiment_is_named(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nadapter: {rnak: 4}\n", "utf-8")
    with pytest.raises(ConfigError, match=r"rnak.*did you mean 'rank'"):
        compose_config(["+experiment=mine"], CONF, [str(tmp_path)])


def test_config_dir_adds_experiments(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nadapter: {rank: 3}\n", "utf-8")
    assert compose_config(["+experiment=mine"], CONF, [str(tmp_path)]).adapter.rank == 3


def test_conf_of_the_working_directory_adds_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 7\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert compose_config(["+experiment=mine"], CONF).seed == 7


def test_the_headline_is_the_paper_s_recipe() -> None:
    config = to_run_config(compose_config(["+experiment=qlora_33b"], CONF))
    assert (config.quant.name, config.quant.double_quant) == ("nf4", True)  # type: ignore[attr-defined]
    assert (config.adapter.rank, config.adapter.alpha, config.adapter.dropout) == (64, 16, 0.05)  # type: ignore[attr-defined]
    assert config.optim.name == "paged_adamw_8bit" and config.train.gradient_checkpointing
    assert config.train.batch_size * config.train.grad_accumulation == 16
    assert (config.train.max_steps, config.train.learning_rate, config.train.schedule) == (1875, 1e-4, "constant")


def test_a_sweep_is_the_product_of_its_lists() -> None:
    assert expand(["adapter.rank=4,8", "seed=0", "train.learning_rate=1e-3,2e-3"]) == [
        [f"adapter.rank={rank}", "seed=0", f"train.learning_rate={rate}"]
        for rank, rate in itertools.product(("4", "8"), ("0.001", "0.002"))
    ]


def test_resume_changes_only_what_cannot_make_it_another_run(tmp_path: Path) -> None:
    saved = compose_config(["adapter.rank=4"], CONF)
    given = compose_config(["adapter.rank=4", "train.max_steps=7", "tracking=off"], CONF)
    result = resumed(saved, given, ["adapter.rank=4", "train.max_steps=7", "tracking=off", "resume=x"], "x")
    assert result.train.max_steps == 7 and result.tracking.name == "off" and result.resume == "x"
    other = compose_config(["adapter.rank=8"], CONF)
    with pytest.raises(ConfigError, match=r"adapter\.rank was 4 and would be 8"):
        resumed(saved, other, ["adapter.rank=8"], "x")


def test_a_newer_run_is_refused_by_its_version(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    save_config(compose_config([], CONF), [], path)
    document = OmegaConf.load(path)
    document.format_version = 99
    OmegaConf.save(document, path)
    with pytest.raises(ConfigError, match="format_version 99, newer"):
        load_config(path)


def test_a_configuration_error_imports_no_model_library() -> None:
    import subprocess

    code = (
        "import sys; from pathlib import Path\n"
        "from finetune.compose import compose_config\nfrom finetune.errors import ConfigError\n"
        "try: compose_config(['adapter.rnak=1'], Path(sys.argv[1]))\nexcept ConfigError: pass\n"
        "heavy = {'transformers', 'accelerate', 'datasets', 'bitsandbytes', 'wandb', 'peft'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code, str(CONF)], check=True, cwd=CONF.parent)
