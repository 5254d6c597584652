"""``python -m statedict``: the command line, with the current folder taken off the import path first.

Python puts the folder that it is started in on the path. A ``numpy.py`` that came with a download would be imported from
there, and run.
"""

from __future__ import annotations

import os
import sys


def _leave_current_folder() -> None:
    """Take the entry that ``-m`` has put first off the path; ``python -P`` puts none there."""
    if sys.path and not getattr(sys.flags, "safe_path", False) and sys.path[0] in ("", os.getcwd()):
        del sys.path[0]


if __name__ == "__main__":
    _leave_current_folder()

    from statedict.cli import main

    sys.exit(main())
