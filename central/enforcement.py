"""Who is told what: policies with rising epochs, to the hosts whose thresholds change.

What the guard wants is compared with what hosts were sent, and only differences go out. Hosts on trial get an epoch of
their own; when the trial ends, the whole group gets a new epoch with the thresholds it is to have, which is above all
that any host has. An epoch says when it was made (Unix milliseconds), and is above all that hosts report, so those of a
restarted central are, too.
"""

import logging
import time
from collections.abc import Iterable
from dataclasses import replace

from central.guard.keeper import Wanted
from central.link import CentralLink
from central.policy.base import GroupSummary
from central.registry import Host, InForce, OnTrial, Registry
from central.threshold_log import ThresholdLog
from fabricpilot.levels import Thresholds
from fabricpilot.wire import Ack, Policy

log = logging.getLogger(__name__)

REPEAT_S = 5.0  # how often a host is sent its policy again
_MS_PER_DAY = 86_400_000


class Enforcement:
    """Sends policies.

    Args:
        registry: of the hosts; what is in force is written there.
        link: to them.
        changes: where changes are recorded.
        expiry_s: of policies.
        follows_long_flows: hosts are to tell at once of flows that become long.
    """

    def __init__(
        self,
        registry: Registry,
        link: CentralLink,
        changes: ThresholdLog,
        expiry_s: float,
        follows_long_flows: bool = False,
    ) -> None:
        self.epoch = 0  # the last one given out
        self._registry = registry
        self._link = link
        self._changes = changes
        self._expiry_s = expiry_s
        self._follows_long_flows = follows_long_flows
        self._repeat_s = min(REPEAT_S, expiry_s / 3)

    def follow(self, summary: GroupSummary, wanted: Wanted, now_s: float) -> None:
        """Send the hosts of a group and K what they are to have and were not sent yet."""
        group, levels = self._registry.groups[summary.group], summary.levels
        members = self._registry.members(summary.group, levels)
        on_trial, in_force = group.on_trial.get(levels), group.in_force.get(levels)
        ended = on_trial is not None and (on_trial.hosts, on_trial.policy.thresholds) != (
            wanted.hosts,
            wanted.challenger,
        )
        if in_force is None or in_force.thresholds != wanted.incumbent or ended:
            group.on_trial.pop(levels, None)
            group.in_force[levels] = self._new(summary, wanted.incumbent, wanted.reason, members)
            self.tell(members, now_s)
        if wanted.challenger is not None and levels not in group.on_trial:
            chosen = [host for host in members if host.name in wanted.hosts]
            policy = self._new(summary, wanted.challenger, wanted.reason, chosen)
            group.on_trial[levels] = OnTrial(policy, wanted.hosts)
            self.tell(chosen, now_s)

    def tell(self, hosts: Iterable[Host], now_s: float) -> None:
        """Send each host what it is to have, or that central is there."""
        by_policy: dict[int, tuple[InForce | None, list[bytes]]] = {}
        for host in hosts:
            policy = self._above(host)
            by_policy.setdefault(policy.epoch if policy else 0, (policy, []))[1].append(host.peer)
            host.told_s = now_s
        for policy, peers in by_policy.values():
            self._link.send(peers, self._message(policy))

    def repeat(self, host: Host, now_s: float) -> None:
        """Tell a host again if it was told too long ago: repairs what was lost, and shows that central lives."""
        if now_s - host.told_s >= self._repeat_s:
            self.tell([host], now_s)

    def _above(self, host: Host) -> InForce | None:
        """What a host is to have, in an epoch that it does not ignore.

        A host that comes from another group, or from a central that was told otherwise, may hold a higher one. It gets
        an epoch of its own then, so that hosts which claim high epochs disturb nobody else.
        """
        policy = self._registry.policy_of(host)
        shared = self._registry.shared_policy_of(host)
        now_ms = int(time.time() * 1000)
        if policy is None or shared is None or host.epoch >= now_ms + _MS_PER_DAY:
            return policy
        another = host.hello.epoch == policy.epoch and tuple(host.hello.thresholds) != policy.thresholds.bytes
        if host.epoch <= policy.epoch and not another:
            return policy
        self.epoch = next_epoch(self.epoch, [host.epoch], now_ms)
        own = replace(policy, epoch=self.epoch)
        host.reissued = (shared.epoch, own)
        return own

    def _message(self, policy: InForce | None) -> Policy | Ack:
        if policy is None:
            return Ack(epoch=0, follows_long_flows=self._follows_long_flows)
        return Policy(
            epoch=policy.epoch,
            thresholds=list(policy.thresholds.bytes),
            expiry_s=self._expiry_s,
            reason=policy.reason[:256],
            follows_long_flows=self._follows_long_flows,
        )

    def _new(self, summary: GroupSummary, thresholds: Thresholds, reason: str, hosts: list[Host]) -> InForce:
        reported = (host.epoch for host in self._registry.hosts.values())
        self.epoch = next_epoch(self.epoch, reported, int(time.time() * 1000))
        policy = InForce(thresholds, self.epoch, reason, time.time())
        log.info(
            "group %s, K = %d: thresholds %s to %d host(s), epoch %d (%s)",
            summary.group,
            summary.levels,
            list(thresholds.bytes),
            len(hosts),
            policy.epoch,
            reason,
        )
        self._changes.write(summary, policy, len(hosts))
        return policy


def next_epoch(last: int, reported: Iterable[int], now_ms: int) -> int:
    """The epoch of a new policy: Unix milliseconds, but always above what was given out or reported before.

    A reported epoch more than a day ahead of the clock is no epoch of ours and is not followed, so that no host can
    drive the count to its end.
    """
    ours = (epoch for epoch in reported if epoch < now_ms + _MS_PER_DAY)
    return max(now_ms, last + 1, max(ours, default=0) + 1)
