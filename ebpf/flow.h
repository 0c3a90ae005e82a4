/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Flows: finds or inserts a packet's flow, adds its bytes, and says which level the packet travels on.
 *
 * - A packet's level is that of the bytes sent before it, so a flow's first packet is always at the top.
 * - SYN, pure ACK, FIN and RST without payload travel at the top: they are small and others wait for them.
 * - Only a SYN or payload inserts. A pure ACK or RST never does, so an entry that user space has forgotten after
 *   the flow's end does not come back as a flow of unknown age.
 * - A TCP flow first seen in mid-life is of unknown size, not short: it stays on the last level.
 * - A SYN on an entry that has ended, or has sent something, is a new flow on the same ports: it starts afresh.
 */
#pragma once

#define FLOW_ENDED 1     /* a FIN or RST was sent */
#define FLOW_SAW_START 2 /* TCP: its SYN was seen. UDP has no start to see: always set */

/* Times are CLOCK_MONOTONIC. The first is exact, and so is the last once the flow has ended; until then the last is
 * that of the latest timer tick (1 to 10 ms), which costs a third of an exact reading. */
struct flow_state {
	__u64 attained_bytes; /* payload sent, retransmissions included */
	__u64 packets;        /* GSO segments count one by one */
	__u64 first_seen_ns;
	__u64 last_seen_ns;
	__u8 level; /* of the latest packet with payload */
	__u8 flags;
	__u8 route;       /* in use; 0: the kernel's choice */
	__u8 pad;
	__u32 routed_ms;  /* latest packet of a flow that has, or shall have, a route; CLOCK_MONOTONIC, wraps */
	__u64 rules;      /* union kept_outcome */
	__u64 verdict;    /* union verdict */
};

/* Key: 5-tuple. Value: what its flow has sent so far. The least recently used entry makes room for a new one. */
BPF_TABLE("lru_hash", struct flow_key, struct flow_state, flows, FLOW_ENTRIES);

static __always_inline struct flow_state *insert_flow(const struct packet *packet, struct counters *counters)
{
	struct flow_state fresh = {};

	if (packet->tcp_flags & TCP_SYN || packet->key.protocol != IPPROTO_TCP)
		fresh.flags = FLOW_SAW_START;
	fresh.first_seen_ns = bpf_ktime_get_ns();
	fresh.last_seen_ns = fresh.first_seen_ns;
	if (flows.insert((struct flow_key *)&packet->key, &fresh) == 0) {
		counters->flows_inserted++;
		if (!fresh.flags)
			counters->flows_midlife++;
	}
	/* Another CPU may have been first: whoever inserted it, this is the entry. */
	return flows.lookup((struct flow_key *)&packet->key);
}

/* Replaces the whole entry at once, so that user space never reads half of the old flow and half of the new. */
static __always_inline struct flow_state *restart_flow(const struct packet *packet, struct flow_state *old,
						       struct counters *counters)
{
	struct flow_state fresh = {.flags = FLOW_SAW_START};

	counters->flows_restarted++;
	counters->restarted_bytes += old->attained_bytes;
	fresh.first_seen_ns = bpf_ktime_get_ns();
	fresh.last_seen_ns = fresh.first_seen_ns;
	flows.update((struct flow_key *)&packet->key, &fresh);
	return flows.lookup((struct flow_key *)&packet->key);
}

static __always_inline void see_flow(const struct packet *packet, struct flow_state *flow)
{
	__u64 now_ns;

	if (packet->tcp_flags & (TCP_FIN | TCP_RST)) {
		if (!(flow->flags & FLOW_ENDED)) {
			flow->last_seen_ns = bpf_ktime_get_ns();
			flow->flags |= FLOW_ENDED;
		}
		return;
	}
	/* What follows a FIN is an acknowledgement or a retransmission: the flow's duration stays what it was. */
	if (flow->flags & FLOW_ENDED)
		return;
	now_ns = bpf_ktime_get_coarse_ns();
	if (now_ns > flow->last_seen_ns)
		flow->last_seen_ns = now_ns;
}

/* Accounts a packet of `segments` segments to its flow, left in `entry` (nothing: it has none); returns the level that
 * the packet has earned. */
static __always_inline __u8 account(const struct packet *packet, __u32 segments, const struct settings *settings,
				    struct counters *counters, struct flow_state **entry)
{
	struct flow_state *flow = flows.lookup((struct flow_key *)&packet->key);
	__u64 attained_bytes;
	__u8 level;

	if (!flow) {
		if (!packet->payload_bytes && (!(packet->tcp_flags & TCP_SYN) || packet->tcp_flags & TCP_RST))
			return 0;
		flow = insert_flow(packet, counters);
		if (!flow) {
			counters->insert_failed++;
			return packet->payload_bytes ? last_level(settings) : 0;
		}
	} else if (packet->tcp_flags & TCP_SYN && (flow->attained_bytes || flow->flags & FLOW_ENDED)) {
		flow = restart_flow(packet, flow, counters);
		if (!flow) {
			counters->insert_failed++;
			return 0;
		}
	}
	*entry = flow;
	see_flow(packet, flow);
	__sync_fetch_and_add(&flow->packets, segments);
	if (!packet->payload_bytes)
		return 0;

	attained_bytes = flow->attained_bytes;
	__sync_fetch_and_add(&flow->attained_bytes, packet->payload_bytes);
	level = flow->flags & FLOW_SAW_START ? level_of(settings, attained_bytes) : last_level(settings);
	if (flow->level != level)
		flow->level = level;
	return level;
}
