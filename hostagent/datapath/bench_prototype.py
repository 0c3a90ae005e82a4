"""The least that counts and tags: a baseline for the data path's cost per packet on whatever machine (bench.py).

TCP over IPv4 without VLAN tag, one lookup by 5-tuple in an LRU table, bytes, packets, the clock, seven thresholds, the
DSCP. No messages, no sockets, no rules, no counters, no word of what it left alone; and it writes into the packet
directly, which may drop one (ebpf/mark.h). What people write first, so its cost says how much all the rest takes.
"""

from typing import Any, Final

_SOURCE: Final = """
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>

struct key {
	__be32 source, destination;
	__be16 ports[2];
	__u32 protocol;
};
struct state {
	__u64 bytes, packets, seen_ns;
};
BPF_TABLE("lru_hash", struct key, struct state, seen, 1 << 20);

int prototype(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + ETH_HLEN;
	struct tcphdr *tcp = (void *)(ip + 1);
	struct key key = {};
	struct state fresh = {}, *state;
	__u32 sum, level = 0, before;
	int i;

	if ((void *)(tcp + 1) > end || ((struct ethhdr *)data)->h_proto != bpf_htons(ETH_P_IP))
		return TC_ACT_UNSPEC;
	if (ip->protocol != IPPROTO_TCP || ip->ihl != 5)
		return TC_ACT_UNSPEC;
	key.source = ip->saddr;
	key.destination = ip->daddr;
	key.ports[0] = tcp->source;
	key.ports[1] = tcp->dest;
	key.protocol = ip->protocol;
	state = seen.lookup(&key);
	if (!state) {
		seen.update(&key, &fresh);
		return TC_ACT_UNSPEC;
	}
#pragma unroll
	for (i = 0; i < 7; i++)
		level += state->bytes >= 10000ULL << 2 * i;
	__sync_fetch_and_add(&state->bytes, skb->len);
	__sync_fetch_and_add(&state->packets, 1);
	state->seen_ns = CLOCK();
	skb->priority = level;
	before = *(__u16 *)ip;
	ip->tos = (7 - level) << 5 | (ip->tos & 3);
	sum = (__u16)~ip->check + (__u16)~before + *(__u16 *)ip; /* RFC 1624 */
	sum = (sum & 0xffff) + (sum >> 16);
	ip->check = ~((sum & 0xffff) + (sum >> 16));
	return TC_ACT_UNSPEC;
}
"""


class Prototypes:
    """Both variants, loaded, as file descriptors by name; give them back with `close`.

    "prototype" reads the exact clock, "prototype_coarse" that of the latest timer tick.

    Raises:
        KernelError: they could not be compiled or loaded.
    """

    def __init__(self) -> None:
        from hostagent.datapath.ebpf_loader import compiled_text

        self._modules: list[Any] = []  # programs and maps are theirs
        self.programs: dict[str, int] = {}
        for name, clock in _CLOCKS.items():
            bcc, module = compiled_text(f"#define CLOCK {clock}\n{_SOURCE}")
            self._modules.append(module)
            self.programs[name] = module.load_func(b"prototype", bcc.BPF.SCHED_CLS).fd

    def close(self) -> None:
        """Let go of programs and maps."""
        for module in self._modules:
            module.cleanup()


_CLOCKS: Final = {"prototype": "bpf_ktime_get_ns", "prototype_coarse": "bpf_ktime_get_coarse_ns"}
