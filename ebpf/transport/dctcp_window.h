/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The congestion window of DCTCP: how far it falls, how it gets there, how it grows.
 *
 * Everything is decided on the ACK path (cong_control) from what the socket shows then. The kernel's own way, ssthresh()
 * now and the window moved by the kernel, would take whatever lies on its stack for the window whenever it passes a
 * program over: before Linux 6.1 when the program is running already on that CPU, on hardened kernels in some tasks.
 * Here a program passed over costs one ACK's worth of reaction, and nothing else.
 *
 * The RFC counts bytes, the kernel whole packets. With a window of a few packets and a small alpha rounding would lose a
 * reduction or double it, so the window is a number of packets and a fraction; the fraction lives where Reno keeps the
 * fraction it has grown (snd_cwnd_cnt, unit 1 / cwnd).
 */
#ifndef FABRICPILOT_TRANSPORT_DCTCP_WINDOW_H
#define FABRICPILOT_TRANSPORT_DCTCP_WINDOW_H

#define MIN_CWND_PKTS 2u      /* one in flight may wait for the peer's delayed ACK; two never do */
#define RESTART_CWND_PKTS 10u /* after idling for longer than the retransmission timeout (RFC 5681, 4.1; RFC 6928) */
#define FRACTION_BITS 20
#define USEC_PER_SEC 1000000ull

static __always_inline __u32 in_flight_pkts(const struct tcp_sock *tp)
{
	return tp->packets_out - (tp->sacked_out + tp->lost_out) + tp->retrans_out;
}

static __always_inline __u32 at_least_min(__u32 pkts)
{
	return pkts > MIN_CWND_PKTS ? pkts : MIN_CWND_PKTS;
}

/*
 * An episode of congestion begins: one window of data, at the end of which SND.UNA reaches high_seq. The window to
 * reach is cwnd * (1 - alpha / 2) if marks say so (RFC 8257, 3.3, step 9), cwnd / 2 if a loss does (3.5).
 */
static __always_inline void begin_episode(struct tcp_sock *tp, struct dctcp *ca, __u32 end)
{
	/* Still on the way down from the last episode: what counts is where that was going. */
	__u32 pkts = ca->reducing ? ca->target : tp->snd_cwnd;
	__u64 window = (__u64)pkts << FRACTION_BITS;
	__u32 whole;

	if (pkts)
		window += ((__u64)ca->fraction << FRACTION_BITS) / pkts;
	window -= window * (ca->ece ? ca->alpha : ALPHA_ONE) >> 21;
	whole = window >> FRACTION_BITS;
	ca->reduced_from = pkts;
	ca->target = at_least_min(whole);
	ca->fraction = whole < MIN_CWND_PKTS ? 0 : ((window & ((1 << FRACTION_BITS) - 1)) * whole) >> FRACTION_BITS;
	ca->episode_end = end;
	ca->prr_from = in_flight_pkts(tp);
	ca->prr_delivered = 0;
	ca->reducing = 1;
}

/*
 * On the way down: send in proportion to what arrives (PRR, RFC 6937), so that the window's fall neither stops the
 * ACK clock nor lets a burst out.
 */
static __always_inline void approach_target(struct tcp_sock *tp, struct dctcp *ca, __u32 delivered)
{
	__u32 in_flight = in_flight_pkts(tp);
	__s64 send;

	if (!delivered)
		return;
	ca->prr_delivered += delivered;
	if (in_flight > ca->target && ca->prr_from) {
		__u64 due = (__u64)ca->prr_delivered * ca->target + ca->prr_from - 1;

		send = (__s64)(due / ca->prr_from) - tp->prr_out;
	} else {
		__s64 limit = (__s64)ca->prr_delivered - tp->prr_out;

		if (limit < delivered)
			limit = delivered;
		limit += 1;
		send = ca->target - in_flight;
		if (send > limit)
			send = limit;
	}
	/* The first ACK of an episode always lets one packet out: a retransmission must not wait. */
	if (send < !tp->prr_out)
		send = !tp->prr_out;
	tp->snd_cwnd = in_flight + send;
}

/* The rate at which packets of one window are spread where pacing is on, and by which the kernel sizes TSO packets. */
static __always_inline void set_pacing_rate(struct sock *sk, const struct tcp_sock *tp)
{
	__u32 pkts = tp->snd_cwnd > tp->packets_out ? tp->snd_cwnd : tp->packets_out;
	/* Twice the window per RTT when it may double within one, otherwise 1.2 times: the kernel's defaults. */
	__u64 percent = tp->snd_cwnd < tp->snd_ssthresh / 2 ? 200 : 120;
	__u64 rate = (__u64)tp->mss_cache * pkts * percent * (USEC_PER_SEC * 8 / 100);

	if (tp->srtt_us) /* in units of 1/8 microsecond */
		rate /= tp->srtt_us;
	sk->sk_pacing_rate = rate < sk->sk_max_pacing_rate ? rate : sk->sk_max_pacing_rate;
}

#endif
