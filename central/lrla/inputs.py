"""What the network sees of flows, may choose and starts from: the same where it learns and where it decides.

Where it sits: `network.py` trains on it, `inference.py` decides on it.
"""

import numpy as np

from central.lrla.flow_set import MAX_PRIORITIES, Bools, Floats, FlowSet, Ints
from central.lrla.rules import YOUNG_BYTES, priorities

CROWD = 8.0  # flows on a link that make a sum of about 1
FREE_WEIGHT = 2.0  # what the logit of no rate starts with, among those of the rates
_LOG_BYTES = 30.0  # log2 of a GiB: sizes are features in [0, 1]


def features_of(flows: FlowSet) -> Floats:
    """(n, FEATURES), each about 0 to 1, as the columns below say."""
    known = ~np.isnan(flows.known_bytes)
    rate = flows.attained_bytes * 8 / np.maximum(flows.age_s, 1e-6) / flows.rate_bps
    columns = (
        np.log2(1 + flows.attained_bytes) / _LOG_BYTES,
        known,
        np.log2(1 + np.where(known, flows.known_bytes, 0.0)) / _LOG_BYTES,
        np.clip((np.log10(np.maximum(flows.age_s, 1e-4)) + 4) / 6, 0, 1),
        np.clip(rate, 0, 1),
        flows.route >= 0,
        flows.priority / (MAX_PRIORITIES - 1),
        flows.migration,
        flows.priorities / MAX_PRIORITIES,
    )
    return np.stack([np.asarray(column, np.float64) for column in columns], axis=1)


def allowed_priorities(flows: FlowSet, asked: Ints) -> Bools:
    """Which priorities the flows in rows `asked` may have, shape (m, P): migrations wait for all others."""
    allowed: Bools = np.arange(MAX_PRIORITIES) < flows.priorities[asked][:, None]
    allowed[flows.migration[asked], 1:] = False
    return allowed


def ruled_priorities(flows: FlowSet, asked: Ints) -> Ints:
    """The priorities that the network starts from, shape (m,): those of `young-first`."""
    return priorities(flows, asked, sent_bytes=YOUNG_BYTES)
