"""The admin listener: HTTP for operators, dashboards and the CLI.

``server`` runs the ASGI application of ``app``; ``answers`` has what all routes share and
``control`` what status and scaling routes act on. ``models`` has the verbs over the model cache
(``model_names``, ``model_parts``, ``model_errors`` belong to it) and ``model_routes`` serves them.
``metrics_page`` writes the Prometheus text, ``usage_poller`` reads the cache's disk use for it.
"""
