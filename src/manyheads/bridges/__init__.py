"""Bridges to neighbouring libraries, one each; nothing here is imported unless it is named."""
