"""The card of LLM-Drop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.choose.timing import Timings, forward, interleaved
from manyheads.papers.base import Check, Claim, Measurement, Paper

__all__ = ["PAPER"]

_SENTENCES = 256
_BATCH = 32
_DROPS = (1, 2, 3)


def measure(progress: Callable[[str], None]) -> Measurement:
    """Drop attentions and MLPs of all-MiniLM-L6-v2: sentence similarity, time, cache.

    Raises:
        MissingExtraError: the package with the weights, gensim or transformers is not installed.
    """
    from manyheads.compress import open_model
    from manyheads.compress.llm_drop import LLMDrop, LLMDropConfig, measure_similarities
    from manyheads.data.lee import load_lee
    from manyheads.data.packages import minilm_folder
    from manyheads.shrink.data import feed_for
    from manyheads.shrink.quality import embed

    opened = open_model(minilm_folder())
    model, lee = opened.model, load_lee()
    feed = feed_for(opened, length=128, batch=_BATCH)
    documents = feed.sentences(list(lee.documents))
    calibration = feed.sentences(list(lee.background)[:_SENTENCES])
    progress("measuring similarities")
    smaller: dict[str, nn.Module] = {"full": model}
    for n in _DROPS:
        for kind in ("attention", "mlp"):
            method = LLMDrop(LLMDropConfig.from_dict({kind: n}))
            plan = method.plan(model, calibration)
            smaller[f"{kind} {n}"] = plan.apply(model)
    smaller["attention all"] = LLMDrop(attention=6).plan(model, calibration).apply(model)
    progress("judging on the Lee documents")
    with torch.no_grad():
        quality = {
            name: lee.correlation(torch.cat([embed(m, b) for b in documents]))
            for name, m in smaller.items()
        }
    progress("timing")
    batch = {k: v[:8] for k, v in calibration[0].items()}  # short calls, so that many fit
    names = ["full", "attention all", *(f"attention {n}" for n in _DROPS)]
    times = interleaved({n: forward(lambda m=smaller[n]: m(**batch)) for n in names}, repeats=31)
    share = 1 - times["attention all"].median / times["full"].median
    gains = {
        n: (1 - times[f"attention {n}"].median / times["full"].median) / (share * n / 6)
        for n in _DROPS
    }
    scoring = _scoring(model, calibration, measure_similarities)
    ratio = scoring["scoring"].median / scoring["forward"].median
    silent = _silent_goes_first(model, calibration)
    lost = {k: quality["full"] - quality[f"{k} 2"] for k in ("attention", "mlp")}
    return Measurement(
        checks=(
            Check(
                what="Spearman on Lee lost with 2 of 6 attentions dropped, minus that with 2 MLPs",
                claimed="attentions are the more redundant (Llama-2-13B: 4 cost less than 4 MLPs)",
                measured=lost["attention"] - lost["mlp"],
                direction=lost["attention"] < lost["mlp"],
                size=lost["attention"] < 0.05 * quality["full"],
                bound="attentions cost under 5 % of the full model's",
            ),
            Check(
                what="time won with 1, 2 and 3 attentions dropped, of their measured share, least",
                claimed="1.05x to 1.62x, in proportion to what goes",
                measured=min(gains.values()),
                direction=min(gains.values()) > 0,
                size=min(gains.values()) >= 0.9,
                bound=">= 0.9",
            ),
            Check(
                what="scoring all branches on 256 sentences over one forward pass",
                claimed="one pass over the calibration",
                measured=ratio,
                unit="x",
                direction=ratio < 2,
                size=ratio < 2,
                bound="< 2x",
            ),
            Check(
                what="a branch whose output is zero: its similarity",
                claimed="1, and it goes first",
                measured=silent,
                direction=silent > 0.99999,
                size=silent > 0.99999,
                bound="> 0.99999",
            ),
        ),
        figures={
            "spearman": quality,
            "attention_share": share,
            "seconds": {n: t.median for n, t in times.items()},
            "won_of_share": {str(n): g for n, g in gains.items()},
        },
        notes=(
            "one real model of 6 layers, fine-tuned for sentence similarity; the paper's are "
            "language models of 32 to 80 layers",
        ),
    )


def _scoring(model: nn.Module, batches: list[dict[str, Tensor]], score: Any) -> Timings:
    def plain() -> None:
        with torch.no_grad():
            for batch in batches:
                model(**batch)

    return interleaved({"forward": plain, "scoring": lambda: score(model, batches)}, repeats=3)


def _silent_goes_first(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Return the similarity of a pre-norm branch whose last matrix is zero."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from manyheads.compress.anatomy import anatomy
    from manyheads.compress.llm_drop import LLMDrop

    torch.manual_seed(0)
    llama: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
        )
    ).eval()
    silent = copy.deepcopy(llama)
    nn.init.zeros_(silent.model.layers[2].self_attn.o_proj.weight)
    plan = LLMDrop(attention=1).plan(silent, [{"input_ids": torch.randint(64, (4, 32))}])
    path = anatomy(silent).blocks[2].path
    if plan.structure["drop"]["attention"] != [path]:
        return 0.0
    return float(plan.measured["similarity"]["attention"][path])


PAPER = Paper(
    slug="llm-drop",
    title="What Matters in Transformers? Not All Attention is Needed",
    arxiv="2406.15786",
    summary=(
        "Depth pruning without training: a pass over a little text measures how much each "
        "attention, MLP or block changes the residual stream, and those that change it least go, "
        "with their weights and caches. Lossy; attentions go first."
    ),
    implements=(
        "manyheads.compress.llm_drop.LLMDrop",
        "manyheads.compress.llm_drop.measure_similarities",
        "manyheads.compress.anatomy",
    ),
    recipe="manyheads shrink MODEL --method llm-drop --drop-attention 2 --calibrate DATA",
    claim=Claim(
        statement="Attention layers can be dropped at little loss, and time falls by their share.",
        measure=measure,
    ),
)
