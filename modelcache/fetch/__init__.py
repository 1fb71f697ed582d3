"""From a source and from peers to the disk.

``fetch`` makes a revision whole, or a damaged one. ``transfer`` runs downloads; ``download`` is one
of them: it asks ``plan`` (pure) for the next piece, and threads of ``readers`` bring it.
"""
