/* SPDX-License-Identifier: GPL-2.0-only
 *
 * The flow table: finds a packet's flow, makes room for a new one, and lets go of those that user space names.
 *
 * Made of array maps, where a lookup is a few inlined instructions; a hash map's is a call and a chain of loads that
 * wait for each other (docs/datapath.md has what each takes).
 *
 *   flows       buckets of eight flows, key and state side by side
 *   flow_tags   per bucket a word, a byte for each of its flows: 0x80 and seven bits of the flow's hash, or 0 where there
 *               is none. One operation on the word finds the flows that are worth a look
 *
 * - A flow's hash names the place it would like to have, so finding a flow there waits for nothing but that place. One that
 *   came when it was taken is in another place of the same bucket, or in that of the hash's other half. So the table
 *   takes nearly as many flows as it has places before any has to make room; half full, three in four are at home.
 * - Where both buckets are full, one flow has to go: that which was silent longest. Flows that have ended, or sent no
 *   second packet, go before all others, so that a flood of new flows does not push out those that are under way.
 * - The hash is keyed at random (NH of UMAC, RFC 4418), so nobody can choose flows that meet in one bucket.
 * - Finding takes no lock. Entering, leaving and being copied for user space hold the bucket's, for a hundred instructions
 *   or so. The last word of a key is 0 in an empty place and written behind all else, so that whoever finds a key finds
 *   its state. (So it is where stores stay in order, as on x86. Elsewhere the first packets of one flow on two CPUs at
 *   once may, at worst, get a level too low.)
 * - Two CPUs that meet the first packets of one flow at once enter it once. (But for two such packets in the very moment
 *   in which its first bucket fills up: then a second entry is left, which is not found, and goes like any idle one.)
 */
#pragma once

#define BUCKET_FLOWS 8
#define BUCKET_MASK (BUCKET_FLOWS - 1)
#define IN_EACH_BYTE 0x0101010101010101ULL
#define TAG_USED 0x80
#define TAG_MASK 0xffULL
#define WAY_OF_BIT 0x0001020304050607ULL /* 1 << 8 * n, times this, has n in its highest byte */

/* On three cache lines: what every packet needs is on the first two. */
struct flow {
	struct flow_key key;
	struct flow_state state;
} __attribute__((aligned(64)));

struct flow_bucket {
	struct flow flow[BUCKET_FLOWS];
};

struct flow_tags {
	__u64 tags; /* lowest byte: of the bucket's first flow */
	struct bpf_spin_lock lock;
	__u32 pad;
};

struct flow_hash {
	__u32 secret[2 * KEY_WORDS];
};

/* Key: bucket. Value: its flows. Mappable, since such an array begins on a page, and its flows on cache lines. */
BPF_F_TABLE("array", __u32, struct flow_bucket, flows, FLOW_BUCKETS, BPF_F_MMAPABLE);

/* Key: bucket. Value: which of its places are taken, and by what. */
BPF_ARRAY(flow_tags, struct flow_tags, FLOW_BUCKETS);

/* Key: 0. Value: what flows are hashed with; user space draws it before the first packet. */
BPF_ARRAY(flow_hash, struct flow_hash, 1);

static __always_inline __u64 mix(__u64 hash, __u64 word)
{
	hash = (hash ^ word) * 0x9e3779b97f4a7c15ULL;
	return hash ^ hash >> 29;
}

static __always_inline __u64 hash_of(const struct flow_key *key)
{
	const __u32 *word = (const __u32 *)key;
	__u32 zero = 0;
	struct flow_hash *hash = flow_hash.lookup(&zero);
	__u64 sum = 0;
	int i;

	if (!hash)
		return 0; /* cannot be: array maps always have their entries */
#pragma unroll
	for (i = 0; i < 2 * KEY_WORDS; i += 2)
		sum += (__u64)(word[i] + hash->secret[i]) * (__u64)(word[i + 1] + hash->secret[i + 1]);
	return mix(sum, sum >> 32); /* ports that follow each other would be evenly spaced without that */
}

static __always_inline __u32 bucket_of(__u64 hash)
{
	return (hash & 0xffffffff) * FLOW_BUCKETS >> 32;
}

static __always_inline __u64 other_half(__u64 hash)
{
	return hash >> 32 | hash << 32;
}

/* What stands for a flow in the tags of either of its buckets. */
static __always_inline __u64 tag_of(__u64 hash)
{
	return ((hash ^ hash >> 32) & (TAG_USED - 1)) | TAG_USED;
}

/* The place in its bucket that a flow would like to have. */
static __always_inline __u32 home_way(__u64 hash)
{
	return hash >> 7 & BUCKET_MASK;
}

/* The place in the bucket that the lowest of some bits 7, 15 ... 63 stands for. */
static __always_inline __u32 lowest_way(__u64 bits)
{
	return ((bits & -bits) >> 7) * WAY_OF_BIT >> 56 & BUCKET_MASK;
}

static __always_inline int same_flow(const struct flow_key *one, const struct flow_key *other)
{
	const __u64 *a = key_words(one), *b = key_words(other);

	return !((a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) | (a[4] ^ b[4]));
}

/* The place of a flow in a bucket with these tags; BUCKET_FLOWS if it has none there. */
static __always_inline __u32 way_of(const struct flow_bucket *bucket, __u64 tags, const struct flow_key *key, __u64 tag)
{
	__u64 differing = tags ^ tag * IN_EACH_BYTE;
	/* Bit 7 of every byte that is 0, and seldom of another one, which the key tells apart. */
	__u64 alike = (differing - IN_EACH_BYTE) & ~differing & TAG_USED * IN_EACH_BYTE;
	int i;

#pragma nounroll
	for (i = 0; i < BUCKET_FLOWS && alike; i++) {
		__u32 way = lowest_way(alike);

		if (same_flow(&bucket->flow[way].key, key))
			return way;
		alike &= alike - 1;
	}
	return BUCKET_FLOWS;
}

/* The state of a packet's flow, or nothing. `hash` is its key's. */
static __always_inline struct flow_state *find_flow(const struct flow_key *key, __u64 hash)
{
	__u32 place = bucket_of(hash), way = home_way(hash);
	struct flow_bucket *bucket = flows.lookup(&place);
	struct flow_tags *tags;
	__u64 tag = tag_of(hash);
	int half;

	if (bucket && same_flow(&bucket->flow[way].key, key))
		return &bucket->flow[way].state;
#pragma nounroll
	for (half = 0; half < 2; half++) {
		place = bucket_of(hash);
		tags = flow_tags.lookup(&place);
		bucket = flows.lookup(&place);
		if (!tags || !bucket)
			return 0; /* cannot be */
		way = way_of(bucket, reread(tags->tags), key, tag);
		if (way < BUCKET_FLOWS)
			return &bucket->flow[way & BUCKET_MASK].state;
		hash = other_half(hash);
	}
	return 0;
}

#define UNDER_WAY (1ULL << 63) /* in a flow's rank: it goes only where all others are, too */

/* Which flow of a full bucket has to make room: work->way, of the lowest work->rank. */
static __always_inline void find_stalest(const struct flow_bucket *bucket, struct work *work)
{
	__u32 i;

	work->rank = ~0ULL;
#pragma nounroll
	for (i = 0; i < BUCKET_FLOWS; i++) {
		const struct flow_state *state = &bucket->flow[i].state;
		__u64 rank = state->last_seen_ns;

		if (state->packets > 1 && !(state->flags & FLOW_ENDED))
			rank |= UNDER_WAY;
		if (rank < reread(work->rank)) {
			work->rank = rank;
			work->way = i;
		}
	}
}

/* Where a new flow goes in its bucket; BUCKET_FLOWS if that is full. */
static __always_inline __u32 vacant_way(__u64 tags, __u64 hash)
{
	__u64 vacant = ~tags & TAG_USED * IN_EACH_BYTE;
	__u32 home = home_way(hash);

	if (vacant >> home * 8 & TAG_USED)
		return home;
	return vacant ? lowest_way(vacant) : BUCKET_FLOWS;
}

/* Both under the lock. */
static __always_inline void empty_place(struct flow_tags *tags, struct flow *flow, __u32 way)
{
	reread(tags->tags) = tags->tags & ~(TAG_MASK << way * 8);
	reread(key_words(&flow->key)[PORTS_WORD]) = 0;
	barrier();
}

static __always_inline void fill_place(struct flow_tags *tags, struct flow *flow, __u32 way, __u64 tag,
				       const struct flow_key *key, const struct flow_state *state)
{
	const __u64 *from = key_words(key);
	__u64 *to = key_words(&flow->key);
	int i;

	flow->state = *state;
#pragma unroll
	for (i = 0; i < PORTS_WORD; i++)
		to[i] = from[i];
	barrier();
	reread(to[PORTS_WORD]) = from[PORTS_WORD];
	reread(tags->tags) = tags->tags | tag << way * 8;
}

/* Enters the flow that begins with a packet, unless another CPU has been first (work->known). Returns its state. */
static __always_inline struct flow_state *enter_flow(struct work *work, struct counters *counters)
{
	const struct flow_key *key = &work->packet.key;
	__u64 hash = work->hash, tag = tag_of(hash);
	int attempt;

	work->known = 0;
	/* The first bucket if it has room, the second if it has or can make room at no loss, and then the first. */
#pragma nounroll
	for (attempt = 0; attempt < 3; attempt++) {
		__u32 place = bucket_of(hash), way;
		struct flow_tags *tags = flow_tags.lookup(&place);
		struct flow_bucket *bucket = flows.lookup(&place);
		struct flow *flow;

		if (!tags || !bucket)
			return 0; /* cannot be */
		bpf_spin_lock(&tags->lock);
		work->rank = 0;
		work->way = way_of(bucket, tags->tags, key, tag);
		if (reread(work->way) < BUCKET_FLOWS) {
			work->known = 1;
		} else {
			work->way = vacant_way(tags->tags, hash);
			if (reread(work->way) >= BUCKET_FLOWS && attempt)
				find_stalest(bucket, work);
			if (attempt == 1 && reread(work->rank) & UNDER_WAY)
				work->way = BUCKET_FLOWS;
		}
		way = reread(work->way);
		flow = &bucket->flow[way & BUCKET_MASK];
		if (way < BUCKET_FLOWS && !reread(work->known)) {
			empty_place(tags, flow, way);
			fill_place(tags, flow, way, tag, key, &work->beginning);
			counters->flows_evicted += !!reread(work->rank);
		}
		bpf_spin_unlock(&tags->lock);
		if (way < BUCKET_FLOWS)
			return &flow->state;
		hash = other_half(hash);
	}
	return 0; /* cannot be */
}

/* Takes a flow out of the table; returns whether it was there. */
static __always_inline int leave_flow(const struct flow_key *key, __u64 hash)
{
	__u64 tag = tag_of(hash);
	int half;

#pragma nounroll
	for (half = 0; half < 2; half++) {
		__u32 place = bucket_of(hash), way;
		struct flow_tags *tags = flow_tags.lookup(&place);
		struct flow_bucket *bucket = flows.lookup(&place);

		if (!tags || !bucket)
			return 0; /* cannot be */
		bpf_spin_lock(&tags->lock);
		way = way_of(bucket, tags->tags, key, tag);
		if (way < BUCKET_FLOWS)
			empty_place(tags, &bucket->flow[way & BUCKET_MASK], way);
		bpf_spin_unlock(&tags->lock);
		if (way < BUCKET_FLOWS)
			return 1;
		hash = other_half(hash);
	}
	return 0;
}
