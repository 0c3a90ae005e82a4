/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Size hints: an application says how many bytes the message has that it is about to write.
 *
 *     uint64_t bytes = ...;
 *     setsockopt(fd, 0x4650, 1, &bytes, sizeof(bytes));
 *
 * A level of ours, so the kernel refuses it (ENOPROTOOPT) where nobody listens; this cgroup/setsockopt program accepts it
 * for TCP sockets of the cgroups it is attached to, and keeps it with the socket: what the message has, and where in
 * the byte stream it begins. The egress program starts a new message there and ranks it by the larger of what was hinted
 * and what was written. So a hint that is too small buys nothing, and one that was overrun counts no longer.
 */
#pragma once

#define SOL_FABRICPILOT 0x4650 /* "FP"; examples/message_hint.h and message_hint.py say the same */
#define FABRICPILOT_MESSAGE_BYTES 1
#define PAGE_BYTES 4096
#define FAMILY_IPV4 2 /* AF_INET */
#define FAMILY_IPV6 10
#define SOCKOPT_DONE (-1) /* do not hand it to the kernel's own handler */

struct hint {
	__u64 bytes;
	__u32 sequence; /* where the message begins */
	__u32 bound;    /* 0: it begins with the next packet; without BTF, and before the connection is made */
};

/* Key: a socket. Value: the latest hint of its application. */
BPF_SK_STORAGE(hints, struct hint);

/* Key: 0. Value: a place where a pointer becomes a number, which bpf_probe_read_kernel takes. */
BPF_PERCPU_ARRAY(scratch, __u64, 1);

int fabricpilot_hint(struct bpf_sockopt *context)
{
	__u16 *given = context->optval, *end = context->optval_end;
	union {
		__u16 part[4]; /* some machines refuse a word that may not be aligned, and to their verifier it may not */
		__u64 bytes;
	} said;
	struct bpf_sock *socket = context->sk;
	__u32 zero = 0, sequence = 0, bound = 0;
	struct hint *hint;

	if (context->level != SOL_FABRICPILOT || context->optname != FABRICPILOT_MESSAGE_BYTES) {
		if (context->optlen > PAGE_BYTES)
			context->optlen = 0; /* not seen in full here; this hands it on as it came */
		return 1;
	}
	if (!socket || given + 4 > end || context->optlen != sizeof(said))
		return 1;
	said.part[0] = given[0];
	said.part[1] = given[1];
	said.part[2] = given[2];
	said.part[3] = given[3];
	if (socket->protocol != IPPROTO_TCP || (socket->family != FAMILY_IPV4 && socket->family != FAMILY_IPV6))
		return 1;
#ifdef WRITE_SEQ_OFFSET
	__u64 *place = scratch.lookup(&zero);

	if (place && (socket->state == TCP_ESTABLISHED_STATE || socket->state == TCP_CLOSE_WAIT_STATE)) {
		*place = (__u64)socket;
		if (!bpf_probe_read_kernel(&sequence, sizeof(sequence),
					   (void *)(*(volatile __u64 *)place + WRITE_SEQ_OFFSET)))
			bound = 1;
		*place = 0;
	}
#endif
	hint = hints.sk_storage_get(socket, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!hint)
		return 1; /* no memory: as if we were not there */
	hint->bytes = said.bytes;
	hint->sequence = sequence;
	hint->bound = bound;
	context->optlen = SOCKOPT_DONE;
	return 1;
}

/* The hint of the socket behind a packet, if it is about this packet or one before; else nothing. */
static __always_inline struct hint *find_hint(struct __sk_buff *skb, const struct packet *packet)
{
	struct bpf_sock *socket = skb->sk;
	struct hint *hint;

	if (!socket)
		return 0;
	socket = bpf_sk_fullsock(socket);
	if (!socket)
		return 0;
	hint = hints.sk_storage_get(socket, 0, 0);
	if (!hint)
		return 0;
	if (!hint->bound) {
		hint->sequence = packet->sequence;
		hint->bound = 1;
	}
	/* The whole packet lies in or behind the hinted message; the number space is cut in halves as TCP does. */
	return (__s32)(packet->sequence - hint->sequence) >= 0 ? hint : 0;
}

/* How many bytes of the hinted message were sent before this packet. */
static __always_inline __u32 hint_position(const struct hint *hint, const struct packet *packet)
{
	return packet->sequence - hint->sequence;
}
