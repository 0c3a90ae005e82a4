"""What every room of fabricpilot shares: words, configuration, wire protocol, the one command.

Imports neither torch nor bcc, nor any other room.
"""

__version__ = "0.1.0"
