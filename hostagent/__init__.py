"""The daemon on each server: data path, queues, agent loop, link to central."""

from hostagent.lean_pyroute2 import install

install()  # before anybody imports pyroute2
