"""The Aaren layer: prefix attention and an MLP, each with a residual and a LayerNorm (2405.13956).

B batch, N length, C embed_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from torch import Tensor, nn

from manyheads.attention.aaren import AarenAttention, AarenConfig, AarenState
from manyheads.config import Config
from manyheads.layers.activations import activation
from manyheads.layers.few_rows import Linear
from manyheads.layers.keymap import Entry, KeyMap, rename, split
from manyheads.models.base import Model, register_variants

__all__ = ["AarenLayer", "AarenLayerConfig", "encoder_options", "layer_entries"]


@dataclass(frozen=True, kw_only=True, slots=True)
class AarenLayerConfig(Config):
    """Sizes and options of a layer; the defaults are the ones the paper counts parameters for.

    Attributes:
        embed_dim, num_heads, ff_dim: sizes.
        norm_first: norm before each branch instead of after each sum. The paper does not say;
            after the sum, as in torch.nn.TransformerEncoderLayer, is a reconstruction.
        activation: of the MLP.
        dropout: on the outputs of attention, of the MLP's hidden layer and of the MLP. Attention
            weights are never made, so they are not dropped.
        norm_eps, bias: as named.
        query: see :class:`manyheads.attention.AarenConfig`.
    """

    embed_dim: int = 512
    num_heads: int = 8
    ff_dim: int = 2048
    norm_first: bool = False
    activation: str = "relu"
    dropout: float = 0.1
    norm_eps: float = 1e-5
    bias: bool = True
    query: Literal["token", "per_head", "shared"] = "token"

    def __post_init__(self) -> None:
        activation(self.activation)
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}"
            )


class AarenLayer(Model):
    """A Transformer layer whose attention is Aaren; causal, constant memory. Needs training.

    Example:
        >>> layer = AarenLayer(AarenLayerConfig(embed_dim=64, num_heads=4, ff_dim=128))
        >>> layer(torch.randn(1, 100, 64)).shape
        torch.Size([1, 100, 64])
    """

    config_class: ClassVar[type[Config]] = AarenLayerConfig
    config: AarenLayerConfig

    def __init__(self, config: AarenLayerConfig) -> None:
        super().__init__()
        self.config = c = config
        self.attention = AarenAttention(
            AarenConfig(embed_dim=c.embed_dim, num_heads=c.num_heads, bias=c.bias, query=c.query)
        )
        self.linear1 = Linear(c.embed_dim, c.ff_dim, bias=c.bias)
        self.linear2 = Linear(c.ff_dim, c.embed_dim, bias=c.bias)
        self.norm1 = nn.LayerNorm(c.embed_dim, eps=c.norm_eps, bias=c.bias)
        self.norm2 = nn.LayerNorm(c.embed_dim, eps=c.norm_eps, bias=c.bias)
        self.dropout = nn.Dropout(c.dropout)
        self.act = activation(c.activation)

    @classmethod
    def from_encoder_layer(
        cls, layer: nn.TransformerEncoderLayer, *, query: Tensor | None = None
    ) -> Self:
        """Take over the weights of a torch encoder layer; lossy, a start for training.

        The projections, the MLP and the norms are copied. The queries of the layer depend on its
        input, ours is one learned token.

        Args:
            layer: any sizes; ReLU or GELU.
            query: (C), the query token; drawn at random unless given.

        Raises:
            ValueError: another activation.
        """
        own = cls(AarenLayerConfig(**encoder_options(layer)))
        own.to(layer.linear1.weight)
        token = own.attention.query.detach() if query is None else query
        own.load_official({**layer.state_dict(), "query": token})
        return own.train(layer.training)

    def forward(
        self, x: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return (B, N, C) of (B, N, C).

        Args:
            x: the inputs.
            mask: (B, N), True = a real token; padding on either side changes no real token.
            cu_seqlens: (S + 1) borders of packed sequences, with B = 1.
        """
        mixed = self.attention(self._before(x), mask=mask, cu_seqlens=cu_seqlens)
        return self._finish(x, mixed)

    def init_state(self, batch_size: int) -> AarenState:
        """Return the state before the first token: H (D + 2) numbers a row."""
        return self.attention.init_state(batch_size)

    def update(
        self, x: Tensor, state: AarenState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, AarenState]:
        """Read a block (B, N, C): the outputs and the next state."""
        mixed, state = self.attention.update(self._before(x), state, mask=mask)
        return self._finish(x, mixed), state

    def step(self, x: Tensor, state: AarenState) -> tuple[Tensor, AarenState]:
        """Read one token a row, (B, C), in constant time and memory."""
        mixed, state = self.attention.step(self._before(x), state)
        return self._finish(x, mixed), state

    def _before(self, x: Tensor) -> Tensor:
        return self.norm1(x) if self.config.norm_first else x

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        if self.config.norm_first:
            x = x + self.dropout(mixed)
            return x + self._mlp(self.norm2(x))
        x = self.norm1(x + self.dropout(mixed))
        return self.norm2(x + self._mlp(x))

    def _mlp(self, x: Tensor) -> Tensor:
        return self.dropout(self.linear2(self.dropout(self.act(self.linear1(x)))))

    def key_map(self) -> KeyMap:
        """Names of torch.nn.TransformerEncoderLayer, and ``query``."""
        return KeyMap(*layer_entries(self.config))


def layer_entries(config: AarenLayerConfig, *, ours: str = "", official: str = "") -> list[Entry]:
    """Return the key map of a layer whose keys begin with ``ours`` here and ``official`` there."""
    parts = "qkv" if config.query == "token" else "kv"
    entries = [rename(f"{ours}attention.query", f"{official}query")]
    for kind in ("weight", "bias"):
        own = [f"{ours}attention.{p}_proj.{kind}" for p in parts]
        entries.append(split(own, f"{official}self_attn.in_proj_{kind}"))
        out = f"out_proj.{kind}"
        entries.append(rename(f"{ours}attention.{out}", f"{official}self_attn.{out}"))
        entries += [
            rename(f"{ours}{name}.{kind}", f"{official}{name}.{kind}")
            for name in ("linear1", "linear2", "norm1", "norm2")
        ]
    return entries


def encoder_options(layer: nn.TransformerEncoderLayer) -> dict[str, Any]:
    """Return the options of :class:`AarenLayerConfig` that a torch encoder layer has.

    Raises:
        ValueError: its activation is neither ReLU nor GELU.
    """
    name = {1: "relu", 2: "gelu"}.get(layer.activation_relu_or_gelu)
    if isinstance(layer.activation, nn.GELU) and layer.activation.approximate == "tanh":
        name = "gelu_tanh"
    if name is None:
        raise ValueError(
            f"the encoder layer's activation {layer.activation!r} is neither ReLU nor GELU"
        )
    return {
        "embed_dim": layer.linear1.in_features,
        "num_heads": layer.self_attn.num_heads,
        "ff_dim": layer.linear1.out_features,
        "norm_first": layer.norm_first,
        "activation": name,
        "dropout": layer.dropout1.p,
        "norm_eps": layer.norm1.eps,
        "bias": layer.linear1.bias is not None,
    }


register_variants(
    AarenLayer, "aaren", {"aaren_layer_512": (AarenLayerConfig(), ("aaren_layer", "aaren"))}
)
