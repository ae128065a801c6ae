"""LLM-Drop on a tiny Llama: similarities, choices, and the logits of what is left."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.compress.anatomy import anatomy
from manyheads.compress.llm_drop import (
    LLMDrop,
    measure_similarities,
    plan_from_lists,
    run_of_blocks,
)
from manyheads.compress.llm_drop.select import within_tolerance
from parity.golden import Golden, adapter, keys


def llama(golden: Golden) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = {k: v for k, v in golden.config.items() if k in _SIZES}
    golden.options(
        *_SIZES, "n_samples", "seq_len", "drop_n", "joint_drop_n", "params", "topk_tolerance"
    )
    rope = {"rope_type": "default", "rope_theta": config.pop("rope_theta", 1e4)}
    model = LlamaForCausalLM(LlamaConfig(**config, rope_parameters=rope))
    model.load_state_dict(golden.weights)
    return model.eval()


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
)


def order(plan: Any, layers: list[str]) -> Tensor:
    """Indices in order of removal; those of MLPs follow those of attentions where both go."""
    kinds = {line.split()[1] for line in plan.measured["order"]}
    found = []
    for line in plan.measured["order"]:
        path, kind = line.split()
        found.append(layers.index(path) + (len(layers) if len(kinds) > 1 and kind == "mlp" else 0))
    return torch.tensor(found)


@adapter("llm-drop", "llama_drop")
def dropped(golden: Golden) -> dict[str, Tensor]:
    model = llama(golden)
    batches = [{"input_ids": ids[None]} for ids in golden.inputs["calibration_ids"]]
    ids = golden.inputs["eval_ids"]
    unit = measure_similarities(model, batches, consecutive=True)
    alone = measure_similarities(model, batches, norm_as_unit=False)
    layers = [b.path for b in anatomy(model).blocks]
    n, config = golden.config["drop_n"], golden.config
    with torch.no_grad():
        out = {"out.logits_full": model(ids).logits}
    (pairs,) = unit.consecutive.values()
    blocks = torch.tensor(list(unit.blocks.values()))
    out |= {
        "out.sim_attn": torch.tensor(list(unit.branches["attention"].values())),
        "out.sim_mlp": torch.tensor(list(unit.branches["mlp"].values())),
        "out.sim_attn_nonorm": torch.tensor(list(alone.branches["attention"].values())),
        "out.sim_mlp_nonorm": torch.tensor(list(alone.branches["mlp"].values())),
        "out.sim_block": blocks[:, None],
        "out.sim_block_consecutive": pairs,
        "out.drop_block_consecutive_corrected": torch.tensor(run_of_blocks(pairs, n)),
        "out.drop_block_consecutive_official": torch.tensor(
            run_of_blocks(pairs, n, official_compat=True)
        ),
    }
    tolerant = config["topk_tolerance"]
    assert tolerant["similarity"] == "sim_block"
    out["out.topk_tolerance"] = torch.tensor(
        within_tolerance(blocks, tolerant["n"], tolerance=tolerant["tolerance"])
    )
    for name, options in (
        ("attn", {"attention": n}),
        ("mlp", {"mlp": n}),
        ("block", {"blocks": n, "tolerance": tolerant["tolerance"]}),
        ("joint", {"joint": config["joint_drop_n"]}),
    ):
        plan = LLMDrop(**options).plan(model, batches)
        smaller = plan.apply(model)
        assert sum(p.numel() for p in smaller.parameters()) == config["params"][name]
        with torch.no_grad():
            result = smaller(ids, use_cache=True)
        held = sum(layer.is_initialized for layer in result.past_key_values.layers)
        assert held == config["params"][f"{name}_kv_layers"]
        out |= {f"out.drop_{name}": order(plan, layers), f"out.logits_drop_{name}": result.logits}
    return out


@keys("llm-drop")
def official(listed: dict[str, Any]) -> nn.Module:
    """Build the undropped model on the meta device and take out what the config lists."""
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    config = dict(listed["config"])
    lists = {k: config.pop(k) for k in ("drop_attn_list", "drop_mlp_list")}
    llama = {"vocab_size": 32000, "rms_norm_eps": 1e-5}
    with torch.device("meta"):
        built: nn.Module = {
            "Mistral-7B-v0.1": lambda: MistralForCausalLM(
                MistralConfig(num_key_value_heads=8, intermediate_size=14336)
            ),
            "Llama-2-7B": lambda: LlamaForCausalLM(LlamaConfig(**llama)),
            "Llama-2-13B": lambda: LlamaForCausalLM(
                LlamaConfig(
                    hidden_size=5120,
                    intermediate_size=13824,
                    num_hidden_layers=40,
                    num_attention_heads=40,
                    **llama,
                )
            ),
        }[config["base"]]()
    return plan_from_lists(built, **lists).apply(built, inplace=True)
