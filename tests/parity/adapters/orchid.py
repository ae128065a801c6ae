"""Orchid's operator in all its transforms, and the equations of its core."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention import (
    OrchidAttention,
    OrchidConfig,
    circular_conv,
    conditioning_type1,
    conditioning_type2,
)
from parity.golden import Golden, adapter


def real(x: Tensor) -> Tensor:
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


@adapter(
    "orchid",
    "type1_dct",
    "type1_fft_freqdomain",
    "type1_fft_ortho_oddL",
    "type1_fft_twosided",
    "type2_dct",
    "type2_fft",
    "type2_fft_tanh_abs",
)
def operator(golden: Golden) -> dict[str, Tensor]:
    layer = OrchidAttention(OrchidConfig.from_official(golden.config))
    layer.load_official(golden.weights).eval()
    (x,) = golden.leaves("x")
    y = layer(x)
    y.backward(golden.inputs["grad_output"])
    assert x.grad is not None
    gradients = layer.key_map().to_official(
        {n: p.grad for n, p in layer.named_parameters() if p.grad is not None}
    )
    return {
        "out.y": y,
        "out.kernel_fixed": layer.static_kernel(x.shape[1]),
        "out.kernel_adapt": real(layer.adaptive_kernel(x)),
        "grad.x": x.grad,
    } | {f"grad.{part}{n}": g for n, g in gradients.items() for part in ("", "w.")}


@adapter("orchid", "core_type1_equations", "core_type2_equations")
def core(golden: Golden) -> dict[str, Tensor]:
    golden.options("B", "D", "L", "kernel")
    given = golden.inputs
    x = given["x"].mT
    if "conv_time_q_w" in given:
        spectrum = conditioning_type2(
            x,
            given["conv_time_w"],
            given["conv_time_q_w"],
            given["conv_freq_w"],
            key_bias=given.get("conv_time_b"),
            query_bias=given.get("conv_time_q_b"),
            frequency_bias=given.get("conv_freq_b"),
        )
    else:
        spectrum = conditioning_type1(
            x,
            given["conv_time_w"],
            given["conv_freq_w"],
            time_bias=given.get("conv_time_b"),
            frequency_bias=given.get("conv_freq_b"),
        )
    y = circular_conv(x, spectrum, domain="frequency")
    return {"out.h_f": real(spectrum.mT.to(torch.complex64)), "out.y": y.mT}
