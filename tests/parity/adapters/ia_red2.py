"""Golden files of IA-RED²: the released interpretation tool, and the reward's equations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from manyheads.models.vision.ia_red2 import (
    Dropping,
    IARed2,
    IARed2Config,
    Interpreter,
    greedy_policy,
    log_probability,
    policy_gradient_loss,
    reward,
)
from manyheads.models.vision.ia_red2.blocks import Block
from manyheads.models.vision.ia_red2.tokens import Tokens, apply_blocks, scatter
from parity.golden import Golden, adapter


@adapter("ia-red2", "interpreter")
def interpreter(golden: Golden) -> dict[str, Tensor]:
    c = golden.options(dim="dim", num_heads="num_heads")
    made = Interpreter(c["dim"], c["num_heads"])
    made.load_state_dict(golden.weights)
    (x,) = golden.leaves("x")
    results = {"out.scores_no_policy": made(x)}
    scores = made(x, golden.inputs["prev_policy"])
    scores.sum().backward()
    return results | {"out.scores": scores, "grad.x": x.grad}


class _Group(Dropping):
    """One group: an interpreter and its blocks, as a model of its own."""

    def __init__(self, c: dict[str, Any], weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.depths = (c["blocks"],)
        options = {"mlp_ratio": c["mlp_ratio"], "norm_eps": c["norm_eps"]}
        made = (Block(c["dim"], c["num_heads"], **options) for _ in range(c["blocks"]))
        self.block_list = nn.ModuleList(made)
        self.make_interpreters(c["dim"], c["agent_heads"], 0.9)
        renamed = {k.replace("agent.", "interpreters.0."): t for k, t in weights.items()}
        self.load_state_dict(renamed)

    def all_blocks(self) -> list[nn.Module]:
        return list(self.block_list)


@adapter("ia-red2", "group")
def group(golden: Golden) -> dict[str, Tensor]:
    c = golden.options(
        dim="dim", num_heads="num_heads", mlp_ratio="mlp_ratio", blocks="blocks",
        agent_heads="agent_heads", ln_eps="norm_eps",
    )  # fmt: skip
    made = _Group(c, golden.weights).eval()
    x, previous = golden.inputs["x"], golden.inputs["prev_policy"].bool()
    results = {}
    for suffix, before in (("_first", None), ("", previous)):

        def decide(i: int, scores: Tensor, alive: Tensor, before=before, suffix=suffix) -> Tensor:
            if before is not None:
                scores = made.interpreters[0](x, before)
            results[f"out.probs{suffix}"] = scores
            return greedy_policy(scores, before)

        ((tokens, decision),) = made.run_groups(x, decide)
        results[f"out.policy{suffix}"] = decision.policy.float()
        results[f"out.y{suffix}"] = scatter(tokens.x, tokens)
    # The masked form: the rows of dropped tokens are those of the released code, too.
    zeroed = torch.where(previous[..., None], x, 0)
    masked = apply_blocks(made.all_blocks(), Tokens(zeroed, None, previous, x.shape[1]))
    return results | {"out.y_masked": masked.x, "out.policy_masked": previous.float()}


@adapter("ia-red2", "model")
def model(golden: Golden) -> dict[str, Tensor]:
    c = golden.options(
        embed_dim="embed_dim", num_heads="num_heads", groups="groups", img="image_size",
        patch="patch_size", num_classes="num_classes", mlp_ratio="mlp_ratio",
        agent_heads="interpreter_heads", ln_eps="norm_eps",
    )  # fmt: skip
    made = IARed2(IARed2Config.from_dict(c)).load_official(golden.weights).eval()
    images = golden.inputs["images"]
    assert torch.equal(made(images), made.look(images).logits)
    whole, first = made.look(images), made.look(images, last=0)
    *_, (last, _) = made.run_groups(made.embed(images)[0], made.greedy)
    assert torch.equal(made.norm(last.x[:, :1])[:, 0], whole.features)
    results = {
        "out.logits": whole.logits,
        "out.cls_feature": last.x[:, 0],
        "out.flops_fraction": whole.cost,
        "out.logits_only_group0_active": first.logits,
        "out.flops_fraction_only_group0_active": first.cost,
    }
    for i, decision in enumerate(whole.decisions):
        results[f"out.probs_{i}"] = decision.scores
        results[f"out.policy_{i}"] = decision.policy.float()
    return results


@adapter("ia-red2", "policy_gradient")
def policy_gradient(golden: Golden) -> dict[str, Tensor]:
    c = golden.options("N", tau="penalty")
    (probs,) = golden.leaves("probs")
    drawn, greedy = golden.inputs["sampled_policy"], greedy_policy(probs).to(probs)
    earned = reward(drawn, golden.inputs["correct_sampled"], **c)
    baseline = reward(greedy, golden.inputs["correct_greedy"], **c)
    loss = policy_gradient_loss(probs, drawn, earned - baseline)
    loss.backward()
    return {
        "out.reward_sampled": earned,
        "out.reward_greedy": baseline,
        "out.advantage": earned - baseline,
        "out.greedy_policy": greedy,
        "out.log_prob": log_probability(drawn, probs),
        "out.loss": loss,
        "grad.probs": probs.grad,
    }
