"""Language models of ours under EleutherAI's lm-evaluation-harness, as its model "manyheads".

    python -m manyheads.bridges.lm_eval --model manyheads \\
        --model_args run=runs/first --tasks lambada_openai

is the harness's own command line with our model entered; ``import manyheads.bridges.lm_eval``
enters it for ``lm_eval.simple_evaluate(model="manyheads", model_args="run=runs/first")``.
"""

from __future__ import annotations

from manyheads.errors import require_extra

require_extra("lm_eval", "lm-eval", "manyheads.bridges.lm_eval")

from manyheads.bridges.lm_eval.model import ManyheadsLM  # noqa: E402

__all__ = ["ManyheadsLM"]
