"""The K strict bands on a NIC: plan them, install them, find them again, take them away.

`plan_queues` looks at kernel and NIC and changes nothing; `QueuePlan` says what, why, the `skb->priority` of each level
and the tc commands; `install`, `installed` and `restore` act on it.
"""

from hostagent.qdisc.install import install, installed, plan_queues, restore, restore_preview
from hostagent.qdisc.plan import QueuePlan, make_plan
from hostagent.qdisc.support import supported_kinds

__all__ = [
    "QueuePlan",
    "install",
    "installed",
    "make_plan",
    "plan_queues",
    "restore",
    "restore_preview",
    "supported_kinds",
]
