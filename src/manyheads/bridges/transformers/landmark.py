"""From a LLaMA of transformers to one with landmark attention (2305.16300)."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.layers.keymap import read_weights
from manyheads.models.language.landmark import (
    LandmarkLlama,
    LandmarkLlamaConfig,
    add_token,
    apply_weight_diff,
)

__all__ = ["landmark_from_llama"]

Weights = str | PathLike[str] | Mapping[str, Tensor]


def landmark_from_llama(
    source: LlamaForCausalLM | str | PathLike[str],
    *,
    difference: Weights | None = None,
    freq: int = 63,
    train_context: int = 512,
) -> LandmarkLlama:
    """Return a LLaMA's weights in our landmark model, with one more token that is the landmark.

    Equal to the LLaMA where no landmark is read. **Needs training** with landmarks, unless the
    published difference is added, which makes the trained weights.

    Args:
        source: a ``LlamaForCausalLM``, or a folder or name that its ``from_pretrained`` takes. It
            is not changed.
        difference: published weights minus the original ones, under the names of transformers: a
            state dict, a file, or a folder of files.
        freq: tokens between landmarks; 63 in the published weights.
        train_context: tokens, landmarks among them, of training; bounds what is read at once
            beside the fetched blocks.

    Returns:
        A :class:`LandmarkLlama` of the same dtype; ``ManyheadsForCausalLM.from_model`` makes a
        transformers model of it.

    Raises:
        ValueError: a LLaMA with biases, scaled rotary positions, another activation or heads of
            another width; a difference that does not fit.

    Example:
        >>> small = LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=48,
        ...                     num_hidden_layers=1, num_attention_heads=2)
        >>> landmark_from_llama(LlamaForCausalLM(small), freq=5).config.landmark_id
        50
    """
    model = source
    if not isinstance(model, LlamaForCausalLM):
        if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
            raise ValueError(f"{str(model)!r} has no config.json: give a folder of transformers")
        model = LlamaForCausalLM.from_pretrained(model, dtype="auto")
    _check(model.config)
    weights: dict[str, Tensor] = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    weights = add_token(weights) if difference is None else _apply(weights, difference)
    rows = weights["model.embed_tokens.weight"].shape[0]
    c = model.config
    config = LandmarkLlamaConfig(
        vocab_size=rows,
        embed_dim=c.hidden_size,
        num_layers=c.num_hidden_layers,
        num_heads=c.num_attention_heads,
        num_kv_heads=c.num_key_value_heads,
        mlp_width=c.intermediate_size,
        landmark_id=rows - 1,
        freq=freq,
        train_context=train_context,
        rotary_theta=_rotary(c).get("rope_theta", 10000.0),
        norm_eps=c.rms_norm_eps,
        tie_embeddings=c.tie_word_embeddings,
        init_std=c.initializer_range,
    )
    if c.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        empty = LandmarkLlama(config)
    landmark = empty.to(model.dtype).to_empty(device=model.device)
    if c.tie_word_embeddings:  # to_empty gave each of the two a tensor of its own
        landmark.head.weight = landmark.embed.weight
    return landmark.load_official(weights).train(model.training)


def _apply(weights: dict[str, Tensor], difference: Weights) -> dict[str, Tensor]:
    if not isinstance(difference, Mapping) and Path(difference).is_dir():
        folder = Path(difference)
        files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
        if not files:
            raise ValueError(f"{str(folder)!r} holds neither *.safetensors nor pytorch_model*.bin")
        difference = {k: t for file in files for k, t in read_weights(file).items()}
    return apply_weight_diff(weights, difference)


def _rotary(config: LlamaConfig) -> dict[str, Any]:
    return dict(config.rope_parameters or {})


def _check(config: LlamaConfig) -> None:
    width = config.hidden_size // config.num_attention_heads
    rules = (
        ("hidden_act", config.hidden_act, ("silu", "swish")),
        ("attention_bias", config.attention_bias, (False,)),
        ("mlp_bias", config.mlp_bias, (False,)),
        ("head_dim", config.head_dim, (width, None)),
        ("rope_type", _rotary(config).get("rope_type", "default"), ("default",)),
        ("partial_rotary_factor", _rotary(config).get("partial_rotary_factor"), (None, 1, 1.0)),
    )
    for name, value, allowed in rules:
        if value not in allowed:
            raise ValueError(
                f"{name}={value!r} is not what a LandmarkLlama can hold: it has {allowed[0]!r}"
            )
