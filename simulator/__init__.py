"""The flow-level laboratory."""
