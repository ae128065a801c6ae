"""Cache policies on our own language model, held against the same weights as a Llama."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from manyheads.attention.clipped_softmax import clipped_softmax_reference
from manyheads.attention.softmax import softmax_reference
from manyheads.compress import get_procedure
from manyheads.compress.a2sf import (
    A2SF,
    H2O,
    SinkRecent,
    SnapKV,
    StreamingLLM,
    continuation_loss,
    simulate_eviction,
)
from manyheads.compress.a2sf.own import EvictingStates
from manyheads.compress.files import load_model, save_model
from manyheads.layers.state import clone_state, reorder_state, state_bytes
from manyheads.models.language.mixer_lm import MixerLM, MixerLMConfig

POLICIES = {
    "a2sf": A2SF(budget=9, recent=3, sink=1, alpha=0.5),
    "h2o": H2O(budget=9),
    "snapkv": SnapKV(budget=9, window=3),
    "sink-recent": SinkRecent(budget=9, sink=2),
    "streaming": StreamingLLM(budget=9, sink=2),
    "int8": A2SF(budget=9, bits=8),
    "layers": A2SF(budget=[5, 11]),
    "share": A2SF(budget=0.4),
    "prompt alone": SnapKV(budget=9, window=3, decode=False),
}
KINDS = ("softmax", "lean", "gated", "clipped_softmax")
VOCAB = 61


def build(mixers: str = "softmax*2", *, sharp: float = 6, **options: Any) -> MixerLM:
    torch.manual_seed(0)
    names = {name.partition("*")[0] for name in mixers.split(",")}
    keys = {n: {"num_kv_heads": 2} for n in names if n in KINDS}
    config = MixerLMConfig(
        vocab_size=VOCAB, embed_dim=40, num_heads=4, mixers=mixers,
        mixer_options=options.pop("mixer_options", keys), **options,
    )  # fmt: skip
    model = MixerLM(config).eval()
    for block in model.layers:
        mixer: Any = block.mixer
        if hasattr(mixer, "q_proj"):  # so that it matters who is attended to
            mixer.q_proj.weight.data *= sharp
    return model


def prompt(rows: int = 2, length: int = 23) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def read(model: MixerLM, ids: Tensor, first: int, mask: Tensor | None = None) -> Tensor:
    """The logits of every token from ``first`` - 1 on, read one by one."""
    state = model.start(ids[:, :first])
    part = None if mask is None else mask[:, :first]
    logits, state = model.update(ids[:, :first], state, mask=part)
    out = [logits[:, -1]]
    for t in range(first, ids.shape[1]):
        step, state = model.step(ids[:, t], state)
        out.append(step)
    return torch.stack(out, 1)


def as_llama(model: MixerLM) -> Any:
    transformers = pytest.importorskip("transformers")
    c, mlp = model.config, model.layers[0].mlp
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=c.vocab_size, hidden_size=c.embed_dim, num_hidden_layers=len(model.layers),
            intermediate_size=mlp.gate_proj.out_features, num_attention_heads=c.num_heads,
            num_key_value_heads=2, rms_norm_eps=c.norm_eps, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip
    names = {
        "embed.": "model.embed_tokens.", ".mixer_norm.": ".input_layernorm.",
        ".mlp_norm.": ".post_attention_layernorm.", ".mixer.": ".self_attn.",
        ".out_proj.": ".o_proj.", "head.": "lm_head.",
    }  # fmt: skip
    renamed = {}
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        renamed[f"model.{name}" if name.startswith(("layers.", "norm.")) else name] = tensor
    llama.load_state_dict(renamed)
    return llama


@pytest.mark.parametrize("padding", [0, 7, 18])
@pytest.mark.parametrize("policy", POLICIES)
def test_it_is_a_llama_with_these_weights_under_the_same_policy(policy, padding) -> None:
    model, ids = build(), prompt(length=40)
    llama = as_llama(model)
    mask = torch.ones_like(ids)
    mask[1, :padding] = 0
    with POLICIES[policy].attach(model) as cache:
        ours = read(model, ids, 23, mask.bool() if padding else None)
        held = [cache.positions(layer) for layer in range(2)]
        nbytes = cache.nbytes
    with POLICIES[policy].attach(llama) as theirs, torch.no_grad():
        for t in range(23, 41):
            real = mask[:, :t]
            start = 0 if t == 23 else t - 1
            places = (real.cumsum(-1) - 1).clamp_min(0)[:, start:]
            out = llama(ids[:, start:t], attention_mask=real, position_ids=places, cache=theirs)
            difference = (out.logits[:, -1] - ours[:, t - 23]).abs().max()
            assert difference < 2e-5 * ours.abs().max(), t
        offset = torch.tensor([0, padding])[:, None, None]
        for layer in range(2):
            kept = theirs.positions(layer)
            real = kept >= offset  # of a short row the rest is padding, which is never seen
            assert torch.equal((kept - offset)[real], held[layer][real].long())
    assert theirs.nbytes == nbytes
    full = read(model, ids, 23, mask.bool() if padding else None)
    assert padding == 18 or (full - ours).abs().max() > 1e-3  # something was evicted that mattered


@pytest.mark.parametrize("kind", KINDS)
def test_a_budget_that_holds_all_changes_nothing(kind) -> None:
    model, ids = build(f"{kind}*2"), prompt(length=33)
    mask = torch.ones(2, 19, dtype=torch.bool)
    mask[1, :6] = False
    for given in (None, mask):
        plain = read(model, ids, 19, given)
        with A2SF(budget=64, alpha=0.3).attach(model) as cache:
            ours = read(model, ids, 19, given)
            assert cache.lengths() == [33, 33]
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        assert model.make_caches is None


@pytest.mark.parametrize("kind", KINDS)
def test_each_token_reads_what_was_kept_and_no_more(kind) -> None:
    """One layer: the definition of its attention on the positions that the cache names."""
    model, ids = build(kind, mlp_ratio=1), prompt(length=31)
    model.layers[0].mlp.down_proj.weight.data.zero_()
    mixer: Any = model.layers[0].mixer
    x = model.layers[0].mixer_norm(model.embed(ids))
    q, k, v = mixer._project(x, torch.arange(31))
    with A2SF(budget=8, alpha=0.6).attach(model) as cache, torch.no_grad():
        _, state = model.update(ids[:, :12], model.init_state(2))
        for t in range(12, 31):
            held = cache.positions(0).long()
            logits, state = model.step(ids[:, t], state)
            allowed = torch.zeros(2, 2, 31, dtype=torch.bool).scatter(-1, held, True)
            allowed[..., t] = True
            allowed = allowed.repeat_interleave(2, 1)[:, :, None]
            query = q[:, :, t : t + 1]
            if kind == "clipped_softmax":
                gamma = mixer.config.clip_gamma
                heads = clipped_softmax_reference(query, k, v, gamma=gamma, attn_mask=allowed)
            else:
                heads = softmax_reference(query, k, v, attn_mask=allowed)
            out = mixer._output(heads, x[:, t : t + 1], None, None)[:, 0]
            expected = model.head(model.norm(model.embed(ids[:, t]) + out))
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-6)


def test_it_keeps_what_the_simulation_keeps() -> None:
    model, ids = build("softmax", mixer_options={}), prompt(length=30)
    mixer: Any = model.layers[0].mixer
    q, k, _ = mixer._project(model.layers[0].mixer_norm(model.embed(ids)), torch.arange(30))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    keep = simulate_eviction(scores, sink=1, select=5, recent=3, alpha=0.5).keep
    with POLICIES["a2sf"].attach(model) as cache, torch.no_grad():
        _, state = model.update(ids[:, :9], model.init_state(2))
        for t in range(9, 30):
            held = cache.positions(0).long()
            seen = torch.zeros(2, 4, 30, dtype=torch.bool).scatter(-1, held, True)
            seen[..., t] = True
            assert torch.equal(seen, keep[:, :, t])
            _, state = model.step(ids[:, t], state)


# A share is of the batch's length, padding included.
@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"share"}))
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_reads_as_it_does_alone(policy, side) -> None:
    model, ids = build("softmax,lean"), prompt(length=36)
    for padding in (7, 18):  # more, and fewer, real tokens than the budget
        mask = torch.ones(2, 23, dtype=torch.bool)
        mask[1, slice(padding) if side == "left" else slice(23 - padding, 23)] = False
        real = ids[1:, :23][:, mask[1]]
        with POLICIES[policy].attach(model), torch.no_grad():
            _, state = model.update(ids[:, :23], model.init_state(2), mask=mask)
            _, alone = model.update(real, model.init_state(1))
            for t in range(23, 36):
                both, state = model.step(ids[:, t], state)
                one, alone = model.step(ids[1:, t], alone)
                torch.testing.assert_close(both[1:], one, rtol=1e-4, atol=1e-6)


def test_bytes_stay_after_the_budget() -> None:
    model = build("softmax,lean,gated,clipped_softmax")
    for policy in (A2SF(budget=9), A2SF(budget=9, bits=8), SinkRecent(budget=9)):
        sizes = []
        for count in (2, 60):
            with policy.attach(model) as cache:
                list(model.generate(prompt(), max_new_tokens=count, temperature=0))
                sizes.append(cache.nbytes)
                assert cache.lengths() == [9] * 4
        assert sizes[0] == sizes[1]
        tokens = 2 * 2 * 9  # batch, groups, held
        numbers = {None: 2 * 10 * 4, 8: 2 * (10 + 4)}[policy.settings.bits]
        scores = 4 if policy.needs_scores else 0
        assert sizes[0] == 4 * tokens * (numbers + 4 + 1 + scores)  # a position, whether real


def test_blocks_of_the_prompt_know_their_share_of_it() -> None:
    model = build()
    with A2SF(budget=0.4).attach(model) as cache:
        list(model.generate(prompt(length=30), max_new_tokens=3, prefill_block=7))
        assert cache.lengths() == [12, 12]


def test_recurrent_layers_stay_as_they_are() -> None:
    model, ids = build("gla,softmax,mamba", mixer_options={}), prompt(length=31)
    plain = read(model, ids, 11)
    with A2SF(budget=40).attach(model) as cache:
        torch.testing.assert_close(read(model, ids, 11), plain, rtol=1e-5, atol=1e-6)
        assert cache.lengths() == [0, 31, 0]
        with pytest.raises(ValueError, match="layer 0 keeps a GLA"):
            cache.positions(0)
    with A2SF(budget=5).attach(model) as cache:
        read(model, ids, 11)
        assert cache.lengths() == [0, 5, 0]
        constant = model.init_state(2).layers
        states = state_bytes(constant[0]) + state_bytes(constant[2])
        assert cache.nbytes == states  # the new text has nothing yet but these states


def test_states_are_branched_and_reordered() -> None:
    model, ids = build(), prompt(length=36)
    with POLICIES["a2sf"].attach(model), torch.no_grad():
        _, state = model.update(ids[:, :20], model.init_state(2))
        branch, swapped = clone_state(state), reorder_state(state, torch.tensor([1, 0, 0]))
        assert state_bytes(branch.layers) == state_bytes(state.layers) > 0
        for t in range(20, 36):
            one, state = model.step(ids[:, t], state)
            other, swapped = model.step(ids[[1, 0, 0], t], swapped)
            torch.testing.assert_close(other, one[[1, 0, 0]], rtol=1e-5, atol=1e-6)
        for t in range(20, 36):
            again, branch = model.step(ids[:, t], branch)
        torch.testing.assert_close(again, one, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("model", "policy", "reason"),
    [
        (lambda: build("gla*2"), A2SF(budget=9), "no layer keeps keys and values .gla."),
        (lambda: build("softmax,urpe"), A2SF(budget=9), "layer 1 is a URPEAttention"),
        (
            lambda: build(mixer_options={"softmax": {"rotary_theta": None}}),
            StreamingLLM(budget=9), "use sink-recent",
        ),
        (lambda: build(add_positions=True), StreamingLLM(budget=9), "embeddings carry positions"),
        (lambda: build(), A2SF(budget=[4]), "layer_budgets names 1 layers"),
        (lambda: torch.nn.Linear(2, 2), A2SF(budget=9), "Linear"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_work(model, policy, reason) -> None:
    made = model()
    with pytest.raises(ValueError, match=reason), policy.attach(made):
        pass
    assert getattr(made, "make_caches", None) is None


@pytest.mark.parametrize("policy", ["a2sf", "h2o", "snapkv", "sink-recent", "streaming"])
def test_a_plan_is_applied_saved_and_loaded(policy, tmp_path) -> None:
    model, ids = build("gla,softmax,lean", mixer_options={}), prompt(length=40)
    plan = get_procedure(policy)(budget_tokens=9).plan(model, [{"tokens": ids}])
    assert plan.measured["tokens"] == 40
    assert plan.measured["cache_bytes"] < plan.measured["cache_bytes_full"]
    small = plan.apply(model)
    assert model.make_caches is None
    with get_procedure(policy)(budget_tokens=9).attach(model):
        expected = read(model, ids, 23)
    assert torch.equal(read(small, ids, 23), expected)
    save_model(small, tmp_path / "small")
    for other in (load_model(tmp_path / "small"), copy.deepcopy(small),
                  pickle.loads(pickle.dumps(small))):  # fmt: skip
        assert torch.equal(read(other, ids, 23), expected)
    losses, held = continuation_loss(small, ids, prompt=20)
    assert float(losses.sum()) == pytest.approx(plan.measured["loss"] * 40, rel=1e-5)
    assert held == plan.measured["cache_bytes"]


def test_a_loss_counts_real_tokens_alone() -> None:
    model, ids = build(), prompt(length=30)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    policy = POLICIES["a2sf"]
    both, _ = continuation_loss(model, ids, prompt=15, policy=policy, mask=mask)
    alone, _ = continuation_loss(model, ids[1:, 5:], prompt=10, policy=policy)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-5)
    llama = as_llama(model)
    theirs, _ = continuation_loss(llama, ids, prompt=15, policy=policy, mask=mask)
    torch.testing.assert_close(both, theirs, rtol=1e-4, atol=1e-5)
    mask[0, 25:] = 0
    both, _ = continuation_loss(model, ids, prompt=15, policy=policy, mask=mask)
    assert bool((both[0, 10:] == 0).all())
    assert bool((both[0, :10] != 0).all())


def test_in_transformers_it_generates_the_same(tmp_path) -> None:
    pytest.importorskip("transformers")
    from manyheads.bridges.transformers import ManyheadsForCausalLM

    model, ids = build(), prompt()
    wrapped = ManyheadsForCausalLM.from_model(model)
    greedy: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False}
    policy = POLICIES["a2sf"]
    with policy.attach(model) as own:
        expected = torch.stack(list(model.generate(ids, max_new_tokens=9, temperature=0)), 1)
    with policy.attach(wrapped) as cache:
        found = wrapped.generate(ids, cache=cache, **greedy)
        assert cache.lengths() == [9, 9]
        assert cache.nbytes == own.nbytes
        assert torch.equal(cache.positions(1), own.positions(1))
        assert torch.equal(wrapped.generate(ids, **greedy), found)
        with pytest.raises(ValueError, match="assistant"):
            wrapped.generate(ids[:1], assistant_model=wrapped, **greedy)
    assert torch.equal(found[:, 23:], expected)
    beams = wrapped.generate(ids, num_beams=3, **greedy)
    with A2SF(budget=64).attach(wrapped):
        assert torch.equal(wrapped.generate(ids, num_beams=3, **greedy), beams)
    with A2SF(budget=0.5).attach(wrapped), pytest.raises(ValueError, match="prefill_chunk_size"):
        wrapped.generate(ids, prefill_chunk_size=5, **greedy)
    small = get_procedure("a2sf")(policy.settings).plan(wrapped).apply(wrapped)
    small.save_pretrained(tmp_path / "small")
    for made in (small, load_model(tmp_path / "small")):
        assert torch.equal(made.generate(ids, **greedy), found)


def test_nothing_was_begun() -> None:
    with pytest.raises(ValueError, match="generate first"):
        EvictingStates().positions(0)
