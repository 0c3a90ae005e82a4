/* Included by bcc's helpers, which count the size of a ring buffer in pages. 4 KiB whatever the kernel's own are: a ring
 * of 64 of them is a whole number of any kernel's. */
#define PAGE_SIZE 4096
