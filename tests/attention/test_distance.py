"""Attention with biases by distance: the definition, other maps, its table."""

from __future__ import annotations

import pytest
import torch

from compare import assert_close
from manyheads.attention.grid import build_mixer
from manyheads.attention.grid.distance import (
    DistanceAttention,
    distance_attention_reference,
    distance_index,
    resize_distances,
)


def test_equals_the_definition_on_an_odd_map() -> None:
    layer = DistanceAttention(20, grid=(3, 5), num_heads=3, key_dim=7, value_ratio=2).double()
    torch.nn.init.normal_(layer.biases)
    x = torch.randn(2, 15, 20, dtype=torch.float64)
    heads = layer.qkv(x).unflatten(2, (3, 28)).transpose(1, 2)
    q, k, v = heads.split((7, 7, 14), 3)
    out = distance_attention_reference(q, k, v, layer.biases, grid=(3, 5))
    expected = layer.proj(out.transpose(1, 2).flatten(2))
    assert_close(layer(x, (3, 5)), expected, 1e-12)


def test_index_is_the_order_of_first_appearance() -> None:
    rows, columns = 4, 3
    order: dict[tuple[int, int], int] = {}
    index = distance_index(rows, columns)
    for i in range(rows * columns):
        for j in range(rows * columns):
            offset = (abs(i // columns - j // columns), abs(i % columns - j % columns))
            assert index[i, j] == order.setdefault(offset, len(order))


def test_resized_tables_keep_their_ends() -> None:
    table = torch.randn(2, 6)
    assert resize_distances(table, (2, 3), (2, 3)) is table
    wide = resize_distances(table, (2, 3), (5, 9)).unflatten(1, (5, 9))
    small = table.unflatten(1, (2, 3))
    corners = wide[:, [0, 0, 4, 4], [0, 8, 0, 8]]
    assert torch.allclose(corners, small[:, [0, 0, 1, 1], [0, 2, 0, 2]])
    # Halfway between two distances is the mean of their biases.
    assert torch.allclose(wide[:, 2, 0], (small[:, 0, 0] + small[:, 1, 0]) / 2)
    assert resize_distances(table.half(), (2, 3), (1, 1)).dtype == torch.float16


def test_biases_follow_the_weights_in_eval() -> None:
    layer = DistanceAttention(16, grid=(3, 3), num_heads=2, key_dim=4).eval()
    x = torch.randn(1, 9, 16)
    before = layer(x, (3, 3))
    torch.nn.init.normal_(layer.biases)
    assert not torch.allclose(layer(x, (3, 3)), before)


def test_a_mirrored_map_gives_the_mirrored_answer() -> None:
    layer = build_mixer("distance", 24, num_heads=3, grid=(4, 6), key_dim=5)
    torch.nn.init.normal_(layer.biases)
    x = torch.randn(2, 24, 5, 7)
    assert_close(layer(x.flip(2, 3)), layer(x).flip(2, 3), 1e-5)


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="12 tokens are no map of 3 x 5"):
        DistanceAttention(8, num_heads=1, key_dim=2)(torch.randn(1, 12, 8), (3, 5))
    with pytest.raises(ValueError, match="num_heads 0"):
        DistanceAttention(8, num_heads=0)
    with pytest.raises(ValueError, match="no option 'side'"):
        build_mixer("distance", 8, side=3)
