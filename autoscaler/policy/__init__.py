"""Pure decisions: no I/O, no clock, no chance.

``recommend`` turns demand and forecasts into replicas, ``outlook`` makes the forecast of the past
that one of them reads, ``decide`` bounds and delays that, ``plan`` says which
replicas start or stop, ``lifecycle`` is the table of what a replica does next,
``device_assignment`` chooses GPUs and cores, ``tier_policy`` how warm a pool at zero is,
``idle_cost`` how long that is worth its price, ``packing`` what is loaded where not all fits,
``gpu_faults`` says what an error of a GPU means.
"""
