"""The flow attention layer: four projections around the flow network, self or cross.

B batch, N length, M context length, C embed_dim, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manyheads.attention.flow.definition import FlowState, feature_map, flow_step
from manyheads.attention.flow.op import empty_flow_state, flow, flow_update
from manyheads.config import Config
from manyheads.layers.few_rows import Linear
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.keymap import KeyMap, rename
from manyheads.layers.mixer import SequenceMixer
from manyheads.layers.ragged import check_mask

__all__ = ["FlowAttention", "FlowConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowConfig(Config):
    """Sizes and options of a flow attention layer; the defaults are the reference code's.

    Attributes:
        embed_dim: C, of the input.
        num_heads: query heads.
        num_kv_heads: heads of key and value (None: num_heads); fewer are repeated, which saves
            parameters but no state.
        is_causal: the causal form, which streams; else all tokens see all.
        inner_dim: width of queries, keys and values, all heads together (None: embed_dim).
        out_dim: width of the output (None: embed_dim).
        context_dim: width of the context in cross-attention (None: embed_dim).
        kernel: "sigmoid" or "relu".
        eps, clamp, outer_eps: see :func:`manyheads.attention.flow`.
        dropout: on the output while training; 0.05 in the reference code, 0 here so that all
            mixers compare alike.
    """

    embed_dim: int
    num_heads: int = 8
    num_kv_heads: int | None = None
    is_causal: bool = True
    inner_dim: int | None = None
    out_dim: int | None = None
    context_dim: int | None = None
    kernel: str = "sigmoid"
    eps: float = 1e-6
    clamp: float | None = 1.0
    outer_eps: float = 0.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        feature_map(self.kernel)
        if self.width % self.num_heads:
            raise ValueError(
                f"inner width {self.width} is not a multiple of num_heads {self.num_heads}: choose "
                "another number of heads or inner_dim"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}"
            )

    @property
    def width(self) -> int:
        return self.embed_dim if self.inner_dim is None else self.inner_dim

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


class FlowAttention(SequenceMixer):
    """Flow attention layer (2202.06258): bidirectional, cross and causal. Needs training.

    Knows no positions. The causal form decodes with a state of constant size.

    Example:
        >>> layer = FlowAttention(FlowConfig(embed_dim=64, num_heads=4, is_causal=False))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
        >>> layer(torch.randn(1, 7, 64), context=torch.randn(1, 100, 64)).shape
        torch.Size([1, 7, 64])
    """

    mechanism: ClassVar[str] = "flow"
    config: FlowConfig

    def __init__(self, config: FlowConfig) -> None:
        super().__init__()
        self.config = c = config
        kv_width = c.kv_heads * c.head_dim
        context = c.embed_dim if c.context_dim is None else c.context_dim
        self.q_proj = Linear(c.embed_dim, c.width)
        self.k_proj = Linear(context, kv_width)
        self.v_proj = Linear(context, kv_width)
        self.out_proj = Linear(c.width, c.embed_dim if c.out_dim is None else c.out_dim)
        self.dropout = nn.Dropout(c.dropout)

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        context: Tensor | None = None,
        context_values: Tensor | None = None,
        context_mask: Tensor | None = None,
    ) -> Tensor:
        """Mix x with itself, or let it read from ``context``.

        Args:
            x: (B, N, C).
            mask: (B, N), True = a real token of x.
            cu_seqlens: (S + 1) borders of packed sequences, with B = 1; not with a context.
            context: (B, M, context_dim), what keys and values are made from (None: x).
            context_values: (B, M, context_dim), what values are made from instead.
            context_mask: (B, M), True = a real token of the context.

        Returns:
            (B, N, out_dim); what stands at padded tokens is not defined.

        Raises:
            ValueError: a causal layer with a context of another length or with a mask of its own.
        """
        c = self.config
        options: dict[str, Any] = {"is_causal": c.is_causal, **self._options()}
        if context is None:
            if context_values is not None or context_mask is not None:
                raise ValueError("context_values and context_mask need a context")
            q, k, v = self._project(x, x, x)
            out = flow(q, k, v, mask=mask, cu_seqlens=cu_seqlens, **options)
            return self._finish(out)
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens is for self-attention: pad and give mask, context_mask")
        q, k, v = self._project(x, context, context if context_values is None else context_values)
        if c.is_causal:
            if context_mask is not None:
                raise ValueError("context_mask does not go with is_causal=True: give mask alone")
            return self._finish(flow(q, k, v, mask=mask, **options))
        mask = check_mask(mask, x.shape[0], x.shape[1])
        if mask is None:
            mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        return self._finish(flow(q, k, v, mask=context_mask, query_mask=mask, **options))

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> FlowState:
        if not self.config.is_causal:
            return super().init_state(batch_size)
        c, weight = self.config, self.q_proj.weight
        wide = torch.promote_types(dtype or weight.dtype, torch.float32)
        sizes = (batch_size, c.num_heads, c.head_dim, c.head_dim)
        return empty_flow_state(*sizes, device=device or weight.device, dtype=wide)

    def update(
        self, x: Tensor, state: FlowState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, FlowState]:
        if not self.config.is_causal:
            return super().update(x, state, mask=mask)
        out, state = flow_update(state, *self._project(x, x, x), mask=mask, **self._options())
        return self._finish(out), state

    def step(self, x: Tensor, state: FlowState) -> tuple[Tensor, FlowState]:
        if not self.config.is_causal:
            return super().step(x, state)
        x = x[:, None]
        q, k, v = (t.squeeze(2) for t in self._project(x, x, x))
        out, state = flow_step(state, q, k, v, **self._options())
        return self._finish(out[:, :, None])[:, 0], state

    def _options(self) -> dict[str, Any]:
        c = self.config
        return {"kernel": c.kernel, "eps": c.eps, "clamp": c.clamp, "outer_eps": c.outer_eps}

    def _project(self, x: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c = self.config
        return (
            split_heads(self.q_proj(x), c.num_heads),
            split_heads(self.k_proj(keys), c.kv_heads),
            split_heads(self.v_proj(values), c.kv_heads),
        )

    def _finish(self, out: Tensor) -> Tensor:
        return self.dropout(self.out_proj(merge_heads(out)))

    def key_map(self) -> KeyMap:
        """Names of the reference code."""
        names = (("q", "query"), ("k", "key"), ("v", "value"), ("out", "out"))
        return KeyMap(
            *(
                rename(f"{ours}_proj.{kind}", f"{theirs}_projection.{kind}")
                for ours, theirs in names
                for kind in ("weight", "bias")
            )
        )
