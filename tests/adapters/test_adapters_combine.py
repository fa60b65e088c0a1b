"""Combining LoRAs: the arithmetic against dense sums, the files against stock PEFT, every refusal in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from adapters_models import FAMILIES, dense_twin, frozen, logits, randomize
from torch import Tensor

from finetune.adapters.base import Adapter
from finetune.adapters.combination import Loss, Product, joined, refactored
from finetune.adapters.dora import DoRAConfig
from finetune.adapters.lora import LoRAConfig
from finetune.adapters.provenance import write_provenance
from finetune.adapters.several import Adapters
from finetune.combine import configured, run
from finetune.errors import ConfigError, ModelError, UserError

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
WEIGHTS = {"a": 0.7, "b": -0.3}
CASES = [(family, ("dense", "nf4")[i % 2]) for i, family in enumerate(f for f in FAMILIES if f != "bert")]


def deltas(adapter: Adapter) -> dict[str, Tensor]:
    """What an adapter adds to each projection, dense and in float64."""
    found = {}
    for p in adapter.projections:
        module = adapter.adapted[p.name]
        zero = torch.zeros_like(module.dequantize(torch.float32))
        found[p.name] = module.merge(zero).double()
    return found


def two(family: str = "llama", quant: str = "dense", **other: object) -> Adapters:
    """Two LoRAs that differ in rank, alpha, rsLoRA and, where `other` says so, in targets."""
    adapters = Adapters(frozen(family, quant))
    randomize(adapters.attach("a", LoRAConfig(rank=4, alpha=8)))
    randomize(adapters.attach("b", LoRAConfig(**{"rank": 6, "alpha": 3, "rslora": True, **other})), 0.07)
    return adapters


def wanted(adapters: Adapters) -> dict[str, Tensor]:
    parts = {name: deltas(adapters[name]) for name in WEIGHTS}
    places = {place for found in parts.values() for place in found}
    return {
        place: sum(w * parts[name][place] for name, w in WEIGHTS.items() if place in parts[name]) for place in places
    }


def distance(found: dict[str, Tensor], dense: dict[str, Tensor]) -> float:
    assert found.keys() == dense.keys()
    lost = sum((found[place] - dense[place]).square().sum() for place in dense)
    return float((lost / sum(tensor.square().sum() for tensor in dense.values())).sqrt())


@pytest.mark.parametrize(("family", "quant"), CASES)
def test_combinations_are_the_weighted_sum(family: str, quant: str, tmp_path: Path) -> None:
    adapters = two(family, quant)
    dense = wanted(adapters)
    for name in WEIGHTS:
        adapters.save(name, tmp_path / name)
    for mode, rank, ranks in (("concat", None, 10), ("sum", 5, 5), ("sum", 64, 10)):
        adapter, error = adapters.combine(f"{mode}{rank}", WEIGHTS, mode=mode, rank=rank)
        assert adapters.using == (f"{mode}{rank}",)
        assert {size.rank for size in adapter.sizes.values()} == {ranks}
        off = distance(deltas(adapter), dense)
        assert abs(off - error) <= 1e-6
        assert (error == 0) == (ranks == 10)
        if rank == 5:
            singular = [torch.linalg.svdvals(tensor) for tensor in dense.values()]
            least = sum(s[..., 5:].square().sum() for s in singular) / sum(s.square().sum() for s in singular)
            assert abs(error - float(least.sqrt())) <= 1e-6  # no product of that rank is nearer
        here, output = logits(adapters.model), tmp_path / f"{mode}-{rank}"
        adapters.save(f"{mode}{rank}", tmp_path / f"python-{mode}-{rank}")
        directories = [str(tmp_path / name) for name in WEIGHTS]
        given = {"adapters": directories, "weights": [*WEIGHTS.values()], "mode": mode, "output": str(output)}
        assert run(configured(given | ({} if rank is None else {"rank": rank}))) == 0
        for directory in (output, tmp_path / f"python-{mode}-{rank}"):
            theirs = peft.PeftModel.from_pretrained(dense_twin(family, quant), str(directory)).eval()
            assert (logits(theirs) - here).abs().max() <= 2e-5
            again = Adapters(frozen(family, quant))
            again.attach("again", LoRAConfig(path=str(directory)))
            assert (logits(again.model) - here).abs().max() <= 2e-5


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "lm_head"], ["embed_tokens", "v_proj"]])
def test_adapters_of_different_places_have_ranks_of_their_own(targets: list[str], tmp_path: Path) -> None:
    adapters = two(targets=targets)
    dense = wanted(adapters)
    for name in WEIGHTS:
        adapters.save(name, tmp_path / name)
    adapter, error = adapters.combine("both", WEIGHTS)
    assert error == 0 and distance(deltas(adapter), dense) <= 1e-6
    outside = {6} & {6 * ("lm_head" in targets or "embed_tokens" in targets)}  # where a, on all-linear, has nothing
    assert {size.rank for size in adapter.sizes.values()} == {4, 10} | outside
    here = logits(adapters.model)
    run(configured({"adapters": [str(tmp_path / n) for n in WEIGHTS], "weights": [0.7, -0.3],
                    "output": str(tmp_path / "both")}))  # fmt: skip
    theirs = peft.PeftModel.from_pretrained(dense_twin("llama"), str(tmp_path / "both")).eval()
    assert (logits(theirs) - here).abs().max() <= 2e-5


def test_a_rank_above_a_matrix_is_cut_without_loss() -> None:
    adapters = Adapters(frozen("llama"))
    for name in WEIGHTS:
        randomize(adapters.attach(name, LoRAConfig(rank=30, targets=["k_proj"])))  # 32 x 64
    dense = wanted(adapters)
    adapter, error = adapters.combine("both", WEIGHTS)
    assert {size.rank for size in adapter.sizes.values()} == {32}
    assert error <= 1e-7 and distance(deltas(adapter), dense) <= 1e-6


def test_adding_factors_would_be_something_else() -> None:
    """What PEFT's `linear` does, and why ours is not called so."""
    adapters = two(rank=4, alpha=8, rslora=False)
    dense = wanted(adapters)
    name = next(iter(dense))
    a, b = (adapters[n].adapted[name] for n in WEIGHTS)
    weights = [abs(w) ** 0.5 for w in WEIGHTS.values()]
    mixed = (weights[0] * b.lora_B.weight + weights[1] * a.lora_B.weight).double()
    mixed = 2 * mixed @ (weights[0] * a.lora_A.weight + weights[1] * b.lora_A.weight).double()
    assert (mixed - dense[name]).norm() > 0.1 * dense[name].norm()


def test_products_of_stacks() -> None:
    """Every expert by itself, at sizes that differ in every axis."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator) for shape in ((3 * 2, 7), (5, 2 * 3)))
    product = Product.of(a, b, 2, 0.5)
    for expert in range(3):
        by_hand = 0.5 * b.double()[:, [expert, 3 + expert]] @ a.double()[2 * expert : 2 * expert + 2]
        assert torch.allclose(product.b_EOR[expert] @ product.a_ERI[expert], by_hand)
    again = Product.of(*product.factors(), 2, 1.0)
    assert torch.allclose(again.b_EOR @ again.a_ERI, product.b_EOR @ product.a_ERI, atol=1e-6)
    loss = Loss()
    cut = refactored(joined([product, product]), 1, loss)
    lost = (cut.b_EOR @ cut.a_ERI - 2 * product.b_EOR @ product.a_ERI).square().sum()
    assert abs(loss.lost - float(lost)) <= 1e-9 and 0 < loss.relative < 1


def test_pefts_own_files_combine(tmp_path: Path) -> None:
    settings = {
        "a": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8, "rank_pattern": {"v_proj": 2}},
        "b": {"target_modules": r".*layers\.1\..*q_proj", "r": 3, "lora_alpha": 5, "use_rslora": True},
    }
    merged = dense_twin("llama")
    state = {name: tensor.clone() for name, tensor in merged.state_dict().items()}
    for name, config in settings.items():
        theirs = peft.get_peft_model(dense_twin("llama"), peft.LoraConfig(**config))
        with torch.no_grad():
            generator = torch.Generator().manual_seed(ord(name))
            for parameter in theirs.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        theirs.save_pretrained(tmp_path / name)
        for key, tensor in theirs.merge_and_unload().state_dict().items():
            state[key] += WEIGHTS[name] * (tensor - merged.state_dict()[key])
    output = tmp_path / "both"
    run(configured({"adapters": [str(tmp_path / n) for n in "ab"], "weights": [0.7, -0.3], "output": str(output)}))
    merged.load_state_dict(state)
    theirs = peft.PeftModel.from_pretrained(dense_twin("llama"), str(output)).eval()
    assert (logits(theirs) - logits(merged)).abs().max() <= 2e-5


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    adapters = two()
    for name in WEIGHTS:
        adapters.save(name, tmp_path / name)
        digests = {"base": "1" * 64, "tokenizer": "t", "chat_template": None, "quantization": "q"}
        write_provenance(tmp_path / name, digests, method="lora", base="some/base")
        (tmp_path / name / "tokenizer.json").write_text("{}")
        (tmp_path / name / "README.md").write_text("words")
    return tmp_path


def attempt(directory: Path, **changed: object) -> None:
    given = {"adapters": [str(directory / n) for n in "ab"], "weights": [1, 1], "output": str(directory / "out")}
    run(configured({**given, **changed}))


def test_origin_and_tokenizer_go_along(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    attempt(saved)
    names = {"adapter_config.json", "adapter_model.safetensors", "finetune.json", "tokenizer.json"}
    assert {path.name for path in (saved / "out").iterdir()} == names
    document = json.loads((saved / "out" / "finetune.json").read_text("utf-8"))
    assert (document["base"], document["digests"]["base"], document["method"]) == ("some/base", "1" * 64, "lora")
    said = capsys.readouterr().out.splitlines()
    assert said == ["combined 2 adapters at 14 places, rank 10: exact", str(saved / "out")]


def redigest(directory: Path, **digests: str) -> None:
    path = directory / "finetune.json"
    document = json.loads(path.read_text("utf-8"))
    document["digests"] |= digests
    path.write_text(json.dumps(document), "utf-8")


def test_other_bases_and_quantizations_are_refused_naming_both(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    redigest(saved / "b", base="2" * 64)
    with pytest.raises(ModelError, match=r"/a and .*/b were trained on different bases: 111111111111 and 222222222222"):
        attempt(saved)
    redigest(saved / "b", base="1" * 64, quantization="other", tokenizer="u")
    with pytest.raises(ModelError, match=r"on one base quantized differently: q and other; set allow_other_quant=true"):
        attempt(saved)
    assert not (saved / "out").exists() and not list(saved.glob(".tmp*"))
    attempt(saved, allow_other_quant=True)
    said = capsys.readouterr().out
    assert "with different quantizations: q and other; the first one's is kept" in said
    assert "with different tokenizers: t and u" in said


def test_without_digests_the_name_of_the_base_decides(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (saved / "b" / "finetune.json").unlink()
    path = saved / "b" / "adapter_config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | {"base_model_name_or_path": "other/base"}), "utf-8")
    with pytest.raises(ModelError, match="on different bases: some/base and other/base"):
        attempt(saved)
    path.write_text(json.dumps(config | {"base_model_name_or_path": "some/base"}), "utf-8")
    attempt(saved)
    assert "nothing but its name, some/base, says that" in capsys.readouterr().out
    assert not (saved / "out" / "finetune.json").exists()


def test_what_is_no_plain_lora_is_refused(saved: Path) -> None:
    adapters = Adapters(frozen("llama"))
    adapters.attach("dora", DoRAConfig(rank=4))
    adapters.attach("head", LoRAConfig(rank=4, train_also=["lm_head"]))
    adapters.attach("low", LoRAConfig(rank=4))
    for name in ("dora", "head"):
        adapters.save(name, saved / name)
    with pytest.raises(ModelError, match="use_dora=true, which adapter=lora does not compute"):
        attempt(saved, adapters=[str(saved / "a"), str(saved / "dora")])
    with pytest.raises(ModelError, match=r"/head also trains lm_head whole, which is no product to combine"):
        attempt(saved, adapters=[str(saved / "a"), str(saved / "head")])
    with pytest.raises(ConfigError, match="dora is adapter=dora, which is no plain low-rank product"):
        adapters.combine("x", {"low": 1.0, "dora": 1.0})
    with pytest.raises(ConfigError, match="head also trains lm_head whole"):
        adapters.combine("x", {"low": 1.0, "head": 1.0})
    wide = Adapters(frozen("gpt2"))
    wide.attach("c", LoRAConfig(rank=4))
    wide.save("c", saved / "c")
    with pytest.raises(ModelError, match="on different bases: some/base and None"):
        attempt(saved, adapters=[str(saved / "a"), str(saved / "c")])
    adapters.save("low", saved / "low")
    with pytest.raises(ModelError, match=r"low and .*/c have no place in common and name no base"):
        attempt(saved, adapters=[str(saved / "low"), str(saved / "c")])


BAD = {
    "weights is .1.: expected 2, one for each adapter": {"weights": [1]},
    "the weight of .*/b is 'x': expected a number": {"weights": [1, "x"]},
    "the weight of .*/b is nan": {"weights": [1, float("nan")]},
    "mode is 'sums': expected concat . sum; did you mean 'sum'": {"mode": "sums"},
    "rank is 3, but mode=concat has the ranks' sum": {"rank": 3},
    "rank is 0: expected at least 1": {"mode": "sum", "rank": 0},
    "output is None: expected a directory": {"output": None},
    "adapters is .*expected a list, e.g.": {"adapters": "a"},
    "unknown key 'wieghts'; did you mean 'weights'.*; unknown key 'ouput'": {"wieghts": [1], "ouput": 2},
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_is_told_in_one_line(words: str, saved: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        attempt(saved, **BAD[words])
    assert "\n" not in str(error.value)


def test_an_output_that_exists_and_a_broken_file_are_left_alone(saved: Path) -> None:
    with pytest.raises(ConfigError, match="/a, which exists already: name a new directory"):
        attempt(saved, output=str(saved / "a"))
    with pytest.raises(ConfigError, match="/a twice: add its weights up"):
        attempt(saved, adapters=[str(saved / "a")] * 2)
    weights = saved / "b" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cannot be read"):
        attempt(saved)
    assert not (saved / "out").exists()
