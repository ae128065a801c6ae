"""MASA on models that exist: families, budgets, exactness, and folders that are read again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from compare import assert_close
from compress.families import batches, build, output
from manyheads.compress import Plan, anatomy, load_model, save_model
from manyheads.compress.masa import MASA, share_attention
from manyheads.compress.masa.statistics import measure_statistics
from manyheads.layers.sharing import SharingConfig, to_dense

pytest.importorskip("transformers")
FAMILIES = ("llama", "qwen", "gpt2", "opt", "bert", "vit", "whisper", "timm", "ours", "encoder")


def numbers(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def attention_numbers(model: nn.Module) -> int:
    """Numbers of the attention's matrices: all that is not a bias."""
    paths: set[str] = set()
    for _, sublayer in anatomy(model).sublayers("attention"):
        found = sublayer.attention
        paths |= {p.path for p in (found.query, found.key, found.value, found.output)}
    own = sum(
        p.numel()
        for path in paths
        for name, p in model.get_submodule(path).named_parameters()
        if name != "bias"
    )
    shared = getattr(model, "shared_atoms", None)
    return own + (0 if shared is None else numbers(shared))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ratio", [0.2, 0.45])
def test_numbers_fall_by_the_ratio_and_the_folder_is_read_again(family, ratio, tmp_path: Path):
    model, data = build(family), batches(family)
    before = copy.deepcopy(model.state_dict())
    plan = MASA(ratio=ratio).plan(model, data)
    plan.save(tmp_path / "plan.json")
    smaller = Plan.load(tmp_path / "plan.json").apply(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    full, left = attention_numbers(model), attention_numbers(smaller)
    assert full * (1 - ratio) * 0.85 <= left <= full * (1 - ratio)
    assert numbers(model) - numbers(smaller) == full - left
    assert plan.measured["attention_numbers"] == {"before": full, "after": left}
    save_model(smaller, tmp_path / "out")
    again = load_model(tmp_path / "out")
    torch.testing.assert_close(output(again, data[0]), output(smaller, data[0]), rtol=0, atol=0)
    assert numbers(again) == numbers(smaller)
    dense = to_dense(copy.deepcopy(smaller))
    assert_close(output(dense, data[0]), output(smaller, data[0]), 1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "timm", "bert"])
def test_layers_that_lie_in_the_span_of_few_atoms_lose_nothing(family) -> None:
    model, data = build(family, layers=6), batches(family)
    paths = {s.attention.query.path for _, s in anatomy(model).sublayers("attention")}
    paths |= {s.attention.output.path for _, s in anatomy(model).sublayers("attention")}
    for leaf in {p.rpartition(".")[2] for p in paths}:
        own = [model.get_submodule(p) for p in sorted(paths) if p.endswith(leaf)]
        with torch.no_grad():
            for i, module in enumerate(own[2:]):
                module.weight.copy_(own[0].weight * (1 + i) - own[1].weight * (2 - i))
    chosen = MASA(ratio=0.3, groups=1, projections=("query", "key", "value", "output"))
    same = chosen.plan(model, data) if family in ("gpt2", "timm") else None
    if same is None:
        same = MASA(ratio=0.3, groups=1, projections=("query", "output")).plan(model, data)
    smaller = same.apply(model)
    assert max(same.measured["lost_energy"].values()) < 1e-9
    assert_close(output(smaller, data[0]), output(model, data[0]), 1e-4)


def test_a_better_allocation_loses_less() -> None:
    model, data = build("llama", layers=6), batches("llama", count=4)
    lost = {}
    for name, options in {
        "all": {},
        "uniform": {"allocation": "uniform"},
        "one atom": {"atoms": 1, "groups": 1},
    }.items():
        plan = MASA(ratio=0.3, **options).plan(model, data)
        lost[name] = sum(plan.measured["lost_energy"].values())
    assert lost["all"] < lost["uniform"]
    assert MASA(ratio=0.3, atoms=1, groups=1).plan(model, data).structure["dictionaries"][
        "query_0"
    ] == {"atoms": 1, "layers": 6, "shape": [32, 32]}


@pytest.mark.parametrize("family", ["llama", "ours", "gpt2", "timm"])
def test_lost_energy_is_that_of_the_layers_outputs(family) -> None:
    model, data = build(family, layers=6), batches(family)
    plan = MASA(ratio=0.3).plan(model, data)
    smaller = plan.apply(model)
    shares: dict[str, list[float]] = {}
    for path, parts in plan.structure["modules"].items():
        seen: list[torch.Tensor] = []
        handle = model.get_submodule(path).register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0].detach())
        )
        for batch in data:
            output(model, batch)
        handle.remove()
        if "attention_mask" in data[0]:
            masks = [b["attention_mask"].bool() for b in data]
            seen = [x[m] for x, m in zip(seen, masks, strict=True)]
        x = torch.cat([x.flatten(0, -2) for x in seen])
        old, new = model.get_submodule(path), smaller.get_submodule(path)
        with torch.no_grad():
            wanted = (old(x) - old(torch.zeros_like(x))).chunk(len(parts), -1)
            left = (old(x) - new(x)).chunk(len(parts), -1)
        for (name, _, _), w, e in zip(parts, wanted, left, strict=True):
            shares.setdefault(name, []).append(float(e.square().sum() / w.square().sum()))
    for name, lost in plan.measured["lost_energy"].items():
        assert sum(shares[name]) / len(shares[name]) == pytest.approx(lost, rel=1e-3, abs=1e-6)


def test_moments_are_of_real_tokens_alone() -> None:
    model, data = build("llama"), batches("llama")
    parts = anatomy(model)
    path = parts.blocks[1].of_kind("attention").attention.key.path
    other = parts.blocks[1].of_kind("attention").attention.query.path
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    roles = {path: "decoder", other: "decoder"}
    found = measure_statistics(model, data, parts, roles)
    handle.remove()
    rows = torch.cat([x[b["attention_mask"].bool()] for x, b in zip(seen, data, strict=True)])
    assert_close(found.moments[path], rows.double().mT @ rows.double() / len(rows), 1e-12)
    assert found.moments[path] is found.moments[other]
    assert found.tokens == len(rows)


def test_layers_that_read_from_the_end_have_their_padding_where_they_see_it() -> None:
    model, data = build("encoder"), batches("encoder", count=1)
    parts = anatomy(model)
    assert model.config.directions == (False, True, False, True)
    path = parts.blocks[1].of_kind("attention").attention.key.path
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach())
    )
    found = measure_statistics(model, data, parts, {path: "encoder"})
    handle.remove()
    rows = seen[0].flip(1)[data[0]["mask"]].double()
    assert len(rows) < seen[0].shape[0] * seen[0].shape[1]
    assert_close(found.moments[path], rows.mT @ rows / len(rows), 1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_generation_with_a_cache_and_gradients(family) -> None:
    model, data = build(family), batches(family)
    smaller = MASA(ratio=0.3, keep=True).plan(model, data).apply(model)
    ids = data[0]["input_ids"][:1]
    whole = output(smaller, {"input_ids": ids})
    cache, steps = None, []
    for at in range(ids.shape[1]):
        with torch.no_grad():
            out = smaller(input_ids=ids[:, at : at + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)
    smaller(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in smaller.shared_atoms.parameters())


def test_a_search_goes_from_mild_to_strong() -> None:
    model = build("llama")
    ratios = [c["ratio"] for c in MASA.candidates(model, {"groups": 1})]
    assert ratios == sorted(ratios)
    assert MASA.candidates(model, {"ratio": 0.3}) == [{"ratio": 0.3}]
    for settings in MASA.candidates(model, {}):
        assert MASA(**settings).settings.ratio == settings["ratio"]


def test_half_precision_stays_half() -> None:
    model, data = build("llama").bfloat16(), batches("llama")
    smaller = MASA(ratio=0.2).plan(model, data).apply(model)
    assert {p.dtype for p in smaller.parameters()} == {torch.bfloat16}
    assert output(smaller, data[0]).isfinite().all()


@pytest.mark.parametrize("family", ["timm", "vit", "gpt2", "llama"])
@pytest.mark.parametrize("kind", ["masa", "sequential"])
def test_models_that_share_from_the_start(family, kind) -> None:
    model, data = build(family, layers=6), batches(family)
    full = attention_numbers(model)
    share_attention(model, SharingConfig(atoms=2, kind=kind))
    left = attention_numbers(model)
    assert full / 3 <= left < full / 3 + 4 * 2 * 6 + 1
    model.train()
    found = model(**data[0])
    loss = found if isinstance(found, torch.Tensor) else found.logits
    loss.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.shared_atoms.parameters())


def test_what_cannot_be_done_is_said() -> None:
    model, data = build("llama"), batches("llama")
    for options, match in (
        ({"ratio": 1.0}, "ratio is 1.0"),
        ({"atoms": -1}, "atoms is -1"),
        ({"allocation": "greed"}, "did you mean 'greedy'"),
        ({"projections": ("q",)}, "projection"),
        ({"groups": 5}, "ratio 0.2 leaves fewer|5 groups of 4"),
        ({"groups": 1, "ratio": 0.9}, "ratio 0.9 leaves fewer"),
    ):
        with pytest.raises(ValueError, match=match):
            MASA(**options).plan(model, data)
    with pytest.raises(ValueError, match="calibration"):
        MASA().plan(model)
    with pytest.raises(ValueError, match="no batches"):
        MASA().plan(model, [])
    with pytest.raises(ValueError, match="holds 3 matrices in one"):
        MASA(projections=("query",)).plan(build("gpt2"), batches("gpt2"))
    with pytest.raises(ValueError, match="already"):
        MASA().plan(MASA().plan(model, data).apply(model), data)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or infinity"):
        MASA().plan(model, data)
