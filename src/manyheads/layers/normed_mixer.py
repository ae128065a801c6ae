"""What the two attention layers of TransNormer share (Qin et al., 2210.10340).

Biased projections, LRPE on queries and keys, a norm over all heads together, official names.
B batch, N length, C embed_dim, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.layers.activations import activation
from manyheads.layers.few_rows import Linear
from manyheads.layers.heads import split_heads
from manyheads.layers.keymap import KeyMap, constant, rename
from manyheads.layers.lrpe import LRPE
from manyheads.layers.mixer import SequenceMixer
from manyheads.layers.ragged import check_cu_seqlens, positions, sequence_ids
from manyheads.layers.token_norm import TOKEN_NORMS, token_norm

__all__ = ["NormedMixer", "NormedMixerConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NormedMixerConfig(Config):
    """Options that both layers have.

    Attributes:
        embed_dim: C.
        num_heads: H; D = C / H.
        is_causal: whether a token sees later ones.
        variant: "t1" or "t2" of the paper; each layer says what it means there.
        lrpe: whether queries and keys carry positions.
        learned_angles, householder: parts of LRPE.
        norm: "simplerms"; the Long Range Arena code also has "layer", "batch" and "synbatch"
            (batch statistics in training see the whole batch, later tokens included).
        eps: of "simplerms". The gradient is bounded by a multiple of 1 / eps; the published 1e-8
            bounds it only in name, 1e-2 in effect.
        layout: "fairseq" or "lra": which official code's names :meth:`key_map` uses.
    """

    embed_dim: int
    num_heads: int = 8
    is_causal: bool = True
    variant: Literal["t1", "t2"] = "t2"
    lrpe: bool = True
    learned_angles: bool = True
    householder: bool = True
    norm: str = "simplerms"
    eps: float = 1e-8
    layout: Literal["fairseq", "lra"] = "fairseq"

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        for kind, value, known in (
            ("variant", self.variant, ("t1", "t2")),
            ("norm", self.norm, TOKEN_NORMS),
            ("layout", self.layout, ("fairseq", "lra")),
        ):
            if value not in known:
                raise unknown_name(kind, value, known)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


class NormedMixer(SequenceMixer):
    """Base of NormAttention and DiagAttention: everything but the attention itself."""

    config: NormedMixerConfig
    norm: nn.Module | None
    official_norm: str  # the norm's official name in the Long Range Arena code

    def __init__(self, config: NormedMixerConfig, *, gain: float, normed: bool) -> None:
        super().__init__()
        self.config = c = config
        self.q_proj = Linear(c.embed_dim, c.embed_dim)
        self.k_proj = Linear(c.embed_dim, c.embed_dim)
        self.v_proj = Linear(c.embed_dim, c.embed_dim)
        self.out_proj = Linear(c.embed_dim, c.embed_dim)
        self.lrpe = None
        if c.lrpe:
            self.lrpe = LRPE(c.head_dim, learned=c.learned_angles, householder=c.householder)
        self.norm = token_norm(c.norm, c.embed_dim, eps=c.eps) if normed else None
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.xavier_uniform_(projection.weight, gain=gain)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def _project(
        self, x: Tensor, places: Tensor, *, feature: str = "identity", widen: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, through ``feature`` and turned, and values: (B, H, N, D)."""
        act = activation(feature)
        q, k, v = act(self.q_proj(x)), act(self.k_proj(x)), self.v_proj(x)
        if widen:
            q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
        q, k, v = (split_heads(t, self.config.num_heads) for t in (q, k, v))
        if self.lrpe is not None:
            q, k = self.lrpe(q, k, places)
        return q, k, v

    @staticmethod
    def _places(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        """Return positions among real tokens, from 0 in each packed sequence: (N,) or (B, N)."""
        if cu_seqlens is None:
            return positions(mask, x.shape[1], device=x.device)
        check_cu_seqlens(cu_seqlens, x.shape[0], x.shape[1])
        ids = sequence_ids(cu_seqlens, x.shape[1])
        return torch.arange(x.shape[1], device=x.device) - cu_seqlens[ids]

    def key_map(self) -> KeyMap:
        """Names of the official classes; they store the unused norm of a softmax layer too."""
        c = self.config
        encoding = "urpe" if c.layout == "fairseq" else "lrpe"
        entries = [rename("lrpe.theta", f"{encoding}.theta"), rename("lrpe.v", f"{encoding}.v")]
        if c.norm != "simplerms":
            inner = f"{self.official_norm}.norm"
            kinds = ["weight", "bias"]
            if c.norm != "layer":
                kinds += ["running_mean", "running_var"]
                count = torch.zeros((), dtype=torch.long)
                entries.append(constant(f"{inner}.num_batches_tracked", count, optional=True))
            if self.norm is not None:
                entries += [rename(f"norm.{k}", f"{inner}.{k}") for k in kinds]
            else:
                start = {"bias": torch.zeros, "running_mean": torch.zeros}
                entries += [
                    constant(f"{inner}.{k}", start.get(k, torch.ones)(c.embed_dim), optional=True)
                    for k in kinds
                ]
        entries += [
            rename(f"{p}_proj.{kind}", f"{p}_proj.{kind}")
            for p in ("q", "k", "v", "out")
            for kind in ("weight", "bias")
        ]
        return KeyMap(*entries)
