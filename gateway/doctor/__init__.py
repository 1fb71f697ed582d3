"""``tidegate doctor``: what this machine has, what is missing, and what to do about it.

``report`` and ``checks`` (the model cache's, and what a finding is) decide what the answers of
``machine`` mean for the settings. ``cluster`` does it for ``tidegate deploy check``, with the
answers of ``cluster_api``.
"""
