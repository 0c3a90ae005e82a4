"""What a cluster, an objective, a planning problem and a plan are."""
