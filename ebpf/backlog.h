/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Backlog: ranks a packet by how much of its message is known to exist, not by how much was sent.
 *
 *   bytes sent before it                             what everybody can know (AuTO, PIAS)
 *   bytes the application has written                no fewer: the rest waits in the send buffer
 *   bytes the application has announced              no fewer, if it does (hint.h)
 *
 * The largest counts, so a message is placed where it belongs as soon as it is written, and then only sinks: what is
 * known to exist never becomes less. Ranking by what remains would let a message rise again as it is sent; its packets
 * would overtake each other in the fabric. docs/backlog.md has what both cost.
 */
#pragma once

/* The number that is compared with the thresholds for this packet, before which `attained_bytes` were sent; no packet
 * has carried the byte `next_sequence` yet, nor those behind it. */
static __always_inline __u64 rank_of(__u64 attained_bytes, __u32 next_sequence, const struct packet *packet,
				     const struct sender *sender, const struct hint *hint,
				     const struct settings *settings)
{
	__u64 known_bytes = attained_bytes;

#if SEES_BACKLOG
	if (sender->known && settings->use_backlog) {
		/* This packet's payload, and what is unsent: not all behind a packet that is sent again, which was counted. */
		__u32 ahead = packet->payload_bytes + (sender->written - next_sequence);

		/* A message's last byte decides, as it does when all of it was sent. */
		if ((__s32)ahead > 0)
			known_bytes += ahead - 1;
	}
#endif
	if (hint && hint_position(hint, packet) < hint->bytes && known_bytes < hint->bytes)
		known_bytes = hint->bytes - 1;
	return known_bytes;
}
