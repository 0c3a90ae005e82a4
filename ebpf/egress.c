/* SPDX-License-Identifier: GPL-2.0-only
 *
 * The egress program: gives every TCP and UDP packet that leaves a NIC the level its flow has earned.
 * Hook: tcx egress, or clsact egress with direct action; both before the qdisc sees the packet.
 *
 *   1. parse    Ethernet, VLAN, IPv4 or IPv6, TCP or UDP; anything else is counted and left alone
 *                                                                                  (parse.h, fragment.h, counters.h)
 *   2. account  find or insert the flow, add the payload, compare with the thresholds         (flow.h, level.h, admission.h)
 *   3. steer    the operator's rules and central's verdict come before the thresholds         (rules.h, verdict.h)
 *   4. mark     DSCP for the fabric, skb->priority for the NIC's own queues                   (mark.h)
 *   5. route    where a rule or a verdict wants another way than the kernel's                 (route.h)
 *
 * It returns TC_ACT_UNSPEC, so other programs on the NIC still run, except for a packet that it sends out of another
 * interface. No path of it drops a packet.
 * UAPI headers and __sk_buff only: it runs on any kernel from 5.15 on without kernel headers or BTF.
 * FLOW_BUCKETS, the size of the flow table, is defined by the loader (hostagent/datapath/source.py).
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>
#include <linux/udp.h>

#include "counters.h"
#include "parse.h"
#include "fragment.h"
#include "level.h"
#include "socket.h"
#include "hint.h"
#include "send_buffer.h"
#include "flow.h"
#include "rules.h"
#include "verdict.h"
#include "mark.h"
#include "route.h"
#include "flow_access.h"

int fabricpilot_egress(struct __sk_buff *skb)
{
	__u32 zero = 0, segments = skb->gso_segs ? skb->gso_segs : 1;
	struct counters *count = counters.lookup(&zero);
	struct settings *settings = settings_in_force();
	struct steering *steering_now = steering.lookup(&zero);
	struct work *work = at_work.lookup(&zero);
	struct packet *packet;
	struct flow_state *flow;
	struct fragment_value *first = 0;
	int reason;

	if (!work || !count || !settings || !steering_now)
		return TC_ACT_UNSPEC; /* cannot be: array maps always have their entries */
	if (skb->tc_index == ROUTED) {
		skb->tc_index = 0; /* we sent it here from another NIC: accounted and marked */
		return TC_ACT_UNSPEC;
	}
	packet = &work->packet;
	reason = parse_anywhere(skb, packet);
	if (reason == PARSED && packet->fragment == LATER_FRAGMENT) {
		first = find_first_fragment(packet);
		if (!first)
			reason = FRAGMENT;
	}
	if (reason != PARSED) {
		count->untracked[reason & (UNTRACKED_REASONS - 1)] += segments;
		return TC_ACT_UNSPEC;
	}
	if (skb->gso_size && !skb->gso_segs && packet->payload_bytes) /* from a virtual machine: not counted yet */
		segments = (packet->payload_bytes + skb->gso_size - 1) / skb->gso_size;
	flow = account(skb, work, segments, settings, count);
	steer(skb, work, flow, settings, steering_now);
	if (work->fresh)
		flow = insert_flow(work, count);
	if (packet->fragment == FIRST_FRAGMENT)
		remember_first_fragment(packet, work->level);
	else if (first)
		work->level = first->level; /* one datagram, one level: its fragments keep their order */
	if (work->treatment == TREAT_EXCLUDE) {
		count->excluded += segments;
		return TC_ACT_UNSPEC;
	}
	mark(skb, work, segments, settings, count);
	if (!flow || settings->observe || work->treatment)
		return TC_ACT_UNSPEC;
	return take_route(skb, work, flow, segments, steering_now, count);
}
