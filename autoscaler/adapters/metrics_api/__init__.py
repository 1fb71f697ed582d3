"""The metrics APIs of Kubernetes, as an aggregated API server answers them to HPA.

``app`` answers requests. ``paths`` reads what they ask for, ``lookup`` finds the values,
``documents`` writes them and the discovery documents, ``quantity`` numbers. ``identity`` says who
asks, ``access`` whether they may, which ``cluster`` asks of the cluster; ``tls`` has the
certificate.
"""
