"""The public functions: circular convolution of any length, and Orchid's gated product.

B batch, H heads, N length, D head dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from manyheads.attention.orchid.definition import circular_conv_reference
from manyheads.attention.orchid.fast import gated_conv
from manyheads.errors import unknown_name
from manyheads.layers.fourier import Norm, check_norm, rfft
from manyheads.layers.heads import check_qkv, repeat_kv
from manyheads.layers.ragged import check_mask, map_lengths, map_packed

__all__ = ["circular_conv", "orchid", "refuse_causal"]

Implementation = Literal["auto", "fft", "direct"]
_IMPLEMENTATIONS = ("auto", "fft", "direct")


def refuse_causal(is_causal: bool) -> None:
    """Raise a ValueError if asked for the autoregressive form, which does not exist."""
    if is_causal:
        raise ValueError(
            "orchid has no causal form: its kernel and its circular convolution see the whole "
            "sequence. Use is_causal=False, or gla, norm or aaren for autoregressive models "
            "(the option of the official code that is called causal is two_sided here)"
        )


def circular_conv(
    x: Tensor,
    kernel: Tensor,
    *,
    norm: Norm = "backward",
    domain: Literal["time", "frequency"] = "time",
) -> Tensor:
    """Circular convolution along axis -2 in O(N log N), any N. Every output sees all inputs.

    y_i = c Σ_j kernel_j x_{(i - j) mod N} for each channel, c = 1, 1/sqrt(N) or 1/N.

    Args:
        x: (..., N, D), real.
        kernel: (..., N, D) taps, or with domain="frequency" their one-sided spectrum
            (..., N // 2 + 1, D), real or complex; leading axes broadcast. Imaginary parts of the
            first bin, and of the last one of an even N, have no effect.
        norm: scaling, as in torch.fft: "backward" is the plain convolution, "ortho" divides it by
            sqrt(N), "forward" by N.
        domain: what ``kernel`` is.

    Returns:
        (..., N, D) in the dtype of ``x``; transforms run in float32 at least.

    Raises:
        ValueError: the kernel's length or width does not fit, or an unknown name.

    Example:
        >>> x, kernel = torch.randn(1, 4, 15, 8), torch.zeros(15, 1)
        >>> kernel[1] = 1  # a shift by one
        >>> torch.allclose(circular_conv(x, kernel), x.roll(1, -2), atol=1e-5)
        True
    """
    check_norm(norm)
    if domain not in ("time", "frequency"):
        raise unknown_name("domain", domain, ("time", "frequency"))
    n = x.shape[-2]
    wanted = n if domain == "time" else n // 2 + 1
    if kernel.shape[-2] != wanted:
        raise ValueError(
            f"kernel has length {kernel.shape[-2]}, input of length {n} needs {wanted} "
            f"with domain={domain!r}"
        )
    if kernel.shape[-1] not in (1, x.shape[-1]):
        raise ValueError(f"kernel has {kernel.shape[-1]} channels, the input {x.shape[-1]}")
    work = torch.promote_types(x.dtype, torch.float32)
    spectrum = kernel.mT
    if domain == "time":
        spectrum = rfft(spectrum.to(work), norm=norm)
    elif not kernel.is_complex():
        spectrum = spectrum.to(work)
    y = torch.fft.irfft(rfft(x.mT.to(work), norm=norm) * spectrum, n=n, norm=norm)
    return y.mT.to(x.dtype)


def orchid(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Tensor,
    *,
    skip: Tensor | None = None,
    norm: Norm = "backward",
    is_causal: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    implementation: Implementation = "auto",
) -> Tensor:
    """Orchid's mixing, query ⊙ (kernel * (key ⊙ value)). Not softmax, not causal: needs training.

    The paper's x0, x1 and v in the places of query, key and value: both are gates, nothing is
    compared. The kernel is what :func:`manyheads.attention.conditioning_type1` or
    :func:`~manyheads.attention.conditioning_type2` make of the input, in time, plus a static one;
    ``kernel[..., j, :]`` weighs the token j places before, counted on a circle of the sequence's
    own length.

    Args:
        query: (B, H, N, D), the gate behind the convolution.
        key, value: (B, H_kv, N, D), multiplied before it; each head serves H / H_kv query heads.
        kernel: (B, H_kv, N, D), or (1, H_kv, N, D) for one that all rows share.
        skip: (H, D) or (D,), weight of key ⊙ value beside the convolution.
        norm: scaling of the convolution, see :func:`circular_conv`.
        is_causal: must be False.
        mask: (B, N), True = a real token; padded tokens and their taps are cut out, so that the
            circle has the real length; their outputs are 0. Rows of different lengths are
            transformed one length at a time.
        cu_seqlens: (S + 1) borders of sequences packed in a batch of 1; each has a circle of its
            own, and the taps that stand at its own places.
        implementation: "fft" (O(N log N)), "direct" (the sum, O(N²)), "auto" is "fft".

    Returns:
        (B, H, N, D) in the dtype of ``query``.

    Raises:
        ValueError: is_causal=True, shapes do not fit, or the implementation is unknown.

    Example:
        >>> q, k, v, h = torch.randn(4, 1, 2, 100, 16)
        >>> orchid(q, k, v, h).shape
        torch.Size([1, 2, 100, 16])
    """
    refuse_causal(is_causal)
    check_qkv(query, key, value, same_length=True)
    _check_kernel(key, value, kernel)
    check_norm(norm)
    batch, _, length, _ = query.shape
    mask = check_mask(mask, batch, length)
    if implementation not in _IMPLEMENTATIONS:
        raise unknown_name("implementation", implementation, _IMPLEMENTATIONS)

    def run(q: Tensor, k: Tensor, v: Tensor, h: Tensor) -> Tensor:
        return _whole(q, k, v, h, skip, norm, implementation)

    if cu_seqlens is not None:
        if mask is not None:
            raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")
        (out,) = map_packed(
            lambda *t: map_lengths(run, t[:4], t[4]), (query, key, value, kernel), cu_seqlens
        )
        return out
    if mask is None:
        return run(query, key, value, kernel) if length else torch.zeros_like(query)
    kernel = kernel.expand(batch, -1, -1, -1)
    return map_lengths(run, (query, key, value, kernel), mask)


def _whole(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel: Tensor,
    skip: Tensor | None,
    norm: Norm,
    implementation: Implementation,
) -> Tensor:
    heads, work = query.shape[1], torch.promote_types(query.dtype, torch.float32)
    if implementation != "direct" and key.shape[1] == heads and skip is None:
        return gated_conv(query, key, value, kernel.expand_as(key), norm=norm)
    x, h = key.to(work) * value.to(work), kernel.to(work)
    conv = circular_conv_reference if implementation == "direct" else circular_conv
    y = repeat_kv(conv(x, h, norm=norm), heads)
    if skip is not None:
        y = torch.addcmul(y, repeat_kv(x, heads), skip.to(work).unsqueeze(-2))
    return (query.to(work) * y).to(query.dtype)


def _check_kernel(key: Tensor, value: Tensor, kernel: Tensor) -> None:
    if value.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"head_dim of key and value differ: {key.shape[-1]} and {value.shape[-1]}; they are "
            "multiplied number by number"
        )
    if kernel.ndim != 4 or kernel.shape[1:] != key.shape[1:]:
        raise ValueError(
            f"kernel has shape {tuple(kernel.shape)}, expected (batch or 1, heads, length, "
            f"head_dim) = (1 or {key.shape[0]}, {key.shape[1]}, {key.shape[2]}, {key.shape[3]})"
        )
    if kernel.shape[0] not in (1, key.shape[0]):
        raise ValueError(f"batch of kernel is {kernel.shape[0]}, of key {key.shape[0]}")
