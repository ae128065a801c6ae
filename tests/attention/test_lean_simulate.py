"""The simulated device: figures worked out by hand, overheads, waiting hosts."""

from __future__ import annotations

import pytest

from manyheads.attention.lean import Device, plan, simulate
from manyheads.papers.lean import occupancies

K = 1024


@pytest.mark.parametrize(
    ("lengths", "heads", "lean", "flash", "splits", "fa2"),
    [
        ([256 * K], 32, 1.00, 0.89, 3, 0.30),
        ([64 * K] * 2, 56, 1.00, 0.52, 1, 0.52),
        ([256 * K], 8, 1.00, 0.89, 12, 0.07),
        ([64 * K] * 4, 48, 1.00, 0.89, 1, 0.89),
    ],
)
def test_occupancy_of_108_multiprocessors(lengths, heads, lean, flash, splits, fa2) -> None:
    found = {m: simulate(lengths, heads=heads, method=m) for m in ("lean", "flash", "fa2")}
    shares = {m: round(s.occupancy, 2) for m, s in found.items()}
    assert shares == {"lean": lean, "flash": flash, "fa2": fa2}
    assert found["flash"].splits == splits
    assert found["fa2"].splits == 1


def test_a_ragged_batch() -> None:
    lengths = [K, K, K, 256 * K]
    assert simulate(lengths, heads=8).makespan == 154
    assert simulate(lengths, heads=8, method="flash").makespan == 683
    assert simulate(lengths, heads=8, method="fa2").makespan == 2048


def test_a_host_waits_and_merges() -> None:
    """One context of 5 tiles on 3 workers: 2, 2 and 1; the first waits for the last to begin."""
    device = Device(sms=3, t_tile=10, t_segment=1, t_merge=2, t_launch=5)
    found = simulate([5 * 128], heads=1, device=device)
    assert found.splits == 3
    assert found.makespan == 5 + 2 * 10 + 1 + 2 * 2
    assert [s.what for s in found.timeline[0]] == ["tiles", "merge"]
    assert found.occupancy == pytest.approx(50 / (3 * 30))
    # The second context's host ends early, and waits for a worker that has more to do first.
    found = simulate([3 * 128, 4 * 128], heads=1, device=Device(sms=2, t_segment=1, t_merge=1))
    first, second = found.timeline
    assert [s.what for s in first] == ["tiles", "tiles", "merge"]
    assert [s.what for s in second] == ["tiles"]
    assert first[-1].end == 4 + 2 + 1
    assert found.makespan == 7


def test_a_host_that_is_done_first_waits() -> None:
    found = simulate([128, 4 * 128], heads=1, device=Device(sms=3, t_segment=0, t_tile=1))
    assert found.makespan == 2
    found = simulate([3 * 128], heads=1, device=Device(sms=2, t_segment=0.5))
    assert [s.what for s in found.timeline[0]] == ["tiles"]
    longer = simulate([4 * 128, 3 * 128], heads=1, device=Device(sms=4, t_segment=1, t_merge=1))
    waits = [s for line in longer.timeline for s in line if s.what == "wait"]
    assert all(s.end > s.start for s in waits)


def test_flash_needs_a_second_kernel() -> None:
    device = Device(sms=4, t_merge=1, t_launch=10)
    found = simulate([8 * 128], heads=1, method="flash", device=device)
    assert found.splits == 4
    assert found.makespan == 10 + 2 + 10 + 4


def test_nothing_to_do_and_errors() -> None:
    assert simulate([0], heads=2).makespan == 0
    assert simulate([0], heads=2).occupancy == 0
    with pytest.raises(ValueError, match="unknown method"):
        simulate([5], heads=1, method="fa3")
    with pytest.raises(ValueError, match="sms 0"):
        Device(sms=0)
    with pytest.raises(ValueError, match="t_tile"):
        Device(t_tile=0)


def test_lean_is_never_behind() -> None:
    for sms in (108, 132):
        for row in occupancies(sms).values():
            assert row["lean"]["occupancy"] > 0.98
            assert row["lean"]["occupancy"] >= row["flash"]["occupancy"]
            assert row["lean"]["makespan"] <= row["flash"]["makespan"] <= row["fa2"]["makespan"]


@pytest.mark.parametrize("order", ["head", "request"])
@pytest.mark.parametrize(
    ("lengths", "heads", "workers", "xcds"),
    [([900, 0, 130, 5000], 8, 24, 8), ([333, 70], 6, 7, 4), ([64], 3, 20, 5), ([500] * 3, 5, 3, 1)],
)
def test_chiplets_share_nothing(lengths, heads, workers, xcds, order) -> None:
    dealt = plan(lengths, heads=heads, workers=workers, tile=64, order=order, xcds=xcds)
    tiles = [-(-n // 64) for n in lengths]
    read = {(s.head, s.request, t) for s in dealt.segments for t in range(s.first, s.end)}
    assert len(read) == sum(s.end - s.first for s in dealt.segments) == heads * sum(tiles)
    # Each chiplet's part is the plan of its own heads alone.
    used = min(heads, xcds)
    first_head = first_worker = 0
    for i in range(used):
        own = heads // used + (i < heads % used)
        team = workers // xcds + (i < workers % xcds)
        alone = plan(lengths, heads=own, workers=team, tile=64, order=order)
        part = [s for s in dealt.segments if first_head <= s.head < first_head + own]
        moved = [s._replace(head=s.head - first_head, worker=s.worker - first_worker) for s in part]
        assert tuple(moved) == alone.segments
        first_head, first_worker = first_head + own, first_worker + alone.workers
    assert first_worker == dealt.workers


def test_chiplets_cost_balance_where_heads_do_not_divide() -> None:
    chips, plain = Device(sms=304, xcds=8), Device(sms=304)
    for heads, lean, divided in ((64, 1.0, 1.0), (9, 1.0, 0.56)):
        shares = [simulate([1024 * K], heads=heads, device=d).occupancy for d in (plain, chips)]
        assert [round(s, 2) for s in shares] == [lean, divided]
    fixed = [simulate([64 * K], heads=9, method="flash", device=d).makespan for d in (plain, chips)]
    assert fixed[0] == fixed[1]


def test_chiplets_and_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="workers 3 is below xcds 8"):
        plan([100], heads=8, workers=3, xcds=8)
    with pytest.raises(ValueError, match="xcds 0"):
        plan([100], heads=8, workers=3, xcds=0)
    with pytest.raises(ValueError, match="xcds 9 is above sms 8"):
        Device(sms=8, xcds=9)
