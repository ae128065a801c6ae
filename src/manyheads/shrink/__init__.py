"""`manyheads shrink`: a smaller folder out of a folder, with the loss measured."""

from __future__ import annotations
