"""Where models come from: one module per kind of store, behind one protocol (``base``).

``opening.open_source`` makes the source of a reference.
"""
