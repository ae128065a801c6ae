"""Taking branches and blocks out of a model so that they are gone: weights, caches, numbers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from manyheads.compress.anatomy import Anatomy, Block, Sublayer, anatomy

__all__ = ["DroppedBranch", "PassThrough", "remove"]


class DroppedBranch(nn.Module):
    """Stands where a branch was: adds nothing, holds nothing, keeps no cache.

    Returns a zero without axes, so that the sum around it costs one pass over the stream.
    """

    is_dropped = True

    def __init__(self, *, as_tuple: bool) -> None:
        super().__init__()
        self.as_tuple = as_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        nothing = hidden.new_zeros(())
        return (nothing, None) if self.as_tuple else nothing

    def init_state(self, batch_size: int) -> tuple[()]:
        return ()

    def update(self, x: Tensor, state: Any, *, mask: Tensor | None = None) -> tuple[Tensor, Any]:
        return x.new_zeros(()), state

    def step(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return x.new_zeros(()), state


class PassThrough(nn.Module):
    """Stands where a branch with its norm after the sum was: gives back the stream."""

    is_dropped = True

    def __init__(self, *, argument: int = 0, as_tuple: bool = False) -> None:
        super().__init__()
        self.argument, self.as_tuple = argument, as_tuple

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stream = args[self.argument] if args else kwargs["hidden_states"]
        return (stream, None) if self.as_tuple else stream


def remove(model: nn.Module, structure: dict[str, Any]) -> nn.Module:
    """Take branches and blocks out of a model, in place, and number the rest anew.

    Args:
        model: with its original numbering.
        structure: ``drop``: by kind, paths of the blocks that lose that branch; ``blocks``: paths
            of blocks to take out whole; ``layers``: how many remain where all share one block.

    Raises:
        ValueError: a path that this model does not have, or nothing would be left to keep a cache.
    """
    parts = anatomy(model)
    if "layers" in structure:
        model.config.num_hidden_layers = int(structure["layers"])  # type: ignore[union-attr]
        return model
    known = {b.path: b for b in parts.blocks}
    for kind, paths in structure.get("drop", {}).items():
        for path in paths:
            sublayer = known[path].of_kind(kind) if path in known else None
            if sublayer is None:
                raise ValueError(
                    f"there is no {kind} branch at {path!r} to drop: blocks are "
                    f"{parts.blocks[0].path} to {parts.blocks[-1].path}"
                )
            _remove_branch(model, known[path], sublayer)
    _remove_blocks(model, parts, structure.get("blocks", []))
    _number(model)
    return model


def _remove_branch(model: nn.Module, block: Block, sublayer: Sublayer) -> None:
    transformers = block.family not in ("timm", "manyheads")
    for norm in sublayer.norms:
        model.set_submodule(norm, nn.Identity())
    if sublayer.post_norm:
        if sublayer.kind == "mlp":  # BERT writes output(intermediate(x), x)
            model.set_submodule(sublayer.parts[0], nn.Identity())
            model.set_submodule(sublayer.path, PassThrough(argument=1))
        else:
            model.set_submodule(sublayer.path, PassThrough(as_tuple=True))
        return
    is_attention = sublayer.kind != "mlp"
    for path in sublayer.parts:
        model.set_submodule(path, DroppedBranch(as_tuple=False))
    model.set_submodule(sublayer.path, DroppedBranch(as_tuple=is_attention and transformers))


def _remove_blocks(model: nn.Module, parts: Anatomy, paths: list[str]) -> None:
    known = {b.path for b in parts.blocks}
    for path in paths:
        if path not in known:
            raise ValueError(f"there is no block at {path!r}: the first is {parts.blocks[0].path}")
    for stack in parts.stacks:
        blocks = parts.stack(stack)
        keep = [b.index for b in blocks if b.path not in paths]
        if len(keep) == len(blocks):
            continue
        if not keep:
            raise ValueError(f"no block of {stack!r} would remain: drop at most {len(blocks) - 1}")
        owner = model.get_submodule(stack)
        kept = [owner[i] for i in keep]  # type: ignore[index]
        model.set_submodule(stack, type(owner)(kept) if _is_list(owner) else nn.Sequential(*kept))
        _shorten_config(model, stack, blocks[0].role, keep)


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList)


def _shorten_config(model: nn.Module, stack: str, role: str, keep: list[int]) -> None:
    config: Any = getattr(model, "config", None)
    if config is None:
        return
    if hasattr(config, "layer_types") and hasattr(config, "replace"):  # a MixerLM's
        kinds = tuple(config.layer_types[i] for i in keep)
        more = {}
        if hasattr(config, "directions"):  # what is left reads as it did, not in turn anew
            more = {"backwards": tuple(config.directions[i] for i in keep)}
        model.config = config.replace(mixers=kinds, num_layers=None, **more)
        return
    if getattr(config, "is_encoder_decoder", False):
        setattr(config, f"{role}_layers", len(keep))
        if role == "encoder":
            config.num_hidden_layers = len(keep)
        return
    config.num_hidden_layers = len(keep)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[i] for i in keep]


def nothing_left(stack: str, blocks: int) -> str:
    """Return what to say where a decoder would lose its last attention."""
    return (
        f"no attention of {stack!r} would remain, and with it no cache that knows how many tokens "
        f"were read: drop at most {blocks - 1}"
    )


def _number(model: nn.Module) -> None:
    """Give kept attentions the numbers of the caches they own: 0, 1, 2 ... in each stack."""
    parts = anatomy(model)
    kinds = set(getattr(getattr(model, "config", None), "layer_types", None) or ())
    for stack in parts.stacks:
        blocks = parts.stack(stack)
        for kind in ("attention", "cross"):
            kept = [(b, s) for b in blocks if (s := b.of_kind(kind)) is not None]
            if kind == "attention" and not kept and blocks[0].role == "decoder":
                raise ValueError(nothing_left(stack, len(blocks)))
            # Caches of several kinds (sliding and full) are made by the original numbers.
            mixed = len(kinds) > 1 and blocks[0].family != "manyheads"
            if mixed and kind == "attention" and kept and kept[0][0].index != 0:
                raise ValueError(
                    "the attention of layer 0 cannot be dropped where layers have caches of "
                    f"several kinds ({', '.join(sorted(kinds))}): the count of tokens is read there"
                )
            for number, (block, sublayer) in enumerate(kept):
                assert sublayer.attention is not None
                core: Any = model.get_submodule(sublayer.attention.core)
                if isinstance(getattr(core, "layer_idx", None), int):
                    core.layer_idx = block.index if mixed else number
