"""Pure decisions: no I/O, no clock, no chance.

``recommend`` turns demand into replicas, ``decide`` bounds and delays that, ``plan`` says which
replicas start or stop, ``placement`` chooses GPUs and cores, ``tier_policy`` how warm a pool at
zero is.
"""
