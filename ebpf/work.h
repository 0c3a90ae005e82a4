/* SPDX-License-Identifier: GPL-2.0-only
 *
 * What a CPU knows of the packet it is at work on, and the clock.
 *
 * In a map, since the verifier follows every value on the stack, but none in a map (parse.h). No program of ours
 * interrupts another on its CPU: packets leave with bottom halves off.
 */
#pragma once

/* A message that has just finished; bytes 0: none. */
struct finished_message {
	__u64 bytes;
	__u64 duration_ns;
};

#define FRESH 1
#define RESTARTED 2 /* its entry has just left */

struct work {
	struct packet packet;
	struct sender sender;
	struct flow_state beginning;  /* the flow that this packet begins, until it is inserted whole */
	struct finished_message done; /* by this packet's coming */
	__u8 repeated;                /* this packet was sent before */
	__u8 begins;                  /* a message begins with it */
	__u8 level;                   /* what the packet gets: this level, */
	__u8 treatment;               /* what a rule said, TREAT_SCHEDULE if none did, */
	__u8 route;                   /* and this route; 0: the kernel's */
	__u8 fresh;                   /* FRESH, RESTARTED: `beginning` is to enter the table */
	__u8 known;                   /* another CPU has entered this packet's flow meanwhile */
	__u8 pad;
	__u32 new_bytes;              /* what it adds to its message; 1 if it is sent again */
	__u32 way;                    /* the place in a bucket that its flow enters, */
	__u64 rank;                   /* and the rank of the flow that has to go for it; 0: none (flow_table.h) */
	__u64 hash;                   /* of the packet's key */
	/* These two stay from packet to packet. */
	__u64 tick;    /* jiffies when the clock was read */
	__u64 tick_ns; /* what it said, CLOCK_MONOTONIC */
};

/* Key: 0. Value: the work of one CPU. */
BPF_PERCPU_ARRAY(at_work, struct work, 1);

/* CLOCK_MONOTONIC as of the latest timer tick. Reading the tick is a load, reading the clock costs 15 ns. */
static __always_inline __u64 tick_ns(struct work *work)
{
	__u64 tick = bpf_jiffies64();

	if (work->tick != tick) {
		work->tick = tick;
		work->tick_ns = bpf_ktime_get_coarse_ns();
	}
	return work->tick_ns;
}
