"""Pools that are resources of a cluster: ModelPools, revisions of Knative, and what Tidegate does
about each.

``model_pool``: the resource, its schema and the settings it stands for (pure). ``manifests``: the
workload that is made of its template (pure). ``status``: what it says back (pure). ``permissions``:
what Tidegate must be allowed to do (pure). ``controller``: watches them, applies, reports.
``pod_autoscaler``: Knative's resource, and the pool that one of our class stands for (pure).
``knative``: scales those. ``node_labels``: which nodes have which model. ``node_cache``: engines
that start from the cache of their node (pure). ``preload_job``: the Job that brings a model to
nodes (pure). ``imports``: what other products' resources become.
"""
