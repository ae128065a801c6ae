"""The parts of an 8-bit Mamba block as operators: kernels where they can be had, PyTorch elsewhere.

B batch, N tokens, C width, E inner channels, G groups, D states, V = E / G, W taps, R width of the
step. Codes are int8. Kernels and PyTorch give the same sums of codes; where a code comes from SiLU
or from the scan, which are float32, the two may differ by one step at a tie.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from manyheads.attention.mamba import MambaState, mamba_update
from manyheads.compress.quamba.hadamard import base_matrix, hadamard_split, hadamard_transform
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.native.int8 import int8_encode, kernels, round_half_away
from manyheads.native.library import strided

__all__ = ["int8_conv", "int8_rotate", "int8_scan", "int8_step"]


def _codes(x: Tensor) -> Tensor:
    return round_half_away(x).clamp(-128, 127).to(torch.int8)


@torch.library.custom_op("manyheads::int8_conv", mutates_args=())
def int8_conv(
    x: Tensor, before: Tensor, weight: Tensor, bias: Tensor | None, scales: Tensor
) -> Tensor:
    """Return the codes of SiLU(conv(x) + bias), (B, N, E).

    Args:
        x: (B, N, E), int8.
        before: (B, W - 1, E), int8, the inputs before the first.
        weight: (W, E), int8.
        bias: (E), float32, or None.
        scales: (2): of input times weight, of the output.
    """
    lib = kernels(x)
    if lib is None:
        wide = torch.cat((before, x), 1)
        taps, length = weight.shape[0], x.shape[1]
        # 4 products of codes: a float32 holds their sum exactly.
        sums = sum(wide[:, j : j + length].float() * weight[j].float() for j in range(taps))
        y = sums * scales[0]
        return _codes(F.silu(y if bias is None else y + bias) / scales[1]).contiguous()
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=torch.int8)
    lib("int8_conv", strided(x), before.contiguous(), weight, bias, scales, out,
        (*x.shape, weight.shape[0], torch.get_num_threads()), x.stride()[:2])  # fmt: skip
    return out


@int8_conv.register_fake
def _(x, before, weight, bias, scales):  # type: ignore[no-untyped-def]
    return torch.empty(x.shape, dtype=torch.int8, device=x.device)


@torch.library.custom_op("manyheads::int8_scan", mutates_args=())
def int8_scan(
    u: Tensor,
    dt: Tensor,
    low: Tensor,
    z: Tensor,
    a: Tensor,
    skip: Tensor,
    bias: Tensor,
    mask: Tensor | None,
    memory: Tensor,
    scales: Tensor,
    rank: int,
) -> tuple[Tensor, Tensor]:
    """Run the selective scan on codes; the states are float32.

    Args:
        u, dt, z: (B, N, E), int8; ``dt`` before its bias and the softplus.
        low: (B, N, R + 2 G D), int8, of which B and C are read.
        a: (G, V, D), float32, rates of decay.
        skip, bias: (E), float32.
        mask: (B, N), True = a real token, or None.
        memory: (B, G, V, D), float32; not changed.
        scales: (4): of u, dt, low, z.
        rank: R.

    Returns:
        (B, N, E), times silu(z), float32; and the memory after the last token.
    """
    groups, _, states = a.shape
    lib = kernels(u)
    if lib is None:
        shared = groups * states
        key, query = (low[..., rank:].float() * scales[2]).split((shared, shared), -1)
        parts = (query, key, u.float() * scales[0], dt.float() * scales[1], z.float() * scales[3])
        q, k, v, d, g = (split_heads(t, groups) for t in parts)
        out, (after,) = mamba_update(
            MambaState(memory), q, k, v, d, a, skip=skip.unflatten(0, (groups, -1)), gate=g,
            delta_bias=bias.unflatten(0, (groups, -1)), mask=mask,
        )  # fmt: skip
        return merge_heads(out).contiguous(), after.contiguous()
    if z.stride(-1) != 1:
        z = z.contiguous()
    state = memory.mT.contiguous()
    if state.data_ptr() == memory.data_ptr():
        state = state.clone()
    out = torch.empty(u.shape)
    fixed = [t if t is None else t.contiguous() for t in (a.mT, skip, bias, mask)]
    lib("int8_scan", u.contiguous(), dt.contiguous(), low.contiguous(), strided(z), *fixed, state,
        out, scales, (*u.shape, groups, states, rank, torch.get_num_threads()),
        z.stride()[:2])  # fmt: skip
    return out, state.mT.contiguous()


@int8_scan.register_fake
def _(u, dt, low, z, a, skip, bias, mask, memory, scales, rank):  # type: ignore[no-untyped-def]
    return torch.empty(u.shape, device=u.device), torch.empty(memory.shape, device=u.device)


@torch.library.custom_op("manyheads::int8_rotate", mutates_args=())
def int8_rotate(y: Tensor, scale: Tensor) -> Tensor:
    """Return the codes of the rotation of ``y`` (..., E), float32, in units of ``scale`` (1)."""
    base, fast = hadamard_split(y.shape[-1])
    factor = _rotation_factor(y.shape[-1], scale)
    lib = kernels(y)
    if lib is None:
        return _codes(hadamard_transform(y, scale=1.0) * factor).contiguous()
    out = torch.empty(y.shape, dtype=torch.int8)
    rows = y.numel() // y.shape[-1]
    lib("int8_rotate", y.contiguous(), base_matrix(base) if base > 1 else None, factor, out,
        (rows, base, fast, torch.get_num_threads()))  # fmt: skip
    return out


@int8_rotate.register_fake
def _(y, scale):  # type: ignore[no-untyped-def]
    return torch.empty(y.shape, dtype=torch.int8, device=y.device)


def _rotation_factor(n: int, scale: Tensor) -> Tensor:
    return (1 / math.sqrt(n)) / scale


@torch.library.custom_op("manyheads::int8_mamba_step", mutates_args=())
def int8_step(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor | None],
    a: Tensor,
    window: Tensor,
    memory: Tensor,
    scales: Tensor,
    groups: int,
    rotated: bool,
) -> list[Tensor]:
    """Pass one token through a whole block: x (B, C), float32.

    Args:
        weights: of in_proj (2E, C), conv (W, E), x_proj, dt_proj, out_proj (C, E), int8.
        biases: of in_proj, conv, dt_proj, skip, out_proj, float32; the first, second and last may
            be None.
        a: (E, D), float32, rates of decay.
        window: (B, W, E), int8, the last inputs of the convolution, newest last.
        memory: (B, E, D), float32.
        scales: (11), see the kernel: input, in_proj, convolution, u, x_proj, dt_proj, dt, low, z,
            the output's code (with a rotation: what it is multiplied by), out_proj.
        groups: G.
        rotated: whether the scan's output is rotated.

    Returns:
        y (B, C), the next window and memory.
    """
    lib = kernels(x)
    assert lib is not None, "the step's operator is called where there are kernels"
    (batch, width), (inner, states) = x.shape, a.shape
    in_w, conv, x_w, dt_w, out_w = weights
    in_b, conv_b, dt_b, skip, out_b = biases
    base, fast = hadamard_split(inner) if rotated else (0, 0)
    after, state = (t.clone(memory_format=torch.contiguous_format) for t in (window, memory))
    out = torch.empty(batch, width)
    lib("int8_mamba_step", x.contiguous(), in_w, in_b, conv, conv_b, x_w, dt_w, dt_b, a, skip,
        base_matrix(base) if base > 1 else None, out_w, out_b, after, state, out, scales,
        (batch, width, inner, groups, states, dt_w.shape[1], conv.shape[0], base, fast,
         torch.get_num_threads()))  # fmt: skip
    return [out, after, state]


@int8_step.register_fake
def _(x, weights, biases, a, window, memory, scales, groups, rotated):  # type: ignore[no-untyped-def]
    return [torch.empty_like(x), torch.empty_like(window), torch.empty_like(memory)]


def encode_output(y: Tensor, scale: Tensor, rotated: bool) -> Tensor:
    """Return the codes of the scan's output, rotated if asked for."""
    return int8_rotate(y, scale) if rotated else int8_encode(y, scale)
