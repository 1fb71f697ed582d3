"""From a store and from peers to the disk.

``request`` says what is missing, ``fetch`` makes a revision whole, ``repair`` a damaged one.
``transfer`` runs downloads, which share a ``transfer_state``; ``download`` is one of them: it asks
``plan`` (pure) for the next piece, and threads of ``readers`` bring it.
"""
