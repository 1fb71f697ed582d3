"""``tidegate doctor``: what this machine has, what is missing, and what to do about it.

``checks`` is one finding, ``report`` and ``model_checks`` decide about values, and ``machine`` and
``model_machine`` obtain those values.
"""
