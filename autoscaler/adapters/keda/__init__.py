"""KEDA's external scaler.

``messages`` are those of its protocol, ``scaler`` says what they are answered, ``server`` serves
them over gRPC.
"""
