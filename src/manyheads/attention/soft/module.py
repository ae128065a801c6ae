"""Softmax-free attention as a layer on maps, and its entry among the token mixers.

B batch, C channels, H and W rows and columns, N = H · W, D head dim, r ratio, M landmarks.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.grid.basic import check_options
from manyheads.attention.grid.registry import GridShape, Mixer, register_mixer
from manyheads.attention.soft.fast import soft
from manyheads.layers.keymap import KeyMap, OfficialWeights, rename

__all__ = ["SoftAttention", "SoftMixer"]

_GRID = 7  # landmarks on a side, in every published stage at 224 px


class SoftAttention(OfficialWeights):
    """Softmax-free attention on maps (B, H, W, C). Approximate, needs training. Linear in N.

    Q = Linear(x) / D^¼ is queries and keys; landmarks are GELU(LN(conv(Q))) of r x r patches
    that do not overlap, rows and columns that fill none dropped; a k x k convolution of the values,
    one filter a head, is added.

    Args:
        dim: C.
        num_heads: H.
        ratio: r; M = floor(H / r) · floor(W / r).
        conv_size: k, odd; None: no local term.
        iterations, normalise, shared_step: as in :func:`manyheads.attention.soft.soft`.
        max_landmarks: rows and columns of landmarks beyond this number on a side are averaged to
            it (before norm and GELU), so that the cost stays linear on larger maps; None, the
            official behaviour, lets M grow with the map, and the inverse with M³.

    Raises:
        ValueError: ``dim`` is not a multiple of ``num_heads``, or a size is not possible.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        ratio: int = 8,
        conv_size: int | None = 3,
        iterations: int = 20,
        normalise: bool = False,
        shared_step: bool = False,
        max_landmarks: int | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim {dim} is not a multiple of num_heads {num_heads}")
        if ratio < 1:
            raise ValueError(f"ratio {ratio} must be at least 1: the side of a landmark's patch")
        if conv_size is not None and (conv_size < 1 or conv_size % 2 == 0):
            raise ValueError(f"conv_size {conv_size} must be odd, or None for no local term")
        if max_landmarks is not None and max_landmarks < 1:
            raise ValueError(f"max_landmarks {max_landmarks} on a side: give at least 1, or None")
        self.num_heads, self.ratio, self.max_landmarks = num_heads, ratio, max_landmarks
        self.iterations, self.normalise, self.shared_step = iterations, normalise, shared_step
        head = dim // num_heads
        self.query = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.to_landmarks = nn.Conv2d(head, head, ratio, ratio, bias=False)
        self.landmark_norm = nn.LayerNorm(head)
        self.local = (
            None
            if conv_size is None
            else nn.Conv2d(
                num_heads, num_heads, conv_size, padding=conv_size // 2, groups=num_heads,
                bias=False,
            )
        )  # fmt: skip
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, H, W, C).

        Raises:
            ValueError: the map has fewer rows or columns than ``ratio``: no landmark fits.
        """
        batch, height, width, dim = x.shape
        self._check(height, width)
        head = dim // self.num_heads
        query, value = self.query(x).mul_(head**-0.25), self.value(x)
        heads = query.unflatten(3, (self.num_heads, head))
        landmarks = self._landmarks(heads.permute(0, 3, 4, 1, 2).flatten(0, 1))
        out = soft(
            heads.flatten(1, 2).transpose(1, 2),
            landmarks.unflatten(0, (batch, self.num_heads)),
            value.view(batch, height * width, self.num_heads, head).transpose(1, 2),
            iterations=self.iterations,
            normalise=self.normalise,
            shared_step=self.shared_step,
        )
        out = out.transpose(1, 2)
        if self.local is None:
            return self.proj(out.reshape(x.shape))
        local = self._local(value, head)
        # In place: neither the sum nor the outputs by heads are written anew.
        local.unflatten(3, (self.num_heads, head)).add_(out.unflatten(1, (height, width)))
        return self.proj(local)

    def _landmarks(self, query: Tensor) -> Tensor:
        """Landmarks (B · heads, M, D) of queries (B · heads, D, H, W)."""
        found = self.to_landmarks(query)
        if self.max_landmarks is not None:
            rows, columns = (min(n, self.max_landmarks) for n in found.shape[2:])
            if (rows, columns) != tuple(found.shape[2:]):
                found = F.adaptive_avg_pool2d(found, (rows, columns))
        return F.gelu(self.landmark_norm(found.flatten(2).mT))

    def _local(self, value: Tensor, head: int) -> Tensor:
        """Convolve values (B, H, W, C): a head's filter is repeated for its channels.

        On all channels at once it is a depthwise convolution of a channels-last map, without a
        copy and in the order in which a CPU is quick at it.
        """
        conv = cast(nn.Conv2d, self.local)
        weight = conv.weight.repeat_interleave(head, 0)
        y = F.conv2d(value.permute(0, 3, 1, 2), weight, padding=conv.padding, groups=value.shape[3])
        return y.permute(0, 2, 3, 1)

    def _check(self, height: int, width: int) -> None:
        if torch.compiler.is_compiling():
            return
        for name, size in (("rows", height), ("columns", width)):
            if size < self.ratio:
                raise ValueError(
                    f"the map has {size} {name}, fewer than ratio {self.ratio}: no landmark fits; "
                    "give larger maps, or a smaller ratio"
                )

    def key_map(self) -> KeyMap:
        """Names of fudan-zvg/SOFT."""
        return KeyMap(*attention_entries("", ""))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, ratio={self.ratio}, normalise={self.normalise}"


def attention_entries(ours: str, official: str) -> list:
    """Return the rules of one attention layer below two prefixes."""
    pairs = [
        (f"{a}.{part}", f"{b}.{part}")
        for a, b in (
            ("query", "W_q"), ("value", "W_v"), ("proj", "ff"),
            ("landmark_norm", "attn.Qnorm_act.0"),
        )
        for part in ("weight", "bias")
    ]  # fmt: skip
    pairs.append(("to_landmarks.weight", "attn.Qlandmark_op.weight"))
    pairs.append(("local.weight", "attn.conv.weight"))
    return [rename(ours + a, official + b) for a, b in pairs]


class SoftMixer(nn.Module):
    """:class:`SoftAttention` on maps (B, C, H, W)."""

    def __init__(self, attention: SoftAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """Mix a map (B, C, H, W)."""
        return self.attention(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _build(dim: int, *, num_heads: int, grid: tuple[int, int] | None, **options: Any) -> nn.Module:
    check_options(
        "soft", options, "ratio", "conv_size", "iterations", "normalise", "shared_step",
        "max_landmarks",
    )  # fmt: skip
    if "ratio" not in options:
        # Seven landmarks on a side of the map that the mixer is made for.
        options["ratio"] = 4 if grid is None else max(1, min(grid) // _GRID)
    return SoftMixer(SoftAttention(dim, num_heads, **({"max_landmarks": _GRID} | options)))


def _flops(s: GridShape) -> int:
    landmarks = min(_GRID, s.height) * min(_GRID, s.width)
    head = s.dim // s.num_heads
    kernel = s.tokens * head + landmarks * head
    products = 2 * s.tokens * head + landmarks * head + 40 * landmarks**2
    per_head = landmarks * (kernel + products)
    shared = s.tokens * (3 * s.dim**2 + s.dim * head + 9 * s.dim)
    return 2 * s.batch * (s.num_heads * per_head + shared)


register_mixer(
    Mixer(
        name="soft",
        summary="Gaussian attention through 7 x 7 landmarks, their inverse by 20 Newton steps",
        paper="soft",
        build=_build,
        any_size=True,
        cost="O(N C (C + M) + M³)",
        flops=_flops,
        notes=(
            "at most 7 x 7 landmarks unless max_landmarks=None, which is the official layer: there "
            "they grow with the map",
            "made for maps with at least as many rows and columns as ratio",
        ),
    )
)
