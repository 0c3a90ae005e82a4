/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Messages: a flow that falls silent with nothing left to send has finished one; what follows is the next, and
 * starts at the top. And turns: a flow that falls silent with data waiting is starved, and gets a bounded turn there.
 *
 *   silence   since the flow's latest packet with payload, so acknowledgements of the other side's data do not count
 *   nothing left to send   local TCP socket: all that was sent is acknowledged, and nothing unsent was left behind
 *                          none (UDP, forwarded): cannot be known, so only a longer silence counts
 *
 * Finished messages go into two histograms; the bins are those of fabricpilot/histogram.py, so that they add up with
 * what user space makes of finished flows.
 */
#pragma once

#define HISTOGRAM_BINS 384 /* eight per octave, up to 2^48 */
#define MAX_HISTOGRAM_VALUE ((1ULL << 46) - 1) /* 70 TB, two years: more counts as this */
#define NS_PER_US 1000

struct finished_messages {
	__u64 sizes[HISTOGRAM_BINS];     /* bytes */
	__u64 durations[HISTOGRAM_BINS]; /* microseconds from the first packet to the last */
};

/* Key: 0. Value: messages of one CPU that were followed by another; user space adds them up. */
BPF_PERCPU_ARRAY(finished, struct finished_messages, 1);

/* 1 if value > limit, else 0; both below 2^63. Without a branch: the verifier would walk every one of the bins. */
static __always_inline __u64 exceeds(__u64 value, __u64 limit)
{
	__u64 difference = limit - value;

	asm volatile("%0 >>= 63" : "+r"(difference));
	return difference;
}

/* floor(8 log2(value)), at most the last bin; values below 1 count as 1. */
static __always_inline __u32 histogram_bin(__u64 value)
{
	/* 2^(i/8) in units of 2^-16, rounded up: what the mantissa has to reach for the i-th part of an octave. */
	const __u32 parts[7] = {71468, 77936, 84990, 92682, 101071, 110218, 120195};
	__u64 octave = 0, step;
	int i;

	if (value > MAX_HISTOGRAM_VALUE)
		value = MAX_HISTOGRAM_VALUE;
	value += exceeds(1, value);
	value <<= 16; /* room for the mantissa of small values */
#pragma unroll
	for (i = 32; i; i /= 2) {
		step = exceeds(value, (1ULL << (i + 16)) - 1) * i;
		value >>= step;
		octave += step;
	}
	octave *= 8;
#pragma unroll
	for (i = 0; i < 7; i++)
		octave += exceeds(value, parts[i] - 1);
	return octave;
}

static __always_inline int is_excluded(const struct flow_state *flow); /* rules.h */

/* The message that a flow has sent up to now. One whose start was not seen has no size to tell, and flows that a rule
 * excludes are not told of. */
static __always_inline void finish_message(const struct flow_state *flow, struct finished_message *done)
{
	if (flow->flags & FLOW_SAW_MESSAGE && !is_excluded(flow)) {
		done->bytes = flow->attained_bytes;
		done->duration_ns = flow->last_data_ns - flow->message_began_ns;
		if ((__s64)done->duration_ns < 0)
			done->duration_ns = 0;
	}
}

/* One place for it in the whole program: it is long. */
static __always_inline void record_message(const struct finished_message *done, struct counters *counters)
{
	__u32 zero = 0, bin;
	struct finished_messages *messages = finished.lookup(&zero);

	if (!messages)
		return;
	counters->messages_finished++;
	bin = histogram_bin(done->bytes);
	if (bin < HISTOGRAM_BINS)
		messages->sizes[bin]++;
	bin = histogram_bin(done->duration_ns / NS_PER_US);
	if (bin < HISTOGRAM_BINS)
		messages->durations[bin]++;
}

static __always_inline void begin_message(struct flow_state *flow, __u64 now_ns, struct finished_message *done)
{
	finish_message(flow, done);
	if (done->bytes) {
		flow->last_message_bytes = done->bytes;
		flow->last_message_ns = done->duration_ns;
	}
	flow->earlier_bytes += flow->attained_bytes;
	flow->attained_bytes = 0;
	flow->message_began_ns = now_ns;
	flow->level = 0; /* so that the level it comes to is a new one, also if it is long from the start */
	flow->flags = (flow->flags | FLOW_SAW_MESSAGE) & ~(FLOW_TURN | FLOW_TOLD);
}

/* A turn is given after `starved_ns` to twice that, drawn per flow: flows that starved together come back one by
 * one (Karuna draws the number of timeouts for the same reason). */
static __always_inline int is_starved(const struct flow_state *flow, __u64 silent_ns, const struct settings *settings)
{
	__u64 draw = flow->first_seen_ns >> 10 & 0xff;

	return silent_ns >= settings->starved_ns && silent_ns >= settings->starved_ns + (settings->starved_ns >> 8) * draw;
}

/* A packet with payload after a silence worth a closer look: whether a message begins with it, or else a turn. */
static __always_inline int message_begins(struct flow_state *flow, const struct work *work, __u64 silent_ns,
					  const struct settings *settings, struct counters *counters)
{
	const struct packet *packet = &work->packet;
	const struct sender *sender = &work->sender;
	__u64 gap_ns = settings->blind_gap_ns;
	int nothing_left = !work->repeated;

	if (flow->flags & FLOW_ENDED)
		return 0;
	if (sender->known) {
		/* Twice the round-trip time, in nanoseconds: srtt_us is eightfold. */
		gap_ns = (__u64)sender->srtt_us * (2 * NS_PER_US / 8);
		if (gap_ns < settings->gap_ns)
			gap_ns = settings->gap_ns;
		nothing_left = nothing_left && sender->una == packet->sequence && !(flow->flags & FLOW_UNSENT);
	}
	if (nothing_left && silent_ns >= gap_ns)
		return 1;
	if (!(sender->known && nothing_left) && is_starved(flow, silent_ns, settings)) {
		counters->turns++;
		flow->turn_ends_bytes = flow->attained_bytes + settings->turn_bytes;
		flow->flags |= FLOW_TURN;
	}
	return 0;
}
