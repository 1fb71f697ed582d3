"""The admin listener: HTTP for operators, dashboards and the CLI.

``schema`` has the types of the admin API's requests and answers, ``operations`` its routes and
its OpenAPI document. ``app`` gives each operation its handler, ``guard`` says who is let in, and
``server`` serves them. ``control`` is what status and scaling act on, ``models`` the verbs over the
model cache, ``history`` those over the past of pools, ``decisions`` what pools decided in it.
``signals`` makes what other autoscalers are told of them.
``metrics_page`` writes the Prometheus text.
"""
