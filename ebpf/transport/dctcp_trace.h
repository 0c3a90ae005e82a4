/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What the traced build of DCTCP (-DDCTCP_TRACE) writes down: one record per acceptable ACK and per reduction of the
 * window, in order, until the log is full. Records hold the RFC's inputs as well as our results, so that a model can
 * recompute every result. The production build contains none of this.
 */
#ifndef FABRICPILOT_TRANSPORT_DCTCP_TRACE_H
#define FABRICPILOT_TRANSPORT_DCTCP_TRACE_H

#define DCTCP_RECORD_ACK 0
#define DCTCP_RECORD_REDUCTION 1 /* an episode of congestion begins; ece: because of marks */
#define DCTCP_RECORD_INIT 2      /* the connection stands, the estimate begins */

#define DCTCP_TRACE_RECORDS 65536

struct dctcp_record {
	__u64 time_ns;
	__u32 snd_una; /* after this ACK */
	__u32 snd_nxt;
	__u32 alpha; /* after this ACK, unit 2^-20 */
	__u32 cwnd_pkts;
	__u32 ssthresh_pkts; /* of a reduction: the window to reach */
	__u32 fraction;      /* of a packet: that window's, unit 1 / ssthresh_pkts; otherwise cwnd's, unit 1 / cwnd_pkts */
	__u16 local_port;
	__u16 remote_port;
	__u8 kind;
	__u8 ece;
	__u8 window_ended;
	__u8 reducing; /* cwnd is on its way down, so it is not the window that counts */
};

#ifdef DCTCP_TRACE

/* Key: record number. Value: the record. Mapped read-only by user space. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, DCTCP_TRACE_RECORDS);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, struct dctcp_record);
} dctcp_records SEC(".maps");

/* Key: 0. Value: records asked for so far; beyond DCTCP_TRACE_RECORDS they are lost, and counted here all the same. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_MMAPABLE);
	__type(key, __u32);
	__type(value, __u64);
} dctcp_count SEC(".maps");

static __always_inline void trace(const struct tcp_sock *tp, const struct dctcp *ca, __u8 kind, __u8 ece,
				  __u8 window_ended, __u32 ssthresh_pkts)
{
	const struct sock *sk = (const struct sock *)tp;
	__u32 zero = 0;
	__u64 *count = bpf_map_lookup_elem(&dctcp_count, &zero);
	struct dctcp_record *record;
	__u32 number;

	if (!count)
		return;
	number = __sync_fetch_and_add(count, 1);
	record = bpf_map_lookup_elem(&dctcp_records, &number);
	if (!record)
		return;
	record->time_ns = bpf_ktime_get_ns();
	record->snd_una = tp->snd_una;
	record->snd_nxt = tp->snd_nxt;
	record->alpha = ca->alpha;
	record->cwnd_pkts = tp->snd_cwnd;
	record->ssthresh_pkts = ssthresh_pkts;
	record->fraction = ca->fraction;
	record->local_port = sk->__sk_common.skc_num;
	record->remote_port = bpf_ntohs(sk->__sk_common.skc_dport);
	record->kind = kind;
	record->ece = ece;
	record->window_ended = window_ended;
	record->reducing = ca->reducing;
}

#else

static __always_inline void trace(const struct tcp_sock *tp, const struct dctcp *ca, __u8 kind, __u8 ece,
				  __u8 window_ended, __u32 ssthresh_pkts)
{
}

#endif
#endif
