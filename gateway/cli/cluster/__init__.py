"""Verbs about a Kubernetes cluster. ``deploy``: ``tidegate deploy``, what a cluster has and lacks;
``import_resources``: ``tidegate import``, what other products' resources become.
"""
