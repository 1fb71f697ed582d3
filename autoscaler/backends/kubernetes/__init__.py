"""Replicas are pods; Kubernetes starts and ends them.

``client``: one connection to the API server, and what its errors mean. ``watch``: lists kept up to
date. ``pods``: what a pod is at (pure). ``workloads``: how many replicas each kind of workload is
told to have. ``cluster``: what is known of the pools' pods. ``binding``: which pod stands for which
replica (pure). ``backend``: workloads that Tidegate scales. ``external``: those that another
autoscaler scales. ``knative``: how Knative scales a revision (pure). ``stat_stream``: load that is
reported to Knative's autoscaler. ``lease``: which of several Tidegates leads. ``leader``: the
label by which a Service finds that one.
"""
