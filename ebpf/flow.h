/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Flows: finds or inserts a packet's flow, adds its bytes, and says which level the packet travels on.
 *
 * - A packet's level is that of the bytes sent before it, so a flow's first packet is always at the top; with a local
 *   socket, that of the bytes written so far (backlog.h).
 * - SYN, pure ACK, FIN and RST without payload travel at the top: they are small and others wait for them.
 * - A retransmission travels on the level of its message, so that of a short one is at the top, however often it is
 *   sent again: what a local TCP socket repeats does not count once more. All of them at the top answered every
 *   spurious timeout of a starved flow with traffic ahead of everybody's (in the testbed, over twice the
 *   retransmissions and the mean of all flows up by half).
 * - Only a SYN or payload inserts. A pure ACK or RST never does, so an entry that user space has forgotten after
 *   the flow's end does not come back as a flow of unknown age.
 * - A TCP flow first seen in mid-life is of unknown size, not short: it is on the last level until its next message.
 * - A source that begins more flows than its share gets no entries beyond it, and the last level (admission.h).
 * - A SYN on an entry that has ended, or has sent something, is a new flow on the same ports: it starts afresh.
 */
#pragma once

#define FLOW_ENDED 1       /* a FIN or RST was sent */
#define FLOW_SAW_START 2   /* TCP: its SYN was seen. UDP has no start to see: always set */
#define FLOW_SAW_MESSAGE 4 /* the current message's start was seen, so its attained service is known */
#define FLOW_UNSENT 8      /* the latest packet left unsent bytes behind in the send buffer */
#define FLOW_TURN 16       /* at the top until attained_bytes reaches turn_ends_bytes */
#define FLOW_TOLD 32       /* user space was told that the current message is long (long_flow.h) */

/* Times are CLOCK_MONOTONIC. Those of local TCP sockets are exact; others are of the latest timer tick (1 to 10 ms),
 * which is read once a tick (work.h), but for the flow's first and, once it has ended, its last. */
struct flow_state {
	__u64 attained_bytes; /* payload of the current message; retransmissions only where no socket tells of them */
	__u64 packets;        /* GSO segments count one by one */
	__u64 last_data_ns;   /* latest packet with payload */
	/* With the key in front (flow_table.h) a cache line ends here. */
	__u32 next_sequence; /* TCP: behind the last byte sent */
	__u8 level;          /* of the latest packet with payload */
	__u8 flags;
	__u8 route; /* in use; 0: the kernel's choice */
	__u8 pad;
	__u64 last_seen_ns;
	__u64 rules;         /* union kept_outcome */
	__u64 verdict;       /* union verdict */
	__u32 routed_ms;     /* latest packet of a flow that has, or shall have, a route; CLOCK_MONOTONIC, wraps */
	__u32 hint_sequence; /* TCP: where the message began that a hint told of (hint.h) */
	__u64 first_seen_ns;
	__u64 message_began_ns;
	__u64 turn_ends_bytes;
	/* And another one here. */
	__u64 earlier_bytes;      /* payload of all messages before the current one */
	__u64 last_message_bytes; /* the message before the current one: size ... */
	__u64 last_message_ns;    /* ... and duration, first to last packet */
};

#include "work.h"
#include "flow_table.h"
#include "message.h"
#include "backlog.h"
#include "long_flow.h"
#include "admission.h"

static __always_inline __u32 behind(const struct packet *packet)
{
	return packet->sequence + packet->payload_bytes + !!(packet->tcp_flags & TCP_SYN);
}

/* Whether a flow first seen now begins a message: a SYN or UDP does, and so does a local sender with nothing in flight
 * (a connection that was forgotten while it was idle). */
static __always_inline __u8 first_flags(const struct packet *packet, const struct sender *sender)
{
	if (packet->tcp_flags & TCP_SYN || packet->key.protocol != IPPROTO_TCP)
		return FLOW_SAW_START | FLOW_SAW_MESSAGE;
	if (sender->known && sender->una == packet->sequence && sender->next == packet->sequence)
		return FLOW_SAW_MESSAGE;
	return 0;
}

/* A flow that begins with this packet; it enters the table when the packet has been accounted. */
static __always_inline struct flow_state *begin_flow(struct work *work)
{
	struct flow_state *fresh = &work->beginning;

	__builtin_memset(fresh, 0, sizeof(*fresh));
	fresh->flags = first_flags(&work->packet, &work->sender);
	fresh->first_seen_ns = bpf_ktime_get_ns();
	fresh->last_seen_ns = fresh->first_seen_ns;
	fresh->last_data_ns = fresh->first_seen_ns;
	fresh->message_began_ns = fresh->first_seen_ns;
	fresh->next_sequence = work->packet.sequence;
	work->fresh = FRESH;
	return fresh;
}

/* A new flow on the ports of an old one, which leaves the table. */
static __always_inline struct flow_state *restart_flow(struct work *work, const struct flow_state *old,
						       struct counters *counters)
{
	struct flow_state *flow;

	counters->flows_restarted++;
	counters->restarted_bytes += old->earlier_bytes + old->attained_bytes;
	finish_message(old, &work->done);
	leave_flow(&work->packet.key, work->hash);
	flow = begin_flow(work);
	work->fresh = RESTARTED;
	return flow;
}

/* Enters the flow that began with this packet, its first packet accounted; the table holds it from here on. */
static __always_inline struct flow_state *insert_flow(struct work *work, struct counters *counters)
{
	const struct flow_state *fresh = &work->beginning;
	struct flow_state *flow = enter_flow(work, counters);

	if (flow && reread(work->known)) {
		/* Another CPU was first: what this packet carries belongs to its entry. */
		__sync_fetch_and_add(&flow->packets, fresh->packets);
		__sync_fetch_and_add(&flow->attained_bytes, fresh->attained_bytes);
	} else if (work->fresh == FRESH) {
		counters->flows_inserted++;
		if (!(fresh->flags & FLOW_SAW_START))
			counters->flows_midlife++;
	}
	return flow;
}

static __always_inline void see_flow(const struct packet *packet, struct flow_state *flow, __u64 now_ns,
				     struct counters *counters)
{
	if (packet->tcp_flags & (TCP_FIN | TCP_RST)) {
		if (!(flow->flags & FLOW_ENDED)) {
			flow->last_seen_ns = bpf_ktime_get_ns();
			flow->flags |= FLOW_ENDED;
			if (flow->flags & FLOW_TOLD)
				tell_of(flow, packet, flow->attained_bytes, 0, 1, counters);
		}
		return;
	}
	/* What follows a FIN is an acknowledgement or a retransmission: the flow's duration stays what it was. */
	if (!(flow->flags & FLOW_ENDED) && now_ns > flow->last_seen_ns)
		flow->last_seen_ns = now_ns;
}

/* Accounts a packet of `segments` segments to its flow and gives it the level it has earned. Returns the flow (work->fresh:
 * it is to be inserted yet), or nothing if the packet has none and makes none. */
static __always_inline struct flow_state *account(struct __sk_buff *skb, struct work *work, __u32 segments,
						  const struct settings *settings, struct counters *counters)
{
	const struct packet *packet = &work->packet;
	struct sender *sender = &work->sender;
	struct flow_state *flow;
	struct hint *hint = 0;
	__u64 now_ns, silent_ns, attained_bytes;

	work->done.bytes = 0;
	work->repeated = 0;
	work->begins = 0;
	work->fresh = 0;
	work->level = 0;
	work->hash = hash_of(&packet->key);
	flow = find_flow(&packet->key, work->hash);
	ask_socket(skb, packet, sender);
	if (!flow) {
		int begins_flow = packet->payload_bytes || (packet->tcp_flags & (TCP_SYN | TCP_RST)) == TCP_SYN;

		if (!admitted(skb, work, begins_flow, settings)) {
			counters->over_share += segments;
			work->level = last_level(settings);
			return 0;
		}
		if (!begins_flow) {
			counters->flowless += segments;
			return 0;
		}
		flow = begin_flow(work);
	} else if (packet->tcp_flags & TCP_SYN) {
		if (!admitted(skb, work, 1, settings)) {
			counters->over_share += segments;
			work->level = last_level(settings);
			return 0;
		}
		if (flow->attained_bytes || flow->earlier_bytes || flow->flags & FLOW_ENDED)
			flow = restart_flow(work, flow, counters);
	}
	now_ns = reread(sender->sent_ns);
	if (!now_ns)
		now_ns = tick_ns(work);
	see_flow(packet, flow, now_ns, counters);
	__sync_fetch_and_add(&flow->packets, segments);
	if (packet->tcp_flags & TCP_SYN)
		flow->next_sequence = packet->sequence;
	if (!packet->payload_bytes)
		goto accounted;

	if (packet->key.protocol == IPPROTO_TCP && packet->fragment != LATER_FRAGMENT) {
		if ((__s32)(behind(packet) - flow->next_sequence) <= 0)
			work->repeated = 1;
		else
			flow->next_sequence = behind(packet);
	}
	silent_ns = now_ns - flow->last_data_ns;
	if ((__s64)silent_ns < 0)
		silent_ns = 0;
	if (silent_ns >= settings->quiet_ns)
		work->begins = message_begins(flow, work, silent_ns, settings, counters);
	if (settings->use_hints && sender->known) {
		hint = find_hint(skb, packet);
		if (hint && flow->hint_sequence != hint->sequence) {
			flow->hint_sequence = hint->sequence;
			work->begins = 1;
		}
	}
	if (reread(work->begins))
		begin_message(flow, now_ns, &work->done);
	flow->last_data_ns += silent_ns;
#if SEES_BACKLOG
	if (sender->known && !reread(work->repeated) &&
	    !(flow->flags & FLOW_UNSENT) != (sender->written == behind(packet)))
		flow->flags ^= FLOW_UNSENT;
#endif
	attained_bytes = flow->attained_bytes;
	work->new_bytes = packet->payload_bytes;
	if (sender->known && reread(work->repeated)) {
		/* Stands for the last byte that was sent: of the same rank as its message, and nothing more to count. */
		work->new_bytes = 1;
		attained_bytes -= !!attained_bytes;
	} else {
		__sync_fetch_and_add(&flow->attained_bytes, packet->payload_bytes);
	}
	work->level = last_level(settings);
	if (flow->flags & FLOW_SAW_MESSAGE)
		work->level = level_of(settings, rank_of(attained_bytes, flow->next_sequence, work, hint, settings));
	if (flow->level != reread(work->level)) {
		flow->level = work->level;
		tell_if_long(flow, work, attained_bytes, settings, counters);
	}
	if (flow->flags & FLOW_TURN) {
		if ((__s64)(attained_bytes - flow->turn_ends_bytes) < 0) {
			work->level = 0;
			if (reread(work->new_bytes) != packet->payload_bytes)
				flow->turn_ends_bytes -= packet->payload_bytes; /* what is sent again uses it up, too */
		} else {
			flow->flags &= ~FLOW_TURN;
		}
	}
accounted:
	if (reread(work->done.bytes))
		record_message(&work->done, counters);
	return flow;
}
