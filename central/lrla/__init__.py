"""Long flows: central chooses level and route of each, by a rule or by a learned policy."""
