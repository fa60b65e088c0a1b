"""The entry at the root: `python train.py +experiment=qlora_33b`. Everything it does is in finetune.cli."""

from pathlib import Path

import hydra
from omegaconf import DictConfig

from finetune.cli import launch, run


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
def main(config: DictConfig) -> None:
    """Run one job; defined here because Hydra looks for conf/ beside the module of the task function."""
    run(config)


if __name__ == "__main__":
    launch(main, Path(__file__).parent / "conf")
