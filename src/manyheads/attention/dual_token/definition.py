"""The token module by its definition, place by place; a reconstruction.

B batch, C channels, H and W rows and columns, G side of the grid of global tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from manyheads.attention.dual_token.module import TokenModule, TokenParts

__all__ = ["dual_token_reference"]


def dual_token_reference(module: TokenModule, x: Tensor, g: Tensor) -> TokenParts:
    """Compute what a :class:`TokenModule` returns, by loops over cells, heads and places.

    Args:
        module: whose weights are used.
        x: map (B, H, W, C).
        g: global tokens (B, G², C).
    """
    from manyheads.attention.dual_token.module import TokenParts

    y = x
    for step in range(module.steps):
        if step:
            conv = module.down[step - 1]
            y = conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y = _cells(y, [(2 * i, 2 * i + 2) for i in range(-(-y.shape[1] // 2))],
                   [(2 * j, 2 * j + 2) for j in range(-(-y.shape[2] // 2))])  # fmt: skip
    rows, columns = (_bounds(n, module.grid) for n in y.shape[1:3])
    x_ds = _cells(y, rows, columns).flatten(1, 2)
    x_ga = module.ga_proj(_attend(module.num_heads, *module.ga_qkv(x_ds).chunk(3, -1)))
    mean = module.alpha * g + (1 - module.alpha) * x_ga
    normed = F.layer_norm(
        mean, mean.shape[-1:], module.g_norm.weight, module.g_norm.bias, module.g_norm.eps
    )
    normed = normed.mT if module.mix else normed
    changed = module.g_fc2(F.gelu(module.g_fc1(normed)))
    g_new = mean + (changed.mT if module.mix else changed)
    key, value = module.gb_kv(g_new).chunk(2, -1)
    x_global = _attend(module.num_heads, module.gb_q(x).flatten(1, 2), key, value)
    return TokenParts(x_ds, x_ga, g_new, x_global.view(x.shape))


def _bounds(size: int, cells: int) -> list[tuple[int, int]]:
    """First and last-but-one of the places that each of ``cells`` averages; they may overlap."""
    return [(i * size // cells, -(-(i + 1) * size // cells)) for i in range(cells)]


def _cells(x: Tensor, rows: list[tuple[int, int]], columns: list[tuple[int, int]]) -> Tensor:
    means = [[x[:, a:b, c:d].mean((1, 2)) for c, d in columns] for a, b in rows]
    return torch.stack([torch.stack(row, 1) for row in means], 1)


def _attend(heads: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    size = query.shape[-1] // heads
    outs = []
    for h in range(heads):
        q, k, v = (t[..., h * size : (h + 1) * size] for t in (query, key, value))
        outs.append(torch.softmax(q @ k.mT / math.sqrt(size), -1) @ v)
    return torch.cat(outs, -1)
