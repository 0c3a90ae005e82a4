/* SPDX-License-Identifier: GPL-2.0-only
 *
 * What user space asks of the flow table, as programs that it runs by itself (BPF_PROG_TEST_RUN) and never attaches:
 *
 *   fabricpilot_read     copies flows out, a bucket at a time under its lock, so that none is torn
 *   fabricpilot_forget   takes flows out
 *
 * Packets interrupt them, so they leave the CPU's own places alone (work.h).
 */
#pragma once

#define READ_BUCKETS 16   /* that one run looks at */
#define READ_FLOWS 512    /* that there is room for */
#define FORGET_AT_ONCE 80 /* keys that fit into the one page of a test run */

struct flow_copy {
	struct flow_key key;
	struct flow_state state;
};

struct flow_copies {
	__u32 bucket; /* the next one to copy */
	__u32 count;
	char raw[READ_FLOWS * sizeof(struct flow_copy)]; /* of that; bcc takes a second to look into an array of structs */
};

/* Key: 0. Value: where the reading has come to, and what it has found. User space sees to it that one reads at a time. */
BPF_ARRAY(flow_copies, struct flow_copies, 1);

static __always_inline void copy_bucket(struct flow_copies *copies, struct flow_tags *tags,
					const struct flow_bucket *bucket)
{
	struct flow_copy *flow = (struct flow_copy *)copies->raw;
	__u32 way;

	bpf_spin_lock(&tags->lock);
#pragma nounroll
	for (way = 0; way < BUCKET_FLOWS; way++) {
		__u32 count = reread(copies->count) & (READ_FLOWS - 1);

		if (!(tags->tags >> way * 8 & TAG_USED))
			continue;
		flow[count].key = bucket->flow[way].key;
		flow[count].state = bucket->flow[way].state;
		copies->count = count + 1;
	}
	bpf_spin_unlock(&tags->lock);
}

/* Copies from where the last run stopped until there is no more room, or the table ends. */
int fabricpilot_read(struct __sk_buff *skb)
{
	__u32 zero = 0;
	struct flow_copies *copies = flow_copies.lookup(&zero);
	int i;

	if (!copies)
		return 0; /* cannot be */
#pragma nounroll
	for (i = 0; i < READ_BUCKETS && reread(copies->count) <= READ_FLOWS - BUCKET_FLOWS - 1; i++) {
		__u32 place = reread(copies->bucket);
		struct flow_tags *tags = flow_tags.lookup(&place);
		struct flow_bucket *bucket = flows.lookup(&place);

		if (!tags || !bucket)
			break; /* that was the last one */
		if (reread(tags->tags))
			copy_bucket(copies, tags, bucket);
		copies->bucket = place + 1;
	}
	return 0;
}

/* Takes the flows whose keys the packet consists of out of the table; returns how many were there. */
int fabricpilot_forget(struct __sk_buff *skb)
{
	struct flow_key key;
	int i, forgotten = 0;

#pragma nounroll
	for (i = 0; i < FORGET_AT_ONCE; i++) {
		if (bpf_skb_load_bytes(skb, i * sizeof(key), &key, sizeof(key)))
			break;
		forgotten += leave_flow(&key, hash_of(&key));
	}
	return forgotten;
}
