"""Where the attention, MLP and norms of a model lie, for models of transformers, timm and ours.

Blocks are recognised by the names of their parts, one :class:`_Layout` a family, so that Mistral
and Qwen are found as Llama is. What is not recognised is said, with what was looked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

__all__ = ["Anatomy", "Attention", "Block", "Projection", "Sublayer", "anatomy"]

Kind = Literal["attention", "cross", "mlp"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One of an attention's matrices.

    Attributes:
        path: of the module that holds it, from the model.
        part: which of ``parts`` equal slices of that module's outputs it is (fused projections).
        parts: 1 where the module holds nothing else.
        transposed: the weight is (in, out), as in GPT-2's Conv1D, and not (out, in).
    """

    path: str
    part: int = 0
    parts: int = 1
    transposed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """An attention sublayer's projections and sizes.

    Attributes:
        path: of the module that takes hidden states and returns mixed ones.
        core: of the module that splits heads and calls the attention function (often ``path``).
        query, key, value, output: the matrices; None where the mechanism has no such matrix.
        num_heads, num_kv_heads, head_dim: as named; 0 where the module does not say.
    """

    path: str
    core: str
    query: Projection | None
    key: Projection | None
    value: Projection | None
    output: Projection | None
    num_heads: int
    num_kv_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sublayer:
    """One residual branch of a block.

    Attributes:
        kind: "attention" (of a sequence on itself), "cross" or "mlp".
        path: of the module whose output is added (an MLP written out in its block: its last one).
        parts: all modules of the branch but its norms, by path.
        norms: norms before and after the branch, in order.
        enter: path of the module that first sees the branch's input: the stream is read there.
        post_norm: the norm acts on the sum (BERT), and not on the branch's input.
        attention: projections, of "attention" and "cross".
    """

    kind: Kind
    path: str
    parts: tuple[str, ...]
    norms: tuple[str, ...]
    enter: str
    post_norm: bool = False
    attention: Attention | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One block: its place, and its branches in the order in which they run.

    Attributes:
        path: from the model.
        index: in its stack.
        stack: path of the list that holds it.
        role: "encoder" or "decoder" (a causal model's blocks are a decoder's).
        family: name of the layout.
        sublayers: branches.
    """

    path: str
    index: int
    stack: str
    role: Literal["encoder", "decoder"]
    family: str
    sublayers: tuple[Sublayer, ...]

    def of_kind(self, kind: Kind) -> Sublayer | None:
        """Return the branch of that kind, or None (dropped, or this family has none)."""
        return next((s for s in self.sublayers if s.kind == kind), None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """All blocks of a model, stack after stack.

    Attributes:
        blocks: in the order in which they run.
        shared: one block's weights serve several layers (ALBERT).
        layers: how often blocks run in all; ``len(blocks)`` unless shared.
    """

    blocks: tuple[Block, ...]
    shared: bool
    layers: int

    def stack(self, path: str) -> tuple[Block, ...]:
        return tuple(b for b in self.blocks if b.stack == path)

    @property
    def stacks(self) -> tuple[str, ...]:
        """Paths of the lists of blocks, in order."""
        return tuple(dict.fromkeys(b.stack for b in self.blocks))

    def sublayers(self, kind: Kind | None = None) -> Iterator[tuple[Block, Sublayer]]:
        """Go through the branches, of one kind or of all."""
        for block in self.blocks:
            for sublayer in block.sublayers:
                if kind is None or sublayer.kind == kind:
                    yield block, sublayer


@dataclass(frozen=True, kw_only=True, slots=True)
class _Branch:
    """How a layout writes one branch: names relative to the block."""

    kind: Kind
    parts: tuple[str, ...]  # the last is the one whose output is added
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    scales: tuple[str, ...] = ()  # on the branch's output: layer scale; dropped with it
    core: str = ""
    names: tuple[str, str, str, str] | None = None  # q, k, v, o, relative to the block
    fused: bool = False
    optional: bool = False
    post_norm: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    name: str
    branches: tuple[_Branch, ...]
    unless: tuple[str, ...] = ()  # a block with one of these is of another layout


def _linears(prefix: str, names: str = "q_proj k_proj v_proj o_proj") -> tuple[str, str, str, str]:
    q, k, v, o = (f"{prefix}.{n}" for n in names.split())
    return q, k, v, o


_LAYOUTS = (
    _Layout(
        name="llama",
        branches=(
            _Branch(
                kind="attention",
                parts=("self_attn",),
                before=("input_layernorm",),
                names=_linears("self_attn"),
            ),
            _Branch(kind="mlp", parts=("mlp",), before=("post_attention_layernorm",)),
        ),
        unless=("pre_feedforward_layernorm",),
    ),
    _Layout(
        name="gemma2",
        branches=(
            _Branch(
                kind="attention",
                parts=("self_attn",),
                before=("input_layernorm",),
                after=("post_attention_layernorm",),
                names=_linears("self_attn"),
            ),
            _Branch(
                kind="mlp",
                parts=("mlp",),
                before=("pre_feedforward_layernorm",),
                after=("post_feedforward_layernorm",),
            ),
        ),
    ),
    _Layout(
        name="gpt2",
        branches=(
            _Branch(
                kind="attention",
                parts=("attn",),
                before=("ln_1",),
                names=_linears("attn", "c_attn c_attn c_attn c_proj"),
                fused=True,
            ),
            _Branch(kind="mlp", parts=("mlp",), before=("ln_2",)),
        ),
        unless=("crossattention",),
    ),
    _Layout(
        name="whisper",
        branches=(
            _Branch(
                kind="attention",
                parts=("self_attn",),
                before=("self_attn_layer_norm",),
                names=_linears("self_attn", "q_proj k_proj v_proj out_proj"),
            ),
            _Branch(
                kind="cross",
                parts=("encoder_attn",),
                before=("encoder_attn_layer_norm",),
                names=_linears("encoder_attn", "q_proj k_proj v_proj out_proj"),
                optional=True,
            ),
            _Branch(kind="mlp", parts=("fc1", "fc2"), before=("final_layer_norm",)),
        ),
    ),
    _Layout(
        name="bert",
        branches=(
            _Branch(
                kind="attention",
                parts=("attention",),
                core="attention.self",
                names=(
                    "attention.self.query",
                    "attention.self.key",
                    "attention.self.value",
                    "attention.output.dense",
                ),
                post_norm=True,
            ),
            _Branch(kind="mlp", parts=("intermediate", "output"), post_norm=True),
        ),
        unless=("crossattention", "layernorm_before"),
    ),
    _Layout(
        name="albert",
        branches=(
            _Branch(
                kind="attention",
                parts=("attention",),
                names=_linears("attention", "query key value dense"),
                post_norm=True,
            ),
            _Branch(
                kind="mlp",
                parts=("ffn", "ffn_output"),
                after=("full_layer_layer_norm",),
                post_norm=True,
            ),
        ),
    ),
    _Layout(
        name="vit",
        branches=(
            _Branch(
                kind="attention",
                parts=("attention",),
                before=("layernorm_before",),
                names=_linears("attention"),
            ),
            _Branch(kind="mlp", parts=("mlp",), before=("layernorm_after",)),
        ),
    ),
    _Layout(
        name="timm",
        branches=(
            _Branch(
                kind="attention",
                parts=("attn",),
                before=("norm1",),
                scales=("ls1",),
                names=_linears("attn", "qkv qkv qkv proj"),
                fused=True,
            ),
            _Branch(kind="mlp", parts=("mlp",), before=("norm2",), scales=("ls2",)),
        ),
    ),
    _Layout(
        name="manyheads",
        branches=(
            _Branch(
                kind="attention",
                parts=("mixer",),
                before=("mixer_norm",),
                names=_linears("mixer", "q_proj k_proj v_proj out_proj"),
            ),
            _Branch(kind="mlp", parts=("mlp",), before=("mlp_norm",)),
        ),
    ),
)


def anatomy(model: nn.Module) -> Anatomy:
    """Find the blocks of a model and their branches.

    Args:
        model: of transformers (Llama, Mistral, Qwen, Gemma, GPT-2, OPT, BERT, ALBERT, Whisper,
            ViT), timm (VisionTransformer) or ours (MixerLM, MixerEncoder).

    Raises:
        ValueError: no list of blocks was recognised; what was looked for and found is said.
    """
    blocks: list[Block] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential) or len(module) == 0:
            continue
        layouts = [_layout_of(child) for child in module]
        if any(layout is None for layout in layouts):
            continue
        role = _role(model, path)
        for index, (child, layout) in enumerate(zip(module, layouts, strict=True)):
            assert layout is not None
            own = f"{path}.{index}"
            blocks.append(
                Block(
                    path=own,
                    index=index,
                    stack=path,
                    role=role,
                    family=layout.name,
                    sublayers=tuple(_sublayers(layout, child, own)),
                )
            )
    if not blocks:
        raise ValueError(_not_recognised(model))
    _refuse(model, blocks)
    shared = blocks[0].family == "albert"
    config = getattr(model, "config", None)
    layers = int(getattr(config, "num_hidden_layers", len(blocks))) if shared else len(blocks)
    return Anatomy(blocks=tuple(blocks), shared=shared, layers=layers)


def _layout_of(block: nn.Module) -> _Layout | None:
    for layout in _LAYOUTS:
        names = [
            name
            for branch in layout.branches
            if not branch.optional
            for name in (*branch.parts, *branch.before, *branch.after)
        ]
        if all(hasattr(block, n) for n in names) and not any(
            isinstance(getattr(block, n, None), nn.Module) for n in layout.unless
        ):
            return layout
    return None


def _sublayers(layout: _Layout, block: nn.Module, path: str) -> Iterator[Sublayer]:
    for branch in layout.branches:
        if branch.optional and not hasattr(block, branch.parts[0]):
            continue
        module = block.get_submodule(branch.parts[-1])
        if getattr(module, "is_dropped", False):
            continue
        norms = tuple(f"{path}.{n}" for n in (*branch.before, *branch.after))
        scales = tuple(f"{path}.{n}" for n in branch.scales if hasattr(block, n))
        parts = tuple(f"{path}.{n}" for n in branch.parts)
        yield Sublayer(
            kind=branch.kind,
            path=parts[-1],
            parts=(*scales, *parts),
            norms=norms,
            enter=norms[0] if branch.before else parts[0],
            post_norm=branch.post_norm,
            attention=_attention(branch, block, path) if branch.kind != "mlp" else None,
        )


def _attention(branch: _Branch, block: nn.Module, path: str) -> Attention:
    core = block.get_submodule(branch.core or branch.parts[-1])
    projections: list[Projection | None] = []
    for place, name in enumerate(branch.names or ()):
        try:
            module = block.get_submodule(name)
        except AttributeError:
            projections.append(None)
            continue
        fused = branch.fused and place < 3
        projections.append(
            Projection(
                path=f"{path}.{name}",
                part=place if fused else 0,
                parts=3 if fused else 1,
                transposed=type(module).__name__ == "Conv1D",
            )
        )
    query, key, value, output = projections
    heads, kv_heads, head_dim = _heads(core)
    return Attention(
        path=f"{path}.{branch.parts[-1]}",
        core=f"{path}.{branch.core or branch.parts[-1]}",
        query=query,
        key=key,
        value=value,
        output=output,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )


def _heads(core: nn.Module) -> tuple[int, int, int]:
    config = getattr(core, "config", None)

    def first(owners: tuple[Any, ...], *names: str) -> int:
        for owner in owners:
            for name in names:
                value = getattr(owner, name, None)
                if isinstance(value, int):
                    return value
        return 0

    heads = first((core, config), "num_heads", "num_attention_heads")
    groups = first((config, core), "num_key_value_heads") or heads
    head_dim = first((core,), "head_dim", "attention_head_size")
    if not head_dim and config is not None and heads:
        head_dim = first((config,), "head_dim") or first((config,), "embed_dim") // heads
    return heads, groups, head_dim


def _role(model: nn.Module, path: str) -> Literal["encoder", "decoder"]:
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return "decoder" if "decoder" in path.split(".") else "encoder"
    stack = model.get_submodule(path)
    for module in stack.modules():
        causal = getattr(module, "is_causal", None)
        if causal is None:
            causal = getattr(getattr(module, "config", None), "is_causal", None)
        if isinstance(causal, bool):
            return "decoder" if causal else "encoder"
    causal = bool(getattr(config, "is_causal", False)) or "ForCausalLM" in type(model).__name__
    return "decoder" if causal or "decoder" in path.split(".") else "encoder"


def _refuse(model: nn.Module, blocks: list[Block]) -> None:
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", "")
    if blocks[0].family == "whisper" and kind not in ("whisper", "opt", ""):
        raise ValueError(
            f"{type(model).__name__} (model type {kind!r}) names its parts as Whisper and OPT do, "
            "but may put its norms elsewhere: only those two are known"
        )
    if kind == "opt" and not getattr(config, "do_layer_norm_before", True):
        raise ValueError(
            "this OPT has its norms after the sums (do_layer_norm_before=False, as in 350m), "
            "which is not supported: use a size whose norms come first"
        )


def _not_recognised(model: nn.Module) -> str:
    lists = [
        f"{path or 'the model'}: {len(m)} x {type(m[0]).__name__}"
        f"({', '.join(n for n, _ in m[0].named_children())})"
        for path, m in model.named_modules()
        if isinstance(m, nn.ModuleList | nn.Sequential) and len(m) > 1
    ]
    looked = "; ".join(
        f"{layout.name} ({', '.join(n for b in layout.branches for n in (*b.before, *b.parts))})"
        for layout in _LAYOUTS
    )
    found = "; ".join(lists[:4]) or "no list of modules"
    return (
        f"the sublayers of {type(model).__name__} are not recognised. Looked for lists of blocks "
        f"with the parts of: {looked}. Found: {found}"
    )
