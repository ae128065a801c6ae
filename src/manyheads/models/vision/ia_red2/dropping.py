"""What every model that drops tokens shares: groups of blocks, each behind a decision.

B batch, N tokens (those that are never dropped first), C channels, D groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn

from manyheads.models.vision.ia_red2.interpreter import Interpreter
from manyheads.models.vision.ia_red2.policy import draw_policy, greedy_policy
from manyheads.models.vision.ia_red2.tokens import Tokens, apply_blocks, gather_kept, scatter

__all__ = ["Decide", "Decision", "Dropping", "Outcome", "heat_map"]

Decide = Callable[[int, Tensor, Tensor], Tensor]


class Decision(NamedTuple):
    """What happened in front of a group.

    Attributes:
        scores: (B, N) in [0, 1]; 0 for tokens that were gone already.
        alive: bool (B, N), tokens that the decision was about, and those that always stay.
        policy: bool (B, N), tokens that were kept.
    """

    scores: Tensor
    alive: Tensor
    policy: Tensor


class Outcome(NamedTuple):
    """What a model answered, and what it looked at.

    Attributes:
        logits: (B, classes).
        decisions: one for each group that decided.
        policies: bool (B, N) for each group, those that decided nothing included.
        cost: (B,), 1 − Σ over groups of (share of tokens dropped) · (share of blocks): linear in
            the tokens, the class token counted, as the released model reports it.
        features: (B, C), what the head read.
    """

    logits: Tensor
    decisions: tuple[Decision, ...]
    policies: tuple[Tensor, ...]
    cost: Tensor
    features: Tensor


class Dropping(nn.Module):
    """Mixin: a transformer whose blocks stand in groups, an interpreter before each.

    A model sets ``interpreters``, ``depths`` (blocks of each group), ``threshold`` and ``prefix``
    (tokens that are never dropped), and fills ``embed``, ``all_blocks`` and ``read_out``.

    Interpreters learn by policy gradients alone, so they are frozen until
    :meth:`unfreeze_interpreters`.
    """

    interpreters: nn.ModuleList
    depths: tuple[int, ...]
    threshold: float = 0.5
    prefix: int = 1
    # Blocks that need the whole grid see dropped tokens masked; all others never see them.
    gathers: bool = True

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """Return tokens (B, N, C) and the grid that those behind the prefix stand in."""
        raise NotImplementedError

    def all_blocks(self) -> Sequence[nn.Module]:
        """Return the blocks in their order."""
        raise NotImplementedError

    def read_out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features (B, C) and logits (B, classes) of the last tokens (B, M, C)."""
        raise NotImplementedError

    def make_interpreters(self, dim: int, num_heads: int, first_score: float) -> None:
        """Make a frozen interpreter for every group."""
        made = (Interpreter(dim, num_heads, first_score=first_score) for _ in self.depths)
        self.interpreters = nn.ModuleList(made).requires_grad_(False)

    def unfreeze_interpreters(self, stages: int | None = None) -> Self:
        """Let the first so many interpreters learn (None: all), freeze the others; returns self.

        Raises:
            ValueError: more stages than there are groups, or fewer than none.
        """
        count = len(self.depths) if stages is None else stages
        if not 0 <= count <= len(self.depths):
            raise ValueError(f"stages {count}: the model has {len(self.depths)} groups")
        for i, interpreter in enumerate(self.interpreters):
            interpreter.requires_grad_(i < count)
        return self

    def run_groups(
        self,
        x: Tensor,
        decide: Decide,
        *,
        last: int | None = None,
        learning: bool = False,
        checkpointing: bool = False,
    ) -> Iterator[tuple[Tokens, Decision | None]]:
        """Yield the tokens behind each group, and what was decided in front of it.

        Args:
            x: tokens (B, N, C).
            decide: ``decide(group, scores, alive)`` returns a policy, bool (B, N).
            last: groups behind this one follow its policy; None: all decide.
            learning: keep the graph from the scores to the interpreters; not to the blocks before,
                which learn from the answer alone.
            checkpointing: compute insides of blocks again in the backward pass.
        """
        tokens = Tokens(x, None, None, x.shape[1])
        tracing = torch.compiler.is_compiling() or torch.jit.is_tracing() or x.is_meta
        masked, first = tracing or not self.gathers, 0
        for i, depth in enumerate(self.depths):
            decision = None
            if last is None or i <= last:
                decision = self._decide(tokens, i, decide, learning)
                if masked:
                    x = torch.where(decision.policy[..., None], tokens.x, 0)
                    tokens = Tokens(x, None, decision.policy, tokens.length)
                else:
                    tokens = gather_kept(tokens, decision.policy)
            elif masked and tokens.real is not None:
                tokens = tokens._replace(x=torch.where(tokens.real[..., None], tokens.x, 0))
            blocks = self.all_blocks()[first : first + depth]
            tokens = apply_blocks(blocks, tokens, checkpointing=checkpointing)
            first += depth
            yield tokens, decision

    def _decide(self, tokens: Tokens, group: int, decide: Decide, learning: bool) -> Decision:
        with torch.set_grad_enabled(learning and torch.is_grad_enabled()):
            found = self.interpreters[group](tokens.x.detach(), tokens.real)
            scores = scatter(found, tokens)
        alive = tokens.alive
        policy = decide(group, scores, alive)
        if policy.shape != alive.shape:
            raise ValueError(
                f"the policy of group {group} has shape {tuple(policy.shape)}, expected (batch, "
                f"tokens) = {tuple(alive.shape)}: the tokens that always stay count too"
            )
        policy = policy.bool() & alive
        policy = torch.cat((torch.ones_like(policy[:, : self.prefix]), policy[:, self.prefix :]), 1)
        return Decision(scores, alive, policy)

    def greedy(self, group: int, scores: Tensor, alive: Tensor) -> Tensor:
        """Keep what scores above the threshold: the rule outside of training."""
        return greedy_policy(scores, alive, threshold=self.threshold)

    def look(
        self,
        x: Tensor,
        *,
        sample: bool = False,
        generator: torch.Generator | None = None,
        policies: Sequence[Tensor] | None = None,
        decide: Decide | None = None,
        last: int | None = None,
    ) -> Outcome:
        """Answer, and return what was looked at; by threshold unless told otherwise.

        Args:
            x: what the model eats: images (B, C, H, W), or clips.
            sample: draw the policies with the scores as probabilities, and keep the graph from
                ``decisions`` to the interpreters.
            generator: of the draw.
            policies: (B, N) for each group that decides, taken instead; what is gone stays gone.
            decide: any other rule: ``decide(group, scores, alive)`` returns a policy. It may draw
                and keep the graph too.
            last: groups behind this one (from 0) follow its policy: the curriculum's stages.

        Raises:
            ValueError: more than one rule, a group that does not exist, or policies that do not
                fit.
        """
        if sum((sample, policies is not None, decide is not None)) > 1:
            raise ValueError("give one of sample, policies and decide")
        if last is not None and not 0 <= last < len(self.depths):
            raise ValueError(f"last {last}: the groups are 0 to {len(self.depths) - 1}")
        count = len(self.depths) if last is None else last + 1
        rule = self.greedy if decide is None else decide
        if sample:
            rule = partial(_drawn, generator=generator)
        if policies is not None:
            if len(policies) != count:
                raise ValueError(f"{len(policies)} policies: {count} groups decide")
            rule = partial(_given, policies)
        embedded, _ = self.embed(x)
        decisions: list[Decision] = []
        kept: list[Tensor] = []
        learning = sample or decide is not None
        for behind, decision in self.run_groups(embedded, rule, last=last, learning=learning):
            tokens = behind
            if decision is not None:
                decisions.append(decision)
            kept.append(decisions[-1].policy)
        features, logits = self.read_out(tokens.x)
        shares = torch.stack([p.to(embedded.dtype).mean(1) for p in kept], 1)
        weights = shares.new_tensor(self.depths) / sum(self.depths)
        return Outcome(logits, tuple(decisions), tuple(kept), shares @ weights, features)

    @torch.no_grad()
    def heat_map(self, x: Tensor, *, group: int | None = None) -> Tensor:
        """Return the scores of a group as pictures in [0, 1], (B, *grid); see :func:`heat_map`.

        Args:
            x: what the model eats.
            group: from 0; None: the second, as in the paper, or the only one.

        Raises:
            ValueError: a group that does not exist.
        """
        chosen = min(1, len(self.depths) - 1) if group is None else group
        if not 0 <= chosen < len(self.depths):
            raise ValueError(f"group {chosen}: the groups are 0 to {len(self.depths) - 1}")
        _, grid = self.embed(x)
        scores = self.look(x, last=chosen).decisions[chosen].scores
        return heat_map(scores[:, self.prefix :], grid)


def heat_map(scores: Tensor, grid: tuple[int, ...], *, least: float = 0.48) -> Tensor:
    """Return scores (B, N) as maps (B, *grid): clamped from below, then each image's span 0 to 1.

    An image whose scores are all alike is 0 everywhere.

    Args:
        scores: of the tokens in the grid alone, row by row.
        grid: sizes whose product is N.
        least: what is dropped for certain is not told apart.
    """
    clamped = scores.clamp(least, 1)
    low, high = clamped.amin(1, keepdim=True), clamped.amax(1, keepdim=True)
    return ((clamped - low) / (high - low).clamp_min(1e-12)).unflatten(1, grid)


def _drawn(
    group: int, scores: Tensor, alive: Tensor, *, generator: torch.Generator | None
) -> Tensor:
    return draw_policy(scores.detach(), alive, generator=generator)


def _given(policies: Sequence[Tensor], group: int, scores: Tensor, alive: Tensor) -> Tensor:
    return policies[group]
