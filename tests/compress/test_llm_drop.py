"""LLM-Drop over every family: what goes is what changes nothing, and it is really gone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compress.families import CAUSAL, FAMILIES, VOCAB, batches, build, output
from manyheads.compress import Plan, anatomy, load_model, save_model
from manyheads.compress.llm_drop import (
    LLMDrop,
    degradation_ratio,
    measure_similarities,
    most_similar,
    plan_from_lists,
    run_of_blocks,
    within_tolerance,
)

pytest.importorskip("transformers")


def silence(model: nn.Module, block: int, kind: str) -> None:
    """Make a branch add nothing: its last matrix and bias are zero."""
    parts = anatomy(model).blocks[block].of_kind(kind)  # type: ignore[arg-type]
    assert parts is not None
    if parts.attention is not None and parts.attention.output is not None:
        last: Any = model.get_submodule(parts.attention.output.path)
    else:
        linears = [
            m
            for m in model.get_submodule(parts.path).modules()
            if isinstance(getattr(m, "weight", None), nn.Parameter) and m.weight.dim() == 2  # type: ignore[union-attr, operator]
        ]
        last = linears[-1]
    with torch.no_grad():
        last.weight.zero_()
        if getattr(last, "bias", None) is not None:
            last.bias.zero_()


PRE_NORM = [f for f in FAMILIES if f != "bert"]


@pytest.mark.parametrize("family", PRE_NORM)
@pytest.mark.parametrize("kind", ["attention", "mlp"])
def test_a_branch_that_adds_nothing_goes_first(family: str, kind: str) -> None:
    model = build(family)
    silence(model, 2, kind)
    data = batches(family)
    plan = LLMDrop(**{kind: 1}).plan(model, data)
    path = anatomy(model).blocks[2].path
    assert plan.structure["drop"] == {kind: [path]}
    assert plan.measured["similarity"][kind][path] == pytest.approx(1, abs=1e-5)
    before = output(model, data[0])
    smaller = plan.apply(model)
    torch.testing.assert_close(output(smaller, data[0]), before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output(model, data[0]), before)  # the original is as it was
    assert sum(p.numel() for p in smaller.parameters()) < sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_similarities_are_of_the_stream(family: str) -> None:
    model, data = build(family), batches(family)
    found = measure_similarities(model, data, consecutive=True)
    for stack, pairs in found.consecutive.items():
        own = [found.blocks[b.path] for b in anatomy(model).stack(stack)]
        torch.testing.assert_close(pairs[:, 0], torch.tensor(own).double(), rtol=0, atol=1e-5)
        assert torch.isinf(pairs).sum() == len(own) * (len(own) - 1) / 2
    assert all(-1 <= v < 1 for kind in found.branches.values() for v in kind.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{"attention": 2}, {"mlp": 1}, {"blocks": 2}, {"joint": 2}])
def test_a_shrunken_model_is_read_again(
    family: str, options: dict[str, int], tmp_path: Path
) -> None:
    model, data = build(family), batches(family)
    if family == "gemma2" and ("attention" in options or "joint" in options):
        silence(model, 1, "attention")
        options = {"attention": 1}
    plan = LLMDrop(**options).plan(model, data)
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    smaller = plan.apply(model)
    save_model(smaller, tmp_path / "out")
    again = load_model(tmp_path / "out")
    torch.testing.assert_close(output(again, data[0]), output(smaller, data[0]), rtol=0, atol=0)
    assert sum(p.numel() for p in again.parameters()) == sum(
        p.numel() for p in smaller.parameters()
    )
    removed = sum(p.numel() for p in model.parameters()) - sum(
        p.numel() for p in smaller.parameters()
    )
    assert removed > 0


@pytest.mark.parametrize("family", CAUSAL)
@pytest.mark.parametrize("options", [{"attention": 2}, {"blocks": 1}, {"joint": 3}])
def test_cached_decoding_equals_a_full_pass(family: str, options: dict[str, int]) -> None:
    model, data = build(family), batches(family)
    silence(model, 0, "attention")  # so that the first layer's goes, and the count is read later
    smaller: Any = LLMDrop(**options).plan(model, data).apply(model)
    ids = data[0]["input_ids"][:1]
    whole = output(smaller, {"input_ids": ids})
    cache, steps = None, []
    for at in range(ids.shape[1]):
        with torch.no_grad():
            out = smaller(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)
    kept = sum(1 for _ in anatomy(smaller).sublayers("attention"))
    held = [layer for layer in cache.layers if layer.is_initialized]
    assert len(held) == kept
    heads = next(s.attention for _, s in anatomy(smaller).sublayers("attention"))
    numbers = sum(layer.keys.numel() + layer.values.numel() for layer in held)
    assert heads is not None
    assert numbers == 2 * kept * heads.num_kv_heads * heads.head_dim * ids.shape[1]
    generated = smaller.generate(ids, max_new_tokens=5, do_sample=False)
    assert generated.shape[1] > ids.shape[1]


def test_whisper_drops_cross_attention_and_generates() -> None:
    model, data = build("whisper"), batches("whisper")
    smaller: Any = LLMDrop(cross=1).plan(model, data).apply(model)
    smaller = LLMDrop(attention=1, stack="encoder").plan(smaller, data).apply(smaller)
    mels = data[0]["input_features"]
    ids = smaller.generate(mels, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        logits = smaller(input_features=mels, decoder_input_ids=ids[:, :-1]).logits
    assert torch.equal(logits.argmax(-1)[:, -1], ids[:, -1])
    assert smaller.model.decoder.layers[-1].encoder_attn is not None


def test_auto_classes_read_the_folder(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    import manyheads.bridges.transformers  # noqa: F401

    model, data = build("llama"), batches("llama")
    smaller: Any = LLMDrop(attention=2).plan(model, data).apply(model)
    smaller.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = data[0]["input_ids"][:1]
    wanted = smaller.generate(ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(again.generate(ids, max_new_tokens=8, do_sample=False), wanted)
    assert type(AutoModel.from_pretrained(tmp_path / "out")).__name__ == "LlamaModel"
    again.save_pretrained(tmp_path / "twice")
    twice = AutoModelForCausalLM.from_pretrained(tmp_path / "twice")
    torch.testing.assert_close(output(twice, data[0]), output(smaller, data[0]), rtol=0, atol=0)


def test_whole_blocks_are_stock(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    model, data = build("llama"), batches("llama")
    smaller = LLMDrop(blocks=2).plan(model, data).apply(model)
    save_model(smaller, tmp_path / "out")
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert stock.config.num_hidden_layers == 2
    torch.testing.assert_close(output(stock, data[0]), output(smaller, data[0]), rtol=0, atol=0)


def test_what_is_left_of_an_encoder_reads_as_it_did(tmp_path: Path) -> None:
    """Without its second block the fourth is the third, and goes on reading from the end."""
    model, data = build("encoder"), batches("encoder")
    silence(model, 2, "attention")
    silence(model, 2, "mlp")
    smaller = LLMDrop(blocks=1).plan(model, data).apply(model)
    assert model.config.directions == (False, True, False, True)
    assert smaller.config.directions == (False, True, True)
    assert torch.equal(output(smaller, data[0]), output(model, data[0]))
    save_model(smaller, tmp_path / "small")
    assert torch.equal(output(load_model(tmp_path / "small"), data[0]), output(model, data[0]))


def test_streams_of_blocks_that_read_from_the_end_are_compared_token_by_token() -> None:
    """Branches that add nothing leave the stream as it is: all similarities are 1."""
    model, data = build("encoder"), batches("encoder")
    for block in range(4):
        silence(model, block, "attention")
        silence(model, block, "mlp")
    found = measure_similarities(model, data, consecutive=True)
    (table,) = found.consecutive.values()
    near = table[table > float("-inf")]
    torch.testing.assert_close(near, torch.ones_like(near), rtol=0, atol=1e-6)


def test_padding_changes_no_similarity() -> None:
    model = build("llama")
    ids = batches("llama")[0]["input_ids"]
    wide = torch.cat([ids, torch.full((3, 5), 9)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(3, 5, dtype=torch.long)], 1)
    plain = measure_similarities(model, [{"input_ids": ids}])
    padded = measure_similarities(model, [{"input_ids": wide, "attention_mask": mask}])
    for path, value in plain.blocks.items():
        assert padded.blocks[path] == pytest.approx(value, abs=1e-6)
    assert padded.tokens == plain.tokens


def test_iterative_measures_what_is_left() -> None:
    model, data = build("llama", layers=5), batches("llama")
    plan = LLMDrop(attention=3, iterative=True).plan(model, data)
    chosen: list[str] = []
    for path in plan.structure["drop"]["attention"]:
        current = model
        if chosen:
            index = [
                anatomy(model).blocks.index(b) for b in anatomy(model).blocks if b.path in chosen
            ]
            current = plan_from_lists(model, drop_attn_list=index).apply(model)
        found = measure_similarities(current, data).branches["attention"]
        assert max(found, key=lambda p: found[p]) == path
        chosen.append(path)
    assert len(LLMDrop(blocks=2, iterative=True).plan(model, data).structure["blocks"]) == 2


def test_shared_layers_run_fewer_times(tmp_path: Path) -> None:
    from transformers import AlbertConfig, AlbertModel

    torch.manual_seed(0)
    model = AlbertModel(
        AlbertConfig(
            hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=56,
            vocab_size=VOCAB,
        )
    ).eval()  # fmt: skip
    data = batches("bert")
    with pytest.raises(ValueError, match="share one block's weights"):
        LLMDrop(attention=1).plan(model, data)
    smaller: Any = LLMDrop(blocks=2).plan(model, data).apply(model)
    assert smaller.config.num_hidden_layers == 4
    save_model(smaller, tmp_path / "out")
    again = AlbertModel.from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(output(again, data[0]), output(smaller, data[0]), rtol=0, atol=0)


@pytest.mark.realdata
@pytest.mark.skipif(find_spec("rxnmapper") is None, reason="rxnmapper is not installed")
def test_rxnmapper_shares_its_layers() -> None:
    from manyheads.compress import open_model
    from manyheads.data.packages import package_folder

    package = package_folder("rxnmapper", "--no-deps rxnmapper", "its ALBERT")
    model: Any = open_model(
        package / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    ).model
    data = [{"input_ids": torch.randint(20, 500, (2, 20))}]
    with pytest.raises(ValueError, match="the 12 layers of AlbertForMaskedLM share"):
        LLMDrop(attention=1).plan(model, data)
    smaller: Any = LLMDrop(blocks=3).plan(model, data).apply(model)
    assert smaller.config.num_hidden_layers == 9
    assert not torch.equal(output(smaller, data[0]), output(model, data[0]))


@pytest.mark.parametrize(
    ("options", "family", "message"),
    [
        ({}, "llama", "a count above 0"),
        ({"attention": 1, "mlp": 1}, "llama", "one kind at a time"),
        ({"attention": 9}, "llama", "cannot drop 9 attention branches: the model has 4"),
        ({"attention": 4}, "llama", "no attention of 'model.layers' would remain"),
        ({"blocks": 4}, "llama", "one must remain"),
        ({"cross": 1}, "llama", "the model has 0"),
        ({"blocks": 2, "consecutive": True}, "whisper", "give stack="),
        ({"attention": 1, "stack": "encoder"}, "gpt2", "no encoder"),
        ({"attention": 1, "norm_as_unit": False}, "bert", "come after the sums"),
    ],
)
def test_bad_counts(options: dict[str, Any], family: str, message: str) -> None:
    model = build(family)
    with pytest.raises(ValueError, match=message):
        LLMDrop(**options).plan(model, batches(family)).apply(model)


def test_a_plan_for_another_model_is_refused() -> None:
    model = build("llama")
    plan = LLMDrop(attention=1).plan(model, batches("llama"))
    with pytest.raises(ValueError, match="with other weights"):
        plan.apply(build("llama", seed=1))
    with pytest.raises(ValueError, match="of other shapes"):
        plan.apply(build("llama", layers=5))
    with pytest.raises(ValueError, match="a LlamaForCausalLM"):
        plan.apply(build("gpt2"))


def test_no_data_and_unknown_models() -> None:
    with pytest.raises(ValueError, match="give calibration batches"):
        LLMDrop(attention=1).plan(build("llama"))
    with pytest.raises(ValueError, match="holds no batches"):
        LLMDrop(attention=1).plan(build("llama"), [])
    with pytest.raises(ValueError, match=r"not recognised.*Found: the model: 2 x Linear"):
        LLMDrop(attention=1).plan(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), [])
    broken = build("llama")
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight.fill_(float("nan"))  # type: ignore[union-attr, index, operator]
    with pytest.raises(ValueError, match="not a number"):
        LLMDrop(attention=1).plan(broken, batches("llama"))


def test_selection() -> None:
    assert most_similar([0.2, 0.9, 0.5, 0.9], 3) == [1, 3, 2]
    assert within_tolerance([0.9, 0.9005, 0.3], 2, tolerance=1e-3) == [0, 1]
    assert within_tolerance([0.9, 0.9005, 0.3], 2, tolerance=0) == [1, 0]
    inf = float("-inf")
    pairs = torch.tensor([[0.1, 0.5, 0.9], [0.9, 0.7, inf], [0.5, inf, inf]])
    assert run_of_blocks(pairs, 2) == [1, 2]
    assert run_of_blocks(pairs, 2, official_compat=True) == [0, 1]
    with pytest.raises(ValueError, match="leave it False"):
        run_of_blocks(pairs, 3, official_compat=True)
    assert degradation_ratio(2.4, 1.11) == pytest.approx(0.218, abs=1e-3)


def test_official_lists_take_bools_and_indices() -> None:
    model = build("llama")
    by_bool = plan_from_lists(model, drop_attn_list=[False, True, False, True])
    by_index = plan_from_lists(model, drop_attn_list=[1, 3])
    assert by_bool.structure == by_index.structure
    with pytest.raises(ValueError, match="3 bools for 4 layers"):
        plan_from_lists(model, drop_attn_list=[True, False, True])
    with pytest.raises(ValueError, match="names layer 4"):
        plan_from_lists(model, drop_mlp_list=[4])
