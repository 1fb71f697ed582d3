"""The autoscaler: how many replicas each pool has, and the means to get there.

``signals`` collects demand, ``policy`` decides (pure), ``control`` acts on replicas, ``tiers``
keeps pools at zero warm, ``backends`` run engines, ``replay`` runs a past through policies,
``operator`` has pools that are resources of a Kubernetes cluster,
``adapters`` answers other autoscalers.
``types`` and ``settings`` are shared by all of them; ``state_file`` is what a small record of
theirs is kept in, ``messages`` what processes of theirs exchange, ``protobuf`` messages of others'
protocols from a table, ``label_selectors`` how Kubernetes selects objects.
"""
