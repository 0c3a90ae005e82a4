"""The daemon on the controller: link, registry of hosts, policies."""
