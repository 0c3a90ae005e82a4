/* SPDX-License-Identifier: GPL-2.0-only
 *
 * The socket behind a packet: what a local TCP sender knows and the packet does not say.
 *
 * Acknowledged, round-trip time and state are stable ABI (struct bpf_tcp_sock). How much the application has written
 * is not: its place in struct tcp_sock comes from the running kernel's BTF as WRITE_SEQ_OFFSET and so on, defined by
 * the loader (hostagent/datapath/backlog_offsets.py) where there is BTF. UDP, and packets forwarded from virtual machines
 * or other hosts, have no such socket; neither has what the kernel sends for one that is not whole (SYN-ACK, TIME-WAIT).
 */
#pragma once

#define TCP_ESTABLISHED_STATE 1
#define TCP_CLOSE_STATE 7
#define TCP_CLOSE_WAIT_STATE 8

struct sender {
	__u64 sent_ns; /* when TCP let the packet go, CLOCK_MONOTONIC; 0: not known */
	__u32 una;     /* first byte that is not acknowledged */
	__u32 next;    /* first byte that was never sent; this packet's, unless it is a retransmission */
	__u32 written; /* behind the last byte the application has written; SEES_BACKLOG only */
	__u32 srtt_us; /* smoothed round-trip time, eightfold as TCP keeps it */
	__u8 known;    /* 0: all others mean nothing */
};

#ifdef WRITE_SEQ_OFFSET
#define SEES_BACKLOG 1
#define TCP_SOCK_FIELD(type, tcp, offset) (*(type *)((void *)(tcp) + (offset)))
#else
#define SEES_BACKLOG 0
#endif

static __always_inline void ask_socket(struct __sk_buff *skb, const struct packet *packet, struct sender *sender)
{
	struct bpf_sock *socket = skb->sk;

	sender->known = 0;
	sender->sent_ns = 0;
	/* Saves the calls for raw sockets and for what a closed connection still sends. */
	if (!socket || packet->key.protocol != IPPROTO_TCP || socket->state == TCP_CLOSE_STATE)
		return;
#if SEES_BACKLOG
	struct tcp_sock *tcp = bpf_skc_to_tcp_sock(socket);

	if (!tcp)
		return;
	sender->una = TCP_SOCK_FIELD(__u32, tcp, SND_UNA_OFFSET);
	sender->next = TCP_SOCK_FIELD(__u32, tcp, SND_NXT_OFFSET);
	sender->written = TCP_SOCK_FIELD(__u32, tcp, WRITE_SEQ_OFFSET);
	sender->srtt_us = TCP_SOCK_FIELD(__u32, tcp, SRTT_OFFSET);
#else
	struct bpf_tcp_sock *tcp;

	socket = bpf_sk_fullsock(socket);
	tcp = socket ? bpf_tcp_sock(socket) : 0;
	if (!tcp)
		return;
	sender->una = tcp->snd_una;
	sender->next = tcp->snd_nxt;
	sender->srtt_us = tcp->srtt_us;
#endif
	sender->sent_ns = skb->tstamp;
	sender->known = 1;
}
