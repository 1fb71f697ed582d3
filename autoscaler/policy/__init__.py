"""Pure decisions: no I/O, no clock, no chance.

``recommend`` turns demand and forecasts into replicas, ``decide`` bounds and delays that, ``plan``
says which replicas start or stop, ``lifecycle`` is the table of what a replica does next.
``outlook`` makes the forecast that a recommendation reads and says whether to use it, ``capacity``
what one replica carries, ``timed_bounds`` are bounds by the clock.
``device_assignment`` chooses GPUs and cores, ``tier_policy`` how warm a pool at zero is,
``idle_cost`` how long that is worth its price, ``packing`` what is loaded where not all fits,
``memory_shares`` whose pages are kept where memory is short,
``gpu_faults`` says what an error of a GPU means.
"""
