/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Parsing: from an Ethernet frame to a flow key, the payload length and what TCP says about the flow's life.
 *
 *   Ethernet, up to two VLAN tags -> IPv4 with options | IPv6 with extension headers -> TCP | UDP
 *
 * Whatever is not certainly that is refused with a reason, never guessed at. A fragment is told apart: its first one
 * has ports, later ones only an identification (fragment.h makes the connection).
 *
 * The packet at work is kept in a map, one per CPU, and not on the stack: the verifier follows every value on the stack
 * and walks the rest of the program once for each way that led there, but knows nothing of values in maps. So all ways
 * become one behind Ethernet, behind IP and behind TCP or UDP. `reread` is where that happens.
 *
 * Reads packet memory directly. Where the headers are not in linear memory, `parse` says NEEDS_PULL and the caller
 * brings them there first; that is rare, as local sockets always put headers into linear memory. Extension headers
 * are rare, too, and read through a helper, which finds them wherever they are.
 */
#pragma once

#define VLAN_TAGS 2 /* 802.1ad and 802.1Q; a tag that the kernel keeps beside the packet comes on top */
#define VLAN_TAG_BYTES 4
#define TAG_BYTES_MASK 0x0c    /* two tags of four bytes */
#define NETWORK_BYTES_MASK 0x1fc /* those, IP header and extension headers: less than 512, all multiples of four */
#define EXTENSION_HEADERS 6 /* all kinds once; a packet with more is refused */
#define MAX_EXTENSION_BYTES 256

/* Ethernet, tags, the longest IP header (60 for IPv4), the longest TCP header. */
#define MAX_HEADER_BYTES (ETH_HLEN + VLAN_TAGS * VLAN_TAG_BYTES + 40 + MAX_EXTENSION_BYTES + 60)
#define NEEDS_PULL (-1)

/* The value as it is in memory, not as compiler or verifier remember it. */
#define reread(place) (*(volatile __typeof__(place) *)&(place))

/* What stands before it in memory is written before what stands behind it. */
#define barrier() asm volatile("" ::: "memory")

/* The offset of a header behind Ethernet's, with what the verifier has forgotten: its bounds and alignment. */
#define header_offset(place, mask) (ETH_HLEN + (reread(place) - ETH_HLEN & (mask)))

#define IPV4_MORE_FRAGMENTS 0x2000
#define IPV4_OFFSET_MASK 0x1fff
#define IPV6_MORE_FRAGMENTS 0x0001
#define IPV6_OFFSET_MASK 0xfff8

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04

/* One flow. IPv4 addresses are IPv4-mapped (::ffff:a.b.c.d), so one table serves both; ports in host order. */
struct flow_key {
	__be32 source[4];
	__be32 destination[4];
	__u16 source_port;
	__u16 destination_port;
	__u8 protocol;
	__u8 pad[3]; /* always 0: it is part of the hashed key */
} __attribute__((aligned(8)));

/* Keys are written a word at a time, as they are read (flow_table.h): a load that spans two stores waits until both have
 * left the CPU's store buffer, and they wait for whatever a packet before this one waits for. */
union key_word {
	__u64 word;
	__be32 address[2];
	struct {
		__u16 source_port;
		__u16 destination_port;
		__u8 protocol;
		__u8 pad[3];
	};
};

#define KEY_WORDS (sizeof(struct flow_key) / sizeof(__u64))
#define ADDRESS_WORDS 2
#define PORTS_WORD (2 * ADDRESS_WORDS)

static __always_inline __u64 *key_words(const struct flow_key *key)
{
	return (__u64 *)key;
}

static __always_inline __u64 two_of_an_address(__be32 first, __be32 second)
{
	union key_word both = {.address = {first, second}};

	return both.word;
}

enum fragment {
	WHOLE,
	FIRST_FRAGMENT, /* has ports */
	LATER_FRAGMENT, /* has none: ports, and for IPv6 the protocol, are yet to be found */
};

struct packet {
	struct flow_key key;
	__u32 payload_bytes;  /* of all GSO segments together */
	__u32 sequence;       /* TCP: of the first payload byte, or of the SYN */
	__u32 fragment_id;    /* identification, where `fragment` is not WHOLE */
	__u32 transport_bytes; /* what the IP headers say follows them; of GSO packets no guide */
	__u16 network_offset;   /* of the IP header */
	__u16 transport_offset; /* of the TCP or UDP header */
	__u8 tcp_flags;         /* 0 for UDP and later fragments */
	__u8 dscp;
	__u8 ipv6;
	__u8 fragment; /* enum fragment */
};

static __always_inline int parse_transport(struct __sk_buff *skb, struct packet *packet)
{
	void *data = (void *)(long)skb->data;
	void *data_end = (void *)(long)skb->data_end;
	__u32 offset = header_offset(packet->transport_offset, NETWORK_BYTES_MASK);
	__u32 ip_payload_bytes = reread(packet->transport_bytes);
	__u32 header_bytes = sizeof(struct udphdr);
	union key_word ports = {};

	/* A GSO packet carries one set of headers and the payload of all segments; its IP length is no guide
	 * (0 beyond 64 KB). Any other packet may be padded behind what its IP header says. */
	if (skb->gso_size && skb->len > offset)
		ip_payload_bytes = skb->len - offset;
	else if (skb->len < offset + ip_payload_bytes)
		return MALFORMED;

	if (reread(packet->fragment) == LATER_FRAGMENT) {
		packet->payload_bytes = ip_payload_bytes;
		return PARSED;
	}
	ports.protocol = reread(packet->key.protocol);
	if (ports.protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = data + offset;
		__u8 *bytes = data + offset;

		if ((void *)(tcp + 1) > data_end)
			return NEEDS_PULL;
		ports.source_port = bpf_ntohs(tcp->source);
		ports.destination_port = bpf_ntohs(tcp->dest);
		packet->sequence = bpf_ntohl(tcp->seq);
		packet->tcp_flags = bytes[13];
		header_bytes = (bytes[12] >> 4) * 4;
		if (header_bytes < sizeof(*tcp))
			return MALFORMED;
	} else {
		struct udphdr *udp = data + offset;

		if ((void *)(udp + 1) > data_end)
			return NEEDS_PULL;
		ports.source_port = bpf_ntohs(udp->source);
		ports.destination_port = bpf_ntohs(udp->dest);
	}
	key_words(&packet->key)[PORTS_WORD] = ports.word;
	if (ip_payload_bytes < header_bytes)
		return MALFORMED;
	packet->payload_bytes = ip_payload_bytes - header_bytes;
	return PARSED;
}

static __always_inline int parse_ipv4(struct __sk_buff *skb, struct packet *packet)
{
	void *data = (void *)(long)skb->data;
	void *data_end = (void *)(long)skb->data_end;
	__u32 offset = header_offset(packet->network_offset, TAG_BYTES_MASK);
	struct iphdr *ip = data + offset;
	__u64 *words = key_words(&packet->key);
	__u32 header_bytes, total_bytes;
	__u16 fragment_bits;

	if ((void *)(ip + 1) > data_end)
		return NEEDS_PULL;
	header_bytes = ip->ihl * 4;
	total_bytes = bpf_ntohs(ip->tot_len);
	if (ip->version != 4 || header_bytes < sizeof(*ip))
		return MALFORMED;
	if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP)
		return OTHER_PROTOCOL;
	if (!skb->gso_size && total_bytes < header_bytes)
		return MALFORMED;
	fragment_bits = bpf_ntohs(ip->frag_off);
	if (fragment_bits & (IPV4_MORE_FRAGMENTS | IPV4_OFFSET_MASK)) {
		packet->fragment = fragment_bits & IPV4_OFFSET_MASK ? LATER_FRAGMENT : FIRST_FRAGMENT;
		packet->fragment_id = ip->id;
	}

	words[1] = two_of_an_address(bpf_htonl(0xffff), ip->saddr);
	words[ADDRESS_WORDS + 1] = two_of_an_address(bpf_htonl(0xffff), ip->daddr);
	packet->key.protocol = ip->protocol;
	packet->dscp = ip->tos >> 2;
	packet->transport_offset = offset + header_bytes;
	packet->transport_bytes = total_bytes - header_bytes;
	return PARSED;
}

/* What every extension header starts with, and all of a fragment header. */
struct extension {
	__u8 next_header;
	__u8 length;
	__be16 offset; /* of a fragment, and whether more of them follow */
	__be32 id;
};

static __always_inline int is_extension_header(__u8 next_header)
{
	/* hop-by-hop, routing, fragment, encapsulating security, authentication, destination options, mobility, HIP,
	 * shim6 */
	return next_header == 0 || next_header == 43 || next_header == 44 || next_header == 50 || next_header == 51 ||
	       next_header == 60 || next_header == 135 || next_header == 139 || next_header == 140;
}

/* Moves the packet's transport header behind the extension headers, and its protocol to what is there. */
static __always_inline int skip_extension_headers(struct __sk_buff *skb, struct packet *packet)
{
	__u32 begin = reread(packet->transport_offset), skipped_bytes;
	struct extension header;
	int i;

#pragma nounroll
	for (i = 0; i < EXTENSION_HEADERS; i++) {
		__u8 next = reread(packet->key.protocol);
		__u32 at = reread(packet->transport_offset);

		if (!is_extension_header(next) || reread(packet->fragment) == LATER_FRAGMENT)
			break;
		if (next == IPPROTO_ESP)
			return EXTENSION_HEADER; /* what follows is encrypted */
		if (bpf_skb_load_bytes(skb, at, &header, sizeof(header)))
			return MALFORMED; /* none is shorter */
		if (next == IPPROTO_FRAGMENT) {
			/* Neither offset nor more to come: an atomic fragment (RFC 6946), which is a whole packet. */
			if (header.offset & bpf_htons(IPV6_OFFSET_MASK))
				packet->fragment = LATER_FRAGMENT;
			else if (header.offset & bpf_htons(IPV6_MORE_FRAGMENTS))
				packet->fragment = FIRST_FRAGMENT;
			packet->fragment_id = header.id;
			at += sizeof(header);
		} else {
			at += next == IPPROTO_AH ? (header.length + 2) * 4 : (header.length + 1) * 8;
		}
		packet->transport_offset = at;
		packet->key.protocol = header.next_header;
	}
	skipped_bytes = reread(packet->transport_offset) - begin;
	if (skipped_bytes > MAX_EXTENSION_BYTES ||
	    (is_extension_header(reread(packet->key.protocol)) && reread(packet->fragment) != LATER_FRAGMENT))
		return EXTENSION_HEADER; /* more than anybody sends */
	if (!skb->gso_size && packet->transport_bytes < skipped_bytes)
		return MALFORMED;
	packet->transport_bytes -= skipped_bytes;
	return PARSED;
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, struct packet *packet)
{
	void *data = (void *)(long)skb->data;
	void *data_end = (void *)(long)skb->data_end;
	__u32 offset = header_offset(packet->network_offset, TAG_BYTES_MASK);
	struct ipv6hdr *ip = data + offset;
	__u64 *words = key_words(&packet->key);
	__u8 protocol;
	int i, result;

	if ((void *)(ip + 1) > data_end)
		return NEEDS_PULL;
	if (ip->version != 6)
		return MALFORMED;
#pragma unroll
	for (i = 0; i < ADDRESS_WORDS; i++) {
		words[i] = two_of_an_address(ip->saddr.in6_u.u6_addr32[2 * i], ip->saddr.in6_u.u6_addr32[2 * i + 1]);
		words[ADDRESS_WORDS + i] =
			two_of_an_address(ip->daddr.in6_u.u6_addr32[2 * i], ip->daddr.in6_u.u6_addr32[2 * i + 1]);
	}
	packet->dscp = (bpf_ntohs(*(__be16 *)ip) >> 6) & 0x3f;
	packet->ipv6 = 1;
	packet->key.protocol = ip->nexthdr;
	packet->transport_offset = offset + sizeof(*ip);
	packet->transport_bytes = bpf_ntohs(ip->payload_len);
	if (is_extension_header(packet->key.protocol)) {
		result = skip_extension_headers(skb, packet);
		if (result != PARSED)
			return result;
	}
	protocol = reread(packet->key.protocol);
	if (protocol != IPPROTO_TCP && protocol != IPPROTO_UDP && reread(packet->fragment) != LATER_FRAGMENT)
		return OTHER_PROTOCOL;
	return PARSED;
}

static __always_inline int is_vlan_tag(__be16 ethertype)
{
	return ethertype == bpf_htons(ETH_P_8021Q) || ethertype == bpf_htons(ETH_P_8021AD);
}

/* PARSED, NEEDS_PULL or the reason why this packet is not tracked. `packet` is all zeroes before. */
static __always_inline int parse(struct __sk_buff *skb, struct packet *packet)
{
	void *data = (void *)(long)skb->data;
	void *data_end = (void *)(long)skb->data_end;
	struct ethhdr *ethernet = data;
	__be16 ethertype;
	int i, result;

	if ((void *)(ethernet + 1) > data_end)
		return NEEDS_PULL;
	ethertype = ethernet->h_proto;
	packet->network_offset = ETH_HLEN;
#pragma unroll
	for (i = 0; i < VLAN_TAGS; i++) {
		__be16 *behind_tag = data + packet->network_offset + VLAN_TAG_BYTES;

		if (!is_vlan_tag(ethertype))
			break;
		if ((void *)behind_tag > data_end)
			return NEEDS_PULL;
		ethertype = behind_tag[-1];
		packet->network_offset += VLAN_TAG_BYTES;
	}
	if (ethertype == bpf_htons(ETH_P_IP))
		result = parse_ipv4(skb, packet);
	else if (ethertype == bpf_htons(ETH_P_IPV6))
		result = parse_ipv6(skb, packet);
	else
		result = is_vlan_tag(ethertype) ? VLAN : NOT_IP;
	return result == PARSED ? parse_transport(skb, packet) : result;
}

/* As `parse`, after bringing the headers into linear memory where they are not. */
static __always_inline int parse_anywhere(struct __sk_buff *skb, struct packet *packet)
{
	int result = NEEDS_PULL, attempt;

#pragma nounroll
	for (attempt = 0; attempt < 2; attempt++) {
		__u32 wanted_bytes = skb->len;

		__builtin_memset(packet, 0, sizeof(*packet));
		result = parse(skb, packet);
		if (result != NEEDS_PULL)
			return result;
		if (wanted_bytes <= (__u32)(skb->data_end - skb->data))
			return MALFORMED; /* all of it is linear already: it is that short */
		if (wanted_bytes > MAX_HEADER_BYTES)
			wanted_bytes = MAX_HEADER_BYTES;
		if (bpf_skb_pull_data(skb, wanted_bytes))
			return UNREADABLE;
	}
	return MALFORMED;
}
