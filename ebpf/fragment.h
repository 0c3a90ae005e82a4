/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Fragments: only the first one of a datagram has ports, so it decides and the others follow.
 *
 * It is accounted like any packet, and its flow and level are kept under the datagram's identification. Later
 * fragments add their bytes to that flow and travel on that level. One that finds nothing (it overtook the first,
 * or the entry had to make room) is left alone and counted.
 */
#pragma once

#define FRAGMENTED_DATAGRAMS 4096 /* remembered at a time, on all CPUs */

struct fragment_key {
	__be32 source[4];
	__be32 destination[4];
	__u32 id;
	__u32 protocol; /* IPv4 only: there it is part of what identifies a datagram */
};

struct fragment_value {
	__u16 source_port;
	__u16 destination_port;
	__u8 protocol;
	__u8 level;
	__u8 pad[2];
};

/* Key: a datagram on its way. Value: what its first fragment said. */
BPF_TABLE("lru_hash", struct fragment_key, struct fragment_value, fragments, FRAGMENTED_DATAGRAMS);

static __always_inline void fill_fragment_key(const struct packet *packet, struct fragment_key *key)
{
	__builtin_memcpy(key->source, packet->key.source, sizeof(key->source));
	__builtin_memcpy(key->destination, packet->key.destination, sizeof(key->destination));
	key->id = packet->fragment_id;
	key->protocol = packet->ipv6 ? 0 : packet->key.protocol;
}

static __always_inline void remember_first_fragment(const struct packet *packet, __u8 level)
{
	struct fragment_key key;
	struct fragment_value value = {
		.source_port = packet->key.source_port,
		.destination_port = packet->key.destination_port,
		.protocol = packet->key.protocol,
		.level = level,
	};

	fill_fragment_key(packet, &key);
	fragments.update(&key, &value);
}

/* Completes the key of a later fragment; returns what its first one said, or nothing. */
static __always_inline struct fragment_value *find_first_fragment(struct packet *packet)
{
	struct fragment_key key;
	struct fragment_value *first;

	fill_fragment_key(packet, &key);
	first = fragments.lookup(&key);
	if (first) {
		packet->key.source_port = first->source_port;
		packet->key.destination_port = first->destination_port;
		packet->key.protocol = first->protocol;
	}
	return first;
}
