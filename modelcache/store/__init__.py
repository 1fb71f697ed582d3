"""The disk: blobs by digest, and the revisions made of them.

``store`` is the face of the folder. ``layout`` says where everything lies, ``files`` writes
atomically, ``digest`` hashes. ``manifest`` and ``revisions`` describe what is there, ``snapshots``
and ``hub_layout`` show it as directories. ``capacity`` (``disk_usage``, ``eviction``) keeps the
quota, ``leases`` protect what is used, ``verify`` reads it again. ``lookup`` and ``inventory``
answer questions, ``local_files`` finds copies elsewhere on this machine. ``partial_files`` and
``pending_results`` are not whole yet.
"""
