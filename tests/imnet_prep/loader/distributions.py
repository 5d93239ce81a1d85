"""Whether numbers are drawn as they should be.

SciPy is imported only where it is used: it takes half a second, in each process that collects tests.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def p_value(values: Any, distribution: str, parameters: tuple[float, ...] = ()) -> float:
    """Return the p-value of Kolmogorov and Smirnov's test that values follow a distribution of SciPy's."""
    from scipy.stats import kstest

    return float(kstest(values, distribution, args=parameters).pvalue)


def p_value_even(counts: NDArray[np.int64]) -> float:
    """Return the p-value of the chi-squared test that all counts are of one mean."""
    from scipy.stats import chisquare

    return float(chisquare(counts).pvalue)
