"""The control loop: observe, decide, act.

``loop`` runs it; ``commands`` are what operators and the data path ask of it. ``replicas`` is its
state and the reports made of it, ``lifecycle`` the table of a replica's states, ``actuator``
applies that table and calls backends, ``timers`` raises what is due. ``decision_log`` remembers
decisions for ``tidegate explain``; ``start_steps`` names what a starting replica is doing.
"""
