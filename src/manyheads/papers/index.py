"""The 47 papers of the house, with or without a card yet."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from manyheads.errors import unknown_name
from manyheads.papers.base import Paper

__all__ = ["PAPERS", "Entry", "get_paper", "is_in"]


class Entry(NamedTuple):
    """A paper: slug, system, arXiv number, and the part of the library it belongs to."""

    slug: str
    system: str
    arxiv: str
    home: str


PAPERS: tuple[Entry, ...] = (
    Entry("dualtoken", "DualToken-ViT", "2309.12424", "models/vision"),
    Entry(
        "urpe",
        "Your Transformer May Not be as Powerful as You Expect (URPE attention)",
        "2205.13401",
        "attention",
    ),
    Entry(
        "smith",
        "Beyond 512 Tokens, Siamese Multi-depth Transformer-based Hierarchical encoder",
        "2004.12297",
        "models/documents",
    ),
    Entry("metaformer", "MetaFormer / PoolFormer", "2111.11418", "models/vision"),
    Entry(
        "axial",
        "Axial Attention in Multidimensional Transformers",
        "1912.12180",
        "models/diffusion",
    ),
    Entry(
        "efficient-vdit",
        "Efficient-vDiT, Efficient Video Diffusion Transformers with Attention Tile",
        "2502.06155",
        "models/diffusion",
    ),
    Entry(
        "plagiarism",
        "BERT embeddings + attention BiLSTM + clustering-based differential evolution",
        "2305.02374",
        "models/documents",
    ),
    Entry(
        "icl-linear",
        "Linear self-attention trained on in-context linear regression",
        "2306.09927",
        "train, inspect",
    ),
    Entry("scatterformer", "ScatterFormer", "2401.00912", "models/geometry"),
    Entry("aaren", "Aaren: attention as a recurrent neural network", "2405.13956", "attention"),
    Entry(
        "ia-red2",
        "IA-RED²: interpretability-aware redundancy reduction",
        "2106.12620",
        "models/vision",
    ),
    Entry(
        "passt",
        "PaSST: patchout audio transformers and the HEAR embedding API",
        "2211.13956",
        "models/audio, music, video",
    ),
    Entry(
        "icl-discrete",
        "In-context learning of Boolean function classes",
        "2310.03016",
        "train, inspect",
    ),
    Entry(
        "ganformer2",
        "GANformer2, Compositional Transformers for Scene Generation",
        "2111.08960",
        "models/diffusion",
    ),
    Entry("transnext", "TransNeXt", "2311.17132", "models/vision"),
    Entry("volo", "VOLO: Vision Outlooker", "2106.13112", "models/vision"),
    Entry("orchid", "Orchid: data-dependent global convolution", "2402.18508", "attention"),
    Entry(
        "quamba",
        "Quamba: static 8-bit quantisation of selective SSMs, with the Mamba-1 block",
        "2410.13229",
        "compress",
    ),
    Entry("flashvggt", "FlashVGGT", "2512.01540", "models/geometry"),
    Entry("bandcontrolnet", "BandControlNet", "2407.10462", "models/audio, music, video"),
    Entry(
        "flowformer",
        "Flowformer: linear attention from conservation flows",
        "2202.06258",
        "attention",
    ),
    Entry(
        "a2sf",
        "Accumulative Attention Scoring with Forgetting Factor (KV-cache eviction)",
        "2407.20485",
        "compress",
    ),
    Entry(
        "contrast",
        "Contrast: hybrid transformer / state-space super-resolution",
        "2501.13353",
        "models/dense",
    ),
    Entry("transnormer", "TransNormer: NormAttention + DiagAttention", "2210.10340", "attention"),
    Entry(
        "label-anything",
        "Label Anything (LAM): multi-class few-shot segmentation from point, box and mask prompts",
        "2407.02075",
        "models/dense",
    ),
    Entry(
        "routing",
        "Efficient Content-Based Sparse Attention with Routing Transformers",
        "2003.05997",
        "attention",
    ),
    Entry("mobilevig", "MobileViG", "2307.00395", "models/vision"),
    Entry(
        "lumina",
        "Lumina-T2X, Flow-based Large Diffusion Transformers (Flag-DiT)",
        "2405.05945",
        "models/diffusion",
    ),
    Entry("soft", "SOFT: Softmax-free Linear Transformers", "2207.03341", "attention"),
    Entry("efficientformer", "EfficientFormer", "2206.01191", "models/vision"),
    Entry(
        "ditraj",
        "DiTraj, training-free trajectory control for video diffusion transformers",
        "2509.21839",
        "models/diffusion",
    ),
    Entry(
        "hbformer",
        "HBFormer: Swin encoder + multi-scale feature fusion (MFF) decoder",
        "2512.03597",
        "models/dense",
    ),
    Entry(
        "flexdit",
        "FlexDiT / SparseDiT, Dynamic Token Density Control for Diffusion Transformers",
        "2412.06028",
        "models/diffusion",
    ),
    Entry("quantizable", "Clipped softmax, gated attention and INT8 PTQ", "2306.12929", "compress"),
    Entry(
        "lean",
        "Lean Attention, stream-K decomposition of decode-phase attention",
        "2405.10480",
        "attention",
    ),
    Entry("masa", "Matrix Atom Sharing in Attention", "2508.04581", "compress"),
    Entry("mesh", "Graph transformer for mesh-based simulation", "2508.18051", "models/geometry"),
    Entry(
        "vitpose",
        "EViTPose and UniTransPose: pose estimation with joint tokens",
        "2503.00232",
        "models/dense",
    ),
    Entry(
        "swinbert",
        "SwinBERT: video captioning with a learnable sparse attention mask",
        "2111.13196",
        "models/audio, music, video",
    ),
    Entry(
        "sla",
        "SLA, Beyond Sparsity in Diffusion Transformers via Fine-Tunable Sparse-Linear Attention",
        "2509.24006",
        "attention",
    ),
    Entry("gla", "Gated Linear Attention (GLA) layer and Transformer", "2312.06635", "attention"),
    Entry(
        "gated-class-attention",
        "Exemplar-free continual ViT: gated class-attention and feature drift compensation",
        "2211.12292",
        "train, inspect",
    ),
    Entry(
        "llm-drop",
        "Similarity-based block / attention / MLP / joint dropping",
        "2406.15786",
        "compress",
    ),
    Entry("qtseg", "QTSeg: query-token segmentation", "2412.17241", "models/dense"),
    Entry(
        "vit-analytics",
        "Visual analytics of ViT attention heads: importance, strength, patterns",
        "2303.13731",
        "train, inspect",
    ),
    Entry("minilm", "Deep self-attention distillation", "2002.10957", "compress"),
    Entry(
        "landmark",
        "Landmark Attention, Random-Access Infinite Context Length for Transformers",
        "2305.16300",
        "attention",
    ),
)


def _module(slug: str) -> str:
    return "manyheads.papers." + slug.replace("-", "_")


def is_in(slug: str) -> bool:
    """Return whether the paper has a card, which is to say that it is in the library."""
    return find_spec(_module(slug)) is not None


def get_paper(slug: str) -> Paper:
    """Return the card of a paper.

    Raises:
        ValueError: the slug is unknown (the nearest is given), or the paper is not in yet.
    """
    slugs = [e.slug for e in PAPERS]
    if slug not in slugs:
        raise unknown_name("paper", slug, slugs)
    if not is_in(slug):
        here = ", ".join(s for s in slugs if is_in(s))
        raise ValueError(f"{slug} is not in the library yet; in it: {here}")
    return import_module(_module(slug)).PAPER
