"""A2SF: its card and its claim."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.attention import softmax
from manyheads.choose.timing import interleaved
from manyheads.compress.a2sf import (
    A2SF,
    H2O,
    CachePolicy,
    EvictionState,
    SinkRecent,
    forgetting_weights,
)
from manyheads.compress.a2sf.scores import accumulate
from manyheads.errors import require_extra
from manyheads.papers.base import Check, Claim, Measurement, Paper

__all__ = ["PAPER"]

_BUDGET = 256
_PROMPTS = (1024, 16384)
# The recall task: every pair is one token; first some keys are asked for often, then others.
_KEYS, _VALUES, _EARLY, _LATE, _AFTER = 16, 8, 24, 8, 8
_PROMPT = _KEYS + _EARLY + _LATE
_STEPS, _BATCH, _RATE = 500, 64, 4e-3

Progress = Callable[[str], None]


def measure(progress: Progress) -> Measurement:
    """Measure fairness, decode time and memory after long prompts, and recall under a quarter."""
    require_extra("transformers", "transformers", "the claim of a2sf")
    progress("scores of uniform attention")
    fair = {str(alpha): _first_over_middle(alpha) for alpha in (1.0, 0.2)}
    part = _attention_part(progress)
    whole = _whole_model(progress)
    held = _held_bytes(progress)
    recall = _recall(progress)
    return Measurement(
        checks=(
            Check(
                what="score of the first key over the middle one's, uniform attention, plain sum",
                claimed="plain sums favour early tokens",
                measured=fair["1.0"],
                unit="x",
                direction=fair["1.0"] > 1,
                size=fair["1.0"] > 2,
                bound="above 2",
            ),
            Check(
                what="the same with a forgetting factor of 0.2",
                claimed="forgetting treats them alike",
                measured=fair["0.2"],
                unit="x",
                direction=fair["0.2"] < fair["1.0"],
                size=fair["0.2"] < 1.1,
                bound="below 1.1",
            ),
            Check(
                what="attention of one token after 16,384 over after 1,024, budget 256",
                claimed="independent of the prompt",
                measured=part,
                unit="x",
                direction=part < 16,
                size=part < 1.3,
                bound="below 1.3",
            ),
            Check(
                what="the same for a whole Llama of one layer",
                claimed="independent of the prompt",
                measured=whole,
                unit="x",
                direction=whole < 16,
                size=whole < 1.3,
                bound="below 1.3",
            ),
            Check(
                what="bytes held after 2,000 tokens over after 1,000",
                claimed="constant memory",
                measured=held,
                unit="x",
                direction=held == 1,
                size=held == 1,
                bound="exactly 1",
            ),
            Check(
                what="recall under a quarter of the cache, A2SF minus H2O",
                claimed="higher accuracy than accumulated attention at the same cache",
                measured=recall["a2sf"] - recall["h2o"],
                direction=recall["a2sf"] > recall["h2o"],
                size=recall["a2sf"] - recall["h2o"] >= 0.05,
                bound=f"at least 0.05; {recall['a2sf']:.2f} to {recall['h2o']:.2f}",
            ),
            Check(
                what="recall under a quarter of the cache, H2O minus first and newest tokens",
                claimed="attention finds what matters in the middle",
                measured=recall["h2o"] - recall["sink_recent"],
                direction=recall["h2o"] > recall["sink_recent"],
                size=recall["h2o"] >= recall["sink_recent"],
                bound=f"0 or more; {recall['h2o']:.2f} to {recall['sink_recent']:.2f}",
            ),
        ),
        figures={
            "first_over_middle": fair,
            "recall": recall,
            "recall_task": {
                "keys": _KEYS, "values": _VALUES, "early_questions": _EARLY,
                "late_questions": _LATE, "scored": _AFTER, "budget": _PROMPT // 4,
                "steps": _STEPS, "batch": _BATCH,
            },
        },
        notes=(
            f"recall with everything held: {recall['full']:.2f}",
            "the task asks for some keys often and early, then for others: where what matters "
            "does not change, forgetting has nothing to gain",
            "published accuracies of LLaMA and OPT were not re-measured",
        ),
    )  # fmt: skip


def _first_over_middle(alpha: float, length: int = 256) -> float:
    rows = torch.ones(length, length).tril() / torch.arange(1.0, length + 1)[:, None]
    real = torch.ones(1, length, dtype=torch.bool)
    score = accumulate(rows[None, None], forgetting_weights(real, alpha), 1)[0, 0]
    return float(score[0] / score[length // 2])


def _token(state: EvictionState, query: Tensor, key: Tensor) -> Tensor:
    keys, values = state.append(key, key)
    out = softmax(query, keys, values, attn_mask=state.mask(None, query))
    state.settle(query, keys)
    return out


def _state(prompt: int) -> EvictionState:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 8, prompt, 64, generator=generator)
    key = torch.randn(1, 2, prompt, 64, generator=generator)
    state = EvictionState(A2SF(budget=_BUDGET))
    keys, _ = state.append(key, key)
    state.mask(None, query)
    state.settle(query, keys)
    return state


def _attention_part(progress: Progress) -> float:
    progress("attention of one token after short and long prompts")
    query, key = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 1, 64)
    states = {prompt: _state(prompt) for prompt in _PROMPTS}
    calls = {str(n): _once(_token, state, query, key) for n, state in states.items()}
    times = interleaved(calls, repeats=31, min_sample_seconds=0.02)
    return times[str(_PROMPTS[1])].median / times[str(_PROMPTS[0])].median


def _once(fn: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return fn(*args)

    return call


def _llama(**sizes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)).eval()


def _whole_model(progress: Progress) -> float:
    progress("a whole model after short and long prompts")
    model = _llama(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=2 * _PROMPTS[1],
    )  # fmt: skip
    token = torch.zeros(1, 1, dtype=torch.long)
    calls, policy = {}, A2SF(budget=_BUDGET)
    with policy.attach(model) as short, policy.attach(model) as long:
        for prompt, cache in zip(_PROMPTS, (short, long), strict=True):
            with torch.no_grad():
                model(torch.randint(256, (1, prompt)), cache=cache, logits_to_keep=1)
            calls[str(prompt)] = _once(lambda c: model(token, cache=c), cache)
        times = interleaved(calls, repeats=31, min_sample_seconds=0.02)
    return times[str(_PROMPTS[1])].median / times[str(_PROMPTS[0])].median


def _held_bytes(progress: Progress) -> float:
    progress("bytes held while generating")
    state = _state(500)
    query, key = torch.randn(1, 8, 1, 64), torch.randn(1, 2, 1, 64)
    held = {}
    for seen in range(501, 2001):
        _token(state, query, key)
        held[seen] = state.nbytes
    return held[2000] / held[1000]


def _sample(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return tokens (B, N) and the value that each question asks for, -100 at pairs."""

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    values = draw(_VALUES, count, _KEYS)
    order = torch.rand(count, _KEYS, generator=generator).argsort(-1)
    pairs = order * _VALUES + values.gather(1, order)
    topics = torch.rand(count, _KEYS, generator=generator).argsort(-1)
    asked = (
        topics[:, :4].gather(1, draw(4, count, _EARLY)),
        topics[:, 4:8].repeat(1, (_LATE + _AFTER) // 4),
    )
    questions = torch.cat(asked, 1)
    tokens = torch.cat((pairs, _KEYS * _VALUES + questions), 1)
    targets = torch.cat((torch.full_like(pairs, -100), values.gather(1, questions)), 1)
    return tokens, targets


def _recall(progress: Progress) -> dict[str, float]:
    model = _llama(
        vocab_size=_KEYS * (_VALUES + 1), hidden_size=64, intermediate_size=128,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=_STEPS)
    for step in range(_STEPS):
        if step % 100 == 0:
            progress(f"recall: step {step} of {_STEPS}")
        tokens, targets = _sample(_BATCH, generator)
        logits = model(tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    progress("recall under a quarter of the cache")
    tokens, targets = _sample(256, torch.Generator().manual_seed(1))
    quarter = _PROMPT // 4
    policies: dict[str, CachePolicy | None] = {
        "full": None,
        "a2sf": A2SF(budget=quarter, alpha=0.9, recent=4),
        "h2o": H2O(budget=quarter, recent=4),
        "sink_recent": SinkRecent(budget=quarter),
    }
    return {name: _accuracy(model, p, tokens, targets) for name, p in policies.items()}


@torch.no_grad()
def _accuracy(model: Any, policy: CachePolicy | None, tokens: Tensor, targets: Tensor) -> float:
    """Return the share of right answers to the questions after the prompt, one at a time."""
    right = []
    with nullcontext() if policy is None else policy.attach(model) as cache:
        cache = model(tokens[:, :_PROMPT], cache=cache, use_cache=True).cache
        for place in range(_PROMPT, tokens.shape[1]):
            out = model(tokens[:, place : place + 1], cache=cache, use_cache=True)
            right.append(out.logits[:, -1].argmax(-1) == targets[:, place])
    return float(torch.stack(right).float().mean())


PAPER = Paper(
    slug="a2sf",
    title="A2SF: Accumulative Attention Scoring with Forgetting Factor for Token Pruning",
    arxiv="2407.20485",
    summary=(
        "A key-value cache of a fixed number of tokens for any causal language model, without "
        "training. Which tokens stay is decided by the attention that they got, where old "
        "attention fades, since a plain sum favours tokens that were there early."
    ),
    implements=(
        "manyheads.compress.a2sf.A2SF",
        "manyheads.compress.a2sf.H2O",
        "manyheads.compress.a2sf.SnapKV",
        "manyheads.compress.a2sf.StreamingLLM",
        "manyheads.compress.a2sf.simulate_eviction",
    ),
    recipe="manyheads shrink MODEL --method a2sf --set budget_tokens=256",
    claim=Claim(
        statement=(
            "At the same cache, forgetting keeps more accuracy than accumulated attention; a "
            "token costs the same after any prompt."
        ),
        measure=measure,
    ),
)
