"""vLLM: ``command`` line, ``compile_cache`` shipped as bundles, the weight ``load_format``
registered as a vLLM plugin, and the ``forkserver`` that has imported vLLM before it is needed.
"""
