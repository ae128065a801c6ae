"""A token of a Mamba block in one call, where nobody looks on: inference on a CPU in float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from manyheads.layers.few_rows import FEW_ROWS, Linear
from manyheads.layers.precision import is_plain_inference
from manyheads.native import library

if TYPE_CHECKING:
    from manyheads.attention.mamba.module import MambaMixer

__all__ = ["block_step"]

_LEAST = 1 << 16  # numbers of the input matrix: below, a call costs as much as the block


def block_step(
    block: MambaMixer, x: Tensor, window: Tensor, memory: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Pass one token through a block: as ``step`` by torch's operators, up to rounding.

    Args:
        block: whose projections are ordinary ones, without hooks.
        x: (B, C).
        window: (B, E, W), the last inputs of the convolution.
        memory: (B, E, D).

    Returns:
        y (B, C), the next window and memory; None where torch's operators have to run: gradients,
        another dtype or device, tracing, hooks, more than eight rows, small blocks, no compiler.
    """
    batch = x.shape[0]
    if x.shape[-1] != block.config.embed_dim or not 0 < batch <= FEW_ROWS:
        return None
    tensors = _tensors(block)
    if tensors is None or tensors[0].numel() < _LEAST:  # type: ignore[union-attr]
        return None
    given = [t for t in (x, window, memory, *tensors) if t is not None]
    if not is_plain_inference(*given) or (lib := library("scan")) is None:
        return None
    c = block.config
    inner, low = c.inner_dim, c.rank + 2 * c.num_heads * c.state_dim
    before, held = window.mT.contiguous(), memory.contiguous()
    after, state, out = torch.empty_like(before), torch.empty_like(held), x.new_empty(x.shape)
    scratch = x.new_empty(batch * (5 * inner + low))
    step = lib.bind("scan_block_step", pointers=19, integers=0)
    sizes = (batch, c.embed_dim, inner, c.num_heads, c.state_dim, c.rank, c.conv_size)
    lengths = torch.tensor((*sizes, torch.get_num_threads()))
    kept = [None if t is None else t.contiguous() for t in (x, *tensors)]
    step(*(None if t is None else t.data_ptr()
           for t in (*kept, before, held, after, state, out, scratch, lengths)))  # fmt: skip
    return out, after.mT, state


def _tensors(block: MambaMixer) -> tuple[Tensor | None, ...] | None:
    """Return the weights in the kernel's order, None where a part is not what it was built as."""
    parts = (block.in_proj, block.x_proj, block.dt_proj, block.out_proj)
    if any(type(p) not in (nn.Linear, Linear) for p in parts) or any(
        m._forward_hooks or m._forward_pre_hooks for m in (*parts, block.conv)
    ):
        return None
    return (
        block.in_proj.weight, block.in_proj.bias, block.conv.weight, block.conv.bias,
        block.x_proj.weight, block.dt_proj.weight, block.dt_proj.bias, block.a_log, block.skip,
        block.out_proj.weight, block.out_proj.bias,
    )  # fmt: skip
