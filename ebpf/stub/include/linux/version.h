/* bcc's helpers ask for the kernel version; nothing in ebpf/ depends on it. */
#define LINUX_VERSION_CODE 0x050f00
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
