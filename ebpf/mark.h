/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Marking: writes a level's DSCP into the IP header, ECN bits untouched, and its priority into the packet.
 *
 * Writes through bpf_skb_store_bytes, not directly: direct writes make the verifier put code in front of the program
 * that drops the packet when a shared header cannot be copied for lack of memory. This way it goes out as it was.
 */
#pragma once

#define IPV4_REWRITE_BYTES 12 /* from the version to the header checksum */
#define IPV6_DSCP_MASK 0x0fc0 /* in the first 16 bits: version 4, DSCP 6, ECN 2, flow label 4 */

static __always_inline long write_dscp_ipv4(struct __sk_buff *skb, __u32 offset, __u8 dscp)
{
	void *data = (void *)(long)skb->data;
	void *data_end = (void *)(long)skb->data_end;
	__u16 *words = data + offset;
	__u16 header[IPV4_REWRITE_BYTES / 2];
	__u32 sum;
	__u8 *tos = (__u8 *)header + 1;
	int i;

	if ((void *)words + IPV4_REWRITE_BYTES > data_end)
		return -1;
#pragma unroll
	for (i = 0; i < IPV4_REWRITE_BYTES / 2; i++)
		header[i] = words[i];
	*tos = dscp << 2 | (*tos & 3);

	/* RFC 1624, equation 3: HC' = ~(~HC + ~m + m') in one's complement, m the word that holds the DSCP. */
	sum = (__u16)~header[5] + (__u16)~words[0] + header[0];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	header[5] = ~sum;
	return bpf_skb_store_bytes(skb, offset, header, sizeof(header), 0);
}

static __always_inline long write_dscp_ipv6(struct __sk_buff *skb, __u32 offset, __u8 dscp)
{
	void *data = (void *)(long)skb->data;
	void *data_end = (void *)(long)skb->data_end;
	__be16 *first = data + offset;
	__be16 word;

	if ((void *)(first + 1) > data_end)
		return -1;
	word = bpf_htons((bpf_ntohs(*first) & ~IPV6_DSCP_MASK) | dscp << 6);
	/* No header checksum, but a checksum the NIC took of the whole packet must follow the change. */
	return bpf_skb_store_bytes(skb, offset, &word, sizeof(word), BPF_F_RECOMPUTE_CSUM);
}

/* Gives the packet its level, unless it carries a DSCP that is to be respected. Packet pointers are stale after it. */
static __always_inline void mark(struct __sk_buff *skb, const struct work *work, __u32 segments,
				 const struct settings *settings, struct counters *counters)
{
	const struct packet *packet = &work->packet;
	__u32 level = reread(work->level) & (MAX_LEVELS - 1);
	__u8 dscp = settings->dscp[level];
	__u32 priority = settings->priority[level];
	__u32 offset;

	if (!settings->levels) {
		counters->untagged += segments;
		return;
	}
	if (!(settings->writable_dscp >> packet->dscp & 1)) {
		counters->foreign_dscp += segments;
		return;
	}
	counters->packets[level] += segments;
	counters->bytes[level] += packet->payload_bytes;
	if (settings->observe || work->treatment == TREAT_OBSERVE) {
		counters->observed += segments;
		return;
	}
	if (skb->priority != priority)
		skb->priority = priority;
	if (packet->dscp == dscp)
		return;
	offset = header_offset(packet->network_offset, TAG_BYTES_MASK);
	if (packet->ipv6 ? write_dscp_ipv6(skb, offset, dscp) : write_dscp_ipv4(skb, offset, dscp))
		counters->write_failed++;
}
