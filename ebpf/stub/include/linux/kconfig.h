/* bcc includes this first of all and wants to be told that the kernel has BPF; the loader finds out for itself. */
#define CONFIG_BPF_SYSCALL 1
