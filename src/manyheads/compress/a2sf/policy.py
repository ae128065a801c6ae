"""What every cache policy shares: its budget, its settings, and where it is put to use.

A policy says which cached tokens stay. Its state lives in :mod:`manyheads.compress.a2sf.state`,
its way into our models in :mod:`manyheads.compress.a2sf.own`, into transformers in the bridge.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, cast

from torch import Tensor, nn

from manyheads.compress.procedure import Batch, Plan, Procedure
from manyheads.config import Config
from manyheads.errors import require_extra
from manyheads.models.language.causal import CausalLM

__all__ = ["CacheConfig", "CachePolicy", "Split"]

_BRIDGE = "manyheads.bridges.transformers.eviction"


class Split(NamedTuple):
    """A budget in tokens: the first ones, those that stay for their scores, the newest ones."""

    sink: int
    select: int
    recent: int

    @property
    def total(self) -> int:
        return sum(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig(Config):
    """The budget of a cache, per layer and key-value head. One of the three budgets is given.

    Or none, with ``cross_budget``: then all of what a decoder said stays.

    Attributes:
        budget_tokens: tokens that are held.
        budget_ratio: the same as a share of the prompt, in (0, 1], rounded to whole tokens.
        layer_budgets: tokens that are held, a number for each layer.
        recent: newest tokens that are never evicted; the policy's share by default
        sink: first tokens that are never evicted
        bits: 8 holds keys and values as int8 with a scale for each token and head
        decode: hold the budget while generating too; otherwise the prompt alone is cut
        cross_budget: encoder positions that a decoder's cross-attentions hold, a number or a share
            in (0, 1]; None: all. An extension of ours, for Whisper
        cross_after: decoded tokens, the prompt's included, whose attention decides which ones
    """

    budget_tokens: int | None = None
    budget_ratio: float | None = None
    layer_budgets: tuple[int, ...] | None = None
    recent: int | None = None
    sink: int = 0
    bits: int | None = None
    decode: bool = True
    cross_budget: int | float | None = None
    cross_after: int = 8

    def __post_init__(self) -> None:
        given = (self.budget_tokens, self.budget_ratio, self.layer_budgets)
        count = sum(g is not None for g in given)
        if count > 1 or (count == 0 and self.cross_budget is None):
            raise ValueError(
                f"budget_tokens={given[0]}, budget_ratio={given[1]}, layer_budgets={given[2]}: "
                "give exactly one of them, or cross_budget alone"
            )
        if self.budget_ratio is not None and not 0 < self.budget_ratio <= 1:
            raise ValueError(
                f"budget_ratio is {self.budget_ratio}, expected a share of the prompt in (0, 1]"
            )
        if self.bits not in (None, 8):
            raise ValueError(f"bits is {self.bits}, expected 8 or None (as the model computes)")
        for name, value in (("sink", self.sink), ("recent", self.recent)):
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}, expected 0 or more tokens")
        cross = self.cross_budget
        if cross is not None and (cross <= 0 or (isinstance(cross, float) and cross > 1)):
            raise ValueError(
                f"cross_budget is {cross}, expected encoder positions (1 or more) or a share of "
                "them in (0, 1]"
            )
        if self.cross_after < 1:
            raise ValueError(f"cross_after is {self.cross_after}, expected 1 or more tokens")
        least = self.sink + (self.recent or 0)
        counts = self.layer_budgets or ()
        for budget in counts if self.budget_tokens is None else (self.budget_tokens,):
            if budget < max(1, least):
                raise ValueError(
                    f"a budget of {budget} tokens is below sink + recent = {least}, or below 1: "
                    "give a larger budget or protect fewer tokens"
                )


class CachePolicy(Procedure):
    """Base of cache policies: how much is held, and a way into a model.

    ``budget`` is an int (tokens), a float (share of the prompt) or a sequence (tokens of each
    layer); it stands for ``budget_tokens``, ``budget_ratio`` and ``layer_budgets`` of the
    settings.
    """

    settings_class: ClassVar[type[Config]] = CacheConfig
    acts_on_cache: ClassVar[bool] = True
    rotates: ClassVar[bool] = False
    needs_scores: ClassVar[bool] = True

    def __init__(
        self,
        settings: Config | None = None,
        *,
        budget: int | float | Sequence[int] | None = None,
        **options: Any,
    ) -> None:
        if budget is not None:
            if isinstance(budget, bool):
                raise ValueError(f"budget is {budget}, expected tokens, a share or a sequence")
            if isinstance(budget, int):
                options["budget_tokens"] = budget
            elif isinstance(budget, float):
                options["budget_ratio"] = budget
            else:
                options["layer_budgets"] = tuple(budget)
        super().__init__(settings, **options)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.settings})"

    def budget(self, layer: int, prompt: int) -> int:
        """Return the tokens that a layer holds after a prompt of that many tokens.

        Raises:
            ValueError: no budget was given for that layer.
        """
        s = self.settings
        if s.budget_tokens is not None:
            return cast(int, s.budget_tokens)
        if s.budget_ratio is not None:
            least = max(1, s.sink + (s.recent or 0))
            return max(least, math.floor(s.budget_ratio * prompt + 0.5))
        if s.layer_budgets is None:
            raise ValueError("no budget but cross_budget was given: add budget_tokens")
        if layer >= len(s.layer_budgets):
            raise ValueError(
                f"layer_budgets names {len(s.layer_budgets)} layers and the model has a layer "
                f"{layer}: give a budget for each layer"
            )
        return cast(int, s.layer_budgets[layer])

    def split(self, budget: int) -> Split:
        """Divide a budget; what is neither first nor newest stays for its score."""
        sink = min(self.settings.sink, budget)
        recent = self._recent(budget) if self.settings.recent is None else self.settings.recent
        recent = min(recent, budget - sink)
        return Split(sink, budget - sink - recent, recent)

    @property
    def holds_all(self) -> bool:
        """Whether a decoder's own tokens all stay: ``cross_budget`` alone was given."""
        s = self.settings
        return s.budget_tokens is None and s.budget_ratio is None and s.layer_budgets is None

    def cross_budget(self, positions: int) -> int:
        """Return how many of an encoder's positions stay, all of them without a budget."""
        budget = self.settings.cross_budget
        if isinstance(budget, float):
            budget = max(1, math.floor(budget * positions + 0.5))
        return positions if budget is None else min(cast(int, budget), positions)

    @property
    def cross_queries(self) -> int:
        """Tokens whose attention decides which of an encoder's positions stay."""
        return cast(int, self.settings.cross_after)

    def _recent(self, budget: int) -> int:
        return budget // 4

    def weights(self, real: Tensor, *, prompt: bool) -> Tensor | None:
        """Return what the attention rows of new queries count, (B, N), or None for nothing.

        Args:
            real: (B, N), True = a real token.
            prompt: they were read at once, not generated.
        """
        raise NotImplementedError

    def decay(self, real: Tensor, *, prompt: bool) -> Tensor:
        """Return the factor on scores from before these new tokens, (B,) or ()."""
        raise NotImplementedError

    def rank(self, scores: Tensor) -> Tensor:
        """Return what the tokens are ranked by, (B, G, n); their scores unless a policy smooths."""
        return scores

    def attach(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Let a model generate within this budget, inside a ``with``.

        **Lossy** once the budget is exceeded. Afterwards the model is as it was. Of a
        transformers model ``with`` gives a cache for ``model.generate(..., cache=cache)``
        (``past_key_values`` is its old name); ``generate`` without one makes a fresh one of the
        same policy at each call. Of ours it gives an
        :class:`~manyheads.compress.a2sf.own.EvictingStates`, which says what the text that was
        begun last holds: ``generate``, ``init_state``, ``update`` and ``step`` are the model's own.

        Args:
            model: of transformers: a causal language model or Whisper, with eager, SDPA or one of
                our attention functions; or a ``MixerLM`` with softmax, lean, gated or
                clipped_softmax layers, whose recurrent layers stay as they are.

        Raises:
            ValueError: another attention function, a model without a cache that grows, one whose
                rotary positions are not known although the policy moves keys.
            MissingExtraError: transformers is not installed, and the model is of it.
        """
        if isinstance(model, CausalLM):
            from manyheads.compress.a2sf.own import attached

            return attached(self, model)
        require_extra("transformers", "transformers", f"{type(self).__name__}.attach")
        context: AbstractContextManager[Any] = import_module(_BRIDGE).attached(self, model)
        return context

    def plan(self, model: nn.Module, calibration: Iterable[Batch] | None = None) -> Plan:
        """Record policy and budget, and what the calibration's second halves lose by it.

        Each batch is read with a cache, its first half at once and its second half token by
        token, with and without eviction: see :func:`continuation_loss`. An encoder-decoder is
        not measured.
        """
        from manyheads.compress.a2sf.quality import compare

        if not isinstance(model, CausalLM):
            require_extra("transformers", "transformers", f"the {self.name} procedure")
        reads = not getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        measured = compare(self, model, calibration) if calibration is not None and reads else {}
        structure = {"policy": self.name, "settings": self.settings.to_dict()}
        return self._plan(model, structure, measured=measured)

    @classmethod
    def apply(cls, plan: Plan, model: nn.Module) -> nn.Module:
        """Make ``model.generate`` create a cache of this policy at each call."""
        return cls.restructure(plan.structure, model)

    @classmethod
    def restructure(cls, structure: dict[str, Any], model: nn.Module) -> nn.Module:
        """Do the same to a freshly built model; there are no weights to change."""
        policy = cls(cls.settings_class.from_dict(structure["settings"]))
        if isinstance(model, CausalLM):
            from manyheads.compress.a2sf.own import install

            install(policy, model)
            return model
        require_extra("transformers", "transformers", f"the {cls.name} procedure")
        import_module(_BRIDGE).install(policy, model)
        return model
