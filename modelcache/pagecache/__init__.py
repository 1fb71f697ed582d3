"""The page cache.

``residency`` measures, prewarms and drops; ``holder`` keeps pages resident through
``holder_process`` and ``holding``. ``spans`` are file ranges, ``linux_pages`` the system calls.
``memory`` says how much may be kept, ``io_pressure`` whether others are reading from the same
disk.
"""
