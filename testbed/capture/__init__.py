"""Looks at real packets from outside: what DSCP each carried, against what its flow's bytes demanded."""
