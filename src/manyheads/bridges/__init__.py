"""Bridges to neighbours, one a library; each is imported by name and brings its own extra."""
