"""Diffusion models and their parts."""
