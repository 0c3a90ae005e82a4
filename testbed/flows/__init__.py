"""Real flows and their true completion times.

`recorded` keeps a trace, `replay` plays it through a star with one `sender` process per host and one `receiver`,
`results` holds what came of every flow, `calibration` times flows alone on the idle path.
"""
