"""What resources of other products become here, field by field. Pure.

``fields``: reading a resource, and what is said of each of its fields. ``bounds``: when a cron
expression holds, as windows. ``ahpa``: an AdvancedHorizontalPodAutoscaler, as a ModelPool.
``fluid``: Fluid's Dataset, DataLoad, DataProcess and runtimes, as what cache agents are given.
``credentials``: what Fluid's options of stores are called in the environment.
"""
