"""DCTCP on the real kernel: estimate against the RFC's model, receiver, losses, peers without ECN, registration."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import numpy as np
import pytest

from testbed.netns.enter import call_in
from testbed.netns.programs import Programs
from testbed.netns.registry import Run
from testbed.netns.star import BOTTLENECK_PORT, StarPlan
from testbed.netns.switch_port import shape
from testbed.transport import dctcp as registration
from testbed.transport.bulk import bulk_flows
from testbed.transport.dctcp import DCTCP, dctcp_registered, is_registered
from testbed.transport.marker import attach_marker
from testbed.transport.rfc8257 import CongestionEstimate, reduced_window
from testbed.transport.trace import ACK, ALPHA_ONE, INIT, REDUCTION, TRACED_DCTCP, dctcp_traced

RATE_BPS = 100_000_000
# alpha is an integer of unit 2^-20. Each update rounds by less than one unit and later ones shrink that by 15/16,
# which sums up to 16; one more for the rounding of M.
ALPHA_ERROR = 17 / ALPHA_ONE


@pytest.fixture
def star():
    run = Run.create()
    try:
        plan = StarPlan(run, 1)
        plan.build()
        yield plan, Programs(run, run.dir / "logs")
    finally:
        run.remove()


def records_of_sender(star, buffer_bytes, k_bytes, seconds):
    """What the sender's traced DCTCP wrote down while one bulk flow crossed the bottleneck, and what arrived."""
    plan, programs = star
    shape(programs, plan, RATE_BPS, buffer_bytes, None)
    with (
        dctcp_traced() as trace,
        attach_marker(plan.switch, BOTTLENECK_PORT, k_bytes, mode="real"),
        bulk_flows(plan.sender_hosts, plan.receiver, TRACED_DCTCP) as flows,
    ):
        assert flows[0].congestion_control == TRACED_DCTCP
        port = flows[0].sender.getsockname()[1]
        time.sleep(seconds)
        records, received_bytes = trace.records(), flows[0].received_bytes
    return records[records["local_port"] == port], received_bytes


def test_alpha_and_window_follow_the_rfc(star):
    records, _ = records_of_sender(star, buffer_bytes=300_000, k_bytes=15_000, seconds=1.5)
    first = int(np.flatnonzero(records["kind"] == INIT)[0])
    start = records[first]
    estimate = CongestionEstimate(window_end=int(start["snd_una"]), snd_una=int(start["snd_una"]))
    alphas, reductions, before = [], 0, start
    for record in records[first + 1 :]:
        if record["kind"] == ACK:
            ended = estimate.acknowledge(int(record["snd_una"]), bool(record["ece"]), int(record["snd_nxt"]))
            assert ended == record["window_ended"]
            assert record["alpha"] / ALPHA_ONE == pytest.approx(estimate.alpha, abs=ALPHA_ERROR)
            alphas.append(estimate.alpha)
        elif record["kind"] == REDUCTION and record["ece"] and before["kind"] == ACK and not before["reducing"]:
            window = before["cwnd_pkts"] + before["fraction"] / before["cwnd_pkts"]
            expected = reduced_window(window, record["alpha"] / ALPHA_ONE)
            reached = record["ssthresh_pkts"] + record["fraction"] / record["ssthresh_pkts"]
            if expected >= 2:
                # The fraction is cut to whole parts of the window.
                assert expected - 1.01 / record["ssthresh_pkts"] <= reached <= expected + 1e-4
                reductions += 1
        before = record
    assert records["window_ended"].sum() > 200
    assert reductions > 20
    # It settles: a reduction that does not reach what is in flight would have every ACK marked for good.
    assert records["ece"][records["kind"] == ACK][len(alphas) // 2 :].mean() < 0.6
    assert max(alphas[len(alphas) // 2 :]) - min(alphas[len(alphas) // 2 :]) > 0.01  # it did move


def test_losses_halve_the_window_and_are_repaired(star):
    records, received_bytes = records_of_sender(star, buffer_bytes=40_000, k_bytes=2**28, seconds=2.0)
    assert not records["ece"].any()
    starts = np.flatnonzero(records["kind"] == REDUCTION)
    starts = starts[(records["kind"][starts - 1] == ACK) & (records["reducing"][starts - 1] == 0)]
    # Without marks alpha decays, so alpha cannot be what halves.
    starts = starts[records["alpha"][starts] < ALPHA_ONE // 100]
    assert len(starts) >= 10
    expected = np.maximum(2, records["cwnd_pkts"][starts - 1] / 2)
    assert np.abs(records["ssthresh_pkts"][starts] - expected).max() <= 1
    assert received_bytes * 8 / 2.0 > 0.85 * RATE_BPS  # and the flow goes on


def test_marks_on_every_packet_bring_the_window_to_its_least(star):
    """Episodes that follow one another without a pause between them must go on reducing what is in flight."""
    records, received_bytes = records_of_sender(star, buffer_bytes=300_000, k_bytes=1, seconds=0.5)
    acks = records[records["kind"] == ACK]
    assert np.median((acks["snd_nxt"] - acks["snd_una"])[-100:]) <= 3 * 1448
    assert received_bytes > 1_000_000


def test_receiver_echoes_exactly_what_was_marked(star):
    """Every byte is acknowledged with ECE if and only if it came with CE, whatever ACKs were delayed."""
    plan, programs = star
    shape(programs, plan, RATE_BPS, 300_000, None)
    capture = call_in(plan.receiver.namespace, lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0x0300))
    with ExitStack() as opened:
        opened.callback(capture.close)
        capture.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)  # SO_RCVBUFFORCE: nothing may be missed
        capture.bind(("eth0", 0x0003))
        opened.enter_context(dctcp_registered())
        opened.enter_context(attach_marker(plan.switch, BOTTLENECK_PORT, 15_000, mode="real"))
        with bulk_flows(plan.sender_hosts, plan.receiver, DCTCP):
            time.sleep(0.6)
        capture.setblocking(False)
        frames = []
        while True:
            try:
                frames.append(capture.recv(128))
            except BlockingIOError:
                break
        statistics = capture.getsockopt(263, 6, 8)  # SOL_PACKET, PACKET_STATISTICS: received, dropped
        assert int.from_bytes(statistics[4:], sys.byteorder) == 0
    right, wrong, marked = compare_echo(frames, socket.inet_aton(plan.receiver.address))
    assert right > 2_000_000
    assert 0.02 < marked / (right + wrong) < 0.98
    # Not zero: a hardened kernel may pass the program over for a packet.
    assert wrong / (right + wrong) < 0.01


def compare_echo(frames, receiver):
    """Bytes acknowledged with the right ECE, with the wrong one, and bytes marked."""
    ce_from = {}  # first byte of a segment: (behind its last byte, CE)
    right = wrong = marked = 0
    acknowledged = None
    for frame in frames:
        if frame[12:14] != b"\x08\x00" or frame[23] != 6:
            continue
        header = 14 + 4 * (frame[14] & 15)
        total = int.from_bytes(frame[16:18], "big") - 4 * (frame[14] & 15)
        sequence, ack = (int.from_bytes(frame[header + at : header + at + 4], "big") for at in (4, 8))
        length, flags = total - 4 * (frame[header + 12] >> 4), frame[header + 13]
        if flags & 0x06:  # SYN, RST
            continue
        if frame[30:34] == receiver:
            if length:
                ce_from[sequence] = ((sequence + length) % 2**32, frame[15] & 3 == 3)
                acknowledged = sequence if acknowledged is None else acknowledged
            continue
        while acknowledged in ce_from and 0 < (ack - acknowledged) % 2**32 < 2**31:
            end, ce = ce_from[acknowledged]
            length = (end - acknowledged) % 2**32
            if ce == bool(flags & 0x40):
                right += length
            else:
                wrong += length
            marked += length * ce
            acknowledged = end
    return right, wrong, marked


@pytest.mark.parametrize(("server", "agreed"), [(DCTCP, DCTCP), ("cubic", "reno")])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_peer_without_ecn_gets_reno_and_no_ect(make_netns, family, server, agreed):
    namespace = make_netns()
    subprocess.run(["nsenter", f"--net=/run/netns/{namespace}", "ip", "link", "set", "lo", "up"], check=True)

    def sockets():
        loopback = "127.0.0.1" if family == socket.AF_INET else "::1"
        listener, client = socket.create_server((loopback, 0), family=family), socket.socket(family)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, server.encode())
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, DCTCP.encode())
        client.connect(listener.getsockname())
        return client, listener.accept()[0], listener

    with dctcp_registered(), ExitStack() as opened:
        client, accepted, _ = (opened.enter_context(s) for s in call_in(namespace, sockets))
        used = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).split(b"\0")[0].decode()
        assert used == agreed
        with attach_marker(namespace, "lo", k_bytes=1, rate_bps=8e3, mode="virtual") as marker:
            for _ in range(20):
                client.sendall(b"x" * 1000)
                accepted.recv(1000)
            seen = marker.stats()
    assert seen.packets >= 20
    assert seen.marked > 0 if agreed == DCTCP else seen.marked == 0 < seen.not_capable


def test_registration_is_shared_and_the_last_leaves_nothing():
    assert not is_registered()
    with dctcp_registered() as outer:
        assert outer == DCTCP
        with dctcp_registered():
            assert is_registered()
        assert is_registered()
    assert not is_registered()


def test_an_error_unregisters():
    with pytest.raises(ZeroDivisionError), dctcp_registered():
        raise ZeroDivisionError
    assert not is_registered()


def test_kept_registration_outlives_its_users():
    registration.keep()
    try:
        with dctcp_registered():
            pass
        assert is_registered()
        with dctcp_registered():
            assert not registration.forget()  # in use: the user will remove it
            assert is_registered()
        assert not is_registered()
    finally:
        registration.forget()


def test_a_killed_user_is_cleaned_up_after():
    code = (
        "import time\nfrom testbed.transport import dctcp_registered\n"
        "with dctcp_registered():\n    print('in', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"in\n"
        os.kill(process.pid, signal.SIGKILL)
    assert is_registered()
    with dctcp_registered():
        pass
    assert not is_registered()


def test_many_users_at_once():
    failures = []

    def use():
        try:
            for _ in range(3):
                with dctcp_registered():
                    assert is_registered()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert not is_registered()
