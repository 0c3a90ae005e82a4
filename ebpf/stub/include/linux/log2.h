/* Included by bcc's helpers, which bring their own log2. */
