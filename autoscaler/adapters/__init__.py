"""Who asks Tidegate what it sees, and how many replicas there should be: other autoscalers.

``types`` is what they are told of the pools, ``series`` the metrics made of it; ``feed`` keeps the
newest in memory, ``catalog`` finds pools and objects in it. ``metrics_api`` answers HPA, ``keda``
KEDA. ``measures`` are the adapter's own metrics, ``settings`` its section of the settings.
"""
