"""A simulated engine: vLLM's API and metrics, a model of its scheduler, and no model behind it.

It exists so that anyone can try Tidegate without an engine, and so that tests and benchmarks
measure Tidegate and not a GPU. Everything it says is labelled a simulation: the first log line,
``/version``, the header ``x-tidegate-simulated: true``, ``system_fingerprint: "simulated"`` and
the metric ``tidegate_simulated_engine``. No figure that comes out of it says anything about the
speed of a real engine.

Run it with ``python -P -m loaders.engines.simulated --model NAME --port 9000``; ``--help`` explains
the rest. ``loaders.engines.simulated.scheduler`` can be used alone: a pure model of one engine, in
virtual time.

``__main__`` is the process, ``arguments`` its settings, ``http1`` its port. ``application``
answers, text by way of ``api``. ``generation`` runs the ``scheduler``, with its KV blocks, in time,
and has what belongs to each reply under way; ``tokens``, ``faults`` and ``metrics`` are its
tokenizer, its scripted failures and what it counts. ``engine`` implements the protocol of
``loaders.engines.base``.
"""
