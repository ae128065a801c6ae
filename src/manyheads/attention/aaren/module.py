"""The Aaren layer's mixer: a learned query token, and keys and values of the inputs.

B batch, N length, C embed_dim, H heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.aaren.definition import AarenState, empty_state, prefix_step
from manyheads.attention.aaren.op import prefix_attention
from manyheads.config import Config
from manyheads.errors import unknown_name
from manyheads.layers.few_rows import Linear
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.keymap import KeyMap, rename, split
from manyheads.layers.mixer import SequenceMixer
from manyheads.layers.precision import is_unwatched_inference

__all__ = ["AarenAttention", "AarenConfig"]

_QUERIES = ("token", "per_head", "shared")


@dataclass(frozen=True, kw_only=True, slots=True)
class AarenConfig(Config):
    """Sizes and options of an Aaren layer's mixer.

    Attributes:
        embed_dim: C.
        num_heads: H.
        is_causal: always True; kept so that all mixers are configured alike.
        bias: whether the projections have biases.
        query: "token", a learned C-vector that goes through the query projection as the paper's
            parameter count implies; or one learned D-vector "per_head", or one "shared" by all
            heads, both without a query projection (ours).
    """

    embed_dim: int
    num_heads: int = 8
    is_causal: bool = True
    bias: bool = True
    query: Literal["token", "per_head", "shared"] = "token"

    def __post_init__(self) -> None:
        if not self.is_causal:
            raise ValueError("aaren has no bidirectional form: is_causal=False is not possible")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )
        if self.query not in _QUERIES:
            raise unknown_name("query", self.query, _QUERIES)

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads


class AarenAttention(SequenceMixer):
    """Aaren (2405.13956): attention of a learned query over every prefix. Causal, O(1) state.

    Needs training. The query does not depend on the input: one layer cannot look up content
    (associative recall). Blind to order inside a prefix: add positions to the input where order
    matters. Scores are x · (W_kᵀ q), so that no keys are made: O(N C H) for N C².

    Example:
        >>> layer = AarenAttention(AarenConfig(embed_dim=64, num_heads=4))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    mechanism: ClassVar[str] = "aaren"
    config: AarenConfig

    def __init__(self, config: AarenConfig) -> None:
        super().__init__()
        self.config = c = config
        sizes = {"token": (c.embed_dim,), "per_head": (c.num_heads, c.head_dim)}
        self.query = nn.Parameter(torch.empty(sizes.get(c.query, (c.head_dim,))))
        if c.query == "token":
            self.q_proj = Linear(c.embed_dim, c.embed_dim, bias=c.bias)
        self.k_proj = Linear(c.embed_dim, c.embed_dim, bias=c.bias)
        self.v_proj = Linear(c.embed_dim, c.embed_dim, bias=c.bias)
        self.out_proj = Linear(c.embed_dim, c.embed_dim, bias=c.bias)
        self._made: tuple[Any, tuple[Tensor, Tensor | None]] | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as torch.nn.MultiheadAttention does, the query as a normalised token."""
        nn.init.normal_(self.query)
        for linear in (m for m in self.children() if isinstance(m, nn.Linear)):
            # The bound of one (3C, C) matrix, as the three projections are drawn there.
            bound = (6 / (4 * self.config.embed_dim)) ** 0.5
            if linear is self.out_proj:
                bound = self.config.embed_dim**-0.5
            nn.init.uniform_(linear.weight, -bound, bound)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        return self._mix(x, None, mask, cu_seqlens)[0]

    def init_state(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AarenState:
        c, weight = self.config, self.v_proj.weight
        wide = torch.promote_types(dtype or weight.dtype, torch.float32)
        device = device or weight.device
        return empty_state(batch_size, c.num_heads, c.head_dim, device=device, dtype=wide)

    def update(
        self, x: Tensor, state: AarenState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, AarenState]:
        return self._mix(x, state, mask, None)

    def step(self, x: Tensor, state: AarenState) -> tuple[Tensor, AarenState]:
        values = self.v_proj(x).unflatten(-1, (self.config.num_heads, -1))
        out, state = prefix_step(state, self._scores(x), values)
        return self.out_proj(out.flatten(-2)), state

    def _mix(
        self, x: Tensor, state: AarenState | None, mask: Tensor | None, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, AarenState]:
        values = split_heads(self.v_proj(x), self.config.num_heads)
        scores = self._scores(x).transpose(1, 2)
        out, state = prefix_attention(scores, values, state=state, mask=mask, cu_seqlens=cu_seqlens)
        return self.out_proj(merge_heads(out)), state

    def _scores(self, x: Tensor) -> Tensor:
        """Return q · (W_k x + b_k) / sqrt(D), (..., H), as a product of x with H vectors.

        In float32 at least, under autocast too: exponentials follow.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            vectors, shift = self._kept_vectors(wide)
            scores = F.linear(x.to(wide), vectors)
            return scores if shift is None else scores + shift

    def _vectors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return W_kᵀ q / sqrt(D), (H, C), and q · b_k / sqrt(D), (H)."""
        c = self.config
        heads = (c.num_heads, c.head_dim)
        query: Tensor = self.query.to(dtype)
        if c.query == "token":
            query = F.linear(query, self.q_proj.weight.to(dtype)).view(heads)
            if self.q_proj.bias is not None:
                query = query + self.q_proj.bias.to(dtype).view(heads)
        query = query.expand(heads) * c.head_dim**-0.5
        keys = self.k_proj.weight.to(dtype).unflatten(0, heads)
        vectors = (query[:, None] @ keys).squeeze(1)
        if self.k_proj.bias is None:
            return vectors, None
        return vectors, (query * self.k_proj.bias.to(dtype).view(heads)).sum(-1)

    def _kept_vectors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Return the vectors, made once for as long as the weights stay, where none is trained.

        A token then reads half the matrices: queries and keys are in the vectors already.
        """
        layers = [self.k_proj, *([self.q_proj] if self.config.query == "token" else [])]
        sources = [self.query, *(t for m in layers for t in m.parameters())]
        if (
            self.training
            or not is_unwatched_inference()
            or any(type(m) not in (nn.Linear, Linear) for m in layers)
            or any(type(t) is not nn.Parameter or t.is_inference() for t in sources)
        ):
            return self._vectors(dtype)
        # Numbers written in place raise a tensor's version; moved ones lie elsewhere.
        key = (dtype, *((t.data_ptr(), t._version, t.dtype, t.device) for t in sources))
        if self._made is None or self._made[0] != key:
            self._made = key, self._vectors(dtype)
        return self._made[1]

    def train(self, mode: bool = True) -> Self:
        if mode:
            self._made = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}

    def key_map(self) -> KeyMap:
        """Names of torch.nn.MultiheadAttention, and ``query``."""
        kinds = ("weight", "bias")
        if self.config.query == "token":
            inputs = [split([f"{n}_proj.{k}" for n in "qkv"], f"in_proj_{k}") for k in kinds]
        else:
            inputs = [split([f"{n}_proj.{k}" for n in "kv"], f"in_proj_{k}") for k in kinds]
        return KeyMap(
            rename("query", "query"),
            *inputs,
            *(rename(f"out_proj.{k}", f"out_proj.{k}") for k in kinds),
        )
