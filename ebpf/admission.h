/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Admission: how many new flows a source may begin. Every new flow starts at the top and takes an entry of the flow
 * table, so whoever sends nothing but first packets would have both for himself.
 *
 *   source    local socket: its cgroup, as all applications of a host share its addresses
 *             forwarded: the address, and the interface that it came in by, with four times the share of one address:
 *             a virtual machine may forge its addresses, but not its tap
 *   share     two buckets per source, each filled at settings->new_flows_per_s, that hold a second's worth: one for
 *             flows that begin with payload, one for what has none, so that a flood of SYNs, or of a server's answers to
 *             one, does not use up what its connections need (a local one refused at its SYN gets in with its data)
 *   beyond    no entry, and the last level: a flood then competes with long flows only. The flow's next packet asks
 *             again, so a real flow of such a source gets in sooner or later, and one-packet flows seldom do
 *
 * An acknowledgement that belongs to no flow in the table (its entry had to go, or the agent is younger) needs no entry,
 * yet travels at the top: it costs a sixteenth of a new flow.
 *
 * Buckets are found by a keyed hash without checking whose they are: two sources in one bucket share it, rarely (1 in
 * 16,384), and nobody can choose whose he shares. CPUs may write over each other's draws: with n of them a source gets
 * at most n shares. Only a packet without an entry pays for any of this.
 */
#pragma once

#define SOURCES 16384
#define SHARES_PER_INTERFACE 4
#define ACKNOWLEDGEMENTS_PER_FLOW 16
#define BUCKET_NS 1000000000ULL /* a full bucket holds what it gets in that time */

/* Key: hash of a source. Value: when its bucket will be full again, CLOCK_MONOTONIC nanoseconds. */
BPF_ARRAY(sources, __u64, SOURCES);

/* Key: 0. Value: what the hash is keyed with; drawn by the first packet that needs it. */
BPF_ARRAY(source_seed, __u64, 1);

/* Takes `cost_ns` out of a source's bucket, if it holds that much. */
static __always_inline int draw(__u64 source, __u64 cost_ns, __u64 now_ns)
{
	__u32 bucket = source >> 32 & (SOURCES - 1);
	__u64 *entry = sources.lookup(&bucket);
	__u64 full_ns;

	if (!entry)
		return 1; /* cannot be: array maps always have their entries */
	full_ns = *(volatile __u64 *)entry;
	if (full_ns < now_ns)
		full_ns = now_ns;
	if (full_ns + cost_ns > now_ns + BUCKET_NS)
		return 0;
	*(volatile __u64 *)entry = full_ns + cost_ns;
	return 1;
}

static __always_inline __u64 seed(void)
{
	__u32 zero = 0;
	__u64 *drawn = source_seed.lookup(&zero);

	if (!drawn)
		return 0;
	if (!*drawn)
		*drawn = (__u64)bpf_get_prandom_u32() << 32 | bpf_get_prandom_u32() | 1;
	return *drawn;
}

/* Whether a packet without an entry may begin a flow, or be what `begins_flow` says it is not, at the top. */
static __always_inline int admitted(struct __sk_buff *skb, struct work *work, int begins_flow,
				    const struct settings *settings)
{
	const struct packet *packet = &work->packet;
	__u64 cost_ns = settings->new_flow_ns, now_ns, cgroup, source;

	if (!cost_ns)
		return 1;
	if (!begins_flow)
		cost_ns /= ACKNOWLEDGEMENTS_PER_FLOW;
	now_ns = tick_ns(work);
	source = mix(seed(), !packet->payload_bytes);
	cgroup = skb->sk ? bpf_skb_cgroup_id(skb) : 0;
	if (cgroup)
		return draw(mix(mix(source, 1), cgroup), cost_ns, now_ns);
	if (skb->ingress_ifindex &&
	    !draw(mix(mix(source, 2), skb->ingress_ifindex), cost_ns / SHARES_PER_INTERFACE, now_ns))
		return 0;
	source = mix(source, (__u64)packet->key.source[0] << 32 | packet->key.source[1]);
	return draw(mix(source, (__u64)packet->key.source[2] << 32 | packet->key.source[3]), cost_ns, now_ns);
}
