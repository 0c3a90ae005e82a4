"""Real flows and their true completion times."""
