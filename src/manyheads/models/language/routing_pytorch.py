"""The language model of the PyTorch package ``routing-transformer``, for its state dicts.

Another family than :class:`RoutingLM`: pre-norm, rotary positions on the queries, keys and values
of routing heads, unit-length means. B batch, N length, C embed_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.routing import SphericalKMeans, blocked_local, spherical_routing
from manyheads.config import Config
from manyheads.errors import nearest
from manyheads.layers.few_rows import Linear
from manyheads.layers.heads import merge_heads, split_heads
from manyheads.layers.keymap import KeyMap, constant, convert, read_weights, rename, tied
from manyheads.layers.rotary import apply_rotary, rotary_angles
from manyheads.models.base import Model

__all__ = ["RoutingTransformerLM", "RoutingTransformerLMConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingTransformerLMConfig(Config):
    """Sizes of a :class:`RoutingTransformerLM`.

    Attributes:
        vocab_size, embed_dim, num_layers, num_heads, head_dim: sizes.
        token_dim: width of the embeddings (None: embed_dim).
        max_length: sets the number of clusters, max_length / window.
        local_heads: heads of each layer that see their surroundings; one number, or one a layer.
        window: tokens of a cluster. local_window, local_radius: block of local heads (None:
            window), and how many blocks they see before it (and behind, where not causal).
        is_causal, share_qk: as in ``spherical_routing`` (share_qk None: where causal).
        memory: learned keys before every cluster; at least 1 where causal and not shared.
        gated: GLU in the MLP, whose width is four times embed_dim.
        tie_embeddings: the output matrix is the embedding; then it has no bias.
        rotary: whether local heads have rotary positions.
        decay, commitment: of the means.
        attention_dropout, branch_dropout, mlp_dropout: as named.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    max_length: int
    num_heads: int = 8
    head_dim: int = 64
    token_dim: int | None = None
    local_heads: int | tuple[int, ...] = 0
    window: int = 64
    local_window: int | None = None
    local_radius: int = 1
    is_causal: bool = False
    share_qk: bool | None = None
    memory: int = 0
    gated: bool = False
    tie_embeddings: bool = False
    rotary: bool = True
    decay: float = 0.999
    commitment: float = 1e-4
    attention_dropout: float = 0.0
    branch_dropout: float = 0.0
    mlp_dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.max_length % self.window:
            raise ValueError(
                f"max_length {self.max_length} is not a multiple of the window {self.window}"
            )
        if isinstance(self.local_heads, tuple) and len(self.local_heads) != self.num_layers:
            raise ValueError(
                f"local_heads has {len(self.local_heads)} entries for {self.num_layers} layers"
            )

    @property
    def width(self) -> int:
        return self.embed_dim if self.token_dim is None else self.token_dim

    @property
    def shares(self) -> bool:
        return self.is_causal if self.share_qk is None else self.share_qk

    @property
    def memories(self) -> int:
        return max(self.memory, 1 if self.is_causal and not self.shares else 0)

    def local(self, layer: int) -> int:
        """Return the local heads of a layer."""
        return self.local_heads if isinstance(self.local_heads, int) else self.local_heads[layer]

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> RoutingTransformerLMConfig:
        """Read the keyword arguments of the package's ``RoutingTransformerLM``.

        Raises:
            ValueError: an argument is unknown, or asks for what is not here.
        """
        values: dict[str, Any] = {}
        for key, value in official.items():
            if key in _NAMES:
                values[_NAMES[key]] = tuple(value) if isinstance(value, list) else value
            elif key in _ABSENT:
                if value not in (_ABSENT[key], [], ()):
                    raise ValueError(f"{key}={value!r} is not here: only {_ABSENT[key]!r} is")
            elif key not in _NO_EFFECT:
                known = [*_NAMES, *_ABSENT, *_NO_EFFECT]
                raise ValueError(f"unknown argument {key!r}{nearest(key, known)}")
        return cls.from_dict(values)


_NAMES = {
    "num_tokens": "vocab_size",
    "dim": "embed_dim",
    "depth": "num_layers",
    "max_seq_len": "max_length",
    "heads": "num_heads",
    "dim_head": "head_dim",
    "emb_dim": "token_dim",
    "n_local_attn_heads": "local_heads",
    "window_size": "window",
    "local_attn_window_size": "local_window",
    "local_attn_radius_blocks": "local_radius",
    "causal": "is_causal",
    "shared_qk": "share_qk",
    "num_mem_kv": "memory",
    "ff_glu": "gated",
    "tie_embedding": "tie_embeddings",
    "rel_pos_emb": "rotary",
    "kmeans_ema_decay": "decay",
    "attn_dropout": "attention_dropout",
    "attn_layer_dropout": "branch_dropout",
    "ff_dropout": "mlp_dropout",
}
_ABSENT: dict[str, Any] = {
    "weight_tie": False, "receives_context": False, "return_embeddings": False, "pkm_layers": (),
    "moe_layers": (), "use_rezero": False, "use_scale_norm": False, "shift_tokens": False,
    "ff_activation": None, "layer_dropout": 0.0,
}  # fmt: skip
_NO_EFFECT = {
    "reversible", "ff_chunks", "ff_mult", "commitment_factor", "context_window_size",
    "_register_kmeans_update", "pkm_num_keys", "moe_num_experts", "moe_loss_coef",
    "context_shared_qk", "use_absolute_pos_emb",
}  # fmt: skip


class _Attention(nn.Module):
    def __init__(self, config: RoutingTransformerLMConfig, layer: int) -> None:
        super().__init__()
        self.config = c = config
        self.local = c.local(layer)
        self.routed = c.num_heads - self.local
        inner = self.routed * c.head_dim
        self.local_proj = None
        if self.local:
            self.local_proj = Linear(c.embed_dim, 3 * self.local * c.head_dim)
        self.kmeans = self.memory_key = self.memory_value = None
        if self.routed:
            clusters = c.max_length // c.window
            self.kmeans = SphericalKMeans(
                self.routed, clusters, c.head_dim, decay=c.decay, commitment=c.commitment
            )
            sizes = self.routed, clusters, c.memories, c.head_dim
            self.memory_key = nn.Parameter(torch.randn(sizes))
            self.memory_value = nn.Parameter(torch.randn(sizes))
        self.q_proj = Linear(c.embed_dim, inner, bias=False)
        self.v_proj = Linear(c.embed_dim, inner, bias=False)
        self.k_proj = None if c.shares else Linear(c.embed_dim, inner, bias=False)
        self.out_proj = Linear(c.num_heads * c.head_dim, c.embed_dim, bias=False)

    def forward(
        self, x: Tensor, mask: Tensor | None, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        c, outputs, loss = self.config, [], x.new_zeros(())
        dropout = c.attention_dropout if self.training else 0.0
        if self.local_proj is not None:
            q, k, v = (split_heads(t, self.local) for t in self.local_proj(x).chunk(3, -1))
            if c.rotary:
                q, k = apply_rotary(q, *angles), apply_rotary(k, *angles)
            block = c.local_window or c.window
            outputs.append(
                blocked_local(
                    q, k, v, block=block, flange=c.local_radius * block, is_causal=c.is_causal,
                    mask=mask, dropout_p=dropout,
                )
            )  # fmt: skip
        if self.kmeans is not None:
            q, v = (split_heads(p(x), self.routed) for p in (self.q_proj, self.v_proj))
            k = q if self.k_proj is None else split_heads(self.k_proj(x), self.routed)
            turned = [apply_rotary(t, *angles, interleaved=True) for t in (q, k, v)]
            q, k, v = turned
            tokens = (q,) if c.shares else (q, k)
            self.kmeans.prepare(self.parameters())
            shown = F.normalize(torch.cat(tokens, 2), dim=-1)
            counted = None if mask is None else mask.repeat(1, len(tokens))
            self.kmeans.place(shown, mask=counted)
            loss = self.kmeans.loss(*tokens)
            outputs.append(
                spherical_routing(
                    q, k, v, self.kmeans.means, window=c.window, is_causal=c.is_causal,
                    share_qk=c.shares, memory_key=self.memory_key, memory_value=self.memory_value,
                    mask=mask, dropout_p=dropout,
                )
            )  # fmt: skip
            self.kmeans.observe(shown, mask=counted)
        y = self.out_proj(merge_heads(torch.cat(outputs, 1)))
        return F.dropout(y, c.branch_dropout, self.training), loss


class _Block(nn.Module):
    def __init__(self, config: RoutingTransformerLMConfig, layer: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.rate, self.gated = config.mlp_dropout, config.gated
        self.mixer_norm, self.mlp_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mixer = _Attention(config, layer)
        self.up_proj = Linear(dim, 4 * dim * (2 if config.gated else 1))
        self.down_proj = Linear(4 * dim, dim)

    def forward(
        self, x: Tensor, mask: Tensor | None, angles: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        mixed, loss = self.mixer(self.mixer_norm(x), mask, angles)
        x = x + mixed
        h = self.up_proj(self.mlp_norm(x))
        if self.gated:
            h, gate = h.chunk(2, -1)
            h = F.gelu(h) * gate
        else:
            h = F.gelu(h)
        return x + self.down_proj(F.dropout(h, self.rate, self.training)), loss


class RoutingTransformerLM(Model):
    """Language model in the layout of the PyTorch package. **Looks ahead** in its selection.

    Who meets is decided over the whole sequence, also where causal; for generation and honest
    likelihoods use :class:`RoutingLM`.

    Example:
        >>> config = RoutingTransformerLMConfig(
        ...     vocab_size=50, embed_dim=64, num_layers=2, max_length=128, head_dim=16
        ... )
        >>> RoutingTransformerLM(config)(torch.randint(50, (1, 128))).shape
        torch.Size([1, 128, 50])
    """

    config_class: ClassVar[type[Config]] = RoutingTransformerLMConfig
    config: RoutingTransformerLMConfig

    def __init__(self, config: RoutingTransformerLMConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.width)
        nn.init.normal_(self.embed.weight, std=0.02)
        projected = c.width != c.embed_dim
        self.in_proj = Linear(c.width, c.embed_dim) if projected else None
        self.out_proj = Linear(c.embed_dim, c.width) if projected else None
        self.layers = nn.ModuleList(_Block(c, i) for i in range(c.num_layers))
        self.norm = nn.LayerNorm(c.width)
        self.head = Linear(c.width, c.vocab_size, bias=not c.tie_embeddings)
        if c.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, N, V) of tokens (B, N); mask (B, N), True = a real token."""
        return self.forward_with_loss(tokens, mask=mask)[0]

    def forward_with_loss(
        self, tokens: Tensor, *, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the logits and the commitment loss, to be added to the model's loss.

        Raises:
            ValueError: more tokens than ``max_length``.
        """
        c, length = self.config, tokens.shape[1]
        if length > c.max_length:
            raise ValueError(f"length {length} is beyond max_length {c.max_length} of this model")
        x = self.embed(tokens)
        if self.in_proj is not None:
            x = self.in_proj(x)
        angles = rotary_angles(torch.arange(length, device=x.device), c.head_dim)
        loss = x.new_zeros(())
        for block in cast(list[_Block], list(self.layers)):
            x, own = block(x, mask, angles)
            loss = loss + own
        if self.out_proj is not None:
            x = self.out_proj(x)
        return self.head(self.norm(x)), loss

    def key_map(self) -> KeyMap:
        """Names of the package, whose tables of positions are written as it computes them."""
        c = self.config
        projected = c.width != c.embed_dim
        body = "routing_transformer.fn." if projected else "routing_transformer."
        theirs, ours = f"{body}layers.layers.{{}}.", "layers.{}."
        attention = f"{theirs}0.fn."
        cos, sin = rotary_angles(torch.arange(c.max_length, device="cpu"), c.head_dim)
        frequency = 10000.0 ** (-torch.arange(0, c.head_dim, 2, device="cpu") / c.head_dim)
        kinds = ("weight", "bias")
        pairs = [
            ("mixer.kmeans.means", "0.fn.global_attn.kmeans.means"),
            ("mixer.memory_key", "0.fn.global_attn.mem_key"),
            ("mixer.memory_value", "0.fn.global_attn.mem_value"),
            *((f"mixer.local_proj.{k}", f"0.fn.local_to_qkv.{k}") for k in kinds),
            *((f"mixer.{n}_proj.weight", f"0.fn.to_{n}.weight") for n in ("q", "k", "v", "out")),
            *((f"mixer_norm.{k}", f"0.norm.{k}") for k in kinds),
            *((f"mlp_norm.{k}", f"1.norm.{k}") for k in kinds),
            *((f"up_proj.{k}", f"1.fn.fn.w1.{k}") for k in kinds),
            *((f"down_proj.{k}", f"1.fn.fn.w2.{k}") for k in kinds),
        ]
        tables = [
            constant(f"{attention.format(i)}local_attn.rel_pos.inv_freq", frequency, optional=True)
            for i in range(c.num_layers)
            if c.local(i) and c.rotary
        ]
        tables.append(constant("sinu_pos_emb.emb", torch.cat((sin, cos), -1), optional=True))
        head = [rename(f"head.{k}", f"out.{k}") for k in kinds]
        if c.tie_embeddings:
            head = [tied("embed.weight", "out.tensor")]
        return KeyMap(
            rename("embed.weight", "token_emb.weight"),
            *(
                rename(f"{a}_proj.{k}", f"routing_transformer.project_{a}.{k}")
                for a in ("in", "out")
                for k in kinds
            ),
            *(rename(ours + a, theirs + b) for a, b in pairs),
            convert(
                f"{ours}mixer.kmeans.is_placed",
                f"{attention}global_attn.kmeans.initted",
                lambda t: t.bool(),
                lambda t: t,
            ),
            *tables,
            *(rename(f"norm.{k}", f"norm.{k}") for k in kinds),
            *head,
        )

    def load_official(self, source: str | PathLike[str] | Mapping[str, Tensor]) -> Self:
        """Load a state dict of the package; means that it holds count as placed."""
        weights = read_weights(source)
        for name in list(weights):
            if name.endswith(".kmeans.means"):
                flag = name.removesuffix("means") + "initted"
                weights.setdefault(flag, torch.tensor(True))
        return super().load_official(weights)
