"""What stands between a learner and the hosts.

    proposal -> bounds (valid, near the incumbent) -> trial (canary hosts, then time slices of the whole group)
             -> promoted, or rolled back; the incumbent is the policy scheme's decision until something beat it

Pure logic: no socket, no clock, no process. `keeper.GroupGuard` is the whole of it for one group and K; it says which
hosts are to have which thresholds, and `central/enforcement.py` sends them.
"""
