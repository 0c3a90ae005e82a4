/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the ECN marker of one port shares with user space (testbed/transport/marker.py reads and writes it in place).
 * A test compares these structures with their Python twins through BTF.
 */
#ifndef FABRICPILOT_TRANSPORT_ECN_MARKER_H
#define FABRICPILOT_TRANSPORT_ECN_MARKER_H

#define MARKER_BINS 256
#define MARKER_DSCPS 64

struct marker_config {
	__u64 drain_bytes_per_s; /* virtual queue: its link rate, gamma * line rate */
	__u32 k_bytes;           /* mark a packet that finds more than this queued */
	__u32 cap_bytes;         /* virtual queue: it never grows beyond, so that it forgives a flood in bounded time */
	__u32 bin_bytes;         /* width of a bin of the histogram below */
	__u32 pad;
	__u32 class_of_dscp[MARKER_DSCPS]; /* real queue: class whose queue counts (major:minor); 0: that of the port */
};

/* Cumulative. Updated with atomic additions: CPUs may send on one port at the same time. */
struct marker_stats {
	__u64 packets;
	__u64 bytes;       /* on the wire, every segment's headers counted */
	__u64 marked;      /* packets that left with CE because they found more than K */
	__u64 not_capable; /* packets that found more than K but do not do ECN */
	__u64 no_queue;    /* packets whose class has no queue to be read */
	__u64 queue_bytes_sum; /* over packets, what each found queued: mean queue = this / packets */
	__u64 queue_bytes_max;
	__u64 queue_bins[MARKER_BINS]; /* packets by what they found; the last bin holds all beyond */
};

#endif
