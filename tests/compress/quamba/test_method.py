"""The procedure: plans, small models, folders, padding, steps, reports."""

from __future__ import annotations

import json

import pytest
import torch

from manyheads.choose.flops import count_flops
from manyheads.compress import Plan, list_procedures
from manyheads.compress.quamba import Int8Mamba, Quamba, SimulatedMamba, calibrate
from manyheads.models.language.mamba import MambaForCausalLM, MambaLMConfig
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig
from manyheads.native import library

CONFIG = MambaLMConfig(embed_dim=24, num_layers=2, vocab_size=50, state_dim=5)


def model() -> MambaForCausalLM:
    torch.manual_seed(1)
    return MambaForCausalLM(CONFIG).eval()


def batches(count: int = 3) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        {"input_ids": torch.randint(50, (1, 19 + i), generator=generator)} for i in range(count)
    ]


def test_a_plan_is_data_and_the_model_is_left_alone(tmp_path) -> None:
    original = model()
    before = {k: v.clone() for k, v in original.state_dict().items()}
    plan = Quamba().plan(original, batches())
    assert "quamba" in list_procedures()
    assert all(torch.equal(v, before[k]) for k, v in original.state_dict().items())
    plan.save(tmp_path / "plan.json")
    small, again = plan.apply(original), Plan.load(tmp_path / "plan.json").apply(original)
    tokens = torch.randint(50, (2, 13))
    assert torch.equal(small(tokens), again(tokens))
    assert isinstance(original.layers[0].mixer, torch.nn.Module)
    assert all(torch.equal(v, before[k]) for k, v in original.state_dict().items())
    json.dumps(plan.report())


@pytest.mark.parametrize("mode", ["int8", "simulate"])
def test_the_result_reloads_into_its_restructured_shell(mode) -> None:
    original = model()
    plan = Quamba(mode=mode).plan(original, batches())
    small = plan.apply(original)
    torch.manual_seed(7)
    shell = Quamba.restructure(plan.structure, MambaForCausalLM(CONFIG)).eval()
    tokens = torch.randint(50, (2, 13))
    assert not torch.equal(shell(tokens), small(tokens))  # tables of the empty shell are made
    shell.load_state_dict(small.state_dict())
    assert torch.equal(shell(tokens), small(tokens))
    kind = Int8Mamba if mode == "int8" else SimulatedMamba
    assert all(isinstance(layer.mixer, kind) for layer in shell.layers)


def test_weights_are_really_gone() -> None:
    wide = MambaForCausalLM(MambaLMConfig(embed_dim=96, num_layers=1, vocab_size=50)).eval()
    plan = Quamba(report_batches=0).plan(wide, batches(1))
    small = plan.apply(wide)
    bytes_ = plan.measured["linear_bytes"]
    assert bytes_["int8"] < 0.52 * bytes_["float16"]
    linears = ("in_proj", "x_proj", "dt_proj", "out_proj")
    mixer = small.layers[0].mixer
    held = sum(getattr(mixer, n).numel() * getattr(mixer, n).element_size() for n in linears)
    half = sum(2 * getattr(wide.layers[0].mixer, n).weight.numel() for n in linears)
    assert held + 4 * 4 == bytes_["int8"]
    assert half == bytes_["float16"]
    total = sum(t.numel() * t.element_size() for t in mixer.state_dict().values())
    assert total < 0.52 * sum(2 * p.numel() for p in wide.layers[0].mixer.parameters())


def test_logits_are_near_and_steps_equal_the_whole() -> None:
    original = model()
    small = Quamba().plan(original, batches()).apply(original)
    tokens = batches(1)[0]["input_ids"]
    whole, y = original(tokens), small(tokens)
    assert (y - whole).norm() / whole.norm() < 0.1
    out, state = small.update(tokens[:, :9], small.init_state(1))
    parts = [out]
    for t in range(9, tokens.shape[1]):
        one, state = small.step(tokens[:, t], state)
        parts.append(one[:, None])
    assert (torch.cat(parts, 1) - y).abs().max() < 0.02 * y.abs().max()
    assert len(list(small.generate(tokens, max_new_tokens=4, temperature=0))) == 4


def test_padding_does_not_touch_the_scales() -> None:
    original, rows = model(), [b["input_ids"][0] for b in batches()]
    longest = max(map(len, rows))
    padded, mask = torch.full((3, longest), 7), torch.zeros(3, longest, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, longest - len(row) :], mask[i, longest - len(row) :] = row, 1
    alone = calibrate(original, rows[0][None].split(1), percentile=None)
    first = calibrate(
        original, [{"input_ids": padded[:1], "attention_mask": mask[:1]}], percentile=None
    )
    for path, scales in alone.items():
        for site, scale in scales.items():
            torch.testing.assert_close(first[path][site], scale, rtol=1e-5, atol=0)
    # Ragged: as one batch with a mask, or one by one, the largest values are the same.
    together = calibrate(original, [{"tokens": padded, "mask": mask}], percentile=None)
    each = calibrate(original, [r[None] for r in rows], percentile=None)
    for path, scales in each.items():
        for site, scale in scales.items():
            torch.testing.assert_close(together[path][site], scale, rtol=1e-4, atol=0)


def test_the_report_tells_ranges_clipping_and_each_trick() -> None:
    plan = Quamba(percentile=0.999).plan(model(), batches())
    figures = plan.measured["blocks"]["layers.1.mixer"]
    assert set(figures["error"]) == {"naive", "percentile", "hadamard", "both"}
    assert all(0 < e < 0.5 for e in figures["error"].values())
    assert all(r > 0 for r in figures["range"].values())
    assert 0 < figures["clipped"]["u"] < 0.02
    assert figures["clipped"]["conv_in"] == 0
    naive = Quamba(percentile=None, hadamard=False).plan(model(), batches())
    assert set(naive.measured["blocks"]["layers.1.mixer"]["error"]) == {"naive"}
    assert "blocks" not in Quamba(report_batches=0).plan(model(), batches()).measured


def test_mamba_layers_among_others() -> None:
    torch.manual_seed(3)
    mixed = MixerLM(
        MixerLMConfig(embed_dim=32, num_heads=2, mixers="mamba,softmax,mamba", vocab_size=50)
    ).eval()
    plan = Quamba(report_batches=1).plan(mixed, [{"tokens": b["input_ids"]} for b in batches()])
    assert plan.structure["blocks"] == ["layers.0.mixer", "layers.2.mixer"]
    small, tokens = plan.apply(mixed), torch.randint(50, (2, 11))
    wanted = mixed(tokens)
    assert (small(tokens) - wanted).norm() / wanted.norm() < 0.1


def test_what_cannot_be_done_is_said() -> None:
    original = model()
    with pytest.raises(ValueError, match="needs a calibration"):
        Quamba().plan(original)
    with pytest.raises(ValueError, match="has no batch"):
        Quamba().plan(original, [])
    with pytest.raises(ValueError, match="needs tokens or input_ids, this one holds pixels"):
        Quamba().plan(original, [{"pixels": torch.ones(1)}])
    with pytest.raises(ValueError, match="no Mamba-1 block"):
        Quamba().plan(torch.nn.Linear(2, 2), batches())
    small = Quamba(report_batches=0).plan(original, batches()).apply(original)
    with pytest.raises(ValueError, match="no Mamba-1 block of ours in float"):
        Quamba().plan(small, batches())
    with pytest.raises(ValueError, match=r"mode 'int4'"):
        Quamba(mode="int4")
    with pytest.raises(ValueError, match=r"percentile 1\.5"):
        Quamba(percentile=1.5)
    with torch.no_grad():
        original.layers[1].mixer.in_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layers.1.mixer: .*NaN"):
        Quamba().plan(original, batches())
    assert not original.layers[0].mixer._forward_pre_hooks


def test_operations_are_counted_as_those_of_the_float_block() -> None:
    wide = MambaForCausalLM(MambaLMConfig(embed_dim=96, num_layers=1, vocab_size=50)).eval()
    small = Quamba(report_batches=0, hadamard=False).plan(wide, batches(1)).apply(wide)
    tokens, mixers = torch.randn(1, 7, 96), [m.layers[0].mixer for m in (wide, small)]
    with torch.no_grad():
        whole, held = (count_flops(m, tokens).total for m in mixers)
        assert held == whole
        states = [m.init_state(1) for m in mixers]
        token = tokens[:, 0]
        whole, held = (
            count_flops(m.step, token, s).total for m, s in zip(mixers, states, strict=True)
        )
    if library("int8") is not None:
        assert abs(held - whole) / whole < 0.01
