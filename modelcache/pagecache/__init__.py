"""The page cache.

``residency`` measures, prewarms and drops; ``holder`` keeps pages resident by a process,
``holder_process``. ``linux_pages`` are the system calls. ``memory`` says how much may be kept,
``io_pressure`` whether others are reading from the same disk.
"""
