"""``tidegate doctor``: what this machine has, what is missing, and what to do about it.

``checks`` is one finding, ``report`` and ``model_checks`` decide what the answers of ``machine``
mean for the settings.
"""
