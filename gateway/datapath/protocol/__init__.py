"""What is on the wire, without I/O: ``http1`` and ``chunks`` frame, ``sse`` reads and writes
events, ``openai`` and ``bodies`` read the fields that route a body, ``errors`` are all errors a
client can get.
"""
