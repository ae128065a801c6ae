"""Attention over listed blocks of keys, which several mechanisms share."""
