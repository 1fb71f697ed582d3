"""The control loop: observe, decide, act.

``loop`` runs it, and takes the commands of operators and of the data path. ``replicas`` is its
state and the reports made of it. ``actuator`` applies the lifecycle table and calls backends,
``timers`` raises the events that are due. ``decision_log`` remembers decisions for ``tidegate
explain``; ``start_steps`` names what a starting replica is doing.
"""
