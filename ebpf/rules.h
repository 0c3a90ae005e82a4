/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Operator rules: which flows are pinned to a level or a route, only observed, or left alone.
 *
 * Rules are evaluated once per flow, at its first packet, and again when they change; the outcome is kept with the
 * flow, so that a packet pays one comparison. However many rules there are, the work is the same: every dimension of a
 * packet (addresses, ports, protocol, DSCP, cgroup) has a table from its value to the set of rules that admit it, one
 * bit per rule. The lowest bit in the intersection of all sets is the first rule that matches (the bit vectors of
 * Lakshman and Stiliadis, SIGCOMM 1998). Ranges of ports are prefixes of ports, so one trie serves most dimensions.
 *
 * There are two slots, filled and turned like those of the settings (level.h): a flow sees all old rules or all new.
 */
#pragma once

#define MAX_RULES 64          /* bits in a set */
#define MAX_PREFIXES 16384    /* in the trie, both slots together */
#define MAX_CGROUP_DEPTH 8    /* below the root; a rule's cgroup lies no deeper */

/* What a rule makes of a packet. */
#define TREAT_SCHEDULE 0
#define TREAT_OBSERVE 1 /* account and level it, change nothing */
#define TREAT_EXCLUDE 2 /* leave it alone and do not report it */

enum rule_dimension {
	BY_SOURCE,
	BY_DESTINATION,
	BY_SOURCE_PORT,
	BY_DESTINATION_PORT,
	BY_CGROUP,
	RULE_DIMENSIONS,
};

struct prefix_key {
	__u32 bits; /* of what follows: slot and dimension (32), then the prefix */
	__u8 slot;
	__u8 dimension;
	__u8 pad[2];
	__u8 value[16]; /* in network order */
};

/* Key: a prefix. Value: the rules that admit all values below it; a prefix's rules include those of shorter ones. */
BPF_LPM_TRIE(prefixes, struct prefix_key, __u64, MAX_PREFIXES);

struct rule_outcome {
	__u8 treatment;
	__u8 level; /* one more than the level the flow is pinned to; 0: none */
	__u8 route; /* 0: not said */
	__u8 pad;
};

struct rule_set {
	__u64 by_dscp[64];
	__u64 by_protocol[2];      /* TCP, UDP */
	__u64 without_cgroup;      /* rules that ask for no cgroup */
	__u32 dimensions;          /* bit d: some rule says something about dimension d */
	__u32 cgroup_depths;       /* bit n: some rule's cgroup is n below the root */
	struct rule_outcome outcome[MAX_RULES];
};

/* Key: slot, 0 or 1. Value: one whole list of rules. */
BPF_ARRAY(rule_sets, struct rule_set, 2);

/* What user space wants of flows beyond the settings, written behind what it stands for. */
struct steering {
	__u64 usable_routes;      /* bit r: route r leads somewhere now */
	__u64 routes_until_ns;    /* CLOCK_MONOTONIC: nobody has watched the links of the routes since then */
	__u32 rules_generation;   /* 0: no rules; its lowest bit is their slot */
	__u32 verdict_generation; /* 16 bits; 0: no verdicts */
	__u32 route_gap_ms;       /* silence after which a flow may change its route; 0: at any packet */
	__u32 last_rules_generation;   /* user space's own: the highest ones so far */
	__u32 last_verdict_generation;
	__u32 pad;
};

/* Key: 0. Value: steering. */
BPF_ARRAY(steering, struct steering, 1);

/* The outcome of the rules as it is kept with a flow, read and written in one piece: two CPUs never mix theirs. */
union kept_outcome {
	__u64 word;
	struct {
		__u32 generation; /* of the rules; 0 together with the rest for a flow that no rules were asked about */
		__u8 treatment;
		__u8 level; /* as in struct rule_outcome */
		__u8 route;
		__u8 rule; /* one more than the number of the rule; 0: none matched */
	};
};

static __always_inline int is_excluded(const struct flow_state *flow)
{
	union kept_outcome kept = {.word = flow->rules};

	return kept.treatment == TREAT_EXCLUDE;
}

static __always_inline __u64 rules_by_prefix(__u32 slot, __u8 dimension, const void *value, __u32 bytes)
{
	struct prefix_key key = {.bits = 32 + bytes * 8, .slot = slot, .dimension = dimension};
	__u64 *rules;

	__builtin_memcpy(key.value, value, bytes);
	rules = prefixes.lookup(&key);
	return rules ? *rules : 0;
}

static __always_inline __u64 rules_by_cgroup(struct __sk_buff *skb, __u32 slot, const struct rule_set *set)
{
	__u64 rules = set->without_cgroup;
	int depth;

#pragma unroll
	for (depth = 1; depth <= MAX_CGROUP_DEPTH; depth++) {
		__u64 id;

		if (!(set->cgroup_depths >> depth & 1))
			continue;
		id = bpf_skb_ancestor_cgroup_id(skb, depth); /* 0: no local socket, or its cgroup is not that deep */
		if (id)
			rules |= rules_by_prefix(slot, BY_CGROUP, &id, sizeof(id));
	}
	return rules;
}

/* Its number: how many bits are set below it. BPF has no instruction for that, and LLVM 14 fails on the builtin. */
static __always_inline __u32 lowest_bit(__u64 bits)
{
	__u64 below = (bits & -bits) - 1;

	below -= below >> 1 & 0x5555555555555555ULL;
	below = (below & 0x3333333333333333ULL) + (below >> 2 & 0x3333333333333333ULL);
	below = (below + (below >> 4)) & 0x0f0f0f0f0f0f0f0fULL;
	return below * 0x0101010101010101ULL >> 56;
}

/* The first rule that matches the packet, and what it says. */
static __always_inline __u64 evaluate_rules(struct __sk_buff *skb, const struct packet *packet,
					    __u32 generation)
{
	union kept_outcome kept = {.generation = generation};
	__u32 slot = generation & 1;
	struct rule_set *set = rule_sets.lookup(&slot);
	__be16 port;
	__u64 rules;
	__u32 first;

	if (!set)
		return kept.word; /* cannot be */
	rules = set->by_dscp[packet->dscp & 63] & set->by_protocol[packet->key.protocol != IPPROTO_TCP];
	if (rules && set->dimensions & 1 << BY_DESTINATION)
		rules &= rules_by_prefix(slot, BY_DESTINATION, packet->key.destination, 16);
	if (rules && set->dimensions & 1 << BY_SOURCE)
		rules &= rules_by_prefix(slot, BY_SOURCE, packet->key.source, 16);
	if (rules && set->dimensions & 1 << BY_DESTINATION_PORT) {
		port = bpf_htons(packet->key.destination_port);
		rules &= rules_by_prefix(slot, BY_DESTINATION_PORT, &port, sizeof(port));
	}
	if (rules && set->dimensions & 1 << BY_SOURCE_PORT) {
		port = bpf_htons(packet->key.source_port);
		rules &= rules_by_prefix(slot, BY_SOURCE_PORT, &port, sizeof(port));
	}
	if (rules && set->dimensions & 1 << BY_CGROUP)
		rules &= rules_by_cgroup(skb, slot, set);
	if (!rules)
		return kept.word;
	first = lowest_bit(rules) & (MAX_RULES - 1);
	kept.treatment = set->outcome[first].treatment;
	kept.level = set->outcome[first].level;
	kept.route = set->outcome[first].route;
	kept.rule = first + 1;
	return kept.word;
}
