"""Ways to forecast, behind ``forecaster.types.Forecaster``.

``last_value`` · ``direct`` our own regression on each lead, of the ``features`` of each step.
"""
