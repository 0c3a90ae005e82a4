/* SPDX-License-Identifier: MIT
 *
 * Tell fabricpilot how large the message is that you are about to write to a TCP socket, in one call:
 *
 *     hint_message(fd, 5 << 20);
 *     write(fd, ...);
 *
 * Where the host's agent listens (hint_cgroups in [datapath]) all of the message travels on the level of its size from
 * its first byte on. Everywhere else the kernel does not know the option, and the call changes nothing.
 */
#ifndef FABRICPILOT_MESSAGE_HINT_H
#define FABRICPILOT_MESSAGE_HINT_H

#include <errno.h>
#include <stdint.h>
#include <sys/socket.h>

#define SOL_FABRICPILOT 0x4650
#define FABRICPILOT_MESSAGE_BYTES 1

/* 1: taken; 0: nobody listens; -1: an error of the socket, in errno. */
static inline int hint_message(int fd, uint64_t bytes)
{
	if (setsockopt(fd, SOL_FABRICPILOT, FABRICPILOT_MESSAGE_BYTES, &bytes, sizeof(bytes)) == 0)
		return 1;
	return errno == ENOPROTOOPT || errno == EOPNOTSUPP ? 0 : -1;
}

#endif
