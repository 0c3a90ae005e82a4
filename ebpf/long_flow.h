/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Long flows: tells user space at once that a flow has become long, so that central can choose its level and route, and
 * that it has ended, so that the others can take its place.
 *
 * A flow is told of once per message, when it first reaches the last level by itself: by bytes sent, or as soon as the
 * application has written so much. Nothing happens on the way of any other packet. Flows of unknown size (first seen in
 * mid-life) and those a rule excludes are not told of; reports have them once they have sent enough. A ring that
 * nobody reads fills up: what finds no room is counted, and waits for the next report.
 */
#pragma once

/* hostagent/datapath/layout.py has the same struct. */
struct long_flow {
	struct flow_key key;
	__u64 at_ns; /* CLOCK_MONOTONIC */
	__u64 message_began_ns;
	__u64 attained_bytes; /* of the current message, before this packet */
	__u64 backlog_bytes;  /* waiting: what this packet adds, and what is written and not sent yet; 0: not known */
	__u64 ended;          /* 0: it has become long; 1: it was, and has ended */
};

/* One struct long_flow after another, 2,900 of them. Never handed on to another version: it is read within a moment. */
BPF_RINGBUF_OUTPUT(became_long, 64);

static __always_inline void tell_of(const struct flow_state *flow, const struct packet *packet, __u64 attained_bytes,
				    __u64 backlog_bytes, __u64 ended, struct counters *counters)
{
	struct long_flow *told = became_long.ringbuf_reserve(sizeof(*told));

	if (!told) {
		counters->long_untold++;
		return;
	}
	told->key = packet->key;
	told->at_ns = bpf_ktime_get_ns();
	told->message_began_ns = flow->message_began_ns;
	told->attained_bytes = attained_bytes;
	told->backlog_bytes = backlog_bytes;
	told->ended = ended;
	became_long.ringbuf_submit(told, 0);
}

/* The level in `work`, which differs from the packet's before, is what bytes sent, written or announced come to. */
static __always_inline void tell_if_long(struct flow_state *flow, const struct work *work, __u64 attained_bytes,
					 const struct settings *settings, struct counters *counters)
{
	const struct packet *packet = &work->packet;
	__s32 waiting = waiting_bytes(flow->next_sequence, work);

	if (work->level != last_level(settings) || (flow->flags & (FLOW_SAW_MESSAGE | FLOW_TOLD)) != FLOW_SAW_MESSAGE ||
	    is_excluded(flow))
		return;
	flow->flags |= FLOW_TOLD;
	tell_of(flow, packet, attained_bytes, waiting > 0 ? waiting : 0, 0, counters);
}
