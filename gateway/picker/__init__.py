"""The endpoint picker: chooses the replica for each request that an Envoy carries.

An Envoy asks it by external processing (ext_proc, gRPC), in the protocol of the Gateway API
Inference Extension. It is a worker process beside those of the data path, with the same pools,
ledger and router. ``stream`` is one request, messages in and replies out, without I/O; ``replies``
makes the replies, ``ext_proc`` the messages; ``server`` is the process with the gRPC server
and its health services, ``certificate`` what it shows as its own.
"""
