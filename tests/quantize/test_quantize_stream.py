"""One block at a time, from disk to disk: the same bytes as with the whole model in memory, also after a kill."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import quantize_models
from filelock import FileLock
from torch import nn

import finetune as ft
from finetune.cli import quantize
from finetune.errors import ConfigError, ModelError
from finetune.quantize import opening

GPTQ = ("calibrator=gptq", "quant=int4", "quant.group_size=32")


def save(directory: Path, family: str = "llama") -> Path:
    sizes = {"num_hidden_layers": 3, "tie_word_embeddings": False} if family in ("llama", "mixtral") else {}
    return quantize_models.save(directory, family, **sizes)


def arguments(base: Path | str, text: Path | None, output: Path, *overrides: str) -> list[str]:
    return quantize_models.arguments(base, text, output, *(overrides or GPTQ))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("base") / "model")


def bytes_of(directory: Path) -> dict[str, Any]:
    """Every file; of the report what does not tell the time, figures of floating-point sums nearly."""
    files: dict[str, Any] = {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    record = json.loads(files.pop("quantization.json"))
    quality = record["quality"] or {}
    for key, value in quality.items():
        quality[key] = None if value is None else float(f"{value:.9g}")
    del record["seconds"], record["bytes"]
    for layer in record["layers"]:
        del layer["seconds"]
    files.pop("errors.png", None)
    return files | {"record": record}


def in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "_streamed", lambda *_: "the test says so")


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("embedded", (*GPTQ, "data.samples=4")),
        ("llama", ("calibrator=gptq", "quant=nf4")),
        ("llama", ("calibrator=rtn", "quant=int8")),
        ("llama", (*GPTQ, "pruner=sparsegpt", "pruner.sparsity=0.5", "quant.symmetric=true")),
        ("llama", (*GPTQ, "transform=awq")),
        ("gpt2", GPTQ),
        ("opt", ("calibrator=gptq", "quant=int3", "quant.group_size=32", "max_shard_gb=0.0001")),
        ("mixtral", ("calibrator=gptq", "quant=int4")),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_the_bytes_are_those_of_the_model_in_memory(
    family: str, overrides: tuple[str, ...], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "embedded" if family == "embedded" else save(tmp_path / "base", family)
    assert quantize(arguments(source, text, tmp_path / "streamed", *overrides)) == 0
    in_memory(monkeypatch)
    assert quantize(arguments(source, text, tmp_path / "whole", *overrides)) == 0
    streamed, whole = bytes_of(tmp_path / "streamed"), bytes_of(tmp_path / "whole")
    assert streamed.keys() == whole.keys()
    for name in whole:
        assert streamed[name] == whole[name], name
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "base") == ["streamed", "whole"]


def begun(base: Path, text: Path, output: Path) -> subprocess.Popen[str]:
    """The verb in a process of its own."""
    program = "import sys; from finetune.cli import main; sys.argv = ['finetune', 'quantize', *{}]; main()"
    command = [sys.executable, "-c", program.format(arguments(base, text, output))]
    where = {**os.environ, "PYTHONPATH": str(Path(ft.__file__).parents[1])}
    return subprocess.Popen(command, env=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def when_done(process: subprocess.Popen[str], part: Path, seconds: float = 120) -> None:
    """Wait until a block is finished."""
    limit = time.monotonic() + seconds
    while not part.is_file():
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.002)


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    base: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quantize(arguments(base, text, tmp_path / "straight")) == 0
    partial = tmp_path / ".out.partial"
    number = random.SystemRandom().randrange(2)
    process = begun(base, text, tmp_path / "out")
    when_done(process, partial / f"block-{number:05d}.safetensors")
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    finished = len(list(partial.glob("block-*.safetensors")))
    capsys.readouterr()
    assert quantize(arguments(base, text, tmp_path / "out")) == 0
    assert f"going on after {finished} of 3 blocks" in capsys.readouterr().out
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "straight"]


def interrupted_in(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """The next run gets SIGTERM while it reads a block."""
    from finetune.model.blocks import BlockReader

    read = BlockReader.read

    def reading(self: BlockReader, name: str) -> nn.Module:
        if name == self.blocks[block]:
            signal.raise_signal(signal.SIGTERM)
        return read(self, name)

    monkeypatch.setattr(BlockReader, "read", reading)


def test_a_signal_ends_it_between_layers(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        interrupted_in(patch, 1)
        assert quantize(arguments(base, text, tmp_path / "out")) == 128 + signal.SIGTERM
    assert "the same command goes on" in capsys.readouterr().out
    partial = tmp_path / ".out.partial"
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    assert {path.name for path in partial.iterdir()} >= {"manifest.json", "block-00000.safetensors"}
    for changed, words in (
        (("quant.group_size=64",), r"was begun with quant.group_size=32, and now it is 64.*delete .*\.out\.partial"),
        (("quant=nf4",), r"was begun with quant"),
        (("data.samples=3",), "the text of data.calibration"),
    ):
        with pytest.raises(ConfigError, match=words) as raised:
            quantize(arguments(base, text, tmp_path / "out", *GPTQ[: 2 if "quant=nf4" in changed else 3], *changed))
        assert "\n" not in str(raised.value)
    with FileLock(partial / "lock"), pytest.raises(ConfigError, match="being written by another process"):
        quantize(arguments(base, text, tmp_path / "out"))
    assert quantize(arguments(base, text, tmp_path / "out", *GPTQ, "max_shard_gb=1")) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_run_stopped_before_its_first_block_leaves_nothing(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted_in(monkeypatch, 0)
    assert quantize(arguments(base, text, tmp_path / "out")) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_other_weights_under_the_same_name_are_noticed(
    base: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = save(tmp_path / "own")
    with monkeypatch.context() as patch:
        interrupted_in(patch, 1)
        quantize(arguments(own, text, tmp_path / "out"))
    shard = own / "model.safetensors"
    content = bytearray(shard.read_bytes())
    content[-2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ConfigError, match=r"the weights of model\.path"):
        quantize(arguments(own, text, tmp_path / "out"))


def test_a_missing_tensor_is_told_before_anything_is_read(base: Path, text: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    own = save(tmp_path / "own")
    tensors = load_file(own / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"missing: model\.layers\.2\.mlp\.up_proj\.weight"):
        quantize(arguments(own, text, tmp_path / "out"))
    assert not (tmp_path / ".out.partial").exists()
