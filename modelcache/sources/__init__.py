"""Where models come from: a module for each kind of store, behind ``modelcache.ports.Source``.

``opening`` makes the source of a reference. ``hf``, ``s3``, ``gs``, ``oss``, ``http`` and ``file``
are the kinds (``s3_access``, ``oss_access`` find credentials, ``obstores`` is shared by those
built on obstore). ``reader``, ``ranged`` and ``wire`` read ranges over HTTP; ``answers``,
``indexes`` and ``listings`` judge what servers say (pure).
"""
