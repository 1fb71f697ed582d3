"""Where replicas run: ``base`` is the protocol, ``process`` starts engines on this machine,
``static`` routes to externally managed servers.
"""
