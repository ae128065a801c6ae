"""The W8A8 Mamba block: int8 weights held as int8, int8 activations, float32 states.

Lossy, inference alone. B batch, N length, C width, E inner channels, W taps, D states.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from manyheads.attention.mamba import MambaConfig, MambaLayerState, MambaMixer
from manyheads.compress.quamba.calibrate import Scales
from manyheads.compress.quamba.hadamard import hadamard_split, hadamard_transform
from manyheads.compress.quamba.ops import encode_output, int8_conv, int8_scan, int8_step
from manyheads.compress.quamba.quantisers import absmax_scale, quantise
from manyheads.layers.keymap import KeyMap
from manyheads.layers.mixer import SequenceMixer
from manyheads.layers.ragged import check_mask, compact, map_packed
from manyheads.native.int8 import int8_encode, int8_linear, kernels

__all__ = ["ACTIVATIONS", "WEIGHT_NAMES", "Int8Mamba", "activation_scales"]

WEIGHT_NAMES = (
    "in_proj", "conv", "x_proj", "dt_proj", "out_proj", "a_log", "skip", "conv_bias", "dt_bias"
)  # fmt: skip
"""The int8 tensors of a block, each with one scale."""

ACTIVATIONS = ("input", "in_proj", "u", "x_proj", "dt_proj", "y")
"""Activations with a scale each: the block's input, all of in_proj's output, the convolution's
output, all of x_proj's output, dt_proj's output before its bias, the scan's output."""


def activation_scales(scales: Scales) -> Tensor:
    """Return the scales at `ACTIVATIONS`, (6), from those of a calibration, by site.

    What one kernel writes has one scale: that of its largest part.
    """
    return torch.cat((
        scales["input"], torch.maximum(scales["conv_in"], scales["gate"]), scales["u"],
        torch.maximum(torch.maximum(scales["dt_low"], scales["key"]), scales["query"]),
        scales["dt_raw"], scales["y"],
    ))  # fmt: skip


def _forget_tables(module: Any, keys: Any) -> None:
    module._forget()


class Int8Mamba(SequenceMixer):
    """Mamba block in int8, a replacement of a trained `MambaMixer`. Lossy; no gradients.

    The weights are one byte each and there is nothing else of their size. Decoding by `step` gives
    what the whole pass gives, up to codes at a tie.

    Attributes:
        scales: (6), of `ACTIVATIONS`, float32.
        weight_scales: (9), of `WEIGHT_NAMES`, float32.
        hadamard: whether the scan's output is rotated; ``out_proj`` then holds the rotation.

    Example:
        >>> block = MambaMixer(MambaConfig(embed_dim=24))
        >>> small = Int8Mamba.from_float(block, calibrate_block(block, [torch.randn(1, 50, 24)]))
        >>> small(torch.randn(2, 7, 24)).shape
        torch.Size([2, 7, 24])
    """

    mechanism: ClassVar[str] = "mamba"
    config: MambaConfig
    in_proj: Tensor
    conv: Tensor
    conv_bias: Tensor
    x_proj: Tensor
    dt_proj: Tensor
    dt_bias: Tensor
    a_log: Tensor
    skip: Tensor
    out_proj: Tensor
    in_bias: Tensor
    out_bias: Tensor
    scales: Tensor
    weight_scales: Tensor

    def __init__(self, config: MambaConfig, *, hadamard: bool = True) -> None:
        super().__init__()
        self.config, self.hadamard = config, hadamard
        c, inner = config, config.inner_dim
        if hadamard:
            hadamard_split(inner)
        shapes = {
            "in_proj": (2 * inner, c.embed_dim),
            "conv": (c.conv_size, inner),
            "x_proj": (c.rank + 2 * c.num_heads * c.state_dim, inner),
            "dt_proj": (inner, c.rank),
            "dt_bias": (inner,),
            "a_log": (inner, c.state_dim),
            "skip": (inner,),
            "out_proj": (c.embed_dim, inner),
        }
        if c.conv_bias:
            shapes["conv_bias"] = (inner,)
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int8))
        if c.proj_bias:
            self.register_buffer("in_bias", torch.zeros(2 * inner))
            self.register_buffer("out_bias", torch.zeros(c.embed_dim))
        self.register_buffer("scales", torch.ones(len(ACTIVATIONS)))
        self.register_buffer("weight_scales", torch.ones(len(WEIGHT_NAMES)))
        self._tables: tuple[Tensor, ...] | None = None
        self.register_load_state_dict_post_hook(_forget_tables)

    def _forget(self) -> None:
        self._tables = None

    def _apply(self, fn, recurse: bool = True) -> Self:  # type: ignore[no-untyped-def]
        kept = {n: getattr(self, n) for n in ("scales", "weight_scales")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            if getattr(self, name).dtype != torch.float32:  # small ranges do not survive half
                setattr(self, name, before.to(getattr(self, name).device))
        self._forget()
        return self

    @classmethod
    @torch.no_grad()
    def from_float(
        cls, block: MambaMixer, scales: Scales | Tensor, *, hadamard: bool = True
    ) -> Self:
        """Quantise a float block; the block is not changed.

        Args:
            block: trained, not rotated.
            scales: of a calibration, by site, or those of `ACTIVATIONS`, (6).
            hadamard: as at the calibration.

        Raises:
            ValueError: a weight holds NaN, or E has no rotation.
        """
        made = cls(block.config, hadamard=hadamard).to(block.in_proj.weight.device)
        made.scales.copy_(scales if isinstance(scales, Tensor) else activation_scales(scales))
        out = block.out_proj.weight.float()
        weights = {
            "in_proj": block.in_proj.weight,
            "conv": block.conv.weight[:, 0].mT,
            "x_proj": block.x_proj.weight,
            "dt_proj": block.dt_proj.weight,
            "out_proj": hadamard_transform(out) if hadamard else out,
            "a_log": block.a_log,
            "skip": block.skip,
            "conv_bias": block.conv.bias,
            "dt_bias": block.dt_proj.bias,
        }
        for i, name in enumerate(WEIGHT_NAMES):
            weight = weights[name]
            if weight is None:
                continue
            scale = absmax_scale(weight)
            made.weight_scales[i] = scale[0]
            getattr(made, name).copy_(quantise(weight, scale))
        if block.config.proj_bias:
            made.in_bias.copy_(block.in_proj.bias)
            made.out_bias.copy_(block.out_proj.bias)
        return made.train(block.training)

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaLayerState:
        """Return zeros: ``conv`` (B, E, W) int8, ``ssm`` (B, E, D) float32."""
        c, device = self.config, device or self.scales.device
        # As the kernel keeps them: a row a tap, seen transposed.
        conv = torch.zeros(batch_size, c.conv_size, c.inner_dim, dtype=torch.int8, device=device)
        return MambaLayerState(
            conv.mT, torch.zeros(batch_size, c.inner_dim, c.state_dim, device=device)
        )

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        if cu_seqlens is not None:
            if mask is not None:
                raise ValueError("give mask or cu_seqlens, not both: packed tokens are all real")
            return map_packed(lambda t, m: self(t, mask=m), (x,), cu_seqlens, dim=1)[0]
        return self.update(x, self.init_state(x.shape[0]), mask=mask)[0]

    @torch.no_grad()
    def update(
        self, x: Tensor, state: MambaLayerState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, MambaLayerState]:
        out, after, _ = self.trace(x, state, mask=mask)
        return out, after

    @torch.no_grad()
    def trace(
        self, x: Tensor, state: MambaLayerState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, MambaLayerState, dict[str, Tensor]]:
        """Run (B, N, C); returns the output, the next state, and the codes of `ACTIVATIONS` beside
        ``scan`` (B, N, E), the scan's output in float32."""
        c, scales = self.config, self.scales
        mask = check_mask(mask, x.shape[0], x.shape[1])
        moved = None if mask is None else compact(mask)
        if moved is not None:
            x = moved.gather(x).masked_fill(~moved.front[..., None], 0)
        rates, skip, dt_bias, conv_bias, products, conv_scales, scan_scales, _ = self._constants()
        h = int8_encode(x.float(), scales[:1])
        xz = int8_linear(h, self.in_proj, products[0:1], bias=self._in_bias(), codes=True)
        u, z = xz.chunk(2, -1)
        window = state.conv.mT
        before = u
        u = int8_conv(u, window[:, 1:], self.conv, conv_bias, conv_scales)
        low = int8_linear(u, self.x_proj, products[1:2], codes=True)
        dt = int8_linear(low[..., : c.rank], self.dt_proj, products[2:3], codes=True)
        groups = c.num_heads
        y, memory = int8_scan(
            u, dt, low, z, rates.unflatten(0, (groups, -1)), skip, dt_bias,
            None if moved is None else moved.front,
            state.ssm.unflatten(1, (groups, -1)).contiguous(), scan_scales, c.rank,
        )  # fmt: skip
        codes = encode_output(y, scales[5:6], self.hadamard)
        out = int8_linear(codes, self.out_proj, products[3:4], bias=self._out_bias())
        keep = c.conv_size
        length = x.shape[1]
        if moved is None:
            last = torch.cat((window[:, length:], before[:, max(length - keep, 0) :]), 1)
        else:
            wide = torch.cat((window, before), 1)
            ends = moved.front.sum(1, keepdim=True) + torch.arange(keep, device=x.device)
            last = wide.gather(1, ends[..., None].expand(-1, -1, wide.shape[-1]))
            out = moved.scatter(out.masked_fill(~moved.front[..., None], 0))
        seen = dict(zip(ACTIVATIONS, (h, xz, u, low, dt, codes), strict=True)) | {"scan": y}
        return out.to(x.dtype), MambaLayerState(last.mT, memory.flatten(1, 2)), seen

    @torch.no_grad()
    def step(self, x: Tensor, state: MambaLayerState) -> tuple[Tensor, MambaLayerState]:
        if kernels(x) is None:
            out, after = self.update(x[:, None], state)
            return out[:, 0], after
        rates, skip, dt_bias, conv_bias, *_, everything = self._constants()
        out, window, memory = int8_step(
            x.float(), [self.in_proj, self.conv, self.x_proj, self.dt_proj, self.out_proj],
            [self._in_bias(), conv_bias, dt_bias, skip, self._out_bias()], rates, state.conv.mT,
            state.ssm, everything, self.config.num_heads, self.hadamard,
        )  # fmt: skip
        return out.to(x.dtype), MambaLayerState(window.mT, memory)

    def _in_bias(self) -> Tensor | None:
        return self.in_bias / self.scales[1] if self.config.proj_bias else None

    def _out_bias(self) -> Tensor | None:
        return self.out_bias if self.config.proj_bias else None

    def _constants(self) -> tuple[Tensor, ...]:
        """Return what the codes of small tensors read as, and products of scales; made once.

        Rates (E, D), skip, the steps' bias and the convolution's (E), scales of the four products,
        of the convolution (2), of the scan (4), and all of a step's (11).
        """
        if self._tables is None:
            w = dict(zip(WEIGHT_NAMES, self.weight_scales, strict=True))
            s = dict(zip(ACTIVATIONS, self.scales, strict=True))
            rates = -(self.a_log.float() * w["a_log"]).exp()
            skip, dt_bias = self.skip.float() * w["skip"], self.dt_bias.float() * w["dt_bias"]
            # A bias that is not there stands as zeros, so that all blocks have as many tables.
            conv_bias = torch.zeros_like(skip)
            if self.config.conv_bias:
                conv_bias = self.conv_bias.float() * w["conv_bias"]
            products = torch.stack((
                s["input"] * w["in_proj"] / s["in_proj"],
                s["u"] * w["x_proj"] / s["x_proj"],
                s["x_proj"] * w["dt_proj"] / s["dt_proj"],
                s["y"] * w["out_proj"],
            ))  # fmt: skip
            conv = torch.stack((s["in_proj"] * w["conv"], s["u"]))
            scan = torch.stack((s["u"], s["dt_proj"], s["x_proj"], s["in_proj"]))
            turn = s["y"]
            if self.hadamard:
                turn = (1 / math.sqrt(self.config.inner_dim)) / s["y"]
            step = torch.stack((
                s["input"], products[0], conv[0], s["u"], products[1], products[2], s["dt_proj"],
                s["x_proj"], s["in_proj"], turn, products[3],
            ))  # fmt: skip
            self._tables = (rates, skip, dt_bias, conv_bias, products, conv, scan, step)
        return self._tables

    def key_map(self) -> KeyMap:
        """A quantised block has no official checkpoint."""
        raise ValueError("a quantised block has no official checkpoint: quantise a float one")
