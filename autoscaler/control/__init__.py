"""The control loop: observe, decide, act.

``loop`` runs it, and takes the commands of operators and of the data path. ``replicas`` is its
state and the reports made of it, ``lifecycle`` the table of a replica's states, ``actuator``
applies that table and calls backends, ``timers`` raises what is due. ``decision_log`` remembers
decisions for ``tidegate explain``; ``start_steps`` names what a starting replica is doing.
"""
