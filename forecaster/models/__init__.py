"""Ways to forecast, behind ``forecaster.types.Forecaster``.

``last_value`` · ``seasonal`` the value of a period ago, and quantiles by the place in the period ·
``direct`` our own regression on each lead, of the ``features`` of each step · ``automatic`` these,
by what the history is · ``statistical`` and ``prophet`` what others use, too slow and too large for
the control process: they import statsmodels and Prophet when they are asked.
"""
