"""The sender of RFC 8257 as the RFC writes it, in real numbers: what the kernel's integers are held against.

Written from section 3.3 of the RFC, independently of `ebpf/transport/dctcp.bpf.c`. Sequence numbers are 32 bits and
wrap.
"""

from dataclasses import dataclass

GAIN = 1 / 16  # DCTCP.g


def after(a: int, b: int) -> bool:
    """Whether sequence number `a` is later than `b` (modulo 2^32)."""
    return 0 < (a - b) % 2**32 < 2**31


@dataclass
class CongestionEstimate:
    """DCTCP.Alpha and the observation window it is updated by.

    Attributes:
        window_end: DCTCP.WindowEnd; begins as SND.UNA.
        snd_una: SND.UNA before the next ACK.
    """

    window_end: int
    snd_una: int
    gain: float = GAIN
    alpha: float = 1.0
    bytes_acked: int = 0
    bytes_marked: int = 0

    def acknowledge(self, ack: int, ece: bool, snd_nxt: int) -> bool:
        """Process one acceptable ACK, steps 1 to 8 of section 3.3; returns whether an observation window ended."""
        acked = (ack - self.snd_una) % 2**32  # 1
        self.snd_una = ack
        self.bytes_acked += acked  # 2
        if ece:  # 3
            self.bytes_marked += acked
        if not after(ack, self.window_end):  # 4
            return False
        marked_fraction = self.bytes_marked / self.bytes_acked  # 5, M
        self.alpha = self.alpha * (1 - self.gain) + self.gain * marked_fraction  # 6
        self.window_end = snd_nxt  # 7
        self.bytes_acked = self.bytes_marked = 0  # 8
        return True


def reduced_window(cwnd: float, alpha: float) -> float:
    """The congestion window after ECN congestion (section 3.3, step 9): cwnd * (1 - alpha / 2), in cwnd's unit."""
    return cwnd * (1 - alpha / 2)
