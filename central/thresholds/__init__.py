"""Optimisers of the byte thresholds."""
