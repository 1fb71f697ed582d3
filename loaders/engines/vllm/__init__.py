"""vLLM: ``engine`` implements the protocol, ``compile_cache`` keeps what it compiles,
``load_format`` is our weight reader as a vLLM plugin, ``tool_calls`` finds the parser of a model's
tool calls, and ``forkserver`` is a process that has
imported vLLM before an engine is needed.
"""
