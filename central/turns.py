"""Who is served when there is not time for all: as many as the time allows, and the others first the next time.

Policy scheme and learner take a few tenths of a second for a group. A worker that has not answered after a minute is
taken for one that hangs, so with hundreds of groups it must answer for some of them.
"""

import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

AskedT = TypeVar("AskedT")
AnswerT = TypeVar("AnswerT")

BUDGET_S = 15.0  # far below what a worker may take, far above what a few dozen groups need


class Turns(Generic[AskedT, AnswerT]):
    """Serves lists of about the same members again and again.

    Args:
        serve: answers for one.
        wait: the answer for those whose turn it is not.
        budget_s: after which nobody else is served; one always is.
    """

    def __init__(
        self, serve: Callable[[AskedT], AnswerT], wait: Callable[[AskedT], AnswerT], budget_s: float = BUDGET_S
    ) -> None:
        self._serve, self._wait, self._budget_s = serve, wait, budget_s
        self._next = 0  # place in the list of the one that is first in turn

    def answer(self, asked: Sequence[AskedT]) -> list[AnswerT]:
        """An answer for each, in order."""
        until_s = time.monotonic() + self._budget_s
        answers: dict[int, AnswerT] = {}
        for place in [(self._next + step) % len(asked) for step in range(len(asked))]:
            if answers and time.monotonic() >= until_s:
                break
            answers[place] = self._serve(asked[place])
        self._next = (self._next + len(answers)) % max(len(asked), 1)
        return [answers[place] if place in answers else self._wait(one) for place, one in enumerate(asked)]
