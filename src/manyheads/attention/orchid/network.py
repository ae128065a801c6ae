"""Modules of an Orchid layer: the conditioning network and the static long filter.

B batch, N length, C channels, F bins of the spectrum, E position features, W hidden width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.orchid.conditioning import Padding, grouped
from manyheads.attention.orchid.config import OrchidConfig
from manyheads.layers.activations import activation
from manyheads.layers.fourier import transform_pair

__all__ = ["ConditioningNetwork", "ConvStack", "ShortFilter", "StaticFilter"]

# A static filter falls to 1 % at its end over this share of the length, slowest and fastest.
_SLOW, _FAST, _TARGET = 1.5, 0.3, 1e-2
_TINY = 1e-6


class ShortFilter(nn.Module):
    """Weights of a grouped convolution, (C · O, I, K), and its bias."""

    def __init__(self, dim: int, taps: int, *, ins: int = 1, outs: int = 1, bias: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim * outs, ins, taps))
        bound = (ins * taps) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        self.bias = nn.Parameter(torch.empty(dim * outs)) if bias else None
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)


class ConvStack(nn.Module):
    """Short convolutions, each followed by a norm over all channels, on a few parts at once."""

    def __init__(self, config: OrchidConfig, *, ins: int = 1, outs: int = 1) -> None:
        super().__init__()
        c, dim = config, config.embed_dim * outs
        self.act = activation(c.kernel_activation)
        self.convs = nn.ModuleList(
            ShortFilter(
                c.embed_dim, c.kernel_size, ins=outs if i else ins, outs=outs, bias=c.kernel_bias
            )
            for i in range(c.kernel_layers)
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(dim)
            if c.kernel_norm == "layer"
            else nn.BatchNorm1d(dim)
            if c.kernel_norm == "batch"
            else nn.Identity()
            for _ in range(c.kernel_layers)
        )

    def forward(self, parts: tuple[Tensor, ...], *, padding: Padding) -> tuple[Tensor, ...]:
        """Take I parts (B, N, C) to O parts."""
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            assert isinstance(conv, ShortFilter)
            parts = grouped(parts, conv.weight, conv.bias, padding=padding)
            if i < len(self.convs) - 1:
                parts = tuple(self.act(p) for p in parts)
            parts = _normed(norm, parts)
        return parts


def _normed(norm: nn.Module, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Apply a norm whose weights list the parts of a channel together."""
    count, dim = len(parts), parts[0].shape[-1]
    if isinstance(norm, nn.LayerNorm):
        # The statistics do not depend on the order, so the parts stay apart.
        weight, bias = (t.unflatten(0, (dim, count)).mT.flatten() for t in (norm.weight, norm.bias))
        y = F.layer_norm(torch.cat(parts, -1), (count * dim,), weight, bias, norm.eps)
        return y.split(dim, -1)
    if isinstance(norm, nn.BatchNorm1d):
        y = norm(torch.stack(parts, -1).flatten(-2).mT).mT
        return y.unflatten(-1, (dim, count)).unbind(-1)
    return parts


class ConditioningNetwork(nn.Module):
    """Makes the spectrum of a kernel, (B, C, F), from a sequence (B, N, C). Needs training."""

    def __init__(self, config: OrchidConfig) -> None:
        super().__init__()
        self.config = c = config
        self.forward_transform, self.inverse_transform = transform_pair(c.transform, c.norm)
        complex_ = c.transform == "fft"
        both = 2 if complex_ else 1
        if c.conditioning == "type2":
            self.key = ConvStack(c)
            self.query = ConvStack(c)
            if c.domains == "both":
                self.frequency = ConvStack(c, ins=both, outs=both)
            return
        if c.domains != "frequency":
            self.time = ConvStack(c)
        if c.domains != "time":
            self.frequency = ConvStack(c, ins=both if c.conditioning == "phase" else 1, outs=both)

    def forward(self, x: Tensor) -> Tensor:
        """Return the spectrum, complex or real; with ``two_sided`` that of twice the length."""
        c, n = self.config, x.shape[-2]
        if c.conditioning == "type2":
            key, query = (self._transformed(s((x,), padding=c.padding)[0], n) for s in self._pair)
            product = key.conj() * self._sigma(query)
            return self._over_bins(product) if c.domains == "both" else product
        if c.domains != "frequency":
            (x,) = self.time((x,), padding=c.padding)
        spectrum = self._transformed(x, 2 * n if c.two_sided else n)
        if c.conditioning == "type1":
            if c.parity and spectrum.is_complex():
                spectrum = spectrum.real.square() + spectrum.imag.square()
            else:
                spectrum = spectrum.abs()
        return spectrum if c.domains == "time" else self._over_bins(spectrum)

    def kernel_taps(self, spectrum: Tensor, length: int) -> Tensor:
        """Return the first ``length`` taps in time, (B, C, N), of a two-sided spectrum."""
        return self.inverse_transform(spectrum, 2 * length)[..., :length]

    @property
    def _pair(self) -> tuple[ConvStack, ConvStack]:
        return self.key, self.query

    def _transformed(self, x: Tensor, length: int) -> Tensor:
        return self.forward_transform(x.mT, length)

    def _sigma(self, x: Tensor) -> Tensor:
        c = self.config

        def sigma(t: Tensor) -> Tensor:
            if c.sigma == "softshrink":
                return F.softshrink(t, c.sigma_threshold)
            return activation(c.sigma)(t)

        if c.sigma_on_magnitude:
            size = x.abs()
            return sigma(size) * x / size.clamp_min(_TINY)
        if c.sigma == "identity":
            return x
        return torch.complex(sigma(x.real), sigma(x.imag)) if x.is_complex() else sigma(x)

    def _over_bins(self, spectrum: Tensor) -> Tensor:
        """Convolve over neighbouring bins; parts of a complex spectrum are mixed."""
        c = self.config
        padding: Padding = "reflect" if c.padding == "reflect" else "zeros"
        x = spectrum.mT  # (B, F, C)
        parts: tuple[Tensor, ...] = (x.real, x.imag) if x.is_complex() else (x,)
        swap = c.parity and len(parts) == 2
        if swap:
            listed = torch.cat(parts, -1)
            parts = listed[..., ::2], listed[..., 1::2]
        outputs = self.frequency(parts, padding=padding)
        if swap and c.conditioning == "type2":
            listed = torch.stack(outputs, -1).flatten(-2)
            outputs = listed.chunk(2, -1)
        y = torch.complex(*outputs) if len(outputs) == 2 else outputs[0]
        return y.mT


class StaticFilter(nn.Module):
    """A long filter that depends on the place alone: an MLP with sines of position features.

    Also holds ``bias`` (C), the weight of the input beside the convolution.
    """

    def __init__(self, config: OrchidConfig) -> None:
        super().__init__()
        c, width = config, config.filter_width
        self.config = config
        self.bias = nn.Parameter(torch.randn(c.embed_dim))
        t, z = _position_features(c.max_length, c.filter_features)
        if c.learn_positions:
            self.z = nn.Parameter(z)
        else:
            self.register_buffer("z", z)
        self.register_buffer("t", t)
        self.frequency = nn.Parameter(torch.full((1, width), float(c.filter_frequency)))
        self.layers = nn.ModuleList(
            nn.Linear(width if i else c.filter_features, width) for i in range(c.filter_layers + 1)
        )
        self.out = nn.Linear(width, c.embed_dim, bias=False)
        slow, fast = (math.log(_TARGET) / share for share in (_SLOW, _FAST))
        self.register_buffer("deltas", torch.linspace(slow, fast, c.embed_dim)[None, None])

    t: Tensor
    z: Tensor
    deltas: Tensor

    def forward(self, length: int) -> Tensor:
        """Return the first ``length`` taps, (1, N, C).

        Raises:
            ValueError: longer than max_length.
        """
        c = self.config
        if length > c.max_length:
            raise ValueError(
                f"length {length} exceeds max_length {c.max_length} of the static filter: build "
                f"the layer with max_length={length} or more"
            )
        h = self.z[:, :length]
        for layer in self.layers:
            h = torch.sin(c.filter_frequency_scale * self.frequency * layer(h))
        h = self.out(h)
        if c.filter_decay:
            h = h * ((-self.t[:, :length] * self.deltas.abs()).exp() + c.decay_floor)
        return h


def _position_features(length: int, features: int) -> tuple[Tensor, Tensor]:
    """Return the time from 0 to 1, (1, N, 1), and with it cosines and sines, (1, N, E)."""
    bands = (features - 1) // 2
    t = torch.linspace(0, 1, length)[None, :, None]
    place = torch.linspace(0, length - 1, length)[None, :, None]
    angle = torch.linspace(1e-4, bands - 1, bands)[None, None] * (2 * math.pi * place / length)
    return t, torch.cat((t, angle.cos(), -angle.sin()), -1)
