"""Optimisers of the byte thresholds: `exact` (the one to use), `mm1` (as PIAS and AuTO published it), `search`."""
