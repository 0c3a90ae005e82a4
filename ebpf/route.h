/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Routes: sends a flow's packets another way than the kernel would, where a rule or a verdict wants that.
 *
 * A route is a next hop behind an interface (the packet is handed to that interface's neighbour, for either IP version),
 * or an IPv6 flow label for fabrics that spread over equal paths by it. A flow changes its route where a message begins
 * (message.h: a local socket has nothing in flight then) or in a silence of `route_gap_ms`, so that its packets do not
 * overtake each other. A route that user space has withdrawn, or that nobody has watched for long, is left at once: the
 * packet goes where the kernel sent it.
 *
 * A redirected packet passes the egress program of the other interface, too. It is accounted and marked by then; a
 * sign in tc_index says so. The sign is set only where that program is ours, which takes it off again.
 */
#pragma once

#define MAX_ROUTES 64 /* bits of usable_routes; route 0 is the kernel's choice */
#define NS_PER_MS 1000000ULL

#define ROUTE_IPV4 1    /* it serves IPv4 */
#define ROUTE_IPV6 2    /* it serves IPv6 */
#define ROUTE_LABEL 4   /* no next hop: a flow label instead */
#define ROUTE_MANAGED 8 /* the interface has our program */

#define ROUTED 0xfab1 /* tc_index of a packet that has been through all this */

#define IPV6_LABEL_MASK 0x000fffff
#define FAMILY_IPV4 2 /* AF_INET */
#define FAMILY_IPV6 10

/* bcc's own declaration (0.26) forgets the third argument. */
static long (*redirect_to_neighbour)(__u32 interface, struct bpf_redir_neigh *neighbour, int size, __u64 flags) =
	(void *)BPF_FUNC_redirect_neigh;

struct route {
	__u32 interface;
	__u32 flags;
	__u32 flow_label;
	__u32 on_link; /* all ones: the destination is the neighbour, and the next hops are 0 */
	__be32 next_hop_ipv4;
	__be32 next_hop_ipv6[4];
};

/* Key: number of the route. Value: where it leads. */
BPF_ARRAY(routes, struct route, MAX_ROUTES);

static __always_inline int is_usable(const struct steering *steering, __u32 number, __u64 now_ns)
{
	return number && steering->usable_routes >> (number & (MAX_ROUTES - 1)) & 1 &&
	       now_ns < steering->routes_until_ns;
}

/* The route the packet takes: the one wanted, or the one it has until there is a gap. */
static __always_inline __u32 choose_route(struct work *work, struct flow_state *flow, __u32 segments,
					  const struct steering *steering, struct counters *counters)
{
	const struct packet *packet = &work->packet;
	__u64 time_ns = now_ns(work, flow);
	__u32 now_ms = time_ns / NS_PER_MS, silent_ms = now_ms - flow->routed_ms;
	__u32 route = flow->route, wanted = work->route;

	if (wanted && !is_usable(steering, wanted, time_ns)) {
		counters->route_unusable += segments;
		wanted = 0;
	}
	if (route != wanted) {
		int begins = flow->packets <= segments ||
			     (packet->payload_bytes && flow->attained_bytes <= packet->payload_bytes);

		if (begins || !steering->route_gap_ms || (route && !is_usable(steering, route, time_ns)) ||
		    (flow->routed_ms && silent_ms >= steering->route_gap_ms))
			route = wanted;
		if (flow->route != route)
			flow->route = route;
	}
	if (flow->routed_ms != now_ms)
		flow->routed_ms = now_ms;
	return route;
}

/* Whether the IP header is right behind the Ethernet header, with no tag inside or beside the frame. */
static __always_inline int starts_with_ip(struct __sk_buff *skb)
{
	struct ethhdr *ethernet = (void *)(long)skb->data;

	if (skb->vlan_present || (void *)(ethernet + 1) > (void *)(long)skb->data_end)
		return 0;
	return ethernet->h_proto == bpf_htons(ETH_P_IP) || ethernet->h_proto == bpf_htons(ETH_P_IPV6);
}

/* The kernel drops a redirected packet that it cannot hand to a neighbour; such packets go their usual way. */
static __always_inline int can_redirect(struct __sk_buff *skb)
{
	struct ethhdr *ethernet = (void *)(long)skb->data;

	return starts_with_ip(skb) && (void *)(ethernet + 1) <= (void *)(long)skb->data_end &&
	       !(ethernet->h_dest[0] & 1);
}

static __always_inline int label_flow(struct __sk_buff *skb, const struct packet *packet, const struct route *route)
{
	__be32 *first, word;

	if (!starts_with_ip(skb))
		return 0;
	/* The hash of a packet inside a tunnel is where the tunnel's source port comes from: it spreads IPv4 as well. */
	bpf_set_hash(skb, route->flow_label * 0x9e3779b1U);
	if (!packet->ipv6)
		return 0;
	first = (void *)(long)skb->data + ETH_HLEN;
	if ((void *)(first + 1) > (void *)(long)skb->data_end)
		return -1;
	word = bpf_htonl((bpf_ntohl(*first) & ~IPV6_LABEL_MASK) | (route->flow_label & IPV6_LABEL_MASK));
	if (word == *first)
		return 0;
	return bpf_skb_store_bytes(skb, ETH_HLEN, &word, sizeof(word), BPF_F_RECOMPUTE_CSUM);
}

/* Sends the packet on its flow's route; returns the program's verdict. Packet pointers are stale after it. */
static __always_inline int take_route(struct __sk_buff *skb, struct work *work, struct flow_state *flow, __u32 segments,
				      const struct steering *steering, struct counters *counters)
{
	const struct packet *packet = &work->packet;
	struct bpf_redir_neigh neighbour = {};
	struct route *route;
	__u32 number, flags;
	int i;

	if (!work->route && !flow->route)
		return TC_ACT_UNSPEC;
	number = choose_route(work, flow, segments, steering, counters) & (MAX_ROUTES - 1);
	route = number ? routes.lookup(&number) : 0;
	if (!route)
		return TC_ACT_UNSPEC;
	flags = route->flags;
	if (flags & ROUTE_LABEL) {
		if (label_flow(skb, packet, route))
			counters->write_failed++;
		else
			counters->routed += segments;
		return TC_ACT_UNSPEC;
	}
	if (!(flags & (packet->ipv6 ? ROUTE_IPV6 : ROUTE_IPV4)) || !can_redirect(skb)) {
		counters->route_unusable += segments;
		return TC_ACT_UNSPEC;
	}
	if (packet->ipv6) {
		neighbour.nh_family = FAMILY_IPV6;
#pragma unroll
		for (i = 0; i < 4; i++)
			neighbour.ipv6_nh[i] = route->next_hop_ipv6[i] | (packet->key.destination[i] & route->on_link);
	} else {
		neighbour.nh_family = FAMILY_IPV4;
		neighbour.ipv4_nh = route->next_hop_ipv4 | (packet->key.destination[3] & route->on_link);
	}
	if (flags & ROUTE_MANAGED)
		skb->tc_index = ROUTED;
	counters->routed += segments;
	return redirect_to_neighbour(route->interface, &neighbour, sizeof(neighbour), 0);
}
