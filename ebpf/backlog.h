/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Backlog: what the send buffer of a local TCP socket adds to attained service.
 */
#pragma once

#ifndef BACKLOG_RULE
#define BACKLOG_RULE 1
#endif

/* The number that is compared with the thresholds for this packet. */
static __always_inline __u64 rank_of(struct flow_state *flow, __u64 attained_bytes, const struct packet *packet,
				     const struct sender *sender, const struct settings *settings)
{
#if SEES_BACKLOG && BACKLOG_RULE > 0
	if (sender->known && settings->use_backlog) {
#if BACKLOG_RULE == 1
		__u32 ahead = sender->written - packet->sequence; /* this packet's payload, and what is unsent behind it */

		return (__s32)ahead > 0 ? attained_bytes + ahead - 1 : attained_bytes;
#else
		__u32 visible = sender->written - sender->una;

		if ((__s32)visible <= 0)
			return attained_bytes;
		if (sender->blocked)
			return visible > attained_bytes ? visible - 1 : attained_bytes;
		return visible - 1;
#endif
	}
#endif
	return attained_bytes;
}
