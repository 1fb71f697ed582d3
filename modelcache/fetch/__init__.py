"""From a store and from peers to the disk.

``request`` says what is missing, ``fetch`` makes a revision whole, ``repair`` a damaged one.
``transfer`` runs downloads; ``download`` is one of them, which asks ``plan`` (pure) for the next
piece and has ``readers`` bring it.
"""
