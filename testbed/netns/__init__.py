"""Topologies of network namespaces, and the register of what is ours on this machine."""
