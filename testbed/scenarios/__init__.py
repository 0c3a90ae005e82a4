"""Scenarios: the same traffic under every scheme, with central's own policies closing the loop.

`catalogue` says who sends what and when, `contenders` which schemes are compared, `cell` simulates one congested port
and what its host would report, `loop` runs one scheme with one seed, `outcome` all of them, `report` shows them.
"""
