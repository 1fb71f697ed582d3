"""Where models come from: a module for each kind of source, behind ``modelcache.ports.Source``.

``opening`` makes the source of a reference. ``hf``, ``s3``, ``gs``, ``oss``, ``http`` and ``file``
are the kinds. ``reader`` reads ranges over HTTP through ``wire``, and ``answers`` judges what
servers say and sources list (pure); ``obstore_client`` is shared by the sources that obstore reads.
``retry`` and ``proxy`` are the one rule of all of them for both.
"""
