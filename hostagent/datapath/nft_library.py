"""libnftables, the library behind nft(8), as the netfilter data path uses it: transactions.

The Python binding is Debian's python3-nftables (it is not on PyPI). One call is one transaction: all of it or none.
"""

from typing import Any, Final

from fabricpilot.errors import KernelError

_REASONS: Final = {
    "Operation not permitted": "not permitted; it needs root or CAP_NET_ADMIN",
    "Operation not supported": "an expression is not in this kernel; it needs CONFIG_NF_TABLES_INET and CONFIG_NFT_CT",
    "No such file or directory": "an expression is not in this kernel; it needs CONFIG_NFT_CT and CONFIG_NF_CONNTRACK",
}


class Nft:
    """A libnftables context in the current network namespace.

    Raises:
        KernelError: library or binding is not installed.
    """

    def __init__(self) -> None:
        try:
            from nftables import Nftables

            self._context = Nftables()
        except (ImportError, OSError) as error:
            raise KernelError(
                "the nftables data path needs libnftables and its Python binding; "
                f"install the Debian package python3-nftables ({error})"
            ) from error

    def run(self, commands: str | list[dict[str, Any]], what: str) -> None:
        """One transaction, as nft commands or as JSON.

        Args:
            commands: one or the other.
            what: it is for, to say when it fails.

        Raises:
            KernelError: the kernel refused; nothing was changed.
        """
        if isinstance(commands, str):
            status, _, said = self._context.cmd(commands)
        else:
            status, _, said = self._context.json_cmd({"nftables": commands})
        if status != 0:
            raise KernelError(f"{what}: nftables refused: {_reason(said)}")


def _reason(said: str) -> str:
    """The first error of libnftables' output in one line, and what to do where that is known."""
    errors = [line.partition("Error: ")[2] for line in said.splitlines() if "Error: " in line]
    first = errors[0] if errors else said.strip().partition("\n")[0]
    return next((f"{why}" for text, why in _REASONS.items() if text in first), first)
