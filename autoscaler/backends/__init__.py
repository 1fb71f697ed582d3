"""Where replicas run: ``base`` is the protocol, ``process`` starts engines on this machine,
``static`` routes to externally managed servers, ``kubernetes`` has pods of a cluster. ``servers``:
what a server answers of itself, for those that are reached by an address.
"""
