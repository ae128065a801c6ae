"""What both landmark language models share: landmarks among the tokens, and reading with a memory.

B batch, N length, C embed_dim, V vocabulary, L = freq + 1 tokens a block with its landmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from manyheads.attention.landmark import (
    LandmarkAttention,
    LandmarkMemory,
    insert_landmarks,
    landmark_jumps,
    strip_landmarks,
)
from manyheads.config import Config
from manyheads.layers.ragged import check_mask
from manyheads.models.language.causal import CausalLM, LMState

__all__ = ["LandmarkBlock", "LandmarkLM", "LandmarkLMConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LandmarkLMConfig(Config):
    """Sizes that both models have.

    Attributes:
        vocab_size: V, the landmark among them.
        embed_dim, num_layers, num_heads: sizes.
        landmark_id: the token that is a landmark.
        freq: tokens between landmarks; a block is one longer.
        train_context: tokens, landmarks among them, that the model was trained on at once.
        rotary_theta: base of the rotary embedding.
        init_std: of linear and embedding weights.
        group_dropout: in training alone, the share of earlier blocks that each query and head
            leaves out.
        pos_jump: in training alone, positions leave out up to ``pos_jump`` - 1 places behind each
            landmark, at random; 0 for none.
    """

    vocab_size: int
    embed_dim: int
    num_layers: int
    num_heads: int
    landmark_id: int
    freq: int
    train_context: int
    rotary_theta: float = 10000.0
    init_std: float = 0.02
    group_dropout: float = 0.0
    pos_jump: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.landmark_id < self.vocab_size:
            raise ValueError(
                f"landmark_id {self.landmark_id} lies outside the vocabulary of {self.vocab_size}"
            )
        if self.freq < 1:
            raise ValueError(f"freq {self.freq} must be at least 1: tokens between two landmarks")
        if self.pos_jump < 0:
            raise ValueError(f"pos_jump {self.pos_jump} must not be negative: 0 for no jumps")

    @property
    def block_size(self) -> int:
        return self.freq + 1


class LandmarkBlock(nn.Module):
    """x += attention(norm(x)); x += mlp(norm(x))."""

    def __init__(
        self, norms: tuple[nn.Module, nn.Module], mixer: LandmarkAttention, mlp: nn.Module
    ) -> None:
        super().__init__()
        self.mixer_norm, self.mlp_norm = norms
        self.mixer, self.mlp = mixer, mlp

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        is_landmark: Tensor,
        jumps: Tensor | None,
    ) -> Tensor:
        x = x + self.mixer(
            self.mixer_norm(x),
            mask=mask,
            cu_seqlens=cu_seqlens,
            is_landmark=is_landmark,
            jumps=jumps,
        )
        return x + self.mlp(self.mlp_norm(x))

    def remember(self, x: Tensor, memory: LandmarkMemory) -> Tensor:
        x = x + self.mixer.remember(self.mixer_norm(x), memory)
        return x + self.mlp(self.mlp_norm(x))


class LandmarkLM(CausalLM):
    """Base of landmark language models.

    ``forward`` reads whole sequences that carry landmarks (:func:`insert_landmarks`), at any
    places. ``update``, ``step`` and ``generate`` read plain tokens: landmarks are put in and taken
    out on the way, and each layer keeps a :class:`LandmarkMemory`, from which ``top_k`` blocks are
    fetched. That is lossy; equal to ``forward`` where ``top_k`` covers all that was read.
    """

    config: LandmarkLMConfig
    embed: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Linear

    @property
    def _blocks(self) -> list[LandmarkBlock]:
        return cast(list[LandmarkBlock], list(self.layers))

    @property
    def never_generated(self) -> tuple[int, ...]:
        # Landmarks are put in by place; one that is drawn would have no block to stand for.
        return (self.config.landmark_id,)

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, N, V) of tokens (B, N), landmarks among them."""
        is_landmark = tokens == self.config.landmark_id
        jumps = None
        if self.training and self.config.pos_jump:
            jumps = landmark_jumps(is_landmark, self.config.pos_jump)
        x = self.embed(tokens)
        for layer in self._blocks:
            x = layer(x, mask, cu_seqlens, is_landmark, jumps)
        return self.head(self.norm(x))

    def init_state(
        self,
        batch_size: int,
        *,
        top_k: int = 2,
        path: str | PathLike[str] | None = None,
        **options: Any,
    ) -> LMState:
        """Return a state of one empty memory a layer.

        Args:
            batch_size: rows; all read streams of one length.
            top_k: blocks that a query fetches.
            path: a folder for the blocks; one below it for each layer.
            options: of :class:`LandmarkMemory` (capacity, selection, positions, storage_device).
        """
        folders = (None if path is None else Path(path) / str(i) for i in range(len(self.layers)))
        return LMState(
            tuple(
                layer.mixer.new_memory(top_k=top_k, path=folder, **options)
                for layer, folder in zip(self._blocks, folders, strict=True)
            )
        )

    def chunk_length(self, top_k: int) -> int:
        """Return how many tokens, with landmarks, fit beside ``top_k`` blocks in train_context.

        Raises:
            ValueError: none do.
        """
        c = self.config
        length = c.train_context - c.train_context % c.block_size - (top_k + 1) * c.block_size
        if length <= 0:
            raise ValueError(
                f"top_k {top_k} blocks of {c.block_size} and one more leave no room in "
                f"train_context {c.train_context}: lower top_k, or pass chunk_length"
            )
        return length

    @torch.no_grad()
    def update(
        self,
        tokens: Tensor,
        state: LMState,
        *,
        mask: Tensor | None = None,
        chunk_length: int | None = None,
        with_landmarks: bool = False,
    ) -> tuple[Tensor, LMState]:
        """Read the next tokens (B, N) of a stream: logits (B, N, V) and the state, changed.

        Args:
            tokens: (B, N), without landmarks.
            state: from :meth:`init_state`, :meth:`update` or :meth:`step`; consumed.
            mask: must be all True: rows share one layout of blocks.
            chunk_length: tokens, with landmarks, that see each other at once (None: as many as
                the context that was trained leaves beside the fetched blocks).
            with_landmarks: whether ``tokens`` carry landmarks where the stream has them; logits
                are then those of all.

        Raises:
            ValueError: padding, landmarks at other places, or no room for a chunk.
        """
        c = self.config
        mask = check_mask(mask, *tokens.shape)
        if mask is not None and not bool(mask.all()):
            raise ValueError("mask has padding: rows of a memory share one layout of blocks")
        first: LandmarkMemory = state.layers[0]
        offset = first.seen * c.freq + first.tail_length
        if with_landmarks:
            self._check_places(tokens, first.tail_length)
        elif first.tail_length == c.freq:
            raise ValueError(
                "the block before these tokens lacks its landmark: begin with it and pass "
                "with_landmarks=True"
            )
        else:
            tokens = insert_landmarks(tokens, c.freq, c.landmark_id, offset=offset)
        size = self.chunk_length(first.top_k) if chunk_length is None else chunk_length
        if size < 1:
            raise ValueError(f"chunk_length {size} must be at least 1")
        parts = [self._remember(part, state.layers) for part in tokens.split(size, 1)]
        hidden = torch.cat(parts, 1)
        if not with_landmarks:
            hidden = strip_landmarks(hidden, c.freq, offset=offset)
        return self.head(hidden), state

    def _remember(self, tokens: Tensor, memories: tuple[LandmarkMemory, ...]) -> Tensor:
        x = self.embed(tokens)
        for layer, memory in zip(self._blocks, memories, strict=True):
            x = layer.remember(x, memory)
        return self.norm(x)

    def _check_places(self, tokens: Tensor, before: int) -> None:
        """Check tokens against the stream; ``before``: tokens of the unfinished block."""
        c = self.config
        places = torch.arange(tokens.shape[1], device=tokens.device) + before
        if bool(((tokens == c.landmark_id) != (places % c.block_size == c.freq)).any()):
            raise ValueError(
                f"tokens do not carry the landmark {c.landmark_id} after every {c.freq} tokens of "
                "the stream: use insert_landmarks, or with_landmarks=False"
            )
