/* The kernel's own short names for the UAPI integer types, as bcc's helpers use them. */
#ifndef FABRICPILOT_STUB_TYPES_H
#define FABRICPILOT_STUB_TYPES_H
#include_next <linux/types.h>
typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s8 s8;
typedef __s16 s16;
typedef __s32 s32;
typedef __s64 s64;
typedef __SIZE_TYPE__ size_t;
typedef __UINTPTR_TYPE__ uintptr_t;
typedef _Bool bool;
#ifndef NULL
#define NULL ((void *)0)
#endif
#endif
