// SPDX-License-Identifier: GPL-2.0-only
/*
 * ECN marker for a switch port of the testbed: the single-threshold marking DCTCP wants of a switch.
 *
 * Hook: clsact egress of the port, that is before the packet enters the port's qdisc. One program and one set of maps
 * per port. Three steps:
 *   1. queue = what this packet finds in front of it (below);
 *   2. count it;
 *   3. queue > K: CE, if the packet says it can do ECN. The kernel's helper does it for IPv4 (checksum) and IPv6.
 * No packet is dropped, and the verdict is UNSPEC, so that other programs of the port run after this one.
 *
 * The queue, by how the program is built:
 *   -DMARKER_REAL_QUEUE  the backlog of the port's qdisc, or of the child qdisc of the packet's class, read from the
 *                        kernel's own structures (BTF; needs bpf_cast_to_kern_ctx and bpf_rdonly_cast, Linux 6.2)
 *   otherwise            a virtual queue: every packet adds its bytes, and it drains at gamma * line rate. It needs
 *                        nothing of the qdisc; with gamma < 1 it marks before any real queue builds (HULL, NSDI 2012)
 */
#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <linux/types.h>

#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "ecn_marker.h"
#include "kernel_types.h"

/* Licence of the compiled program: the kernel lends its functions only to GPL programs. */
char _license[] SEC("license") = "GPL";

#define NS_PER_S 1000000000ull
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86DD

/* Key: 0. Value: configuration, written by user space at any time. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct marker_config);
} marker_config SEC(".maps");

/* Key: 0. Value: counters, only read by user space. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct marker_stats);
} marker_stats SEC(".maps");

#ifdef MARKER_REAL_QUEUE

#define NO_QUEUE (~0ull)
#define MAX_CHAIN 8 /* qdiscs in one of the 16 buckets of a device; testbed ports have at most 9 in all */

extern void *bpf_cast_to_kern_ctx(void *ctx) __ksym;
extern void *bpf_rdonly_cast(const void *object, __u32 btf_id) __ksym;

static __always_inline __u32 class_of(struct __sk_buff *skb, const struct marker_config *config)
{
	__u8 head[2], dscp;

	if (bpf_skb_load_bytes_relative(skb, 0, head, sizeof(head), BPF_HDR_START_NET))
		return 0;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		dscp = head[1] >> 2;
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		dscp = (head[0] & 0xf) << 2 | head[1] >> 6;
	else
		return 0;
	return config->class_of_dscp[dscp % MARKER_DSCPS];
}

/*
 * The qdisc below a class, in one bucket of the device's table of qdiscs. The table is changed under the kernel's RCU
 * rules and our program runs as a reader; loads through these pointers cannot fault.
 */
static __always_inline struct Qdisc *child_in(struct hlist_head *bucket, __u32 class)
{
	void *node = bucket->first;

	for (int i = 0; i < MAX_CHAIN && node; i++) {
		struct Qdisc *child = bpf_rdonly_cast(node - bpf_core_field_offset(struct Qdisc, hash),
						      bpf_core_type_id_kernel(struct Qdisc));

		if (child->parent == class)
			return child;
		node = child->hash.next;
	}
	return 0;
}

static __always_inline __u64 found_queued(struct __sk_buff *ctx, const struct marker_config *config, __u32 added)
{
	struct sk_buff *skb = bpf_cast_to_kern_ctx(ctx);
	struct net_device *device = skb->dev;
	__u32 class = class_of(ctx, config);

	if (!class)
		return device->qdisc->qstats.backlog;
#pragma unroll
	for (int i = 0; i < 16; i++) {
		struct Qdisc *child = child_in(&device->qdisc_hash[i], class);

		if (child)
			return child->qstats.backlog;
	}
	return NO_QUEUE;
}

#else

#define NO_QUEUE (~0ull)

struct virtual_queue {
	struct bpf_spin_lock lock;
	__u64 drained_at_ns;
	__u64 byte_ns; /* bytes queued times 10^9, so that a packet's drain is exact at any rate */
};

/* Key: 0. Value: the virtual queue of the port. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct virtual_queue);
} marker_virtual SEC(".maps");

static __always_inline __u64 found_queued(struct __sk_buff *ctx, const struct marker_config *config, __u32 added)
{
	__u32 zero = 0;
	struct virtual_queue *queue = bpf_map_lookup_elem(&marker_virtual, &zero);
	__u64 now_ns = bpf_ktime_get_ns(); /* not allowed under the lock */
	__u64 rate = config->drain_bytes_per_s, cap = config->cap_bytes * NS_PER_S;
	__u64 found, drained;
	__s64 idle_ns;

	if (!queue)
		return NO_QUEUE;
	bpf_spin_lock(&queue->lock);
	idle_ns = now_ns - queue->drained_at_ns;
	if (idle_ns > 0) { /* another CPU may have passed us between the clock and the lock */
		if (idle_ns > NS_PER_S)
			idle_ns = NS_PER_S; /* keeps the product within 64 bits up to 147 Gbit/s */
		drained = idle_ns * rate;
		queue->byte_ns = queue->byte_ns > drained ? queue->byte_ns - drained : 0;
		queue->drained_at_ns = now_ns;
	}
	found = queue->byte_ns;
	queue->byte_ns += added * NS_PER_S;
	if (queue->byte_ns > cap)
		queue->byte_ns = cap;
	bpf_spin_unlock(&queue->lock);
	return found / NS_PER_S;
}

#endif

static __always_inline void count(struct marker_stats *stats, const struct marker_config *config, __u64 queue_bytes)
{
	__u64 bin = queue_bytes / (config->bin_bytes ? config->bin_bytes : 1);

	barrier_var(bin); /* compare all 64 bits: the verifier loses a bound found on 32 */
	if (bin >= MARKER_BINS)
		bin = MARKER_BINS - 1;
	__sync_fetch_and_add(&stats->queue_bytes_sum, queue_bytes);
	__sync_fetch_and_add(&stats->queue_bins[bin], 1);
	if (queue_bytes > stats->queue_bytes_max)
		stats->queue_bytes_max = queue_bytes; /* a lost race costs one sample of the maximum */
}

/* CE, if the packet can do ECN. A tag inside the frame (not beside it, as usual) would lead the helper to the tag. */
static __always_inline int mark(struct __sk_buff *ctx)
{
	if (ctx->protocol != bpf_htons(ETH_P_IP) && ctx->protocol != bpf_htons(ETH_P_IPV6))
		return 0;
	return bpf_skb_ecn_set_ce(ctx) > 0;
}

SEC("tc")
int ecn_marker(struct __sk_buff *ctx)
{
	__u32 zero = 0;
	struct marker_config *config = bpf_map_lookup_elem(&marker_config, &zero);
	struct marker_stats *stats = bpf_map_lookup_elem(&marker_stats, &zero);
	__u32 bytes = ctx->wire_len; /* a GSO packet: what its segments will have */
	__u64 queue_bytes;

	if (!config || !stats)
		return TC_ACT_UNSPEC;
	queue_bytes = found_queued(ctx, config, bytes);
	__sync_fetch_and_add(&stats->packets, 1);
	__sync_fetch_and_add(&stats->bytes, bytes);
	if (queue_bytes == NO_QUEUE) {
		__sync_fetch_and_add(&stats->no_queue, 1);
		return TC_ACT_UNSPEC;
	}
	count(stats, config, queue_bytes);
	if (queue_bytes > config->k_bytes) {
		if (mark(ctx))
			__sync_fetch_and_add(&stats->marked, 1);
		else
			__sync_fetch_and_add(&stats->not_capable, 1);
	}
	return TC_ACT_UNSPEC;
}
