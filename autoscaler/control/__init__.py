"""The control loop: observe, decide, act.

``loop`` runs it, and takes the commands of operators and of the data path. ``replicas`` is its
state, with the newest decisions, ``reports`` what others see of it; ``decision_log`` keeps the
decisions of before. ``device_turns`` bounds decisions where not all models fit, and says whose are
kept in the page cache. ``actuator`` applies the lifecycle table and calls backends; ``start_steps``
names what a starting replica is doing. ``forecasts`` has what is expected of each pool, made in
``forecast_worker``, a process, and ``slow_models``, another. ``capacity_learner`` watches what a
replica carries; ``learned_history`` keeps it, and the gaps between requests, for the next control
process. ``disabled_pools`` are those that an operator has taken out of service,
``replica_numbers`` those in the ids of replicas.
"""
