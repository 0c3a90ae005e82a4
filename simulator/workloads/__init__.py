"""Flow-size distributions and arrival processes."""
