"""The GPUs of this node: ``figures`` is what is read of one, ``nvml`` reads it from NVIDIA's
library, ``dcgm`` out of a DCGM exporter's page, ``reader`` does either again and again.
"""
