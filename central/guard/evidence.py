"""Whether a mean differs from zero, asked after every observation: an always-valid confidence interval.

Looking at a t-test after each of n observations and stopping when it is significant is wrong far more often than its
level says. The mixture t-test may be looked at any time: with a normal prior N(0, 1/g) on the effect in standard
deviations and the right Haar prior on the deviation, the Bayes factor against mean m

    B(m) = sqrt(g / (g + n)) * ((1 + u) / (1 + u g / (g + n)))^(n / 2),   u = n (mean - m)^2 / sum (x - mean)^2

is a test martingale under mean m whatever the deviation (Lai 1976; Wang and Ramdas 2024, "Anytime-valid t-tests"), so
P(B(m) ever reaches 1 / alpha) <= alpha, and {m: B(m) < 1 / alpha} covers the mean at all times with probability
1 - alpha. It is exact for normal observations and needs no known deviation, so a handful of observations may count.
"""

import math

# Prior precision of the effect, in deviations: most sensitive to effects of half a deviation to two.
_PRIOR = 1.0


class Evidence:
    """Observations of one quantity: count, mean, sum of squared deviations (Welford 1962)."""

    def __init__(self) -> None:
        self.n = 0
        self.mean = 0.0
        self._squares = 0.0

    def add(self, value: float) -> None:
        """One more observation."""
        self.n += 1
        step = value - self.mean
        self.mean += step / self.n
        self._squares += step * (value - self.mean)

    @property
    def deviation(self) -> float:
        """Standard deviation of one observation; infinite below two."""
        return math.sqrt(self._squares / (self.n - 1)) if self.n > 1 else math.inf

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite below two observations."""
        return self.deviation / math.sqrt(self.n) if self.n else math.inf

    def radius(self, alpha: float) -> float:
        """Half the width of the interval that covers the mean at all times with probability 1 - alpha.

        Infinite for the first few observations.
        """
        if self.n < 2:
            return math.inf
        shrink = _PRIOR / (_PRIOR + self.n)
        reach = (1 / (alpha * alpha * shrink)) ** (1 / self.n)
        if reach * shrink >= 1:
            return math.inf
        return math.sqrt((reach - 1) / (1 - reach * shrink) * self._squares / self.n)

    def interval(self, alpha: float) -> tuple[float, float]:
        """Lower and upper end."""
        radius = self.radius(alpha)
        return self.mean - radius, self.mean + radius
