"""A2SF: the official cache class, mask simulation, prefill policies and a tiny Llama."""

from __future__ import annotations

import torch
from torch import Tensor

from manyheads.attention import softmax
from manyheads.compress.a2sf import A2SF, H2O, EvictionState, SnapKV, simulate_eviction
from manyheads.compress.a2sf.policy import CachePolicy
from parity.golden import Golden, adapter


def _policy(golden: Golden) -> CachePolicy:
    c = golden.config
    budget, recent = c["hh_size"] + c["recent_size"], c["recent_size"]
    if c["policy"] == "h2o":
        assert c["forgetting_factor"] == 1
        return H2O(budget=budget, recent=recent)
    assert c["policy"] == "a2sf"
    return A2SF(budget=budget, recent=recent, alpha=c["forgetting_factor"])


@adapter("a2sf", "cache_steps_a2sf")
def steps(golden: Golden) -> dict[str, Tensor]:
    golden.options(
        "hh_size", "recent_size", "forgetting_factor", "policy", "prompt", "steps"
    )  # fmt: skip
    state = EvictionState(_policy(golden))
    given, results = golden.inputs, {}
    for step in range(golden.config["steps"] + 1):
        key, value, rows = (
            (given["keys_prefill"], given["values_prefill"], given["attn_prefill"])
            if step == 0
            else (given[f"key_{step}"], given[f"value_{step}"], given[f"attn_{step}"])
        )
        keys, _ = state.append(key, value)
        state.mask(None, key)
        state.settle(key, keys, rows=rows)
        held = state.held
        assert held is not None
        results |= {f"out.positions_{step}": held["position"], f"out.scores_{step}": held["score"]}
        if step == 0:
            results |= {"out.keys_0": held["key"], "out.values_0": held["value"]}
        assert torch.equal(held["key"][..., -1].long(), held["position"].long())
    return results


@adapter("a2sf", "mask_simulation_a2sf")
def simulation(golden: Golden) -> dict[str, Tensor]:
    options = golden.options(
        "seq", streaming="sink", selecting="select", recent="recent", forgetting_factor="alpha"
    )
    keep, attention = simulate_eviction(golden.inputs["logits"], **options)
    # What stands above the diagonal of the stored mask means nothing.
    kept = torch.where(torch.ones_like(keep).tril(), keep, golden.outputs["keep_mask"].bool())
    return {"out.keep_mask": kept, "out.masked_probs": attention}


@adapter("a2sf", "prefill_policy_gqa")
def prefill(golden: Golden) -> dict[str, Tensor]:
    golden.options(
        "batch", "heads", "kv_heads", "seq", "head_dim", "total_budget", "recent_budget", "method",
        "forgetting_factor", "observation_window",
    )  # fmt: skip
    c = golden.config
    sizes = {"budget": c["total_budget"], "recent": c["recent_budget"]}
    policy: CachePolicy
    if c["method"] == "a2sf":
        policy = A2SF(**sizes, alpha=c["forgetting_factor"])
    else:
        assert c["method"] == "snap"
        policy = SnapKV(**sizes, window=c["observation_window"], pool=1)
    query, key, value = (golden.inputs[n] for n in "qkv")
    out = softmax(query, key, value, is_causal=True)
    scores = []
    for kept in (c["seq"], c["total_budget"]):  # a budget that holds all shows all scores
        state = EvictionState(type(policy)(policy.settings.replace(budget_tokens=kept)))
        keys, _ = state.append(key, value)
        state.mask(None, query)
        state.settle(query, keys)
        assert state.held is not None
        scores.append(state.held)
    return {
        "out.attention": out,
        "out.scores": scores[0]["score"],
        "out.kept": scores[1]["position"],
    }


@adapter("a2sf", "tiny_llama_generate")
def llama(golden: Golden) -> dict[str, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = golden.options(
        "hh_size", "recent_size", "forgetting_factor", "policy", "prompt", "steps",
        hidden_size="hidden_size", intermediate_size="intermediate_size",
        layers="num_hidden_layers", heads="num_attention_heads", kv_heads="num_key_value_heads",
        vocab="vocab_size", rope_theta="rope_theta", rms_norm_eps="rms_norm_eps",
    )  # fmt: skip
    theta = sizes.pop("rope_theta")
    config = LlamaConfig(
        **sizes,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(golden.weights)
    ids, count = golden.inputs["ids"], golden.config["steps"]
    with _policy(golden).attach(model) as cache:
        made = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            cache=cache,
            max_new_tokens=count + 1,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    held = [layer.state.held for layer in cache.layers]
    return {
        "out.tokens": made.sequences[:, ids.shape[1] : ids.shape[1] + count],
        "out.logits": torch.stack(made.logits, 1),
        "out.final_keys": torch.stack([h["key"] for h in held]),
        "out.final_scores": torch.stack([h["score"] for h in held]),
    }
