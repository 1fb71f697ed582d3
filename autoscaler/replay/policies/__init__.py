"""Scaling policies: ours, our re-implementations of others', and two bounds.

``facts`` what a policy is built with · ``windows`` rates and minutes of what it sees ·
``tidegate`` ours · ``kubernetes`` HPA and KEDA · ``knative`` · ``ray_serve`` · ``ahpa`` ·
``dynamo`` · ``llm_d`` · ``bounds`` a fixed number, and the clairvoyant oracle · ``registry`` all of
them by name.
"""
