"""Gymnasium environments over the simulator; importing this package registers them.

import gymnasium, simulator.envs
env = gymnasium.make("fabricpilot/MLFQThresholds-v1", load=0.8)
"""

from gymnasium.envs.registration import register, registry

MLFQ_THRESHOLDS = "fabricpilot/MLFQThresholds-v1"
LONG_FLOWS = "fabricpilot/LongFlows-v0"

for _name, _entry in (
    (MLFQ_THRESHOLDS, "simulator.envs.thresholds:MLFQThresholds"),
    (LONG_FLOWS, "simulator.envs.longflows:LongFlows"),
):
    if _name not in registry:
        register(id=_name, entry_point=_entry)
