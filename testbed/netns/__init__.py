"""Topologies of network namespaces."""
