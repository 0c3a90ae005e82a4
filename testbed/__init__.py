"""Real traffic in network namespaces, under any scheme, with its ground truth.

`netns` builds the network, `flows` sends a trace through it and times every flow, `schemes` says how packets are
queued, `capture` checks their DSCP from outside, `report` makes tables and pictures of it, `demo` runs the lot.
"""
