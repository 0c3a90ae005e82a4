/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Counters: everything that happens to a packet is counted once, per CPU, in one struct that is looked up once.
 * hostagent/datapath/layout.py has the same struct; a test compares the two through BTF.
 */
#pragma once

#define MAX_LEVELS 8

/* Why a packet was left alone. PARSED is not a reason: it keeps the codes and the array below in step. */
enum untracked_reason {
	PARSED,
	NOT_IP,           /* ARP, LLDP, MPLS ... */
	VLAN,             /* more than two tags inside the frame */
	OTHER_PROTOCOL,   /* IP, but neither TCP nor UDP */
	FRAGMENT,         /* a later one whose first one is not known */
	EXTENSION_HEADER, /* IPv6: encrypted, or more extension headers than anybody sends */
	MALFORMED,        /* truncated, or lengths that contradict each other */
	UNREADABLE,       /* headers are not in linear memory and the kernel could not bring them there */
	UNTRACKED_REASONS,
};

struct counters {
	__u64 packets[MAX_LEVELS];           /* tagged with this level; GSO segments count one by one */
	__u64 bytes[MAX_LEVELS];             /* their payload */
	__u64 untracked[UNTRACKED_REASONS];  /* packets, by enum untracked_reason */
	__u64 foreign_dscp;                  /* packets that kept an application's own DSCP; accounted, not tagged */
	__u64 observed;                      /* packets accounted and levelled, but left alone: observe mode, or a rule */
	__u64 untagged;                      /* packets accounted before the first settings arrived */
	__u64 excluded;                      /* packets that a rule said to leave alone */
	__u64 routed;                        /* packets sent another way than the kernel's */
	__u64 route_unusable;                /* packets that took the kernel's way because theirs led nowhere */
	__u64 flows_inserted;
	__u64 flows_evicted;                 /* that made room for others */
	__u64 flows_midlife;                 /* of those: TCP flows whose start was not seen */
	__u64 flows_restarted;               /* entries started afresh by a SYN (port reuse) ... */
	__u64 restarted_bytes;               /* ... and what their former flows had sent, in case nobody had read it */
	__u64 messages_finished;             /* behind which the next one of the same flow has begun */
	__u64 turns;                         /* given to starved flows */
	__u64 over_share;                    /* packets beyond their source's share of new flows: on the last level */
	__u64 flowless;                      /* acknowledgements and resets without an entry, which make none: at the top */
	__u64 write_failed;                  /* packets whose header the kernel would not let us change */
	__u64 long_untold;                   /* flows that became long while the ring to user space was full */
};

/* Key: 0. Value: counters of one CPU; user space adds them up. */
BPF_PERCPU_ARRAY(counters, struct counters, 1);
