/* Included by bcc's helpers; nothing in ebpf/ needs packet sockets. */
