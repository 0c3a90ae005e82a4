"""Real traffic in network namespaces, under any scheme, with its ground truth."""
