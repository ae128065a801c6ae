"""A pooling block's first half in one sweep: a kernel where it can be had, PyTorch elsewhere.

B batch, C channels, H and W rows and columns.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.layers.precision import is_plain_inference
from manyheads.native import library

__all__ = ["pool_norm"]


def pool_norm(
    x: Tensor,
    gain: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    window: int,
    eps: float,
    eps_after: float,
) -> tuple[Tensor, Tensor]:
    """Return m = x + pool(norm(x)) - norm(x) and norm(m), both norms over an image's whole map.

    The kernel runs in float32 on a CPU without gradients; anything else, and what is traced
    (compile, export), is computed by PyTorch. Both results are channels-last in memory.

    Args:
        x: maps (B, C, H, W); read without a copy in channels-last memory.
        gain: of the first norm, (C); its shift cancels.
        weight, bias: of the second norm, (C).
        window: side of the mean's window, odd; places outside of the map do not count.
        eps, eps_after: of the norms.
    """
    bears = x.numel() > 0 and is_plain_inference(x, gain, weight, bias)
    form = _swept if bears else _plain
    return form(x, gain, weight, bias, window, eps, eps_after)


def _plain(
    x: Tensor,
    gain: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: int,
    eps: float,
    eps_after: float,
) -> tuple[Tensor, Tensor]:
    x = x.contiguous(memory_format=torch.channels_last)
    normed = F.group_norm(x, 1, gain, None, eps)
    pooled = F.avg_pool2d(normed, window, 1, window // 2, count_include_pad=False)
    mixed = x + (pooled - normed)
    return mixed, F.group_norm(mixed, 1, weight, bias, eps_after)


@torch.library.custom_op("manyheads::pool_norm", mutates_args=())
def _swept(
    x: Tensor,
    gain: Tensor,
    weight: Tensor,
    bias: Tensor,
    window: int,
    eps: float,
    eps_after: float,
) -> tuple[Tensor, Tensor]:
    mixed, normed = (torch.empty_like(x, memory_format=torch.channels_last) for _ in range(2))
    lib = library("pool", like=x)
    if lib is None:
        for out, found in zip(
            (mixed, normed), _plain(x, gain, weight, bias, window, eps, eps_after), strict=True
        ):
            out.copy_(found)
        return mixed, normed
    batch, channels, height, width = x.shape
    threads = torch.get_num_threads()
    lib("pool_norm", _places(x).contiguous(), gain.contiguous(), weight.contiguous(),
        bias.contiguous(), _places(mixed), _places(normed), x.new_empty(threads, width * channels),
        x.new_empty(4 * batch * height), (batch, height, width, channels, window, threads),
        eps, eps_after)  # fmt: skip
    return mixed, normed


@_swept.register_fake
def _(x, gain, weight, bias, window, eps, eps_after):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.channels_last) for _ in range(2))


def _places(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)
