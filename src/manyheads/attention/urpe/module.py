"""The URPE layer: projections, a relative bias inside the softmax, a relative factor behind it.

B batch, N length, C embed_dim, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from manyheads.attention.softmax.op import SoftmaxState
from manyheads.attention.urpe.op import urpe, urpe_update
from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.layers.few_rows import Linear
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.keymap import KeyMap, rename
from manyheads.layers.mixer import SequenceMixer
from manyheads.layers.ragged import check_mask
from manyheads.layers.relative import Beyond, RelativeTable

__all__ = ["TableKind", "URPEAttention", "URPEConfig", "URPELayerState", "build_table"]

TableKind = Literal["unique", "bucketed", "none"]
_KINDS = ("unique", "bucketed", "none")


@dataclass(frozen=True, kw_only=True, slots=True)
class URPEConfig(Config):
    """Sizes and options of a URPE attention layer.

    Attributes:
        embed_dim: C.
        num_heads: query heads.
        num_kv_heads: key-value heads (None: num_heads).
        head_dim: D (None: embed_dim / num_heads).
        is_causal: whether a token sees later ones.
        max_length: R, the length that the tables cover.
        beyond: "clamp": farther tokens share the farthest value; "error": they raise.
        bias, multiplier: "unique" (a value a distance), "bucketed", or "none" (the layer has no
            such table; it may be handed one).
        bias_buckets, multiplier_buckets: (num_buckets, max_distance) of bucketed tables.
        multiplier_init: "one" (the layer starts as softmax attention) or "normal".
        dropout: on C ∘ softmax, in training.
        count_padding: distances count padded places, as in official code (see ``urpe``).
    """

    embed_dim: int
    num_heads: int = 8
    num_kv_heads: int | None = None
    head_dim: int | None = None
    is_causal: bool = True
    max_length: int = 1024
    beyond: Beyond = "clamp"
    bias: TableKind = "unique"
    multiplier: TableKind = "unique"
    bias_buckets: tuple[int, int] = (64, 128)
    multiplier_buckets: tuple[int, int] = (64, 128)
    multiplier_init: Literal["one", "normal"] = "one"
    dropout: float = 0.0
    count_padding: bool = False

    def __post_init__(self) -> None:
        if self.head_dim is None and self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}: "
                "pass head_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )
        for kind in (self.bias, self.multiplier):
            if kind not in _KINDS:
                raise unknown_name("kind of table", kind, _KINDS)
        if self.multiplier_init not in ("one", "normal"):
            raise unknown_name("multiplier_init", self.multiplier_init, ("one", "normal"))
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} must lie in [0, 1)")

    @property
    def dim(self) -> int:
        return self.head_dim or self.embed_dim // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class URPELayerState(NamedTuple):
    """``cache``, whose ``length`` (B,) is also the place of each row's next token."""

    cache: SoftmaxState


def build_table(
    kind: TableKind,
    heads: int,
    max_length: int,
    *,
    buckets: tuple[int, int],
    init: Literal["one", "normal"],
    beyond: Beyond,
) -> RelativeTable | None:
    """Build the table that a config describes, None for "none"."""
    if kind == "none":
        return None
    return RelativeTable(
        heads,
        max_length,
        buckets=buckets if kind == "bucketed" else None,
        init=1.0 if init == "one" else "normal",
        beyond=beyond,
    )


class URPEAttention(SequenceMixer):
    """Attention with universal relative positional encoding (2205.13401).

    out = (C ∘ softmax(Q Kᵀ / sqrt(D) + B)) V with learned B and C of the distance j − i. C = 1 is
    softmax attention with a relative bias; C behind the softmax lets a layer tell places apart
    that a bias inside cannot. Knows positions by itself; the cache grows with the context.

    Example:
        >>> layer = URPEAttention(URPEConfig(embed_dim=64, num_heads=4, is_causal=False))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "urpe"
    config: URPEConfig

    def __init__(self, config: URPEConfig) -> None:
        super().__init__()
        self.config = c = config
        self.q_proj = Linear(c.embed_dim, c.num_heads * c.dim)
        self.k_proj = Linear(c.embed_dim, c.kv_heads * c.dim)
        self.v_proj = Linear(c.embed_dim, c.kv_heads * c.dim)
        self.out_proj = Linear(c.num_heads * c.dim, c.embed_dim)
        self.bias = build_table(
            c.bias, c.num_heads, c.max_length,
            buckets=c.bias_buckets, init="normal", beyond=c.beyond,
        )  # fmt: skip
        self.multiplier = build_table(
            c.multiplier, c.num_heads, c.max_length,
            buckets=c.multiplier_buckets, init=c.multiplier_init, beyond=c.beyond,
        )  # fmt: skip

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        bias: Tensor | None = None,
        multiplier: Tensor | None = None,
    ) -> Tensor:
        """Mix whole sequences.

        Args:
            x, mask, cu_seqlens: see :meth:`SequenceMixer.forward`.
            bias, multiplier: what ``urpe`` takes, in place of the layer's own: a table that
                several layers share, or the matrix of a window or a graph.

        Raises:
            ValueError: shapes do not fit, or a table of the layer does not reach (``beyond``).
        """
        mask = check_mask(mask, x.shape[0], x.shape[1])
        b, c = self._factors(x.shape[1], bias, multiplier)
        q, k, v = self._project(x)
        out = urpe(
            q,
            k,
            v,
            bias=b,
            multiplier=c,
            is_causal=self.config.is_causal,
            mask=mask,
            cu_seqlens=cu_seqlens,
            count_padding=self.config.count_padding and cu_seqlens is None,
            dropout_p=self.config.dropout if self.training else 0.0,
        )
        return self.out_proj(merge_heads(out))

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> URPELayerState:
        if not self.config.is_causal:
            return super().init_state(batch_size)
        c, weight = self.config, self.q_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        empty = torch.zeros(batch_size, c.kv_heads, 0, c.dim, device=device, dtype=dtype)
        length = torch.zeros(batch_size, dtype=torch.long, device=device)
        return URPELayerState(SoftmaxState(empty, empty, length))

    def update(
        self,
        x: Tensor,
        state: URPELayerState,
        *,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        multiplier: Tensor | None = None,
    ) -> tuple[Tensor, URPELayerState]:
        """Mix the next block; ``bias`` and ``multiplier`` as in :meth:`forward`, tables only."""
        if not self.config.is_causal:
            return super().update(x, state, mask=mask)
        mask = check_mask(mask, x.shape[0], x.shape[1])
        reach = int(state.cache.length.max()) + x.shape[1]
        b, c = self._factors(reach, bias, multiplier)
        q, k, v = self._project(x)
        out, cache = urpe_update(state.cache, q, k, v, bias=b, multiplier=c, mask=mask)
        return self.out_proj(merge_heads(out)), URPELayerState(cache)

    def _factors(
        self, length: int, bias: Tensor | None, multiplier: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if bias is None and self.bias is not None:
            bias = self.bias.toeplitz(length)
        if multiplier is None and self.multiplier is not None:
            multiplier = self.multiplier.toeplitz(length)
        return bias, multiplier

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        return (
            split_heads(self.q_proj(x), c.num_heads),
            split_heads(self.k_proj(x), c.kv_heads),
            split_heads(self.v_proj(x), c.kv_heads),
        )

    def key_map(self) -> KeyMap:
        """Names of the official attention, and of the tables, which stand in its encoder."""
        return KeyMap(
            *(
                rename(f"{n}_proj.{kind}", f"{n}_proj.{kind}")
                for n in ("q", "k", "v", "out")
                for kind in ("weight", "bias")
            ),
            rename("bias.weight", "rp_bias.weight"),
            rename("multiplier.weight", "ur_rp_bias.weight"),
        )
