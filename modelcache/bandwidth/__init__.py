"""What downloads may use.

``budget`` hands out bandwidth, connections and memory by ``fair_queue`` (pure); ``throughput``
(pure) finds slow readings.
"""
