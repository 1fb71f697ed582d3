"""Where models come from: one module per kind of store, behind one protocol (``base``)."""
