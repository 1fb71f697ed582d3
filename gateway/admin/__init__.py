"""The admin listener: HTTP for operators, dashboards and the CLI.

``schema`` has the types of the admin API's requests and answers, ``operations`` its routes,
``openapi`` describes both. ``app`` gives each operation its handler, ``server`` runs it.
``control`` is what status and scaling act on, ``models`` the verbs over the model cache, which
``model_routes`` serves. ``metrics_page`` writes the Prometheus text, ``usage_poller`` reads the
cache's disk use for it.
"""
