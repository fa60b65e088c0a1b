"""What is shipped: an emulator that is a model of its own, and nothing of the middle that was left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from offsite_tiny import (
    BLOCKS,
    FAMILIES,
    block_list,
    checkpoint,
    emulator_of,
    ids,
    job,
    leaf,
    logits,
    settings,
    stock,
    tensors,
    text_rows,
)
from torch import Tensor, nn

from finetune.adapters.emulator import read_emulator
from finetune.errors import ConfigError, ModelError
from finetune.model.digest import base_digest
from finetune.model.headers import read_header
from finetune.offsite import split as split_module
from finetune.offsite.config import OffsiteConfig
from finetune.offsite.cut import spread
from finetune.offsite.split import split
from finetune.structure import inspect


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {family: checkpoint(root / family, family) for family in (*FAMILIES, "qwen2")}


def pieces(found: dict[str, Tensor]) -> dict[bytes, str]:
    """Bytes of every tensor that is not constant, and of each expert of a stack."""
    every = [(name, part) for name, t in found.items() for part in ([t, *t] if t.dim() == 3 else [t])]
    varied = ((name, part) for name, part in every if part.numel() > 1 and bool((part != part.flatten()[0]).any()))
    return {part.contiguous().view(torch.uint8).numpy().tobytes(): name for name, part in varied}


def middle_of(base: Path, family: str, numbers: range | list[int]) -> dict[bytes, str]:
    found = tensors(base)
    return pieces({name: t for name, t in found.items() if leaf(name, block_list(family)) in numbers})


def test_kept_blocks_are_spread_uniformly() -> None:
    assert spread(6, 3) == [0, 2, 5]
    assert spread(44, 22) == [round(i * 43 / 21) for i in range(22)]
    assert spread(7, 1) == [0]
    for middle in range(1, 40):
        assert spread(middle, middle) == list(range(middle))
        for keep in range(2, middle + 1):
            chosen = spread(middle, keep)
            assert (chosen[0], chosen[-1], len(set(chosen))) == (0, middle - 1, keep)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_blocks_kept_is_the_full_model_bit_for_bit(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    emulator = emulator_of(bases[family], tmp_path / "emulator", keep=1.0)
    assert torch.equal(logits(stock(emulator)), logits(stock(bases[family])))
    wanted, found = tensors(bases[family]), tensors(emulator)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2"])
def test_layer_drop_is_the_model_without_these_blocks(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """The oracle is stock transformers with entries taken out of its list of blocks."""
    emulator = emulator_of(bases[family], tmp_path / "emulator")
    model = stock(emulator)
    cut = stock(bases[family])
    owner, _, name = inspect(cut).blocks[0].rpartition(".")[0].rpartition(".")
    blocks = getattr(cut.get_submodule(owner), name)
    setattr(cut.get_submodule(owner), name, nn.ModuleList([blocks[number] for number in (0, 1, 4, 5)]))
    if family == "qwen2":  # the only one whose blocks differ: its own list of kinds says which
        assert model.config.layer_types == [settings(family).layer_types[number] for number in (0, 1, 4, 5)]
        cut.config.layer_types = cut.config.layer_types[:2] + cut.config.layer_types[4:]
    assert torch.equal(logits(model), logits(cut))
    prompt = ids(rows=1, length=4)
    out = model.float().generate(
        prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    with torch.no_grad():
        full = model(out.sequences[:, :-1], use_cache=False).logits[:, prompt.shape[1] - 1 :]
    assert torch.allclose(torch.stack(out.logits, dim=1), full, atol=1e-4)  # each block has a cache of its own


@pytest.mark.parametrize("family", FAMILIES)
def test_no_dropped_weight_is_shipped(family: str, bases: dict[str, Path], tmp_path: Path) -> None:
    emulator = emulator_of(bases[family], tmp_path / "emulator")
    shipped = pieces(tensors(emulator))
    assert not shipped.keys() & middle_of(bases[family], family, [2, 3]).keys()
    kept = middle_of(bases[family], family, [1, 4])
    assert shipped.keys() >= kept.keys() and kept  # plain layer drop: what it keeps is the owner's
    record = read_emulator(emulator)
    assert record is not None and record.verbatim
    assert (record.full_blocks, record.kept, record.layers, record.train) == (BLOCKS, (1, 4), (1, 1), (0, 3))
    assert [record.in_full(block) for block in range(4)] == [0, None, None, 5]
    assert record.full == base_digest([read_header(path) for path in sorted(bases[family].glob("*.safetensors"))])
    assert {path.suffix for path in emulator.iterdir()} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize(
    ("family", "quant", "steps"),
    [("llama", "none", 2), ("mixtral", "none", 2), ("llama", "nf4", 0), ("gpt2", "int4", 0), ("opt", "int8", 0),
     ("bloom", "nf4", 2), ("mixtral", "nf4", 0)],
)  # fmt: skip
def test_what_is_taught_or_packed_holds_no_weight_of_the_middle(
    family: str, quant: str, steps: int, bases: dict[str, Path], tmp_path: Path
) -> None:
    from finetune.adapters.attach import attach
    from finetune.adapters.layers import LayersConfig
    from finetune.model.config import ModelConfig
    from finetune.model.load import load
    from finetune.quant.keep import KeepConfig

    base, data = bases[family], text_rows(tmp_path / "rows.jsonl")
    emulator = emulator_of(
        base, tmp_path / "emulator", distill_steps=steps, quant=quant, verbatim=False, data=data, rate=5e-2
    )
    assert not pieces(tensors(emulator)).keys() & middle_of(base, family, [1, 2, 3, 4]).keys()
    ends = middle_of(base, family, [0, 5])
    assert pieces(tensors(emulator)).keys() >= ends.keys()  # what trains is the owner's own
    record = json.loads((emulator / "offsite.json").read_text("utf-8"))
    assert record["verbatim"] is False and (record["distilled"] is not None) == bool(steps)
    assert (record["quant"] or {"name": "none"})["name"] == quant
    loaded = load(ModelConfig(path=str(emulator)), KeepConfig(), torch.bfloat16, "cpu")
    assert loaded.digests["base"] == record["emulator"]
    adapter = attach(loaded.model, LayersConfig())
    assert "decoded" not in adapter.note, "what trains has to be dense"
    assert torch.isfinite(logits(loaded.model)).all()


def test_taught_weights_that_did_not_move_are_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    data = text_rows(tmp_path / "rows.jsonl")
    words = r"tensors of the middle would leave as they are, first model\.layers\.[1-4]\..*offsite\.verbatim=true"
    with pytest.raises(ConfigError, match=words):
        split(job(bases["llama"], tmp_path / "out", distill_steps=1, verbatim=False, data=data, rate=1e-30))
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_after_a_fault(bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("finetune.offsite.ship.write_tokenizer", broken)
    with pytest.raises(OSError, match="no space"):
        split(job(bases["llama"], tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_distillation_writes_nothing(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.offsite.distill import Distilled

    stopped = Distilled(adapter=None, record={}, status="interrupted", signal=15)  # type: ignore[arg-type]
    monkeypatch.setattr(split_module, "_distilled", lambda *_: stopped)
    with pytest.raises(SystemExit) as caught:
        split(job(bases["llama"], tmp_path / "out", distill_steps=1, data=text_rows(tmp_path / "rows.jsonl")))
    assert caught.value.code == 143
    assert not (tmp_path / "out").exists()


def test_blocks_that_depend_on_their_place_are_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", "gpt2")
    config = json.loads((base / "config.json").read_text("utf-8"))
    (base / "config.json").write_text(json.dumps(config | {"scale_attn_by_inverse_layer_idx": True}), "utf-8")
    with pytest.raises(ModelError, match=r"GPT2LMHeadModel cannot be cut: without blocks \[2, 3\].*on their place"):
        split(job(base, tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": [1]}, r"offsite\.layers is \[1\]: expected two numbers"),
        ({"layers": [0, 0]}, r"offsite\.layers is \[0, 0\]"),
        ({"layers": [-1, 2]}, r"offsite\.layers is \[-1, 2\]"),
        ({"keep": 0}, r"offsite\.keep is 0: expected a number of blocks from 1"),
        ({"keep": 1.5}, r"offsite\.keep is 1\.5"),
        ({"keep": "half"}, r"offsite\.keep is 'half'"),
        ({"distill_steps": -1}, r"offsite\.distill_steps is -1"),
        ({"kd_weight": -1.0}, r"offsite\.kd_weight is -1"),
        ({"kd_weight": 0.0, "lm_weight": 0.0}, r"are both 0"),
        ({"quant": "nf5"}, r"offsite\.quant is 'nf5': expected .*did you mean 'nf4'\?"),
    ],
)
def test_settings_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        OffsiteConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers": [3, 3]}, r"offsite\.layers is \[3,3\], but the model has 6 blocks: expected at most 5"),
        ({"keep": 5}, r"offsite\.keep is 5, but the middle has 4 blocks"),
        ({"verbatim": False}, r"the kept blocks would leave as they are"),
    ],
)
def test_settings_that_do_not_fit(changes: dict[str, Any], words: str, bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        split(job(bases["llama"], tmp_path / "out", **changes))
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_or_is_missing(bases: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        split(job(bases["llama"], tmp_path))
    with pytest.raises(ConfigError, match=r"offsite\.output is not set"):
        split(job(bases["llama"], None))


def test_an_encoder_is_not_cut(tmp_path: Path) -> None:
    import transformers

    base = checkpoint(tmp_path / "base", "llama")
    config = transformers.BertConfig(
        vocab_size=28, hidden_size=32, num_hidden_layers=6, num_attention_heads=2, intermediate_size=48
    )
    config.save_pretrained(base)
    with pytest.raises(ConfigError, match="cannot be cut in three"):
        split(job(base, tmp_path / "out"))


def test_a_packed_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    packed = emulator_of(bases["llama"], tmp_path / "packed", quant="nf4")
    with pytest.raises((ConfigError, ModelError), match="dense checkpoint"):
        split(job(packed, tmp_path / "out", keep=1))
