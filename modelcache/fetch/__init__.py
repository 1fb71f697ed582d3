"""From a source and from peers to the disk.

``selection`` says which files of a listing make the model, ``fetch`` makes a revision whole, or a
damaged one. ``transfer`` runs downloads, by
threads that read from the source and from peers; ``download`` is one of them, and asks ``plan``
(pure) which piece is next.
"""
