"""The disk: blobs by digest, and the revisions made of them.

``store`` is the face of the folder, and reads again what is there. ``layout`` says where everything
lies, ``files`` writes atomically, ``digest`` hashes. ``records`` describe what is there,
``snapshots`` show it as directories, also as a Hugging Face cache. ``capacity`` keeps the quota by
``eviction`` (pure), ``leases`` protect what is used. ``lookup`` finds and lists models.
``partial_files`` and ``unfinished_results`` are not whole yet.
"""
