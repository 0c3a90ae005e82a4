/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Verdicts: level and route that central chose for single flows, each with an end; and the joining of rules, verdict
 * and thresholds into what a packet gets. An operator's rule comes before a verdict, a verdict before the thresholds.
 *
 * Verdicts live in a map of their own, since a flow's entry is written by packets at any time. The flow keeps a copy, in
 * one word, and looks again only when the generation has moved on: a packet pays one comparison, a change of verdicts
 * one lookup per active flow. The end of a verdict is the kernel's to keep, so a lost agent or central cannot leave
 * a flow steered for ever.
 */
#pragma once

#define MAX_VERDICTS 8192
#define NS_PER_S 1000000000ULL

/* As it stands in the map and as it is kept with a flow, read and written in one piece. */
union verdict {
	__u64 word;
	struct {
		__u32 until_s;    /* CLOCK_MONOTONIC; 0: no verdict */
		__u16 generation; /* when the flow looked; 0 in the map */
		__u8 level;       /* one more than the level; 0: not said */
		__u8 route;       /* 0: not said */
	};
};

/* Key: 5-tuple. Value: its verdict. */
BPF_F_TABLE("hash", struct flow_key, __u64, verdicts, MAX_VERDICTS, BPF_F_NO_PREALLOC);

static __always_inline __u64 look_up_verdict(const struct packet *packet, __u16 generation)
{
	union verdict verdict = {};
	__u64 *found;

	if (generation) {
		found = verdicts.lookup((struct flow_key *)&packet->key);
		if (found)
			verdict.word = *(volatile __u64 *)found;
	}
	verdict.generation = generation;
	return verdict.word;
}

/* The time at which this packet was accounted: its flow has it already, unless it has ended. */
static __always_inline __u64 now_ns(struct work *work, const struct flow_state *flow)
{
	return flow->flags & FLOW_ENDED ? tick_ns(work) : flow->last_seen_ns;
}

/* Lets rules and verdict have their say on what the thresholds gave; `flow` may be nothing (`account`). */
static __always_inline void steer(struct __sk_buff *skb, struct work *work, struct flow_state *flow,
				  const struct settings *settings, const struct steering *steering)
{
	const struct packet *packet = &work->packet;
	__u32 rules_generation = *(volatile __u32 *)&steering->rules_generation;
	__u16 verdict_generation = *(volatile __u32 *)&steering->verdict_generation;
	union kept_outcome rules = {}, no_rule = {.generation = rules_generation};
	union verdict verdict = {}, no_verdict = {.generation = verdict_generation};

	work->treatment = TREAT_SCHEDULE;
	work->route = 0;
	if (flow) {
		rules.word = *(volatile __u64 *)&flow->rules;
		verdict.word = *(volatile __u64 *)&flow->verdict;
		/* Nearly every packet: it has been asked, and there is nothing. */
		if (rules.word == no_rule.word && verdict.word == no_verdict.word)
			return;
	}
	if (rules.generation != rules_generation) {
		rules.word = 0;
		if (rules_generation)
			rules.word = evaluate_rules(skb, packet, rules_generation);
		if (flow)
			*(volatile __u64 *)&flow->rules = rules.word;
	}
	if (flow && verdict.generation != verdict_generation) {
		verdict.word = look_up_verdict(packet, verdict_generation);
		*(volatile __u64 *)&flow->verdict = verdict.word;
	}
	if (!rules.rule && !verdict.until_s)
		return;

	work->treatment = rules.treatment;
	work->route = rules.route;
	if (verdict.until_s && now_ns(work, flow) < verdict.until_s * NS_PER_S) {
		/* Packets without payload stay on top: they are small, and the other side waits for them. */
		if (verdict.level && packet->payload_bytes)
			work->level = verdict.level - 1;
		if (!work->route)
			work->route = verdict.route;
	}
	if (rules.level)
		work->level = rules.level - 1;
	if (work->level > last_level(settings))
		work->level = last_level(settings);
	if (flow && packet->payload_bytes && flow->level != work->level)
		flow->level = work->level;
}
