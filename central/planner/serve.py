"""The process that plans for central: a request on standard input, its answer on standard output, both compressed.

    python -m central.planner.serve < request > answer

One request per process: nothing of one client is left for the next, and a planner that hangs or grows is ended by the
daemon (`desk`) without a trace. It runs at low priority, since the hosts' link comes first.
"""

import os
import signal
import sys

from central.planner.request import MOST_SECONDS, PlanOutcome, answer, pack, unpack_request
from fabricpilot.errors import UsageError

_NICE = 5
_END_S = int(MOST_SECONDS) + 60  # if the daemon is no longer there to end us


def main() -> None:
    """Answer one request."""
    signal.alarm(_END_S)
    os.nice(_NICE)
    try:
        outcome = answer(unpack_request(sys.stdin.buffer.read()))
    except UsageError as error:
        outcome = PlanOutcome(error=str(error), exit_code=error.exit_code)
    sys.stdout.buffer.write(pack(outcome))


if __name__ == "__main__":
    main()
