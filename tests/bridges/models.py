"""Small models with varied outputs: untrained ones of the usual scale repeat one token."""

from __future__ import annotations

import torch

from manyheads.bridges.transformers import ManyheadsConfig, ManyheadsForCausalLM

FAMILIES: dict[str, tuple[str, dict]] = {
    "softmax": ("MixerLM", {"mixers": "softmax*2"}),
    "placed": ("MixerLM", {"mixers": "softmax", "add_positions": True}),
    "lean": ("MixerLM", {"mixers": "lean"}),
    "gla": ("MixerLM", {"mixers": "gla*2"}),
    "hybrid": ("MixerLM", {"mixers": "gla,softmax,mamba,aaren"}),
    "others": ("MixerLM", {"mixers": "flow,norm,urpe,diag"}),
    "blocks": (
        "MixerLM",
        {
            "mixers": "landmark,routing",
            "mixer_options": {
                "landmark": {"block_size": 4},
                "routing": {"clusters": 2, "window": 8},
            },
        },
    ),
    "gla_lm": ("GLAForCausalLM", {"num_layers": 2, "softmax_layers": (1,)}),
    "mamba_lm": ("MambaForCausalLM", {"num_layers": 2}),
    "flowformer": ("FlowformerGPT", {"num_layers": 2, "block_size": 64}),
    "transnormer": ("TransNormerLM", {"num_layers": 2, "num_heads": 2}),
    "routing": ("RoutingLM", {"num_layers": 2, "clusters": 2, "window": 8, "block": 8}),
}
HEADS = {"MixerLM", "GLAForCausalLM", "FlowformerGPT"}
VOCAB = 61


def settings(name: str, **changes) -> tuple[str, dict]:
    family, own = FAMILIES[name]
    values = {"vocab_size": VOCAB, "embed_dim": 32} | own | changes
    if family in HEADS:
        values["num_heads"] = 2
    return family, values


def build(name: str, **changes) -> ManyheadsForCausalLM:
    family, values = settings(name, **changes)
    model = ManyheadsForCausalLM(ManyheadsConfig(family=family, settings=values)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    return model


def tokens(*shape: int) -> torch.Tensor:
    """Token ids without 0 and 1, padding for some models, and the last, a landmark for others."""
    return torch.randint(2, VOCAB - 1, shape)
