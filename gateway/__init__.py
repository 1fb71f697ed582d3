"""The gateway: everything a client, an operator or a shell talks to.

``datapath`` carries requests, ``admin`` is the operators' HTTP listener, ``settings`` reads what
was configured, ``cli`` is the ``tidegate`` command, ``doctor`` looks at the machine, and
``compose`` puts a running process together from all packages. ``terminal`` is what all of them say
on one.
"""
