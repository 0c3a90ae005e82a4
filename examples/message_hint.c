/* SPDX-License-Identifier: MIT
 *
 * Sends messages over one TCP connection and says of each how large it is:
 *
 *     cc -o message_hint examples/message_hint.c
 *     ./message_hint 10.0.0.2 5001 1000000 4000 25000000
 */
#include "message_hint.h"

#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int connect_to(const char *host, const char *port)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *found, *one;
	int fd = -1;

	if (getaddrinfo(host, port, &hints, &found))
		return -1;
	for (one = found; one && fd < 0; one = one->ai_next) {
		fd = socket(one->ai_family, one->ai_socktype, one->ai_protocol);
		if (fd >= 0 && connect(fd, one->ai_addr, one->ai_addrlen)) {
			close(fd);
			fd = -1;
		}
	}
	freeaddrinfo(found);
	return fd;
}

static int send_message(int fd, uint64_t bytes)
{
	char chunk[65536] = {0};

	while (bytes) {
		ssize_t sent = write(fd, chunk, bytes < sizeof(chunk) ? bytes : sizeof(chunk));

		if (sent < 0)
			return -1;
		bytes -= sent;
	}
	return 0;
}

int main(int count, char **words)
{
	int fd, i;

	if (count < 4) {
		fprintf(stderr, "usage: %s HOST PORT BYTES...\n", words[0]);
		return 2;
	}
	fd = connect_to(words[1], words[2]);
	if (fd < 0) {
		fprintf(stderr, "cannot connect to %s, port %s\n", words[1], words[2]);
		return 1;
	}
	for (i = 3; i < count; i++) {
		uint64_t bytes = strtoull(words[i], NULL, 10);
		int taken = hint_message(fd, bytes);

		if (taken < 0 || send_message(fd, bytes)) {
			perror(words[0]);
			return 1;
		}
		printf("%s bytes: hint %s\n", words[i], taken ? "taken" : "not wanted here");
	}
	close(fd);
	return 0;
}
