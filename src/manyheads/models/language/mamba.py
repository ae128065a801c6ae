"""The Mamba language model: RMSNorm and a Mamba-1 block, residuals in float32 (2312.00752).

B batch, N length, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from manyheads.attention.mamba import MambaConfig, MambaLayerState, MambaMixer
from manyheads.config import Config
from manyheads.errors import nearest, unknown_name
from manyheads.layers.few_rows import Linear
from manyheads.layers.keymap import Entry, KeyMap, read_weights, rename
from manyheads.layers.norms import RMSNorm
from manyheads.models.base import register_variants
from manyheads.models.language.causal import CausalLM, LMState

__all__ = ["MambaForCausalLM", "MambaLMConfig"]

Naming = Literal["state-spaces", "transformers"]
_EMBEDDING = {
    "state-spaces": "backbone.embedding.weight",
    "transformers": "backbone.embeddings.weight",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MambaLMConfig(Config):
    """Sizes of the model; those of a block are explained in :class:`MambaConfig`.

    Attributes:
        vocab_size: V, with its padding.
        embed_dim, num_layers: sizes.
        norm_eps: of all RMSNorms.
        tie_embeddings: whether the output matrix is the embedding.
        wide_residual: keep the sum over layers in float32 when the model is in half precision.
        init_std: of the embedding; the blocks' output matrices are shrunk by sqrt(num_layers).
    """

    vocab_size: int = 50280
    embed_dim: int = 768
    num_layers: int = 24
    state_dim: int = 16
    conv_size: int = 4
    expand: float = 2
    dt_rank: int | None = None
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_floor: float = 1e-4
    dt_scale: float = 1.0
    dt_init: str = "random"
    conv_bias: bool = True
    proj_bias: bool = False
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    wide_residual: bool = True
    init_std: float = 0.02

    def block(self) -> MambaConfig:
        """Return the config of one block."""
        return MambaConfig(
            embed_dim=self.embed_dim,
            state_dim=self.state_dim,
            conv_size=self.conv_size,
            expand=self.expand,
            dt_rank=self.dt_rank,
            dt_min=self.dt_min,
            dt_max=self.dt_max,
            dt_floor=self.dt_floor,
            dt_scale=self.dt_scale,
            dt_init=self.dt_init,
            conv_bias=self.conv_bias,
            proj_bias=self.proj_bias,
        )

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> MambaLMConfig:
        """Read an official ``config.json``, of state-spaces/mamba or of transformers.

        The vocabulary is rounded up to ``pad_vocab_size_multiple`` as the official code does (8
        where a state-spaces file does not say).

        Raises:
            ValueError: a key is neither known nor known to change nothing, or asks for something
                that a Mamba-1 model has not.
        """
        inner = official.get("ssm_cfg") or {}
        values: dict[str, Any] = {}
        for key, value in [*official.items(), *inner.items()]:
            if key in _OFFICIAL:
                values[_OFFICIAL[key]] = value
            elif key in _FIXED:
                if value not in _FIXED[key]:
                    raise ValueError(
                        f"{key}={value!r} is no Mamba-1 model: only {_FIXED[key][0]!r}"
                    )
            elif key not in _NO_EFFECT:
                known = [*_OFFICIAL, *_FIXED]
                raise ValueError(f"unknown key {key!r} in an official config{nearest(key, known)}")
        if values.get("dt_rank") == "auto":
            values["dt_rank"] = None
        multiple = official.get("pad_vocab_size_multiple", 1 if "hidden_size" in official else 8)
        if "vocab_size" in values:
            values["vocab_size"] = -(-values["vocab_size"] // multiple) * multiple
        return cls.from_dict(values)


_OFFICIAL = {
    "d_model": "embed_dim",
    "n_layer": "num_layers",
    "d_state": "state_dim",
    "d_conv": "conv_size",
    "dt_init_floor": "dt_floor",
    "norm_epsilon": "norm_eps",
    "bias": "proj_bias",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "state_size": "state_dim",
    "conv_kernel": "conv_size",
    "time_step_rank": "dt_rank",
    "time_step_min": "dt_min",
    "time_step_max": "dt_max",
    "time_step_floor": "dt_floor",
    "time_step_scale": "dt_scale",
    "time_step_init_scheme": "dt_init",
    "layer_norm_epsilon": "norm_eps",
    "use_conv_bias": "conv_bias",
    "use_bias": "proj_bias",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
    "residual_in_fp32": "wide_residual",
    **{
        name: name
        for name in (
            "vocab_size", "expand", "dt_rank", "dt_min", "dt_max", "dt_scale", "dt_init",
            "conv_bias", "tie_embeddings",
        )
    },
}  # fmt: skip
_FIXED: dict[str, tuple[Any, ...]] = {
    "rms_norm": (True,),
    "hidden_act": ("silu", "swish"),
    "layer": ("Mamba1",),
    "d_intermediate": (0,),
    "attn_layer_idx": ([], None),
    "attn_cfg": ({}, None),
    "model_type": ("mamba",),
}
_NO_EFFECT = {
    "architectures",
    "bos_token_id",
    "d_inner",
    "dtype",
    "eos_token_id",
    "fused_add_norm",
    "intermediate_size",
    "pad_token_id",
    "pad_vocab_size_multiple",
    "rescale_prenorm_residual",
    "ssm_cfg",
    "torch_dtype",
    "transformers_version",
    "use_associative_scan",
    "use_cache",
    "use_fast_path",
    "use_mambapy",
}


class _Block(nn.Module):
    """residual += mixer(norm(residual))."""

    def __init__(self, config: MambaLMConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.mixer = MambaMixer(config.block())

    def normed(self, residual: Tensor) -> Tensor:
        assert self.norm.weight is not None
        return self.norm(residual).to(self.norm.weight.dtype)


class MambaForCausalLM(CausalLM):
    """Language model of Mamba-1 blocks; constant memory while it generates. Needs training.

    ``load_official`` reads checkpoints of state-spaces/mamba and of transformers alike.

    Example:
        >>> model = MambaForCausalLM(MambaLMConfig(vocab_size=50, embed_dim=64, num_layers=2))
        >>> model(torch.randint(50, (1, 30))).shape
        torch.Size([1, 30, 50])
    """

    config_class: ClassVar[type[Config]] = MambaLMConfig
    config: MambaLMConfig

    def __init__(self, config: MambaLMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.embed_dim)
        self.layers = nn.ModuleList(_Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.head = Linear(config.embed_dim, config.vocab_size, bias=False)
        nn.init.normal_(self.embed.weight, std=config.init_std)
        with torch.no_grad():
            for layer in self._blocks:
                layer.mixer.out_proj.weight.mul_(config.num_layers**-0.5)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    @property
    def _blocks(self) -> list[_Block]:
        return cast(list[_Block], list(self.layers))

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, N, V) of tokens (B, N); other arguments as in the layers."""
        residual = self._embed(tokens)
        for layer in self._blocks:
            mixed = layer.mixer(layer.normed(residual), mask=mask, cu_seqlens=cu_seqlens)
            residual = residual + mixed
        return self._logits(residual)

    def init_state(self, batch_size: int) -> LMState:
        return LMState(tuple(layer.mixer.init_state(batch_size) for layer in self._blocks))

    def update(
        self, tokens: Tensor, state: LMState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        residual, states = self._embed(tokens), list[MambaLayerState]()
        for layer, own in zip(self._blocks, state.layers, strict=True):
            mixed, own = layer.mixer.update(layer.normed(residual), own, mask=mask)
            residual = residual + mixed
            states.append(own)
        return self._logits(residual), LMState(tuple(states))

    def step(self, tokens: Tensor, state: LMState) -> tuple[Tensor, LMState]:
        residual, states = self._embed(tokens), list[MambaLayerState]()
        for layer, own in zip(self._blocks, state.layers, strict=True):
            mixed, own = layer.mixer.step(layer.normed(residual), own)
            residual = residual + mixed
            states.append(own)
        return self._logits(residual), LMState(tuple(states))

    def _embed(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        wide = torch.promote_types(x.dtype, torch.float32)
        return x.to(wide) if self.config.wide_residual else x

    def _logits(self, residual: Tensor) -> Tensor:
        return self.head(self.norm(residual).to(self.head.weight.dtype))

    def load_official(self, source: str | PathLike[str] | Mapping[str, Tensor]) -> Self:
        """Load a checkpoint of either naming, strictly; returns self.

        Raises:
            ValueError: a key is missing, left over or of another shape, with nearest names.
        """
        weights = read_weights(source)
        if _EMBEDDING["transformers"] in weights:
            weights[_EMBEDDING["state-spaces"]] = weights.pop(_EMBEDDING["transformers"])
        return super().load_official(weights)

    def to_official(self, naming: Naming = "state-spaces") -> dict[str, Tensor]:
        """Return the weights under the names of state-spaces/mamba or of transformers."""
        if naming not in _EMBEDDING:
            raise unknown_name("naming", naming, _EMBEDDING)
        weights = super().to_official()
        weights[_EMBEDDING[naming]] = weights.pop(_EMBEDDING["state-spaces"])
        return weights

    def key_map(self) -> KeyMap:
        """Names of state-spaces/mamba; transformers differs in the embedding alone."""
        ours, theirs = "layers.{}.mixer.", "backbone.layers.{}.mixer."
        # Some files leave the tied output matrix out.
        tied = Entry(("embed.weight",), ("lm_head.weight",), is_tied=True, optional=True)
        blocks = self._blocks[0].mixer.key_map().entries if self._blocks else ()
        return KeyMap(
            rename("embed.weight", _EMBEDDING["state-spaces"]),
            rename("layers.{}.norm.weight", "backbone.layers.{}.norm.weight"),
            *(rename(ours + e.ours[0], theirs + e.official[0]) for e in blocks),
            rename("norm.weight", "backbone.norm_f.weight"),
            tied if self.config.tie_embeddings else rename("head.weight", "lm_head.weight"),
        )


def _variant(size: str, width: int, layers: int) -> tuple[str, tuple[Config, tuple[str, ...]]]:
    config = MambaLMConfig(embed_dim=width, num_layers=layers)
    names = (f"mamba-{size}", f"state-spaces/mamba-{size}", f"state-spaces/mamba-{size}-hf")
    return f"mamba_{size}", (config, names)


# The block is the one that Quamba quantises; its paper is not among the cards.
register_variants(
    MambaForCausalLM,
    "quamba",
    dict(
        (
            _variant("130m", 768, 24),
            _variant("370m", 1024, 48),
            _variant("790m", 1536, 48),
            _variant("1.4b", 2048, 48),
            _variant("2.8b", 2560, 64),
        )
    ),
)
