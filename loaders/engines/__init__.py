"""Serving engines: ``base`` is the protocol, ``vllm``, ``simulated`` and ``openai_compatible``
implement it, ``client`` is the HTTP by which they are asked. ``load_metrics`` has the names by
which engines tell their load, ``past_metrics`` those by which a Prometheus knows their past;
``prometheus_text`` reads their format.
"""
