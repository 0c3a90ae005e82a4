/* Included by bcc's helpers; nothing in ebpf/ depends on the page size. */
