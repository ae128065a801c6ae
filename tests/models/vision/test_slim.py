"""Slimming: greedy steps against a made-up table, and a table measured here."""

from __future__ import annotations

import pytest
import torch

from manyheads.choose.latency import measure_latencies
from manyheads.models import create_model
from manyheads.models.vision.efficientformer import EfficientFormer, EfficientFormerConfig
from manyheads.models.vision.efficientformer.slim import Architecture, LatencyTable, slim
from manyheads.models.vision.efficientformer.supernet import Supernet

CONFIG = EfficientFormerConfig(
    depths=(2, 2, 3, 3), embed_dims=(32, 48, 64, 80), num_classes=5, image_size=64,
    num_heads=2, key_dim=4,
)  # fmt: skip


def supernet(seed: int = 0) -> Supernet:
    torch.manual_seed(seed)
    net = Supernet(CONFIG)
    for stage in net.slots():
        for slot in stage:
            torch.nn.init.normal_(slot.logits)
    return net


def table() -> LatencyTable:
    costs = {"stem": 0.02, "embed": 0.01, "map": 0.03, "token": 0.05}
    return LatencyTable(
        milliseconds={
            f"{kind}/{stage}/{width}": cost * width
            for kind, cost in costs.items()
            for stage in range(4)
            for width in range(16, 97, 16)
        }
    )


def accuracy(a: Architecture) -> float:
    return sum(d * w for d, w in zip(a.depths, a.widths, strict=True)) / 1000 + a.token_blocks


@pytest.mark.parametrize("seed", range(4))
def test_steps_shorten_and_keep_the_rules(seed) -> None:
    seen: list[Architecture] = []

    def watched(a: Architecture) -> float:
        seen.append(a)
        return accuracy(a)

    found = slim(supernet(seed), table(), 9.0, watched)
    times = [ms for _, _, ms in found.steps]
    assert times == sorted(times, reverse=True)
    assert found.latency <= 9.0
    assert table()(found.architecture) == pytest.approx(found.latency)
    assert len(times) == 1 or times[-2] > 9.0
    for a in seen:
        assert all(w % 16 == 0 and w >= 16 for w in a.widths)
        assert all(d >= 1 for d in a.depths)
        assert 0 <= a.token_blocks <= a.depths[-1]
    model = EfficientFormer(found.architecture.config(CONFIG)).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 5)


def test_each_step_is_the_cheapest_of_its_candidates() -> None:
    net, times = supernet(), table()
    whole = slim(net, times, 1e9, accuracy).architecture
    found = slim(net, times, times(whole) - 1e-6, accuracy)
    importance = [[s.importance() for s in stage] for stage in net.slots()]
    _, i, j = min((v, i, j) for i, s in enumerate(importance) for j, v in enumerate(s))
    dropped = tuple(tuple(k for k in s if (a, k) != (i, j)) for a, s in enumerate(whole.slots))
    gone = i == 3 and j >= 3 - whole.token_blocks
    least = min(range(4), key=lambda s: sum(importance[s]))
    narrow = tuple(w - 16 * (s == least) for s, w in enumerate(whole.widths))
    options = {
        "drop": Architecture(slots=dropped, widths=whole.widths,
                             token_blocks=whole.token_blocks - gone),
        "narrow": Architecture(slots=whole.slots, widths=narrow,
                               token_blocks=whole.token_blocks),
    }  # fmt: skip
    if whole.token_blocks:
        options["turn"] = Architecture(
            slots=whole.slots, widths=whole.widths, token_blocks=whole.token_blocks - 1
        )
    costs = {
        n: (accuracy(whole) - accuracy(a)) / (times(whole) - times(a)) for n, a in options.items()
    }
    best = min(costs, key=lambda n: costs[n])
    assert found.steps[0][0] == best
    assert found.architecture == options[best]


def test_the_first_token_block_is_turned_first() -> None:
    net = supernet()
    for slot in net.slots()[-1]:
        torch.nn.init.zeros_(slot.logits)
    whole = slim(net, table(), 1e9, accuracy).architecture
    assert whole.token_blocks == 3
    # Tokens are worth nothing and all else is worth much.
    found = slim(net, table(), table()(whole) - 2.0, lambda a: accuracy(a) - 2 * a.token_blocks)
    assert {a for a, _, _ in found.steps} == {"turn"}
    assert found.architecture.depths == whole.depths


def test_what_cannot_be_reached_is_said() -> None:
    with pytest.raises(ValueError, match=r"target_ms 0\.1 is out of reach"):
        slim(supernet(), table(), 0.1, accuracy)
    with pytest.raises(ValueError, match="no latency of"):
        slim(supernet(), LatencyTable(milliseconds={}), 1.0, accuracy)
    with pytest.raises(ValueError, match="take 48"):
        Supernet(CONFIG.replace(embed_dims=(40, 48, 64, 80)))


def test_the_supernet_learns_its_logits() -> None:
    net = Supernet(CONFIG)
    net.set_temperature(0.5)
    net(torch.randn(2, 3, 64, 64)).square().sum().backward()
    assert all(slot.logits.grad.any() for stage in net.slots() for slot in stage)
    net.eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(net(x), net(x))
    for stage in net.slots():
        for slot in stage:
            torch.nn.init.constant_(slot.logits, -60.0)
            with torch.no_grad():
                slot.logits[0] = 0.0
    plain = create_model("efficientformer_l1", **CONFIG.replace(token_blocks=0).to_dict()).eval()
    named = {n.replace("map.", ""): t for n, t in net.state_dict().items()}
    plain.load_state_dict({n: named[n] for n in plain.state_dict()})
    assert torch.allclose(net(x), plain(x), atol=1e-5)


def test_a_table_measured_here(tmp_path) -> None:
    measured = measure_latencies(CONFIG, repeats=3, least_width=32)
    assert all(ms > 0 for ms in measured.milliseconds.values())
    measured.save(tmp_path / "table.json")
    again = LatencyTable.load(tmp_path / "table.json")
    whole = slim(supernet(), again, 1e9, accuracy)
    assert whole.latency > 0
    with pytest.raises(ValueError, match="least_width 24"):
        measure_latencies(CONFIG, least_width=24)
