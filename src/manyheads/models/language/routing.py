"""The Routing Transformer: local and routing heads in post-norm layers (2003.05997).

B batch, N length, C embed_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.routing import RoutingAttention
from manyheads.attention.routing.official import kernel, layer_entries, with_averages
from manyheads.config import Config
from manyheads.layers.activations import activation
from manyheads.layers.few_rows import Linear
from manyheads.layers.keymap import KeyMap, read_weights, rename
from manyheads.layers.ragged import positions
from manyheads.models.base import register_variants
from manyheads.models.language.causal import CausalLM, LMState
from manyheads.models.language.mixer_lm import packed_positions
from manyheads.models.language.routing_config import VARIANTS, RoutingLMConfig, timing_signal

__all__ = ["RoutingLM", "RoutingLMConfig", "shift_right"]


def shift_right(targets: Tensor) -> Tensor:
    """Return what the model reads to predict ``targets`` (B, N): 0 and all but the last."""
    return F.pad(targets, (1, 0))[:, :-1]


class _FeedForward(nn.Module):
    """GEGLU without biases, or ReLU with them."""

    def __init__(self, config: RoutingLMConfig) -> None:
        super().__init__()
        c = config
        self.gated, self.rate = c.mlp == "geglu", c.mlp_dropout
        self.up_proj = Linear(c.embed_dim, c.mlp_width, bias=not self.gated)
        self.down_proj = Linear(c.mlp_width, c.embed_dim, bias=not self.gated)
        if self.gated:
            self.gate_proj = Linear(c.embed_dim, c.mlp_width, bias=False)
        self.act = activation("gelu_tanh" if self.gated else "relu")

    def forward(self, x: Tensor) -> Tensor:
        h = (
            self.act(self.gate_proj(x)) * self.up_proj(x)
            if self.gated
            else self.act(self.up_proj(x))
        )
        return self.down_proj(F.dropout(h, self.rate, self.training))


class _Block(nn.Module):
    """x = norm(x + mixer(x)); x = norm(x + mlp(x))."""

    def __init__(self, config: RoutingLMConfig, index: int) -> None:
        super().__init__()
        self.mixer = RoutingAttention(config.layer(index))
        self.mixer_norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.mlp = _FeedForward(config)
        self.mlp_norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.residual_dropout)

    def forward(
        self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, with_loss: bool
    ) -> tuple[Tensor, Tensor]:
        if with_loss:
            mixed, loss = self.mixer.forward_with_loss(x, mask=mask, cu_seqlens=cu_seqlens)
        else:
            mixed, loss = self.mixer(x, mask=mask, cu_seqlens=cu_seqlens), x.new_zeros(())
        return self._rest(x, mixed), loss

    def update(self, x: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.update(x, state, mask=mask)
        return self._rest(x, mixed), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.step(x, state)
        return self._rest(x, mixed), state

    def _rest(self, x: Tensor, mixed: Tensor) -> Tensor:
        x = self.mixer_norm(x + self.dropout(mixed))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class RoutingLM(CausalLM):
    """Language model whose heads attend locally or inside clusters of content.

    Its default, ``selection="strict"``, never looks ahead, and generates in constant memory;
    ``selection="official"`` is what the checkpoints were trained with: it **looks ahead** in
    choosing who meets, so that its likelihoods are a little too good and steps do not exist.
    Read ``shift_right(targets)`` to predict ``targets``, or call :meth:`loss`.

    Example:
        >>> model = RoutingLM(RoutingLMConfig(vocab_size=50, embed_dim=64, num_layers=2))
        >>> model(torch.randint(50, (1, 30))).shape
        torch.Size([1, 30, 50])
    """

    config_class: ClassVar[type[Config]] = RoutingLMConfig
    config: RoutingLMConfig

    def __init__(self, config: RoutingLMConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.width)
        self.embed_proj = Linear(c.width, c.embed_dim)
        self.layers = nn.ModuleList(_Block(c, i) for i in range(c.num_layers))
        self.head_in = None if c.width == c.embed_dim else Linear(c.embed_dim, c.width)
        self.head = Linear(c.width, c.vocab_size)
        nn.init.normal_(self.embed.weight, std=c.width**-0.5)

    @property
    def _blocks(self) -> list[_Block]:
        return cast(list[_Block], list(self.layers))

    def num_parameters(self, *, trainable: bool = False) -> int:
        """Return the number of official variables: parameters, centroids and their averages.

        Args:
            trainable: leave out the averages, as the official count of trainable variables does.
        """
        state = [(n, b.numel()) for n, b in self.named_buffers()]
        buffers = sum(count for n, count in state if not (trainable and ".ema_" in n))
        return super().num_parameters() + buffers

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, N, V) of tokens (B, N); other arguments as in the layers."""
        return self._run(tokens, mask, cu_seqlens, with_loss=False)[0]

    def loss(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean cross entropy of targets (B, N) that are not 0, and the clustering loss.

        The training loss is their sum.
        """
        tokens = targets
        if self.training and self.config.target_dropout:
            dropped = torch.rand(targets.shape, device=targets.device) < self.config.target_dropout
            tokens = targets.masked_fill(dropped, 0)
        logits, clustering = self._run(shift_right(tokens), None, None, with_loss=True)
        entropy = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten().long(), ignore_index=0
        )
        return entropy, clustering

    def update_centroids(self) -> None:
        """Move all centroids now by what was observed since they moved last."""
        for block in self._blocks:
            block.mixer.update_centroids()

    def _run(
        self, tokens: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, *, with_loss: bool
    ) -> tuple[Tensor, Tensor]:
        places = packed_positions(tokens.shape[1], mask, cu_seqlens, tokens.device)
        x = self._embed(tokens, places)
        loss = x.new_zeros(())
        for block in self._blocks:
            x, own = block(x, mask, cu_seqlens, with_loss)
            loss = loss + own
        return self._logits(x), loss

    def init_state(self, batch_size: int) -> LMState:
        states = tuple(block.mixer.init_state(batch_size) for block in self._blocks)
        return LMState(states, self.embed.weight.new_zeros(batch_size, dtype=torch.long))

    def update(
        self, tokens: Tensor, state: LMState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        places = positions(mask, tokens.shape[1], device=tokens.device) + state.position[:, None]
        x, states = self._embed(tokens, places), []
        for block, own in zip(self._blocks, state.layers, strict=True):
            x, own = block.update(x, own, mask)
            states.append(own)
        count = tokens.shape[1] if mask is None else mask.sum(1)
        return self._logits(x), LMState(tuple(states), state.position + count)

    def step(self, tokens: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        x, states = self._embed(tokens, state.position), []
        for block, own in zip(self._blocks, state.layers, strict=True):
            x, own = block.step(x, own)
            states.append(own)
        return self._logits(x), LMState(tuple(states), state.position + 1)

    def _embed(self, tokens: Tensor, places: Tensor) -> Tensor:
        c = self.config
        x = F.dropout(self.embed(tokens), c.dropout, self.training)
        x = self.embed_proj(x)
        if c.add_positions:
            x = x + timing_signal(places, c.embed_dim).to(x)
        return F.dropout(x, c.residual_dropout, self.training)

    def _logits(self, x: Tensor) -> Tensor:
        return self.head(x if self.head_in is None else self.head_in(x))

    def key_map(self) -> KeyMap:
        """Variables of the official TensorFlow graph."""
        body, ours = "sparse_transformer/body/", "layers.{}."
        layer = f"{body}decoder_layer_{{}}/self_attention/"
        norms = (("mixer_norm", "layer_postprocess"), ("mlp_norm", "layer_postprocess_1"))
        return KeyMap(
            rename("embed.weight", f"{body}embeddings/embedding"),
            *_dense("embed_proj", f"{body}emb_dense"),
            *layer_entries(f"{ours}mixer.", f"{layer}self_attention/", self.config.layer(-1)),
            *(
                rename(f"{ours}{a}.{p}", f"{layer}{b}/layer_norm/layer_norm_{q}")
                for a, b in norms
                for p, q in (("weight", "scale"), ("bias", "bias"))
            ),
            *self._mlp_entries(f"{ours}mlp.", f"{layer}ffn/"),
            *_dense("head_in", f"{body}final_dense_1"),
            *_dense("head", f"{body}final_dense_2"),
        )

    def _mlp_entries(self, ours: str, theirs: str) -> list[Any]:
        if self.config.mlp == "relu":
            return [
                *_dense(f"{ours}up_proj", f"{theirs}conv1"),
                *_dense(f"{ours}down_proj", f"{theirs}conv2"),
            ]
        names = (("gate", 1), ("up", 2), ("down", 3))
        return [kernel(f"{ours}{a}_proj", f"{theirs}weight{b}") for a, b in names]

    def load_official(self, source: str | PathLike[str] | Mapping[str, Tensor]) -> Self:
        weights = read_weights(source)
        return super().load_official(with_averages(weights) if self.config.ema else weights)


def _dense(ours: str, theirs: str) -> list[Any]:
    return [kernel(ours, theirs), rename(f"{ours}.bias", f"{theirs}/bias")]


register_variants(RoutingLM, "routing", VARIANTS)
