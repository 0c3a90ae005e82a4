/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Parsing: from an Ethernet frame to a flow key, the payload length and what TCP says about the flow's life.
 * Whatever is not certainly IPv4 or IPv6 with TCP or UDP right behind it is refused with a reason, never guessed at.
 *
 * Reads packet memory directly. Where the headers are not in linear memory, `parse` says NEEDS_PULL and the caller
 * brings them there first; that is rare, as local sockets always put headers into linear memory.
 */
#pragma once

#define MAX_HEADER_BYTES (ETH_HLEN + 60 + 60) /* Ethernet, the longest IPv4 header, the longest TCP header */
#define NEEDS_PULL (-1)

#define IPV4_FRAGMENT_BITS 0x3fff /* more-fragments and offset; don't-fragment is none of our concern */

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
};

struct packet {
	struct flow_key key;
	__u32 payload_bytes; /* of all GSO segments together */
	__u8 tcp_flags;      /* 0 for UDP */
	__u8 dscp;
	__u8 ipv6;
};

/* Transport header at `offset`; `ip_payload_bytes` is what the IP header says follows it. */
static __always_inline int parse_transport(struct __sk_buff *skb, struct packet *packet, __u32 offset,
					   __u32 ip_payload_bytes)
{
	void *data = (void *)(long)skb->data;
	void *data_end = (void *)(long)skb->data_end;
	__u32 header_bytes = sizeof(struct udphdr);

	/* A GSO packet carries one set of headers and the payload of all segments; its IP length is no guide
	 * (0 beyond 64 KB). Any other packet may be padded behind what its IP header says. */
	if (skb->gso_size && skb->len > offset)
		ip_payload_bytes = skb->len - offset;
	else if (skb->len < offset + ip_payload_bytes)
		return MALFORMED;

	if (packet->key.protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = data + offset;
		__u8 *bytes = data + offset;

		if ((void *)(tcp + 1) > data_end)
			return NEEDS_PULL;
		packet->key.source_port = bpf_ntohs(tcp->source);
		packet->key.destination_port = bpf_ntohs(tcp->dest);
		packet->tcp_flags = bytes[13];
		header_bytes = (bytes[12] >> 4) * 4;
		if (header_bytes < sizeof(*tcp))
			return MALFORMED;
	} else {
		struct udphdr *udp = data + offset;

		if ((void *)(udp + 1) > data_end)
			return NEEDS_PULL;
		packet->key.source_port = bpf_ntohs(udp->source);
		packet->key.destination_port = bpf_ntohs(udp->dest);
		packet->tcp_flags = 0;
	}
	if (ip_payload_bytes < header_bytes)
		return MALFORMED;
	packet->payload_bytes = ip_payload_bytes - header_bytes;
	return PARSED;
}

static __always_inline int parse_ipv4(struct __sk_buff *skb, struct packet *packet)
{
	void *data = (void *)(long)skb->data;
	void *data_end = (void *)(long)skb->data_end;
	struct iphdr *ip = data + ETH_HLEN;
	__u32 header_bytes, total_bytes;

	if ((void *)(ip + 1) > data_end)
		return NEEDS_PULL;
	header_bytes = ip->ihl * 4;
	total_bytes = bpf_ntohs(ip->tot_len);
	if (ip->version != 4 || header_bytes < sizeof(*ip))
		return MALFORMED;
	if (ip->frag_off & bpf_htons(IPV4_FRAGMENT_BITS))
		return FRAGMENT;
	if (ip->protocol != IPPROTO_TCP && ip->protocol != IPPROTO_UDP)
		return OTHER_PROTOCOL;
	if (!skb->gso_size && total_bytes < header_bytes)
		return MALFORMED;

	packet->key.source[0] = 0;
	packet->key.source[1] = 0;
	packet->key.source[2] = bpf_htonl(0xffff);
	packet->key.source[3] = ip->saddr;
	packet->key.destination[0] = 0;
	packet->key.destination[1] = 0;
	packet->key.destination[2] = bpf_htonl(0xffff);
	packet->key.destination[3] = ip->daddr;
	packet->key.protocol = ip->protocol;
	packet->dscp = ip->tos >> 2;
	packet->ipv6 = 0;
	return parse_transport(skb, packet, ETH_HLEN + header_bytes, total_bytes - header_bytes);
}

static __always_inline int is_extension_header(__u8 next_header)
{
	/* hop-by-hop, routing, encapsulating security, authentication, destination options, mobility, HIP, shim6 */
	return next_header == 0 || next_header == 43 || next_header == 50 || next_header == 51 || next_header == 60 ||
	       next_header == 135 || next_header == 139 || next_header == 140;
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, struct packet *packet)
{
	void *data = (void *)(long)skb->data;
	void *data_end = (void *)(long)skb->data_end;
	struct ipv6hdr *ip = data + ETH_HLEN;
	int i;

	if ((void *)(ip + 1) > data_end)
		return NEEDS_PULL;
	if (ip->version != 6)
		return MALFORMED;
	if (ip->nexthdr == IPPROTO_FRAGMENT)
		return FRAGMENT;
	if (is_extension_header(ip->nexthdr))
		return EXTENSION_HEADER;
	if (ip->nexthdr != IPPROTO_TCP && ip->nexthdr != IPPROTO_UDP)
		return OTHER_PROTOCOL;

#pragma unroll
	for (i = 0; i < 4; i++) {
		packet->key.source[i] = ip->saddr.in6_u.u6_addr32[i];
		packet->key.destination[i] = ip->daddr.in6_u.u6_addr32[i];
	}
	packet->key.protocol = ip->nexthdr;
	packet->dscp = (bpf_ntohs(*(__be16 *)ip) >> 6) & 0x3f;
	packet->ipv6 = 1;
	return parse_transport(skb, packet, ETH_HLEN + sizeof(*ip), bpf_ntohs(ip->payload_len));
}

/* PARSED, NEEDS_PULL or the reason why this packet is not tracked. */
static __always_inline int parse(struct __sk_buff *skb, struct packet *packet)
{
	void *data = (void *)(long)skb->data;
	void *data_end = (void *)(long)skb->data_end;
	struct ethhdr *ethernet = data;

	if ((void *)(ethernet + 1) > data_end)
		return NEEDS_PULL;
	if (ethernet->h_proto == bpf_htons(ETH_P_IP))
		return parse_ipv4(skb, packet);
	if (ethernet->h_proto == bpf_htons(ETH_P_IPV6))
		return parse_ipv6(skb, packet);
	if (ethernet->h_proto == bpf_htons(ETH_P_8021Q) || ethernet->h_proto == bpf_htons(ETH_P_8021AD))
		return VLAN;
	return NOT_IP;
}

/* As `parse`, after bringing the headers into linear memory where they are not. */
static __always_inline int parse_anywhere(struct __sk_buff *skb, struct packet *packet)
{
	int result = parse(skb, packet);
	__u32 wanted_bytes = skb->len;

	if (result != NEEDS_PULL)
		return result;
	if (wanted_bytes <= (__u32)(skb->data_end - skb->data))
		return MALFORMED; /* all of it is linear already: it is that short */
	if (wanted_bytes > MAX_HEADER_BYTES)
		wanted_bytes = MAX_HEADER_BYTES;
	if (bpf_skb_pull_data(skb, wanted_bytes))
		return UNREADABLE;
	result = parse(skb, packet);
	return result == NEEDS_PULL ? MALFORMED : result;
}
