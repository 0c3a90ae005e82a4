/* SPDX-License-Identifier: GPL-2.0-only
 *
 * Send buffers: gives new TCP connections of chosen cgroups and ports a larger one, so that more of what an application
 * writes can be seen at once (backlog.h). A sock_ops program; the kernel bounds the size by net.core.wmem_max, and no
 * longer tunes the buffer of such a socket itself.
 */
#pragma once

#define SEND_BUFFER_PORTS 32
#define SOL_SOCKET_LEVEL 1
#define SO_SNDBUF_OPTION 7

struct send_buffer {
	__u32 bytes; /* 0: leave all as they are */
	__u32 ports; /* how many there are below; 0: any */
	__u16 port[SEND_BUFFER_PORTS]; /* a connection has it on either side */
};

/* Key: 0. Value: which connections get which buffer. */
BPF_ARRAY(send_buffers, struct send_buffer, 1);

int fabricpilot_send_buffer(struct bpf_sock_ops *operation)
{
	__u32 zero = 0, remote_port, local_port, i;
	struct send_buffer *wanted = send_buffers.lookup(&zero);
	int bytes, chosen;

	if (operation->op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && operation->op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return 1;
	if (!wanted || !wanted->bytes)
		return 1;
	local_port = operation->local_port; /* host order */
	remote_port = bpf_ntohl(operation->remote_port);
	chosen = !wanted->ports;
#pragma unroll
	for (i = 0; i < SEND_BUFFER_PORTS; i++)
		chosen |= i < wanted->ports && (wanted->port[i] == local_port || wanted->port[i] == remote_port);
	if (!chosen)
		return 1;
	bytes = wanted->bytes;
	bpf_setsockopt(operation, SOL_SOCKET_LEVEL, SO_SNDBUF_OPTION, &bytes, sizeof(bytes));
	return 1;
}
