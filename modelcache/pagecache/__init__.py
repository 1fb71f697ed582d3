"""The page cache.

``residency`` measures, prewarms and drops; ``holder`` keeps pages resident by a process,
``holder_process``. ``linux_pages`` are the system calls. ``pressure`` says how much may be kept,
and whether others are reading from the same disk.
"""
