"""The daemon on each server: data path, queues, agent loop, link to central."""
