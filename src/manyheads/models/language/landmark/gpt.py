"""The GPT of the landmark paper: layer norms without bias, rotary positions (2305.16300).

B batch, N length, C embed_dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention.landmark import LandmarkAttention, LandmarkConfig
from manyheads.config import Config
from manyheads.errors import nearest
from manyheads.layers.few_rows import Linear
from manyheads.layers.keymap import Entry, KeyMap, constant, rename, split, tied
from manyheads.models.base import register_variants
from manyheads.models.language.landmark.base import LandmarkBlock, LandmarkLM, LandmarkLMConfig

__all__ = ["LandmarkGPT", "LandmarkGPTConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LandmarkGPTConfig(LandmarkLMConfig):
    """Sizes of a :class:`LandmarkGPT`, by default those trained on PG-19 and arXiv.

    Attributes:
        bias: whether norms and linear layers have biases.
        dropout: on the embeddings and on both branches.
    """

    vocab_size: int = 50304
    embed_dim: int = 1024
    num_layers: int = 12
    num_heads: int = 8
    landmark_id: int = 50260
    freq: int = 50
    train_context: int = 512
    bias: bool = False
    dropout: float = 0.0

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> LandmarkGPTConfig:
        """Read the arguments of a run of the official lm_benchmark.

        Raises:
            ValueError: a key is unknown, or a value is one that no released run has.
        """
        values: dict[str, Any] = {}
        for key, value in official.items():
            if key in _OFFICIAL:
                values[_OFFICIAL[key]] = value
            elif key in _IN_TRAINING:
                values[_IN_TRAINING[key]] = value or 0
            elif key in _RELEASED:
                if value not in _RELEASED[key]:
                    raise ValueError(f"{key}={value!r} is not supported: {_RELEASED[key]}")
            elif key not in _AT_INFERENCE:
                known = [*_OFFICIAL, *_IN_TRAINING, *_RELEASED, *_AT_INFERENCE]
                raise ValueError(f"unknown key {key!r} in an official config{nearest(key, known)}")
        if official.get("positional_encoder") == "rotary":
            values["pos_jump"] = 0  # that encoder does not read it
        freq = official.get("mem_cache_freq") or official.get("mem_freq")
        return cls.from_dict(values | ({"freq": freq} if freq else {}))


_OFFICIAL = {
    "n_embd": "embed_dim",
    "n_head": "num_heads",
    "n_layer": "num_layers",
    "vocab_size": "vocab_size",
    "landmark_id": "landmark_id",
    "sequence_length": "train_context",
    "bias": "bias",
    "dropout": "dropout",
}
_RELEASED: dict[str, tuple[Any, ...]] = {
    "softmax_func": ("mem", "mem_opt"),
    "positional_encoder": ("rotary", "rotary_mem_jump"),
}
_IN_TRAINING = {"group_dropout": "group_dropout", "pos_jump_on_mem": "pos_jump"}
_AT_INFERENCE = {
    "allow_cache_during_training",
    "batch_size",
    "cache_selection_method",
    "cache_topk",
    "enable_rem_score",
    "lm_cache",
    "max_groups_for_softmax",
    "mem_cache_freq",
    "mem_cache_size",
    "mem_freq",
    "postpone_lm_cache",
}


class _MLP(nn.Module):
    def __init__(self, dim: int, *, bias: bool, dropout: float) -> None:
        super().__init__()
        self.fc1 = Linear(dim, 4 * dim, bias=bias)
        self.fc2 = Linear(4 * dim, dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(F.gelu(self.fc1(x))))


class LandmarkGPT(LandmarkLM):
    """GPT with landmark attention; reads any length with a memory of blocks. Needs training.

    Example:
        >>> config = LandmarkGPTConfig(
        ...     vocab_size=50, landmark_id=49, embed_dim=64, num_layers=2, freq=5)
        >>> model = LandmarkGPT(config)
        >>> logits, state = model.update(torch.randint(49, (1, 300)), model.init_state(1))
        >>> logits.shape
        torch.Size([1, 300, 50])
    """

    config_class: ClassVar[type[Config]] = LandmarkGPTConfig
    config: LandmarkGPTConfig

    def __init__(self, config: LandmarkGPTConfig) -> None:
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.embed_dim)
        self.layers = nn.ModuleList(self._block() for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(c.embed_dim, bias=c.bias)
        self.head = Linear(c.embed_dim, c.vocab_size, bias=False)
        self.apply(self._init)
        for name, parameter in self.named_parameters():
            if name.endswith(("out_proj.weight", "fc2.weight")):
                nn.init.normal_(parameter, std=c.init_std * (2 * c.num_layers) ** -0.5)
        self.head.weight = self.embed.weight

    def _block(self) -> LandmarkBlock:
        c = self.config
        mixer = LandmarkAttention(
            LandmarkConfig(
                embed_dim=c.embed_dim,
                num_heads=c.num_heads,
                bias=c.bias,
                block_size=c.block_size,
                rotary_theta=c.rotary_theta,
                rotary_interleaved=True,
                group_dropout=c.group_dropout,
            )
        )
        norms = (nn.LayerNorm(c.embed_dim, bias=c.bias), nn.LayerNorm(c.embed_dim, bias=c.bias))
        return LandmarkBlock(norms, mixer, _MLP(c.embed_dim, bias=c.bias, dropout=c.dropout))

    def key_map(self) -> KeyMap:
        """Names of the official lm_benchmark; its mask buffers are written, and not needed."""
        c = self.config
        ours, theirs = "layers.{}.", "transformer.h.{}."
        entries: list[Entry] = []
        for kind in ("weight", "bias") if c.bias else ("weight",):
            entries += [
                split(
                    [f"{ours}mixer.{n}_proj.{kind}" for n in "qkv"], f"{theirs}attn.c_attn.{kind}"
                ),
                rename(f"{ours}mixer.out_proj.{kind}", f"{theirs}attn.c_proj.{kind}"),
                rename(f"{ours}mixer_norm.{kind}", f"{theirs}ln_1.{kind}"),
                rename(f"{ours}mlp_norm.{kind}", f"{theirs}ln_2.{kind}"),
                rename(f"{ours}mlp.fc1.{kind}", f"{theirs}mlp.c_fc.{kind}"),
                rename(f"{ours}mlp.fc2.{kind}", f"{theirs}mlp.c_proj.{kind}"),
                rename(f"norm.{kind}", f"transformer.ln_f.{kind}"),
            ]
        half = c.embed_dim // c.num_heads // 2
        frequencies = c.rotary_theta ** (-torch.arange(half, device="cpu") / half)
        size = c.train_context
        mask = torch.ones(size, size, device="cpu").tril()[None, None]
        return KeyMap(
            rename("embed.weight", "transformer.wte.weight"),
            tied("embed.weight", "lm_head.weight"),
            *entries,
            constant("transformer.wpe.freqs", frequencies, optional=True),
            *(
                constant(f"transformer.h.{i}.attn.bias", mask, optional=True)
                for i in range(0 if c.bias else c.num_layers)
            ),
        )


register_variants(
    LandmarkGPT, "landmark", {"landmark_gpt": (LandmarkGPTConfig(), ("lm_benchmark",))}
)
