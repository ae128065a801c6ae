"""Tables of relative positions: which row serves which pair, and what lies beyond a table."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.layers.relative import (
    IndexedTable,
    RelativeTable,
    RelativeTable2d,
    parameter_groups,
    relative_position_bucket,
)

HEADS = 3


def distances(n: int, m: int, offset: int = 0) -> torch.Tensor:
    return torch.arange(m) - torch.arange(offset, offset + n)[:, None]


@settings(deadline=None, max_examples=60)
@given(
    num_buckets=st.integers(2, 40).map(lambda n: 2 * n),
    stretch=st.integers(1, 200),
)
def test_buckets_follow_the_formula(num_buckets: int, stretch: int) -> None:
    half, exact = num_buckets // 2, num_buckets // 4
    farthest = exact + stretch
    distance = torch.arange(-2 * farthest - 3, 2 * farthest + 4)
    buckets = relative_position_bucket(
        distance, num_buckets=num_buckets, max_distance=farthest
    ).tolist()
    for d, bucket in zip(distance.tolist(), buckets, strict=True):
        n = abs(d)
        if n < exact:
            expected = n
        else:
            steps = math.log(n / exact) / math.log(farthest / exact) * (half - exact)
            if abs(steps - round(steps)) < 1e-4:  # on a border float32 decides
                assert abs(bucket) in (
                    min(half - 1, exact + round(steps)),
                    min(half - 1, exact + round(steps) - 1),
                )
                continue
            expected = min(half - 1, exact + int(steps))
        assert bucket == expected * (d > 0) - expected * (d < 0)
    assert buckets == sorted(buckets)


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(3, 10), (2, 10), (16, 4), (16, 3)])
def test_bucket_sizes_are_checked(num_buckets: int, max_distance: int) -> None:
    with pytest.raises(ValueError, match=r"num_buckets|max_distance"):
        relative_position_bucket(
            torch.arange(3), num_buckets=num_buckets, max_distance=max_distance
        )


@pytest.mark.parametrize(
    ("n", "m", "offset"), [(9, 9, 0), (5, 9, 0), (3, 9, 6), (1, 9, 8), (1, 1, 0)]
)
def test_unique_rows(n: int, m: int, offset: int) -> None:
    table = RelativeTable(HEADS, 9)
    assert table.weight.shape == (17, HEADS)
    expected = table.weight[distances(n, m, offset) + 8].movedim(-1, 0)
    assert torch.equal(table(n, m, offset=offset), expected)


def test_a_shorter_sequence_uses_the_same_rows() -> None:
    for buckets in (None, (16, 16), (8, 40)):
        table = RelativeTable(HEADS, 30, buckets=buckets)
        assert torch.equal(table(7), table(30)[:, :7, :7])


@pytest.mark.parametrize("buckets", [None, (16, 16), (64, 128)])
def test_the_line_and_the_matrix_agree(buckets) -> None:
    table = RelativeTable(HEADS, 40, buckets=buckets)
    line, matrix = table.toeplitz(23), table(23)
    assert line.shape == (HEADS, 45)
    assert torch.equal(matrix, line[:, distances(23, 23) + 22])
    (grad,) = torch.autograd.grad((matrix * torch.arange(23.0)).sum(), table.weight)
    twin = (line[:, distances(23, 23) + 22] * torch.arange(23.0)).sum()
    torch.testing.assert_close(torch.autograd.grad(twin, table.weight)[0], grad)


@pytest.mark.parametrize("length", [1, 2, 5, 20, 200])
def test_bucketed_rows_of_the_whole_grid(length: int) -> None:
    """+2 where not negative, minus the least of the grid of max_length places."""
    table = RelativeTable(1, length, buckets=(16, 16))
    assert table.weight.shape == (17, 1)
    grid = distances(length, length)
    signed = relative_position_bucket(grid, num_buckets=16, max_distance=16)
    shifted = torch.where(signed >= 0, signed + 2, signed)
    rows = table.rows(grid)
    assert torch.equal(rows, shifted - shifted.min())
    assert rows.min() == 0
    assert rows.max() <= 16
    if length == 200:
        assert rows.max() == 16
        assert set(range(17)) - set(rows.flatten().tolist()) == {7, 8}, "rows next to 0 are unused"


def test_the_least_bucket_is_not_that_of_a_shorter_sequence() -> None:
    table = RelativeTable(1, 200, buckets=(16, 16))
    assert table.rows(distances(3, 3)).min() == 5  # -2 minus the least, -7


@pytest.mark.parametrize("buckets", [None, (16, 16)])
def test_beyond_the_table(buckets) -> None:
    strict = RelativeTable(HEADS, 6, buckets=buckets)
    for call in (
        lambda: strict.toeplitz(7),
        lambda: strict(3, 9),
        lambda: strict(1, 4, offset=6),
        lambda: strict.rows(torch.tensor([-6])),
    ):
        with pytest.raises(ValueError, match="max_length 6"):
            call()
    clamped = RelativeTable(HEADS, 6, buckets=buckets, beyond="clamp")
    matrix = clamped(20)
    assert torch.equal(matrix[:, 7:13, 7:13], clamped(6))
    assert torch.equal(matrix[:, 0, 5:], matrix[:, 0, 5:6].expand(-1, 15))
    assert torch.equal(matrix[:, 19, :14], matrix[:, 19, 14:15].expand(-1, 14))


def test_initial_values() -> None:
    assert (RelativeTable(HEADS, 50, init=1.0).weight == 1).all()
    assert (RelativeTable2d(HEADS, (3, 4), init=0.0).weight == 0).all()
    drawn = RelativeTable(8, 500)
    assert drawn.weight.std().item() == pytest.approx(0.02, rel=0.05)
    with torch.no_grad():
        drawn.weight.fill_(3)
    drawn.reset_parameters()
    assert drawn.weight.abs().max() < 0.2
    with pytest.raises(ValueError, match="normal"):
        RelativeTable(1, 3, init="norm")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clamp"):
        RelativeTable(1, 3, beyond="clam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_length"):
        RelativeTable(1, 0)


def test_windows() -> None:
    table = RelativeTable2d(HEADS, (3, 4))
    assert table.weight.shape == (5 * 7, HEADS)
    for height, width in ((3, 4), (2, 3), (1, 1)):
        matrix = table(height, width)
        places = [(y, x) for y in range(height) for x in range(width)]
        for i, (y, x) in enumerate(places):
            for j, (v, u) in enumerate(places):
                row = (v - y + 2) * 7 + u - x + 3
                assert torch.equal(matrix[:, i, j], table.weight[row])
    assert table().shape == (HEADS, 12, 12)
    with pytest.raises(ValueError, match="height 4"):
        table(4, 4)
    wide = RelativeTable2d(HEADS, (2, 2), beyond="clamp")(3, 2)
    assert torch.equal(wide[:, 0, 4], wide[:, 0, 2])
    with pytest.raises(ValueError, match="window"):
        RelativeTable2d(1, (0, 3))


def test_indices_of_the_caller() -> None:
    table = IndexedTable(HEADS, 5)
    index = torch.randint(0, 5, (4, 6))
    assert torch.equal(table(index), table.weight[index].movedim(-1, 0))
    many = torch.randint(0, 5, (2, 4, 6))
    assert torch.equal(table(many)[1], table(many[1]))
    with pytest.raises(ValueError, match="index 5"):
        table(torch.full((2, 2), 5))
    with pytest.raises(ValueError, match="index -1"):
        table(torch.full((2, 2), -1))
    with pytest.raises(ValueError, match="axes"):
        table(torch.zeros(3, dtype=torch.long))
    clamped = IndexedTable(HEADS, 5, beyond="clamp")
    assert torch.equal(clamped(torch.full((1, 1), 9))[:, 0, 0], clamped.weight[4])
    with pytest.raises(ValueError, match="index -1"):
        clamped(torch.full((2, 2), -1))


def test_tables_do_not_decay() -> None:
    model = torch.nn.ModuleList(
        [torch.nn.Linear(3, 3), RelativeTable(2, 4), IndexedTable(2, 4), torch.nn.LayerNorm(3)]
    )
    model.append(model[1])  # a shared table counts once
    rest, tables = parameter_groups(model, weight_decay=0.1)
    assert rest["weight_decay"] == 0.1
    assert tables["weight_decay"] == 0
    assert {id(p) for p in tables["params"]} == {id(model[1].weight), id(model[2].weight)}
    assert len(tables["params"]) == 2
    assert {id(p) for p in rest["params"] + tables["params"]} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("buckets", [None, (16, 16)])
def test_compiles_and_builds_on_meta(buckets) -> None:
    table = RelativeTable(HEADS, 10, buckets=buckets, beyond="clamp")
    compiled = torch.compile(table, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(7, 12), table(7, 12))
    with torch.device("meta"):
        built = RelativeTable(HEADS, 10, buckets=buckets)
    assert built.weight.is_meta
    assert built.least == table.least
