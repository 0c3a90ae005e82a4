/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The few kernel structures the transport programs touch.
 *
 * Only the members that are used, in any order: the loader (libbpf, CO-RE) finds their real offsets in the running
 * kernel's BTF, so no kernel headers and no generated vmlinux.h are needed. A member the kernel lacks fails the load
 * by its name.
 */
#ifndef FABRICPILOT_TRANSPORT_KERNEL_TYPES_H
#define FABRICPILOT_TRANSPORT_KERNEL_TYPES_H

#include <linux/types.h>

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

/* --- sockets (dctcp.bpf.c) --- */

struct sock_common {
	__be16 skc_dport;
	__u16 skc_num;
	volatile unsigned char skc_state;
};

struct sock {
	struct sock_common __sk_common;
	unsigned long sk_pacing_rate;
	unsigned long sk_max_pacing_rate;
};

struct inet_sock {
	struct sock sk;
};

struct inet_connection_sock {
	struct inet_sock icsk_inet;
	__u32 icsk_rto;
	__u8 icsk_ca_state : 5;
	struct {
		__u8 pending;
	} icsk_ack;
	__u64 icsk_ca_priv[13];
};

struct tcp_sock {
	struct inet_connection_sock inet_conn;
	__u32 rcv_nxt;
	__u32 rcv_wup;
	__u32 snd_nxt;
	__u32 snd_una;
	__u32 snd_cwnd;
	__u32 snd_cwnd_cnt;
	__u32 snd_ssthresh;
	__u32 high_seq;
	__u32 delivered;
	__u32 packets_out;
	__u32 sacked_out;
	__u32 lost_out;
	__u32 retrans_out;
	__u32 prr_out;
	__u32 mss_cache;
	__u32 srtt_us;
	__u32 lsndtime;
	__u8 ecn_flags;
};

/* State of the receiver's delayed ACK, bits of icsk_ack.pending. */
enum inet_csk_ack_state_t {
	ICSK_ACK_NOW = 16,
};

enum tcp_ca_event {
	CA_EVENT_TX_START = 0,
	CA_EVENT_ECN_NO_CE = 4,
	CA_EVENT_ECN_IS_CE = 5,
};

enum tcp_ca_ack_event_flags {
	CA_ACK_ECE = 4,
};

struct tcp_congestion_ops {
	char name[16];
	__u32 flags;
	void (*init)(struct sock *sk);
	__u32 (*ssthresh)(struct sock *sk);
	void (*cong_avoid)(struct sock *sk, __u32 ack, __u32 acked);
	void (*cong_control)(struct sock *sk);
	void (*cwnd_event)(struct sock *sk, enum tcp_ca_event event);
	void (*in_ack_event)(struct sock *sk, __u32 flags);
	__u32 (*undo_cwnd)(struct sock *sk);
};

/* --- packets and queues (ecn_marker.bpf.c) --- */

struct hlist_node {
	struct hlist_node *next;
};

struct hlist_head {
	struct hlist_node *first;
};

struct gnet_stats_queue {
	__u32 backlog;
};

struct Qdisc {
	struct hlist_node hash;
	__u32 handle;
	__u32 parent;
	struct gnet_stats_queue qstats;
};

struct net_device {
	struct Qdisc *qdisc;
	struct hlist_head qdisc_hash[16];
};

struct sk_buff {
	struct net_device *dev;
};

#pragma clang attribute pop

#endif
