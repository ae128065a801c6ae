"""The GLA language model: RMSNorm, gated linear attention, RMSNorm, SwiGLU (2312.06635).

B batch, N length, C hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from manyheads.attention.gla import GatedLinearAttention, GLAConfig
from manyheads.attention.softmax import SoftmaxAttention, SoftmaxConfig
from manyheads.config import Config
from manyheads.errors import nearest
from manyheads.layers.few_rows import Linear
from manyheads.layers.keymap import KeyMap, rename, tied
from manyheads.layers.mixer import SequenceMixer
from manyheads.layers.mlp import GatedMLP, swiglu_width
from manyheads.layers.norms import RMSNorm
from manyheads.models.base import register_variants
from manyheads.models.language.causal import CausalLM, LMState

__all__ = ["GLAForCausalLM", "GLALMConfig"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GLALMConfig(Config):
    """Sizes of the model; the layer's own options are those of :class:`GLAConfig`.

    Attributes:
        vocab_size, embed_dim, num_layers, num_heads, num_kv_heads: sizes.
        mlp_width: hidden width of the MLP (None: two thirds of mlp_ratio · embed_dim, rounded up
            to 256).
        activation: of the MLP and of the output gate.
        softmax_layers: indices of layers that use softmax attention instead (hybrid models).
        softmax_heads, softmax_kv_heads: their heads (None: as the GLA layers).
        init_std: of linear and embedding weights.
    """

    vocab_size: int = 32000
    embed_dim: int = 2048
    num_layers: int = 24
    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    feature_map: str | None = None
    conv_size: int = 0
    output_gate: bool = True
    clamp_min: float | None = None
    norm_affine: bool = True
    norm_eps: float = 1e-6
    fuse_norm: bool = True
    activation: str = "swish"
    mlp_ratio: float = 4
    mlp_width: int | None = None
    tie_embeddings: bool = False
    softmax_layers: tuple[int, ...] = ()
    softmax_heads: int | None = None
    softmax_kv_heads: int | None = None
    rotary_theta: float = 10000.0
    init_std: float = 0.02

    @classmethod
    def from_official(cls, official: Mapping[str, Any]) -> GLALMConfig:
        """Read an official ``config.json``.

        Raises:
            ValueError: a key is neither known nor known to change nothing.
        """
        values: dict[str, Any] = {}
        for key, value in official.items():
            if key in _OFFICIAL:
                values[_OFFICIAL[key]] = value
            elif key not in _NO_EFFECT and key not in ("use_short_conv", "conv_size", "attn"):
                known = [*_OFFICIAL, "use_short_conv", "conv_size", "attn"]
                raise ValueError(f"unknown key {key!r} in an official config{nearest(key, known)}")
        if official.get("use_short_conv", False):
            values["conv_size"] = official.get("conv_size", 4)
        if attn := official.get("attn"):
            values["softmax_layers"] = tuple(attn["layers"])
            values["softmax_heads"] = attn.get("num_heads")
            values["softmax_kv_heads"] = attn.get("num_kv_heads")
            values["rotary_theta"] = attn.get("rope_theta", 10000.0)
        return cls.from_dict(values)


_OFFICIAL = {
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_heads": "num_heads",
    "num_kv_heads": "num_kv_heads",
    "expand_k": "expand_k",
    "expand_v": "expand_v",
    "feature_map": "feature_map",
    "use_output_gate": "output_gate",
    "clamp_min": "clamp_min",
    "hidden_act": "activation",
    "hidden_ratio": "mlp_ratio",
    "intermediate_size": "mlp_width",
    "elementwise_affine": "norm_affine",
    "norm_eps": "norm_eps",
    "fuse_norm": "fuse_norm",
    "vocab_size": "vocab_size",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
}
_NO_EFFECT = {
    "architectures",
    "attn_mode",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "fuse_cross_entropy",
    "fuse_linear_cross_entropy",
    "fuse_swiglu",
    "max_position_embeddings",
    "model_type",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
    "use_gk",
    "use_gv",
    "use_l2warp",
}


class _Block(nn.Module):
    def __init__(self, config: GLALMConfig, index: int) -> None:
        super().__init__()
        c = config
        self.mixer_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        self.mixer: SequenceMixer
        if index in c.softmax_layers:
            self.mixer = SoftmaxAttention(
                SoftmaxConfig(
                    embed_dim=c.embed_dim,
                    num_heads=c.softmax_heads or c.num_heads,
                    num_kv_heads=c.softmax_kv_heads,
                    rotary_theta=c.rotary_theta,
                )
            )
        else:
            self.mixer = GatedLinearAttention(
                GLAConfig(
                    embed_dim=c.embed_dim,
                    num_heads=c.num_heads,
                    num_kv_heads=c.num_kv_heads,
                    expand_k=c.expand_k,
                    expand_v=c.expand_v,
                    feature_map=c.feature_map,
                    conv_size=c.conv_size,
                    output_gate=c.output_gate,
                    gate_fn=c.activation,
                    fuse_norm=c.fuse_norm,
                    norm_affine=c.norm_affine,
                    norm_eps=c.norm_eps,
                    clamp_min=c.clamp_min,
                )
            )
        self.mlp_norm = RMSNorm(c.embed_dim, eps=c.norm_eps)
        width = c.mlp_width or swiglu_width(c.embed_dim, ratio=c.mlp_ratio)
        self.mlp = GatedMLP(c.embed_dim, width, activation_name=c.activation)

    def forward(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        x = x + self.mixer(self.mixer_norm(x), mask=mask, cu_seqlens=cu_seqlens)
        return x + self.mlp(self.mlp_norm(x))

    def update(self, x: Tensor, state: Any, mask: Tensor | None) -> tuple[Tensor, Any]:
        mixed, state = self.mixer.update(self.mixer_norm(x), state, mask=mask)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state


class GLAForCausalLM(CausalLM):
    """Language model of gated linear attention layers; constant memory while it generates.

    Example:
        >>> model = GLAForCausalLM(GLALMConfig(vocab_size=50, embed_dim=64, num_layers=2))
        >>> model(torch.randint(50, (1, 30))).shape
        torch.Size([1, 30, 50])
    """

    config_class: ClassVar[type[Config]] = GLALMConfig
    config: GLALMConfig

    def __init__(self, config: GLALMConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.embed_dim)
        self.layers = nn.ModuleList(_Block(config, i) for i in range(config.num_layers))
        self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps)
        self.head = Linear(config.embed_dim, config.vocab_size, bias=False)
        self.apply(self._init)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    @property
    def _blocks(self) -> list[_Block]:
        return cast(list[_Block], list(self.layers))

    def _init(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.init_std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Tensor, *, mask: Tensor | None = None, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Return logits (B, N, V) of tokens (B, N); other arguments as in the layers."""
        x = self.embed(tokens)
        for layer in self._blocks:
            x = layer(x, mask, cu_seqlens)
        return self.head(self.norm(x))

    def init_state(self, batch_size: int) -> LMState:
        return LMState(tuple(layer.mixer.init_state(batch_size) for layer in self._blocks))

    def update(
        self, tokens: Tensor, state: LMState, *, mask: Tensor | None = None
    ) -> tuple[Tensor, LMState]:
        x, states = self.embed(tokens), []
        for layer, own in zip(self._blocks, state.layers, strict=True):
            x, own = layer.update(x, own, mask)
            states.append(own)
        return self.head(self.norm(x)), LMState(tuple(states))

    def key_map(self) -> KeyMap:
        """Names of flash-linear-attention."""
        fused = (
            self.config.output_gate and self.config.fuse_norm and self.config.activation == "swish"
        )
        ours, theirs = "layers.{}.", "model.layers.{}."
        pairs = [
            *((f"mixer.{n}_proj.weight", f"attn.{n}_proj.weight") for n in "qkv"),
            ("mixer.gate_proj.weight", "attn.g_proj.weight"),
            ("mixer.out_proj.weight", "attn.o_proj.weight"),
            ("mixer.decay_proj.0.weight", "attn.gk_proj.0.weight"),
            ("mixer.decay_proj.1.weight", "attn.gk_proj.1.weight"),
            ("mixer.decay_proj.1.bias", "attn.gk_proj.1.bias"),
            ("mixer.norm.weight", f"attn.g_norm{'_swish_gate' if fused else ''}.weight"),
            *((f"mixer.{n}_conv.weight", f"attn.{n}_conv1d.weight") for n in "qkv"),
            ("mixer_norm.weight", "attn_norm.weight"),
            ("mlp_norm.weight", "mlp_norm.weight"),
            *((f"mlp.{n}_proj.weight", f"mlp.{n}_proj.weight") for n in ("gate", "up", "down")),
        ]
        head = tied("embed.weight", "lm_head.weight") if self.config.tie_embeddings else None
        return KeyMap(
            rename("embed.weight", "model.embeddings.weight"),
            *(rename(ours + a, theirs + b) for a, b in pairs),
            rename("norm.weight", "model.norm.weight"),
            head or rename("head.weight", "lm_head.weight"),
        )


register_variants(
    GLAForCausalLM,
    "gla",
    {
        "gla_340m": (GLALMConfig(embed_dim=1024), ("340M", "gla-340M")),
        "gla_1.3b": (GLALMConfig(embed_dim=2048), ("1.3B", "gla-1.3B")),
        "gla_2.7b": (GLALMConfig(embed_dim=2560, num_layers=32), ("2.7B", "gla-2.7B")),
    },
)
