"""Central and an agent on every sender, as an operator would run them, inside the star.

Keys are made by `fabricpilot central keys`; central runs in the controller's namespace, each agent in its host's, and
they meet on the management network. Everything lies in the run's directory: configuration, keys, control sockets,
and a bpffs of its own (below /sys/fs/bpf it would belong to the machine). Logs go to the results.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from fabricpilot.control import ask
from fabricpilot.errors import FabricpilotError, KernelError
from fabricpilot.levels import DEFAULT_LEVELS, Thresholds
from testbed.capture.oracle import InForce
from testbed.netns.programs import Program, Programs
from testbed.netns.star import DATA_PORT, Host, StarPlan

CENTRAL_PORT = 5555
_START_S = 90.0  # four loaders at once on a busy machine take most of a minute
_FABRICPILOT = (sys.executable, "-c", "from fabricpilot.cli import main; main()")  # this one, whatever is installed
# The agent logs right after the kernel has the new thresholds; before that it waits for packets in flight.
_APPLY_NS = 100_000_000


@dataclass(frozen=True)
class Usage:
    """What one daemon has cost."""

    name: str
    cpu_s: float
    rss_bytes: int


@dataclass(frozen=True)
class Role:
    """What sets a host apart: its group, and the thresholds it begins with (None: the defaults)."""

    group: str
    thresholds: Thresholds | None


@dataclass
class Daemons:
    """Central and the agents of one run.

    Attributes:
        star: where they run.
        programs: starts them.
        rate_bps: rate of the bottleneck; central is told that the senders share it.
        decision_s: how often central decides.
        mode: of the agents' data path, as `datapath.mode`.
        scheme: how central chooses thresholds, as `policy.scheme`.
        levels: K.
        thresholds: what agents begin with and central keeps to; None: the defaults, and what the scheme has.
        hints: applications in the hosts' cgroups may say how large their messages are.
        roles: of hosts by name, where they differ; `thresholds` is for the others.
        policy: more of central's `[policy]`.
        long_flows: central's `[long_flows]`.
        report_s: how often agents report.
        alone: there is no central, agents keep what they begin with.
    """

    star: StarPlan
    programs: Programs
    rate_bps: int
    decision_s: float
    mode: str = "attained"
    scheme: str = "optimiser"
    levels: int = DEFAULT_LEVELS
    thresholds: Thresholds | None = None
    hints: bool = False
    roles: Mapping[str, Role] = field(default_factory=dict)
    policy: Mapping[str, Any] = field(default_factory=dict)
    long_flows: Mapping[str, Any] = field(default_factory=dict)
    report_s: float = 1.0
    alone: bool = False
    central: Program | None = None
    agents: dict[str, Program] = field(default_factory=dict)

    @property
    def dir(self) -> Path:
        """Where keys, configuration and sockets lie."""
        return self.star.run.dir

    @property
    def threshold_log(self) -> Path:
        """Central's record of every change of thresholds."""
        return self.programs.log_dir / "thresholds.jsonl"

    def start(self) -> None:
        """Start everything and wait until every agent tags packets and, unless alone, talks to central.

        Raises:
            FabricpilotError: something did not start; names its log.
        """
        hosts = self.star.sender_hosts
        bpffs = self.dir / "bpf"
        bpffs.mkdir(exist_ok=True)
        if not bpffs.is_mount():  # an earlier scheme of this run has left it
            mount = ["mount", "-t", "bpf", "bpf", str(bpffs)]
            mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
            if mounted.returncode:
                reason = mounted.stderr.strip()
                raise KernelError(f"cannot mount a bpffs on {bpffs}: {reason} (needs CONFIG_BPF_SYSCALL)")
        self.programs.log_dir.mkdir(parents=True, exist_ok=True)
        self.threshold_log.unlink(missing_ok=True)
        if not self.alone:
            named = [argument for host in hosts for argument in ("--host", host.name)]
            self._call(self.star.controller, ["central", "keys", "--force", "--out", str(self.dir / "keys"), *named])
            self.start_central()
            self._await(self.central, "central.sock", lambda told: True)
        for host in hosts:
            self.start_agent(host)
        for host in hosts:
            self._await(
                self.agents[host.name],
                f"{host.name}/agent.sock",
                lambda told: self.alone or told["link"]["connected"],
            )

    def start_central(self) -> None:
        """Start central, again if it was ended."""
        keys = self.dir / "keys"
        config = self._write(
            "central.toml",
            central={"run_dir": str(self.dir), "threshold_log": str(self.threshold_log)},
            link={
                "listen": f"tcp://{self.star.controller_address}:{CENTRAL_PORT}",
                "key": str(keys / "central.key_secret"),
                "authorized_keys": str(keys / "hosts"),
            },
            policy={
                "scheme": self.scheme,
                "thresholds": _listed(self.thresholds),
                "interval_s": self.decision_s,
                "shared_rate": f"{self.rate_bps}bit",
                **self.policy,
            },
            long_flows=self.long_flows,
        )
        self.central = self._daemon("central", self.star.controller, ["central", "run", "--config", str(config)])

    def start_agent(self, host: Host) -> None:
        """Start one host's agent, again if it was ended."""
        config = self.agent_config(host)
        self.agents[host.name] = self._daemon(
            f"agent-{host.name}", host.namespace, ["agent", "run", "--config", str(config)]
        )

    def agent_config(self, host: Host) -> Path:
        """Write one agent's configuration; returns the file."""
        keys = self.dir / "keys"
        link = {
            "endpoint": f"tcp://{self.star.controller_address}:{CENTRAL_PORT}",
            "key": str(keys / "hosts" / f"{host.name}.key_secret"),
            "central_key": str(keys / "central.key"),
        }
        role = self.roles.get(host.name, Role("default", self.thresholds))
        return self._write(
            f"agent-{host.name}.toml",
            host={
                "interfaces": [DATA_PORT],
                "name": host.name,
                "group": role.group,
                "report_interval_s": self.report_s,
                "run_dir": str(self.dir / host.name),
            },
            datapath={
                "pin_dir": str(self.dir / "bpf" / host.name),
                "mode": self.mode,
                "levels": self.levels,
                "thresholds": _listed(role.thresholds),
                "hint_cgroups": [self.star.run.make_cgroup(host.name)] if self.hints else [],
                # One connection carries one message here, as the ground truth has it, however its sender pauses.
                "message_gap_us": 60_000_000,
            },
            link={} if self.alone else link,
        )

    def agent_status(self, host: Host) -> dict[str, Any]:
        """What the agent says of itself."""
        return ask(self.dir / host.name / "agent.sock", "status")

    def central_status(self) -> dict[str, Any]:
        """What central says of itself."""
        return ask(self.dir / "central.sock", "status")

    def usage(self) -> list[Usage]:
        """CPU time and memory of every daemon that runs."""
        running = [p for p in (self.central, *self.agents.values()) if p is not None and p.alive]
        return [_usage(program) for program in running]

    def stop(self) -> None:
        """End the daemons and take the data path out of the hosts, as an operator would."""
        for program in (*self.agents.values(), self.central):
            if program is not None:
                program.stop()
        for host in self.star.sender_hosts:
            if host.name in self.agents:
                self._call(host.namespace, ["agent", "detach", "--config", str(self.dir / f"agent-{host.name}.toml")])
        self.agents.clear()
        self.central = None

    def history(self, host: Host) -> list[InForce]:
        """Which thresholds this host had when, from its agent's log."""
        log = self.programs.log_dir / f"agent-{host.name}.log"
        return read_history(log.read_text(errors="replace").splitlines())

    def _daemon(self, name: str, namespace: str, arguments: Sequence[str]) -> Program:
        return self.programs.start(name, namespace, [*_FABRICPILOT, *arguments])

    def _call(self, namespace: str, arguments: Sequence[str]) -> None:
        self.programs.run_in(namespace, [*_FABRICPILOT, *arguments])

    def _write(self, name: str, **tables: Mapping[str, Any]) -> Path:
        path = self.dir / name
        path.write_text("".join(_toml(table, values) for table, values in tables.items()))
        return path

    def _await(self, program: Program | None, socket: str, good: Any) -> None:
        """Wait until the daemon answers at its control socket and `good` says it is ready."""
        assert program is not None
        until = time.monotonic() + _START_S
        while time.monotonic() < until:
            if not program.alive:
                said = program.log.read_text(errors="replace").strip().splitlines()
                lacking = program.popen.returncode == KernelError.exit_code
                kind = KernelError if lacking else FabricpilotError
                raise kind(f"{program.name} ended: {said[-1] if said else 'it said nothing'}")
            try:
                if good(ask(self.dir / socket, "status")):
                    return
            except FabricpilotError:
                pass
            time.sleep(0.1)
        raise FabricpilotError(f"{program.name} is not ready after {_START_S:g} s; see {program.log}")


@contextmanager
def running(daemons: Daemons) -> Iterator[Daemons]:
    """These daemons while the context lasts.

    Raises:
        FabricpilotError: one does not start, or cannot be taken away.
    """
    try:
        daemons.start()
        yield daemons
    except BaseException:
        with suppress(FabricpilotError):  # the first failure is the one to tell
            daemons.stop()
        raise
    daemons.stop()


_LOG_TIME = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) .*thresholds (\[[\d, ]+\])")


def read_history(log_lines: Sequence[str]) -> list[InForce]:
    """Thresholds over time from an agent's log: when attached or adopted, and after each policy."""
    history: list[InForce] = []
    for line in log_lines:
        found = _LOG_TIME.match(line)
        if found:
            second = int(datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S").astimezone().timestamp())
            logged_ns = (second * 1000 + int(found[2]) + 1) * 1_000_000
            history.append(InForce(logged_ns - _APPLY_NS, logged_ns, Thresholds.of(json.loads(found[3]))))
    return history


def _listed(thresholds: Thresholds | None) -> list[int]:
    return list(thresholds.bytes) if thresholds is not None else []


def _toml(table: str, values: Mapping[str, Any]) -> str:
    # A JSON string, number or list of strings is the same in TOML.
    return f"[{table}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())


def _usage(program: Program) -> Usage:
    fields = Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()
    cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return Usage(program.name, cpu_s, int(fields[21]) * os.sysconf("SC_PAGE_SIZE"))
