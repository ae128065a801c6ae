"""What the heavy operators of torch cost.

Conventions: a multiply-add is 2 FLOPs, 8 if it is complex. Counted are matrix products,
convolutions, attention kernels, Fourier transforms, triangular and linear solves. Positions in a
convolution's padding count as computed. A fused attention kernel with ``is_causal`` counts the
pairs that the mask leaves, N(N+1)/2; with ``attn_mask`` all pairs are computed, and count. Its
backward computes the scores again and four more products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from manyheads.choose.kernel_flops import KERNELS

__all__ = ["FORMULAS", "TRANSPARENT", "attention_flops"]

Arguments = Mapping[str, Any]
Formula = Callable[[Arguments, Any], int]


def attention_flops(
    query: tuple[int, ...],
    key: tuple[int, ...],
    value: tuple[int, ...],
    *,
    is_causal: bool,
    backward: bool = False,
) -> int:
    """Return the FLOPs of softmax attention's products for (B, H, N, D) shapes.

    Forward are scores and values; backward the scores again, then the gradients of values,
    weights, queries and keys.
    """
    batch, heads, n, d = query
    m, dv = key[-2], value[-1]
    pairs = n * m
    if is_causal:
        square = min(n, m)
        pairs = square * (square + 1) // 2 + (n - square) * m
    width = 3 * d + 2 * dv if backward else d + dv
    return 2 * batch * heads * pairs * width


def _mac(x: Tensor) -> int:
    return 8 if x.is_complex() else 2


def _product(left: str, right: str) -> Formula:
    # (..., M, K) @ (..., K, N), (K, N) @ (N) and (N) . (N): each number on the left meets each
    # column on the right.
    def formula(a: Arguments, out: Any) -> int:
        x, y = a[left], a[right]
        columns = y.shape[-1] if y.ndim > 1 else 1
        return _mac(x) * x.numel() * columns

    return formula


def _weight_rows(weight: str) -> Formula:
    def formula(a: Arguments, out: Any) -> int:
        return _mac(a["self"]) * a["self"].numel() * a[weight].shape[0]

    return formula


def _packed_rows(a: Arguments, out: Any) -> int:
    return _mac(a["X"]) * a["X"].numel() * a["W"].shape[0]


def _outer(a: Arguments, out: Any) -> int:
    return _mac(a["vec1"]) * a["vec1"].numel() * a["vec2"].numel()


def _attention(a: Arguments, out: Any) -> int:
    shapes = (a["query"].shape, a["key"].shape, a["value"].shape)
    return attention_flops(*shapes, is_causal=a["is_causal"])


def _attention_backward(a: Arguments, out: Any) -> int:
    shapes = (a["query"].shape, a["key"].shape, a["value"].shape)
    return attention_flops(*shapes, is_causal=a["is_causal"], backward=True)


def _convolution(a: Arguments, out: Any) -> int:
    x = a["input"] if "input" in a else a["self"]
    places = x if a.get("transposed", False) else out
    return _convolution_macs(a["weight"], places)


def _convolution_backward(a: Arguments, out: Any) -> int:
    places = a["input"] if a["transposed"] else a["grad_output"]
    wanted = sum(bool(m) for m in a["output_mask"][:2])  # the bias gradient is a plain sum
    return wanted * _convolution_macs(a["weight"], places)


def _convolution_macs(weight: Tensor, places: Tensor) -> int:
    # Each weight is used once at each place of each sample; groups are in the weight's shape.
    return _mac(weight) * weight.numel() * places.shape[0] * math.prod(places.shape[2:])


def _convolution_tbc(a: Arguments, out: Any) -> int:
    return _mac(out) * out.shape[0] * out.shape[1] * a["weight"].numel()


def _rnn(backward: bool) -> Formula:
    first, second = ("weight1", "weight2") if backward else ("weight0", "weight1")

    def formula(a: Arguments, out: Any) -> int:
        tokens = a["input"].numel() // a["input"].shape[-1]
        forward = 2 * tokens * (a[first].numel() + a[second].numel())
        return 2 * forward if backward else forward

    return formula


def _fourier(per_point: float) -> Formula:
    # 5 N log2 N for a complex transform of N points, half of that for a real one.
    def formula(a: Arguments, out: Any) -> int:
        shape = list(a["self"].shape)
        dims = a["dim"]
        if "last_dim_size" in a:
            shape[dims[-1]] = a["last_dim_size"]
        points = math.prod(shape[d] for d in dims)
        return round(per_point * math.prod(shape) * math.log2(points)) if points > 1 else 0

    return formula


def _square(matrix: str, weight: float) -> Formula:
    # weight * n³ for each n x n matrix, in real FLOPs (four times as many for complex ones).
    def formula(a: Arguments, out: Any) -> int:
        x = a[matrix]
        return round(_mac(x) / 2 * weight * x.numel() * x.shape[-1])

    return formula


def _solve(matrix: str, right: str, sides: int, factor: float = 0.0) -> Formula:
    # n² FLOPs for each right-hand side and triangular factor, after factor * n³ for factoring.
    def formula(a: Arguments, out: Any) -> int:
        m, solution = a[matrix], out[0] if isinstance(out, (tuple, list)) else out
        n = m.shape[-1]
        real = sides * solution.numel() * n + factor * m.numel() * n
        return round(_mac(m) / 2 * real)

    return formula


_SDPA = "aten::_scaled_dot_product_"

FORMULAS: dict[str, Formula] = {
    **KERNELS,
    "aten::mm": _product("self", "mat2"),
    "aten::addmm": _product("mat1", "mat2"),
    "aten::addmm_": _product("mat1", "mat2"),
    "aten::_addmm_activation": _product("mat1", "mat2"),
    "aten::_int_mm": _product("self", "mat2"),
    "aten::_scaled_mm": _product("self", "mat2"),
    "aten::_weight_int8pack_mm": _weight_rows("mat2"),
    "aten::bmm": _product("self", "mat2"),
    "aten::baddbmm": _product("batch1", "batch2"),
    "aten::baddbmm_": _product("batch1", "batch2"),
    "aten::addbmm": _product("batch1", "batch2"),
    "aten::addbmm_": _product("batch1", "batch2"),
    "aten::mv": _product("self", "vec"),
    "aten::addmv": _product("mat", "vec"),
    "aten::addmv_": _product("mat", "vec"),
    "aten::dot": _product("self", "tensor"),
    "aten::vdot": _product("self", "other"),
    "aten::addr": _outer,
    "aten::addr_": _outer,
    "aten::mkldnn_linear": _weight_rows("weight"),
    "mkldnn::_linear_pointwise": _packed_rows,
    "mkldnn::_reorder_linear_weight": lambda a, out: 0,
    **{
        f"{_SDPA}{kind}": _attention
        for kind in (
            "flash_attention_for_cpu",
            "flash_attention",
            "efficient_attention",
            "cudnn_attention",
            "fused_attention_overrideable",
        )
    },
    **{
        f"{_SDPA}{kind}_backward": _attention_backward
        for kind in (
            "flash_attention_for_cpu",
            "flash_attention",
            "efficient_attention",
            "cudnn_attention",
            "fused_attention_overrideable",
        )
    },
    **{
        f"aten::{kind}": _convolution
        for kind in (
            "convolution",
            "_convolution",
            "convolution_overrideable",
            "mkldnn_convolution",
            "_slow_conv2d_forward",
            "slow_conv3d_forward",
            "slow_conv_dilated2d",
            "slow_conv_dilated3d",
            "_conv_depthwise2d",
            "conv_depthwise3d",
            "cudnn_convolution",
        )
    },
    "aten::conv_tbc": _convolution_tbc,
    "aten::convolution_backward": _convolution_backward,
    "aten::mkldnn_rnn_layer": _rnn(backward=False),
    "aten::mkldnn_rnn_layer_backward": _rnn(backward=True),
    "aten::_fft_c2c": _fourier(5.0),
    "aten::_fft_r2c": _fourier(2.5),
    "aten::_fft_c2r": _fourier(2.5),
    "aten::linalg_cholesky_ex": _square("self", 1 / 3),
    "aten::linalg_lu_factor_ex": _square("A", 2 / 3),
    "aten::linalg_inv_ex": _square("A", 2.0),
    "aten::_linalg_det": _square("A", 2 / 3),
    "aten::_linalg_slogdet": _square("A", 2 / 3),
    "aten::linalg_solve_triangular": _solve("self", "B", 1),
    "aten::triangular_solve": _solve("A", "self", 1),
    "aten::_cholesky_solve_helper": _solve("A", "self", 2),
    "aten::cholesky_solve": _solve("input2", "self", 2),
    "aten::linalg_lu_solve": _solve("LU", "B", 2),
    "aten::_linalg_solve_ex": _solve("A", "B", 2, 2 / 3),
}
"""Operator name to its FLOPs, from the arguments by name and the output."""

TRANSPARENT = {
    "aten::_transformer_encoder_layer_fwd",
    "aten::_native_multi_head_attention",
    "aten::_euclidean_dist",
}
"""Kernels in C++ that take all their products through the dispatcher, so that looking inside
counts them exactly (held against the plain form by tests)."""
