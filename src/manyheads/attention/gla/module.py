"""The GLA layer: projections, low-rank gate, output norm and gate.

B batch, N length, C embed_dim, H heads, D key dim a head, V value dim a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.gla.definition import GLAState, gla_step
from manyheads.attention.gla.op import gla_update
from manyheads.config import Config
from manyheads.layers.activations import activation
from manyheads.layers.conv import ShortConv
from manyheads.layers.few_rows import Linear
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.keymap import KeyMap, rename
from manyheads.layers.mixer import SequenceMixer
from manyheads.layers.norms import RMSNorm
from manyheads.layers.ragged import check_mask, map_packed

__all__ = ["GLAConfig", "GLALayerState", "GatedLinearAttention"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GLAConfig(Config):
    """Sizes and options of a GLA layer; the defaults are the published layer's.

    Attributes:
        embed_dim: C.
        num_heads: query heads.
        num_kv_heads: heads of key, value and gate (None: num_heads).
        expand_k, expand_v: total key and value width as a part of C.
        is_causal: always True; kept so that all mixers are configured alike.
        feature_map: activation on queries and keys, or None.
        conv_size: width of the depthwise convolutions on q, k and v; 0 for none.
        conv_bias: whether they have a bias.
        output_gate: multiply the normalised output by gate_fn(x W_g).
        gate_fn: activation of the output gate.
        fuse_norm: only decides the official name of the norm's weight.
        norm_affine, norm_eps: the norm over each head's V channels.
        gate_low_rank: width between the two matrices of the forget gate.
        gate_normalizer: log decay = logsigmoid(logits) / gate_normalizer.
        clamp_min: lower bound of the log decay, or None.
    """

    embed_dim: int
    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    is_causal: bool = True
    feature_map: str | None = None
    conv_size: int = 0
    conv_bias: bool = False
    output_gate: bool = True
    gate_fn: str = "swish"
    fuse_norm: bool = True
    norm_affine: bool = True
    norm_eps: float = 1e-5
    gate_low_rank: int = 16
    gate_normalizer: float = 16.0
    clamp_min: float | None = None

    def __post_init__(self) -> None:
        if not self.is_causal:
            raise ValueError("gla has no bidirectional form: is_causal=False is not possible")
        for name, total in (("key", self.key_dim), ("value", self.value_dim)):
            if total % self.num_heads:
                raise ValueError(
                    f"total {name} width {total} is not a multiple of num_heads {self.num_heads}"
                )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )

    @property
    def key_dim(self) -> int:
        return int(self.embed_dim * self.expand_k)

    @property
    def value_dim(self) -> int:
        return int(self.embed_dim * self.expand_v)

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class GLALayerState(NamedTuple):
    """``attention`` and, with convolutions, the last inputs of q, k and v (B, W - 1, ·)."""

    attention: GLAState
    conv: tuple[Tensor, Tensor, Tensor] | None


class GatedLinearAttention(SequenceMixer):
    """Gated linear attention layer (2312.06635). Causal; needs training; constant-size state.

    Example:
        >>> layer = GatedLinearAttention(GLAConfig(embed_dim=64, num_heads=2))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "gla"
    config: GLAConfig

    def __init__(self, config: GLAConfig) -> None:
        super().__init__()
        self.config = config
        c, groups = config, config.num_heads // config.kv_heads
        kv_key, kv_value = c.key_dim // groups, c.value_dim // groups
        self.q_proj = Linear(c.embed_dim, c.key_dim, bias=False)
        self.k_proj = Linear(c.embed_dim, kv_key, bias=False)
        self.v_proj = Linear(c.embed_dim, kv_value, bias=False)
        self.decay_proj = nn.Sequential(
            Linear(c.embed_dim, c.gate_low_rank, bias=False),
            Linear(c.gate_low_rank, kv_key),
        )
        if c.conv_size:
            self.q_conv = ShortConv(c.key_dim, c.conv_size, bias=c.conv_bias)
            self.k_conv = ShortConv(kv_key, c.conv_size, bias=c.conv_bias)
            self.v_conv = ShortConv(kv_value, c.conv_size, bias=c.conv_bias)
        if c.output_gate:
            self.gate_proj = Linear(c.embed_dim, c.value_dim, bias=False)
        head_value = c.value_dim // c.num_heads
        self.norm = RMSNorm(head_value, eps=c.norm_eps, affine=c.norm_affine)
        self.out_proj = Linear(c.value_dim, c.embed_dim, bias=False)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        if cu_seqlens is not None and self.config.conv_size:
            (out,) = map_packed(lambda t, m: self(t, mask=m), (x,), cu_seqlens, dim=1)
            return out
        return self._mix(x, None, mask, cu_seqlens)[0]

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GLALayerState:
        c, weight = self.config, self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        sizes = (batch_size, c.num_heads, c.key_dim // c.num_heads, c.value_dim // c.num_heads)
        memory = torch.zeros(sizes, device=device, dtype=wide)
        conv = None
        if c.conv_size:
            convs = (self.q_conv, self.k_conv, self.v_conv)
            q, k, v = (m.init_state(batch_size, device=device, dtype=dtype) for m in convs)
            conv = (q, k, v)
        return GLALayerState(GLAState(memory), conv)

    def update(
        self, x: Tensor, state: GLALayerState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, GLALayerState]:
        return self._mix(x, state, mask, None)

    def step(self, x: Tensor, state: GLALayerState) -> tuple[Tensor, GLALayerState]:
        q, k, v, g, conv = self._project(x[:, None], state.conv, None)
        out, attention = gla_step(state.attention, *(t.squeeze(2) for t in (q, k, v, g)))
        return self._finish(out[:, :, None], x[:, None])[:, 0], GLALayerState(attention, conv)

    def _mix(
        self,
        x: Tensor,
        state: GLALayerState | None,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, GLALayerState]:
        mask = check_mask(mask, x.shape[0], x.shape[1])
        q, k, v, g, conv = self._project(x, None if state is None else state.conv, mask)
        memory = None if state is None else state.attention
        out, attention = gla_update(memory, q, k, v, g, mask=mask, cu_seqlens=cu_seqlens)
        y = self._finish(out, x)
        if mask is not None:
            y = y.masked_fill(~mask[..., None], 0)
        return y, GLALayerState(attention, conv)

    def _project(
        self, x: Tensor, conv: tuple[Tensor, Tensor, Tensor] | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor, Tensor] | None]:
        c = self.config
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if c.conv_size:
            q_last, k_last, v_last = conv or (None, None, None)
            q, q_last = self.q_conv(q, q_last, mask=mask)
            k, k_last = self.k_conv(k, k_last, mask=mask)
            v, v_last = self.v_conv(v, v_last, mask=mask)
            conv = (q_last, k_last, v_last)
        # The gate stays in float32 under autocast: its sums run over whole sequences.
        g = F.logsigmoid(self.decay_proj(x).to(self._wide(x))) / c.gate_normalizer
        if c.clamp_min is not None:
            g = g.clamp_min(c.clamp_min)
        q, k, v, g = (
            split_heads(t, h)
            for t, h in ((q, c.num_heads), (k, c.kv_heads), (v, c.kv_heads), (g, c.kv_heads))
        )
        if c.feature_map is not None:
            feature = activation(c.feature_map)
            q, k = feature(q), feature(k)
        return q, k, v, g, conv

    @staticmethod
    def _wide(x: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, torch.float32)

    def _finish(self, out: Tensor, x: Tensor) -> Tensor:
        y = merge_heads(self.norm(out))
        if self.config.output_gate:
            y = y * activation(self.config.gate_fn)(self.gate_proj(x))
        return self.out_proj(y.to(x.dtype))

    def key_map(self) -> KeyMap:
        """Names of flash-linear-attention."""
        c = self.config
        fused = c.output_gate and c.fuse_norm and c.gate_fn == "swish"
        return KeyMap(
            *(rename(f"{n}_proj.weight", f"{n}_proj.weight") for n in ("q", "k", "v")),
            rename("gate_proj.weight", "g_proj.weight"),
            rename("out_proj.weight", "o_proj.weight"),
            rename("decay_proj.0.weight", "gk_proj.0.weight"),
            rename("decay_proj.1.weight", "gk_proj.1.weight"),
            rename("decay_proj.1.bias", "gk_proj.1.bias"),
            rename("norm.weight", "g_norm_swish_gate.weight" if fused else "g_norm.weight"),
            *(
                rename(f"{n}_conv.{kind}", f"{n}_conv1d.{kind}")
                for n in ("q", "k", "v")
                for kind in ("weight", "bias")
            ),
        )
