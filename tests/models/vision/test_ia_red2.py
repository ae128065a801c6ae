"""IA-RED²: what is gathered equals what is masked, and the gradient is that of the reward."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from manyheads.choose.flops import count_flops
from manyheads.models import create_model
from manyheads.models.vision.ia_red2 import (
    IARed2,
    IARed2Config,
    Interpreter,
    bounded,
    draw_policy,
    greedy_policy,
    heat_map,
    interpreter_reference,
    log_probability,
    policy_gradient_loss,
    reward,
    wrap,
)
from manyheads.models.vision.ia_red2.tokens import Tokens, apply_blocks, gather_kept, scatter

timm = pytest.importorskip("timm")


def _model(**changes) -> IARed2:
    sizes = {"groups": (1, 2, 1), "embed_dim": 36, "num_heads": 3, "interpreter_heads": 4}
    config = IARed2Config(**sizes | {"image_size": 40, "patch_size": 8, "num_classes": 7} | changes)
    model = IARed2(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def _vit(**changes):
    sizes = {"img_size": 40, "patch_size": 8, "embed_dim": 36, "num_heads": 3, "depth": 4}
    return timm.models.VisionTransformer(**sizes | {"num_classes": 7} | changes).eval()


def _ragged(batch: int, count: int) -> torch.Tensor:
    """Policies that keep all, a half, one and none of the tokens behind the class token."""
    policy = torch.rand(batch, count) < torch.linspace(0, 1, batch)[:, None]
    policy[:, 0] = True
    return policy


@pytest.mark.parametrize("heads", [1, 5])
def test_the_fast_scores_are_the_definition(heads) -> None:
    made = Interpreter(20, heads).double()
    nn.init.normal_(made.qk.weight)
    x = torch.randn(3, 63, 20, dtype=torch.float64, requires_grad=True)
    alive = torch.rand(3, 63) < 0.6
    for mask in (None, alive):
        fast = made(x, mask)
        slow = interpreter_reference(x, made.qk.weight, made.qk.bias, heads, mask)
        assert torch.allclose(fast, slow, atol=1e-12)
        cotangent, leaves = torch.randn_like(fast), (x, made.qk.weight, made.qk.bias)
        for a, b in zip(
            torch.autograd.grad(fast, leaves, cotangent),
            torch.autograd.grad(slow, leaves, cotangent),
            strict=True,
        ):
            assert torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("score", [0.2, 0.5, 0.9])
def test_a_new_interpreter_gives_its_first_score(score) -> None:
    made = Interpreter(384, 6, first_score=score)
    assert float((made(torch.randn(2, 50, 384)) - score).abs().max()) < 0.06
    assert made.half()(torch.randn(1, 9, 384).half()).dtype == torch.float32


def test_scores_of_what_is_gone_are_zero_whatever_stands_there() -> None:
    made = Interpreter(20, 5)
    x, alive = torch.randn(2, 9, 20), torch.ones(2, 9, dtype=torch.bool)
    alive[:, 4:6] = False
    spoilt = x.masked_fill(~alive[..., None], float("nan"))
    assert torch.equal(made(spoilt, alive), made(x, alive))
    assert not made(x, alive)[:, 4:6].any()


def _both(model, x, policy):
    """Return the kept rows behind all blocks, gathered and masked."""
    embedded, _ = model.embed(x)
    blocks = model.all_blocks()
    tokens = Tokens(embedded, None, None, embedded.shape[1])
    gathered = apply_blocks(blocks, gather_kept(tokens, policy))
    zeroed = torch.where(policy[..., None], embedded, 0)
    masked = apply_blocks(blocks, Tokens(zeroed, None, policy, embedded.shape[1]))
    return scatter(gathered.x, gathered), scatter(masked.x, masked)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("foreign", [False, True])
def test_gathered_equals_masked(batch, foreign) -> None:
    model = wrap(_vit(), (1, 2, 1)) if foreign else _model()
    gathered, masked = _both(model, torch.randn(batch, 3, 40, 40), _ragged(batch, 26))
    assert torch.allclose(gathered, masked, atol=1e-5)


def test_images_of_a_batch_do_not_see_each_other() -> None:
    model, x = _model(), torch.randn(5, 3, 40, 40)
    together = model.look(x, policies=[_ragged(5, 26)] * 3)
    for i in range(5):
        alone = model.look(x[i : i + 1], policies=[p[i : i + 1] for p in together.policies])
        assert torch.allclose(alone.logits[0], together.logits[i], atol=1e-5)


def test_gradients_pass_through_gathering() -> None:
    model, policy = _model().train(), _ragged(4, 26)
    x, grads = torch.randn(4, 3, 40, 40), []
    for form in (0, 1):
        model.zero_grad()
        _both(model, x, policy)[form].square().sum().backward()
        grads.append([p.grad.clone() for p in model.blocks.parameters()])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_blocks_without_a_mask_see_equal_lengths_together() -> None:
    class Bare(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block, self.shapes = block, []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.shapes.append(tuple(x.shape[:2]))
            return self.block(x)

    vit = _vit()
    model, x, policy = wrap(vit, 1), torch.randn(3, 3, 40, 40), _ragged(3, 26)
    expected = model.look(x, policies=[policy]).logits
    vit.blocks = nn.Sequential(*(Bare(b) for b in vit.blocks))
    assert torch.allclose(wrap(vit, 1).look(x, policies=[policy]).logits, expected, atol=1e-5)
    counts = policy.sum(1).tolist()
    assert sorted(n for _, n in vit.blocks[0].shapes) == sorted(set(counts))


def test_only_the_class_token_may_be_left() -> None:
    for model in (_model(), wrap(_vit(), 2)):
        none = torch.zeros(2, 26, dtype=torch.bool)
        out = model.look(torch.randn(2, 3, 40, 40), policies=[none] * len(model.depths))
        assert out.logits.isfinite().all()
        assert all(p.sum(1).tolist() == [1, 1] for p in out.policies)
        assert out.cost.tolist() == pytest.approx([1 / 26] * 2)


def test_dropped_patches_are_neither_seen_nor_paid() -> None:
    model = _model(num_heads=4, groups=(2, 1, 2))
    model.train()  # in eval mode nn.Linear may run as an operator without a formula
    x, (n1, n2, n3), c = torch.randn(1, 3, 40, 40), (20, 11, 6), 36
    policies = [(torch.arange(26) < n)[None] for n in (n1, n2, n3)]
    seen = count_flops(lambda: model.look(x, policies=policies)).total / 2
    cheaper = count_flops(lambda: model.look(x, policies=[policies[2]] * 3)).total / 2

    def expected(*counts: int) -> int:
        return sum(d * (12 * n * c * c + 2 * n * n * c) for d, n in zip((2, 1, 2), counts,
                                                                         strict=True))  # fmt: skip

    # What differs is exactly the blocks, but for the interpreters, which read fewer tokens too.
    interpreters = 4 * c * ((n1 - n3) + (n2 - n3))
    assert seen - cheaper == expected(n1, n2, n3) - expected(n3, n3, n3) + interpreters
    spoilt = x.clone()
    spoilt[:, :, 32:] = 1e3  # the last five patches, which no group keeps
    assert torch.allclose(
        model.look(spoilt, policies=policies).logits, model.look(x, policies=policies).logits
    )


def test_a_new_wrapper_answers_as_its_model() -> None:
    vit, x = _vit(class_token=True, reg_tokens=2), torch.randn(2, 3, 40, 40)
    model = wrap(vit, 2)
    assert torch.allclose(model(x), vit(x), atol=1e-6)
    assert model.look(x).cost.tolist() == [1, 1]
    assert model.heat_map(x).shape == (2, 5, 5)
    assert {id(p) for p in vit.parameters()} <= {id(p) for p in model.parameters()}
    ours = _model()
    with pytest.warns(UserWarning, match="no interpreters"):
        ours.load_official(_vit().state_dict())


def test_weights_of_the_wrapper_fit_our_model() -> None:
    vit, x = _vit(), torch.randn(3, 3, 40, 40)
    model = wrap(vit, (1, 2, 1), interpreter_heads=4)
    with torch.no_grad():
        for p in model.interpreters.parameters():
            p.normal_(std=0.5)
    ours = _model().load_official(vit.state_dict() | model.save_interpreters())
    assert torch.allclose(ours(x), model(x), atol=1e-5)
    assert 0.1 < float(ours.look(x).cost.mean()) < 0.9


def test_wrapped_models_compile() -> None:
    model, x = wrap(_vit(), 2, first_score=0.5), torch.randn(3, 3, 40, 40)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), model(x), atol=1e-5)


def test_twins_of_the_released_file_must_be_equal() -> None:
    model = _model()
    weights = model.to_official()
    twin = "groups.1.block_list.1.mlp.fc1.weight"
    assert torch.equal(weights[twin], weights["blocks.2.mlp.fc1.weight"])
    half = {k: t for k, t in weights.items() if not k.startswith("blocks.")}
    other = _model().load_official(half)
    assert torch.equal(other.blocks[2].mlp.fc1.weight, weights[twin])
    with pytest.raises(ValueError, match="is tied to"):
        model.load_official(weights | {twin: weights[twin] + 1})
    larger = IARed2(model.config.replace(image_size=56)).load_official(weights)
    assert larger.pos_embed.shape == (1, 50, 36)


def test_interpreters_learn_by_policy_gradients_alone() -> None:
    model, x = _model(), torch.randn(2, 3, 40, 40)
    assert not any(p.requires_grad for p in model.interpreters.parameters())
    model.unfreeze_interpreters(2)
    learning = [all(p.requires_grad for p in i.parameters()) for i in model.interpreters]
    assert learning == [True, True, False]
    out = model.look(x, sample=True, last=1, generator=torch.Generator().manual_seed(3))
    again = model.look(x, sample=True, last=1, generator=torch.Generator().manual_seed(3))
    assert torch.equal(out.policies[2], again.policies[2])
    assert len(out.decisions) == 2
    assert torch.equal(out.policies[2], out.policies[1])
    loss = sum(
        policy_gradient_loss(d.scores[:, 1:], d.policy[:, 1:], torch.ones(2), d.alive[:, 1:])
        for d in out.decisions
    )
    loss.backward()
    assert all(i.qk.weight.grad.any() for i in model.interpreters[:2])
    assert model.blocks[0].attn.qkv.weight.grad is None
    for decision in out.decisions:
        assert not (decision.policy & ~decision.alive).any()


def test_the_policy_gradient_is_unbiased() -> None:
    torch.manual_seed(1)
    scores = torch.rand(1, 6, dtype=torch.float64, requires_grad=True)
    policies = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64)
    right = (policies[:, :2].sum(1) > 0).double()  # what the answer needs
    earned = reward(policies, right, penalty=3.0)
    chances = torch.where(policies.bool(), scores, 1 - scores).prod(1)
    (exact,) = torch.autograd.grad((chances * earned).sum(), scores)
    baseline, estimate = 0.37, torch.zeros_like(scores)
    for policy, chance, r in zip(policies, chances.detach(), earned, strict=True):
        loss = policy_gradient_loss(scores, policy[None], (r - baseline)[None])
        estimate -= chance * torch.autograd.grad(loss, scores)[0]
    assert torch.allclose(estimate, exact, atol=1e-12)


def test_certain_decisions_are_neither_nan_nor_counted() -> None:
    scores = torch.tensor([[0.0, 1.0, 0.25, 0.0]], requires_grad=True)
    policy = torch.tensor([[False, True, True, True]])
    alive = torch.tensor([[True, True, True, False]])
    found = log_probability(policy, scores, alive)
    assert found.item() == pytest.approx(torch.tensor(0.25).log().item())
    found.backward()
    assert scores.grad.isfinite().all()
    assert scores.grad[0, 3] == 0
    assert bounded(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.2, 0.8])
    drawn = draw_policy(torch.full((1, 4000), 0.3), generator=torch.Generator().manual_seed(0))
    assert abs(float(drawn.float().mean()) - 0.3) < 0.03
    assert greedy_policy(torch.tensor([[0.5, 0.51]])).tolist() == [[False, True]]


def test_the_heat_map_spans_zero_to_one() -> None:
    scores = torch.tensor([[0.1, 0.48, 0.74, 1.0, 0.6, 0.5], [0.3] * 6])
    maps = heat_map(scores, (2, 3))
    assert maps[0].tolist()[0] == pytest.approx([0, 0, 0.5])
    assert maps[0, 1, 0] == 1
    assert not maps[1].any()


def test_wrong_input_is_named() -> None:
    model, x = _model(), torch.randn(1, 3, 40, 40)
    with pytest.raises(ValueError, match="last 3"):
        model.look(x, last=3)
    with pytest.raises(ValueError, match="2 policies: 3 groups"):
        model.look(x, policies=[torch.ones(1, 26)] * 2)
    with pytest.raises(ValueError, match=r"shape \(1, 25\)"):
        model.look(x, policies=[torch.ones(1, 25)] * 3)
    with pytest.raises(ValueError, match="height 41"):
        model(torch.randn(1, 3, 41, 40))
    with pytest.raises(ValueError, match="groups 3 does not divide 4"):
        wrap(_vit(), 3)
    with pytest.raises(ValueError, match="hold 5 blocks, the model has 4"):
        wrap(_vit(), (2, 3))
    with pytest.raises(ValueError, match="pools 'avg'"):
        wrap(_vit(global_pool="avg", class_token=True))
    with pytest.raises(ValueError, match="no patch_embed"):
        wrap(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="7 interpreter heads"):
        wrap(_vit(), 2, interpreter_heads=7)
    with pytest.raises(ValueError, match="penalty -1"):
        reward(torch.ones(1, 3), torch.ones(1), penalty=-1)
    with pytest.raises(ValueError, match="stages 4"):
        model.unfreeze_interpreters(4)
    with pytest.raises(ValueError, match="group 3"):
        model.heat_map(x, group=3)


def test_published_sizes() -> None:
    small = create_model("interp_deit_small_patch16_224", device="meta")
    base = create_model("deit_base", device="meta")
    assert small.num_parameters() == 23_381_224
    assert base.num_parameters() == 91_882_984
    assert sum(p.numel() for p in small.interpreters.parameters()) == 1_330_560
    assert sum(p.numel() for p in base.interpreters.parameters()) == 5_315_328
