"""What makes Orchid's kernel from the input: short convolutions in time and over frequencies.

N length, D channels, K taps, F = N // 2 + 1 bins. A circular shift of the input multiplies its
spectrum by a phase. Type I takes the magnitude, type II the product of one spectrum with the
conjugate of another: both drop the phase, so the kernel stays, and convolving with it commutes
with shifts. That is exact with padding="circular", and up to the borders with any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from manyheads.errors import unknown_name
from manyheads.layers.fourier import Norm, check_norm, rfft
from manyheads.layers.taps import shifted_sum

__all__ = [
    "PADDINGS",
    "Padding",
    "conditioning_type1",
    "conditioning_type2",
    "depthwise",
    "grouped",
    "pad_length",
]

Padding = Literal["zeros", "reflect", "circular"]
PADDINGS = ("zeros", "reflect", "circular")


def pad_length(x: Tensor, left: int, right: int, padding: Padding = "zeros") -> Tensor:
    """Pad axis -2 of (..., N, D).

    Raises:
        ValueError: unknown padding, or a reflection that is longer than what there is.
    """
    if padding not in PADDINGS:
        raise unknown_name("padding", padding, PADDINGS)
    if left == right == 0:
        return x
    if padding == "zeros":
        return torch.nn.functional.pad(x, (0, 0, left, right))
    n = x.shape[-2]
    place = torch.arange(-left, n + right, device=x.device)
    if padding == "circular":
        return x.index_select(-2, place % n)
    if max(left, right) >= n:
        raise ValueError(
            f"length {n} is too short to reflect {max(left, right)} places: use padding='zeros'"
        )
    return x.index_select(-2, n - 1 - (n - 1 - place.abs()).abs())


def depthwise(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, padding: Padding = "zeros"
) -> Tensor:
    """y_l = Σ_j w_j x_{l + j - (K - 1) / 2} for each channel: (..., N, D) with weight (D, K)."""
    return grouped((x,), weight[:, None], bias, padding=padding)[0]


def grouped(
    parts: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    padding: Padding = "zeros",
) -> tuple[Tensor, ...]:
    """Depthwise convolutions that mix a few parts of each channel, of the same length.

    Sums of shifted copies: for a few taps far faster on a CPU than a grouped conv1d.

    Args:
        parts: I tensors (..., N, D), as real and imaginary parts.
        weight: (D · O, I, K), K odd; the O outputs of a channel lie together, as in a grouped
            conv1d.
        bias: (D · O) or None.
        padding: at both ends.

    Returns:
        O tensors (..., N, D).
    """
    n, d = parts[0].shape[-2:]
    taps = weight.shape[-1]
    if weight.shape[0] % d or weight.shape[1] != len(parts) or taps % 2 == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}, expected (a multiple of {d} channels, "
            f"{len(parts)}, an odd number of taps)"
        )
    side = (taps - 1) // 2
    padded = [pad_length(p, side, side, padding).reshape(-1, n + 2 * side, d) for p in parts]
    table = weight.unflatten(0, (d, -1)).to(parts[0].dtype)  # (D, O, I, K)
    outputs = []
    for o in range(table.shape[1]):
        y = shifted_sum(padded[0], table[:, o, 0])
        for i, p in enumerate(padded[1:], 1):
            y = y + shifted_sum(p, table[:, o, i])
        if bias is not None:
            y = y + bias.unflatten(0, (d, -1))[:, o].to(y.dtype)
        outputs.append(y.reshape(parts[0].shape))
    return tuple(outputs)


def conditioning_type1(
    x: Tensor,
    time_weight: Tensor,
    frequency_weight: Tensor,
    *,
    time_bias: Tensor | None = None,
    frequency_bias: Tensor | None = None,
    squared: bool = False,
    padding: Padding = "circular",
    norm: Norm = "backward",
) -> Tensor:
    """Orchid's type I: Conv_f(|F(Conv_t(x))|), the spectrum of a kernel. Needs training.

    Args:
        x: (..., N, D).
        time_weight: (D, K), taps over neighbouring tokens.
        frequency_weight: (D, K'), taps over neighbouring bins; or (2D, K'), pairs of rows that
            give the real and the imaginary part.
        time_bias, frequency_bias: (D) and as many as rows.
        squared: the squared magnitude, as the official code takes it.
        padding: of the convolution in time; "circular" keeps shift equivariance exact. Over
            bins it is always zeros.
        norm: scaling of the transform, see :func:`manyheads.attention.circular_conv`.

    Returns:
        (..., N // 2 + 1, D), real, or complex for 2D rows; for ``circular_conv`` with
        domain="frequency".
    """
    x = _wide(x, norm)
    spectrum = _spectrum(depthwise(x, time_weight, time_bias, padding=padding), norm)
    size = spectrum.abs()
    size = (size.square() if squared else size).mT
    outputs = grouped((size,), frequency_weight[:, None], frequency_bias)
    return outputs[0] if len(outputs) == 1 else torch.complex(*outputs)


def conditioning_type2(
    x: Tensor,
    key_weight: Tensor,
    query_weight: Tensor,
    frequency_weight: Tensor,
    *,
    key_bias: Tensor | None = None,
    query_bias: Tensor | None = None,
    frequency_bias: Tensor | None = None,
    padding: Padding = "circular",
    norm: Norm = "backward",
) -> Tensor:
    """Orchid's type II: Conv_f(conj(F(k(x))) ⊙ F(q(x))), a cross-correlation. Needs training.

    Args:
        x: (..., N, D).
        key_weight, query_weight: (D, K), taps over neighbouring tokens.
        frequency_weight: (D, K'), taps over neighbouring bins, the same for both parts; or
            (2D, 2, K'), which mixes the real and the imaginary part of a channel.
        key_bias, query_bias: (D).
        frequency_bias: (D), on the real part; or (2D), on both.
        padding, norm: as for :func:`conditioning_type1`.

    Returns:
        (..., N // 2 + 1, D), complex.
    """
    x = _wide(x, norm)
    key = _spectrum(depthwise(x, key_weight, key_bias, padding=padding), norm)
    query = _spectrum(depthwise(x, query_weight, query_bias, padding=padding), norm)
    product = (key.conj() * query).mT
    if frequency_weight.ndim == 3:
        return torch.complex(
            *grouped((product.real, product.imag), frequency_weight, frequency_bias)
        )
    return torch.complex(
        depthwise(product.real, frequency_weight, frequency_bias),
        depthwise(product.imag, frequency_weight),
    )


def _wide(x: Tensor, norm: Norm) -> Tensor:
    check_norm(norm)
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _spectrum(x: Tensor, norm: Norm) -> Tensor:
    return rfft(x.mT, norm=norm)
