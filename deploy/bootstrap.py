"""Where `make run` and `make test` begin: any Python 3 can run this file, and it finds a good one.

Kept to what an old interpreter can read, so that a wrong version is one clear line and not a
traceback. What is done is in ``prepare.py``, beside it.
"""

import os
import shutil
import subprocess
import sys

OLDEST, NEWEST = (3, 11), (3, 13)
CHOICES = ("python3.12", "python3.11", "python3.13")
TELL = "import sys; print('%d.%d' % sys.version_info[:2])"


def find_python():
    """The path of an interpreter of a version we support, or None."""
    for name in CHOICES:
        path = shutil.which(name)
        if path is None:
            continue
        asked = subprocess.run(
            [path, "-I", "-c", TELL], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        if asked.returncode == 0 and asked.stdout.decode().strip() == name[len("python") :]:
            return path
    return None


def main():
    """Hand over to ``prepare.main`` in an interpreter that can run it."""
    if OLDEST <= sys.version_info[:2] <= NEWEST:
        from prepare import main as prepare

        return prepare(sys.argv[1:])
    have = "{}.{}".format(*sys.version_info[:2])
    other = None if "--python-given" in sys.argv else find_python()
    if other is None:
        sys.stderr.write(
            f"Tidegate needs Python 3.11, 3.12 or 3.13, and this is {have}: install one of them, "
            "or name it with PYTHON=/path/to/python3.12\n"
        )
        return 2
    os.execv(other, [other, os.path.abspath(__file__)] + sys.argv[1:])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
