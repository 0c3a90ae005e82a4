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

/* Bytes that are known to wait: what this packet adds, and what is written and not sent yet. `next_sequence` is where the
 * unsent begins; behind a packet that is sent again also lies what is in flight, and was counted when it was sent.
 * At most 0: not known. */
static __always_inline __s32 waiting_bytes(__u32 next_sequence, const struct work *work)
{
#if SEES_BACKLOG
	if (work->sender.known)
		return reread(work->new_bytes) + (work->sender.written - next_sequence);
#endif
	return 0;
}

/* The number that is compared with the thresholds for this packet, before which `attained_bytes` were sent. */
static __always_inline __u64 rank_of(__u64 attained_bytes, __u32 next_sequence, const struct work *work,
				     const struct hint *hint, const struct settings *settings)
{
	__u64 known_bytes = attained_bytes;
	__s32 waiting = settings->use_backlog ? waiting_bytes(next_sequence, work) : 0;

	/* A message's last byte decides, as it does when all of it was sent. */
	if (waiting > 0)
		known_bytes += waiting - 1;
	if (hint && hint_position(hint, &work->packet) < hint->bytes && known_bytes < hint->bytes)
		known_bytes = hint->bytes - 1;
	return known_bytes;
}
