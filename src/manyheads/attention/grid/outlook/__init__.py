"""Outlook attention: windows mixed by weights that their middle predicts (2106.13112)."""

from manyheads.attention.grid.outlook.function import outlook, outlook_reference
from manyheads.attention.grid.outlook.module import OutlookAttention, OutlookMixer

__all__ = ["OutlookAttention", "OutlookMixer", "outlook", "outlook_reference"]
