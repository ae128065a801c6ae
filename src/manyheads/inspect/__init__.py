"""Analysis of trained models: what they look at."""
