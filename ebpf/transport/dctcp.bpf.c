// SPDX-License-Identifier: GPL-2.0-only
/*
 * DCTCP (RFC 8257) as a TCP congestion control written in BPF (struct_ops), for kernels without tcp_dctcp.
 *
 * Hook: struct tcp_congestion_ops; registered by `bpftool struct_ops register`, chosen per socket by TCP_CONGESTION
 * under the name bpf_dctcp (never mistaken for the kernel's own `dctcp`). Both ends of a connection need it: it turns
 * ECN on in the handshake, and the receiver's half is what makes the sender's estimate true.
 *
 *   receiver (RFC 3.2)  a packet's CE differs from that of the packets before it
 *                       -> acknowledge those before it at once with their ECE, then this one with its own
 *   sender (RFC 3.3)    every acceptable ACK: count bytes acknowledged, and those acknowledged with ECE;
 *                       once per window: M = marked / acknowledged; alpha += (M - alpha) / 16
 *   sender (RFC 3.3-3.5) ECE, once per window: the window becomes cwnd * (1 - alpha / 2)
 *                       loss, once per window: it becomes cwnd / 2, whatever alpha is; growth and the rest is Reno
 *
 * Everything per socket lives in the socket (icsk_ca_priv): no map, nothing to leak.
 */
#include <linux/bpf.h>
#include <linux/types.h>

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_tracing.h>

#include "kernel_types.h"

/* Licence of the compiled program: the kernel lends its functions only to GPL programs. */
char _license[] SEC("license") = "GPL";

/* The algorithm's name, and that of the map that registers it. */
#ifdef DCTCP_TRACE
#define DCTCP_NAME bpf_dctcp_trace
#else
#define DCTCP_NAME bpf_dctcp
#endif
#define QUOTE(text) #text
#define QUOTED(macro) QUOTE(macro)

#define ALPHA_ONE (1u << 20) /* alpha and M are fractions in units of 2^-20 */
#define GAIN_SHIFT 4         /* g = 1/16, RFC 8257 section 4.2 */

/* Preprocessor constants of the kernel (net/tcp.h, linux/tcp.h), which BTF does not hold. */
#define TCP_CONG_NEEDS_ECN 0x2
#define TCP_ECN_OK 0x1         /* RFC 3168 ECN was negotiated */
#define TCP_ECN_DEMAND_CWR 0x4 /* our ACKs carry ECE */
#define SOL_TCP 6
#define TCP_CONGESTION 13
#define TCP_CA_CWR 2      /* reducing because of marks */
#define TCP_CA_RECOVERY 3 /* loss, repaired by fast retransmission */
#define TCP_CA_LOSS 4     /* retransmission timeout */
#define TCP_LISTEN 10
#define TCP_CLOSE 7

struct dctcp {
	/* estimate */
	__u32 alpha;        /* DCTCP.Alpha */
	__u32 window_end;   /* DCTCP.WindowEnd, sequence number */
	__u32 last_una;     /* SND.UNA at the previous ACK */
	__u8 ece;           /* the previous ACK carried ECE */
	__u64 acked_bytes;  /* DCTCP.BytesAcked */
	__u64 marked_bytes; /* DCTCP.BytesMarked */
	/* window, in packets; see dctcp_window.h */
	__u8 reducing;        /* an episode of congestion goes on: cwnd is on its way to target */
	__u32 episode_end;    /* high_seq of that episode, sequence number */
	__u32 reduced_from;   /* cwnd before it */
	__u32 target;         /* cwnd after it */
	__u32 fraction;       /* of cwnd (when reducing: of target), unit 1 / cwnd */
	__u32 prr_from;       /* in flight when it began */
	__u32 prr_delivered;  /* delivered since */
	__u32 last_delivered; /* delivered at the previous ACK */
	/* receiver */
	__u8 ce;            /* DCTCP.CE */
	__u32 last_rcv_nxt; /* RCV.NXT before the packet at hand */
	__u32 early_ack;    /* acknowledged by the last ACK that left out the packet at hand */
	__u32 early_wup;    /* what the kernel took that ACK to have acknowledged */
};

#include "dctcp_trace.h"
#include "dctcp_window.h"

extern void tcp_reno_cong_avoid(struct sock *sk, __u32 ack, __u32 acked) __ksym;

/* The kernel hands `struct sock` to struct_ops programs as the tcp_sock it is part of. */
static __always_inline struct tcp_sock *tcp_sk(struct sock *sk)
{
	return (struct tcp_sock *)sk;
}

static __always_inline struct dctcp *state_of(struct tcp_sock *tp)
{
	return (struct dctcp *)tp->inet_conn.icsk_ca_priv;
}

static __always_inline int before(__u32 a, __u32 b)
{
	return (__s32)(a - b) < 0;
}

SEC("struct_ops")
void BPF_PROG(dctcp_init, struct sock *sk)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct dctcp *ca = state_of(tp);
	__u8 tcp_state = sk->__sk_common.skc_state;

	__builtin_memset(ca, 0, sizeof(*ca));
	ca->alpha = ALPHA_ONE; /* RFC 3.3: a first mark halves the window, as it would without history */
	ca->window_end = tp->snd_una;
	ca->last_una = tp->snd_una;
	ca->last_delivered = tp->delivered;
	ca->last_rcv_nxt = tp->rcv_nxt;
	trace(tp, ca, DCTCP_RECORD_INIT, 0, 0, tp->snd_ssthresh);

	/* The peer does not do ECN: be Reno, and send no ECT (the kernel clears it with the change). */
	if (!(tp->ecn_flags & TCP_ECN_OK) && tcp_state != TCP_LISTEN && tcp_state != TCP_CLOSE) {
		char reno[] = "reno";

		bpf_setsockopt(sk, SOL_TCP, TCP_CONGESTION, reno, sizeof(reno));
	}
}

static __always_inline void set_ece(struct tcp_sock *tp, __u8 on)
{
	if (on)
		tp->ecn_flags |= TCP_ECN_DEMAND_CWR;
	else
		tp->ecn_flags &= ~TCP_ECN_DEMAND_CWR;
}

/* RFC 5681, 4.1. The kernel leaves this to algorithms that control the window themselves. */
static __always_inline void restart_after_idle(struct tcp_sock *tp, struct dctcp *ca)
{
	__u32 idle_ticks = (__u32)bpf_jiffies64() - tp->lsndtime;

	if (idle_ticks <= tp->inet_conn.icsk_rto || tp->snd_cwnd <= RESTART_CWND_PKTS)
		return;
	if (tp->snd_ssthresh < tp->snd_cwnd / 4 * 3)
		tp->snd_ssthresh = tp->snd_cwnd / 4 * 3;
	tp->snd_cwnd = RESTART_CWND_PKTS;
	tp->snd_cwnd_cnt = ca->fraction = 0;
}

/*
 * Whether packets before the one at hand still wait for their ACK. The delayed-ACK timer does not tell: since Linux 6.7
 * ACKs due while a reader holds the socket wait for it without one. RCV.WUP is RCV.NXT when the last ACK was sent;
 * after an ACK of ours, which covers less, that is true once the ACK demanded with it has gone too.
 */
static __always_inline int ack_owed(const struct tcp_sock *tp, const struct dctcp *ca)
{
	int only_early = tp->rcv_wup == ca->early_wup && (tp->inet_conn.icsk_ack.pending & ICSK_ACK_NOW);

	return before(only_early ? ca->early_ack : tp->rcv_wup, ca->last_rcv_nxt);
}

/* The receiver. Called for each arriving data packet, after RCV.NXT has moved over it, before any ACK is sent. */
SEC("struct_ops")
void BPF_PROG(dctcp_cwnd_event, struct sock *sk, enum tcp_ca_event event)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct dctcp *ca = state_of(tp);
	__u8 ce = event == CA_EVENT_ECN_IS_CE;

	if (event == CA_EVENT_TX_START)
		restart_after_idle(tp, ca);
	if (!ce && event != CA_EVENT_ECN_NO_CE)
		return;
	if (ce != ca->ce) {
		/* Packets of the other kind wait for their ACK: they get it by themselves, with their own ECE. */
		if (ack_owed(tp, ca)) {
			set_ece(tp, ca->ce);
			bpf_tcp_send_ack(tp, ca->last_rcv_nxt);
			ca->early_ack = ca->last_rcv_nxt;
			ca->early_wup = tp->rcv_wup;
		}
		/* This packet's ACK goes at once too: a sender with a window of one or two must not wait for a timer. */
		tp->inet_conn.icsk_ack.pending |= ICSK_ACK_NOW;
		ca->ce = ce;
	}
	ca->last_rcv_nxt = tp->rcv_nxt;
	/* Always, not only on a change: the kernel's RFC 3168 code latches ECE on CE and clears it on CWR. */
	set_ece(tp, ce);
}

/* The sender's estimate. Called for every acceptable ACK, after SND.UNA has moved, before the window is touched. */
SEC("struct_ops")
void BPF_PROG(dctcp_in_ack_event, struct sock *sk, __u32 flags)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct dctcp *ca = state_of(tp);
	__u32 acked_bytes = tp->snd_una - ca->last_una;
	__u8 ece = !!(flags & CA_ACK_ECE);
	__u8 window_ended = before(ca->window_end, tp->snd_una);

	ca->ece = ece;
	ca->last_una = tp->snd_una;
	ca->acked_bytes += acked_bytes;
	if (ece)
		ca->marked_bytes += acked_bytes;

	if (window_ended) {
		__u64 total = ca->acked_bytes;
		/* At least one byte was acknowledged, or SND.UNA could not have passed the end of the window. */
		__s32 marked = total ? (ca->marked_bytes << 20) / total : 0;

		/* The shift rounds down also below zero: without marks alpha reaches 0 exactly (RFC 4.2 warns of less). */
		ca->alpha += (marked - (__s32)ca->alpha) >> GAIN_SHIFT;
		ca->window_end = tp->snd_nxt;
		ca->acked_bytes = 0;
		ca->marked_bytes = 0;
	}
	trace(tp, ca, DCTCP_RECORD_ACK, ece, window_ended, tp->snd_ssthresh);
}

/* The kernel sees congestion, at most once per window of data: a mark, a loss. */
SEC("struct_ops")
__u32 BPF_PROG(dctcp_ssthresh, struct sock *sk)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct dctcp *ca = state_of(tp);

	begin_episode(tp, ca, tp->snd_nxt);
	trace(tp, ca, DCTCP_RECORD_REDUCTION, ca->ece, 0, ca->target);
	return ca->target;
}

/* The sender's window. Called at the end of every ACK that acknowledged something new, after the kernel's own state. */
SEC("struct_ops")
void BPF_PROG(dctcp_cong_control, struct sock *sk)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct dctcp *ca = state_of(tp);
	__u32 delivered = tp->delivered - ca->last_delivered;
	__u8 ca_state = BPF_CORE_READ_BITFIELD(&tp->inet_conn, icsk_ca_state);

	ca->last_delivered = tp->delivered;
	if (ca_state == TCP_CA_CWR || ca_state == TCP_CA_RECOVERY) {
		if (!ca->reducing || ca->episode_end != tp->high_seq)
			begin_episode(tp, ca, tp->high_seq); /* dctcp_ssthresh was passed over */
		if (ca_state == TCP_CA_RECOVERY) {
			/* A loss halves what the window was before the episode, also when marks began it. */
			ca->target = at_least_min(ca->reduced_from / 2);
			ca->fraction = 0;
		}
		tp->snd_ssthresh = ca->target;
		approach_target(tp, ca, delivered);
	} else {
		if (ca_state == TCP_CA_LOSS) {
			if (ca->reducing) /* a timeout: the kernel has set cwnd to one packet, slow start ends at half */
				tp->snd_ssthresh = at_least_min(ca->reduced_from / 2);
		} else if (ca->reducing) {
			tp->snd_cwnd = ca->target;
			tp->snd_ssthresh = ca->target;
			tp->snd_cwnd_cnt = ca->fraction;
		}
		ca->reducing = 0;
		tcp_reno_cong_avoid(sk, tp->snd_una, delivered);
		ca->fraction = tp->snd_cwnd_cnt;
	}
	set_pacing_rate(sk, tp);
}

/* The loss was none (RFC 3522, DSACK): back to the window before it. */
SEC("struct_ops")
__u32 BPF_PROG(dctcp_undo_cwnd, struct sock *sk)
{
	struct tcp_sock *tp = tcp_sk(sk);
	struct dctcp *ca = state_of(tp);

	ca->reducing = 0;
	return tp->snd_cwnd > ca->reduced_from ? tp->snd_cwnd : ca->reduced_from;
}

/* The kernel wants one of these two; with cong_control it never calls this one. */
SEC("struct_ops")
void BPF_PROG(dctcp_cong_avoid, struct sock *sk, __u32 ack, __u32 acked)
{
}

SEC(".struct_ops")
struct tcp_congestion_ops DCTCP_NAME = {
	.name = QUOTED(DCTCP_NAME),
	.flags = TCP_CONG_NEEDS_ECN,
	.init = (void *)dctcp_init,
	.ssthresh = (void *)dctcp_ssthresh,
	.cong_avoid = (void *)dctcp_cong_avoid,
	.cong_control = (void *)dctcp_cong_control,
	.cwnd_event = (void *)dctcp_cwnd_event,
	.in_ack_event = (void *)dctcp_in_ack_event,
	.undo_cwnd = (void *)dctcp_undo_cwnd,
};
