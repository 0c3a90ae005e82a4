/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Settings and levels: what user space wants, and the level that attained service has under it.
 *
 * There are two slots and the index of the one in force. User space fills the other slot and turns the index, and
 * waits for an RCU grace period before it fills a slot again, so a packet sees one whole vector or the next.
 */
#pragma once

struct settings {
	__u64 thresholds[MAX_LEVELS - 1]; /* ascending bytes; all ones behind the last one in use */
	__u64 writable_dscp;              /* bit d: a packet that carries DSCP d may be given another */
	__u32 priority[MAX_LEVELS];       /* skb->priority of each level, in the form the NIC's qdisc reads */
	__u8 dscp[MAX_LEVELS];            /* code point of each level */
	__u8 levels;                      /* K; 0: nothing was set yet, so count and do not tag */
	__u8 observe;                     /* 1: compute and count everything, change no packet */
	__u8 pad[6];
	/* Messages and turns (message.h). All ones: never. */
	__u64 quiet_ns;     /* silence that is worth a closer look: the least of the three below */
	__u64 gap_ns;       /* least silence between two messages of a local TCP socket */
	__u64 blind_gap_ns; /* the same where there is no such socket to ask */
	__u64 starved_ns;   /* silence with data waiting after which a flow gets a turn at the top ... */
	__u64 turn_bytes;   /* ... of so many bytes */
	__u32 use_backlog;  /* 1: rank by what the send buffer shows (backlog.h); 0: by attained service alone */
	__u32 use_hints;    /* 1: look for the hints of applications (hint.h) */
	__u32 new_flows_per_s; /* share of one source (admission.h) ... */
	__u32 new_flow_ns;     /* ... and what each flow takes out of it; 0: as many as they like */
};

/* Key: slot, 0 or 1. Value: one whole vector of settings. */
BPF_ARRAY(slots, struct settings, 2);

/* Key: 0. Value: the slot in force. */
BPF_ARRAY(active, __u32, 1);

static __always_inline struct settings *settings_in_force(void)
{
	__u32 zero = 0, slot;
	__u32 *index = active.lookup(&zero);

	slot = index ? *(volatile __u32 *)index & 1 : 0;
	return slots.lookup(&slot);
}

/* How many thresholds have been reached: 0 is served first. */
static __always_inline __u8 level_of(const struct settings *settings, __u64 attained_bytes)
{
	__u8 level = 0;
	int i;

#pragma unroll
	for (i = 0; i < MAX_LEVELS - 1; i++) {
		if (attained_bytes < settings->thresholds[i])
			break;
		level++;
	}
	return level;
}

static __always_inline __u8 last_level(const struct settings *settings)
{
	return settings->levels ? (settings->levels - 1) & (MAX_LEVELS - 1) : 0;
}
