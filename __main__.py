"""Entry point of ``python3 <clone> COMMAND``: works from any directory and under any folder name.

This file must parse on every Python that somebody may try, so it stays free of annotations and f-strings.
"""
# ruff: noqa: UP031, UP036, RUF005

import os
import sys
import types

ROOT = os.path.dirname(os.path.abspath(__file__))
PACKAGE = "svdq"


def register_package(root=ROOT):
    """Make the clone importable as ``svdq`` without running its ``__init__.py``, which only ComfyUI can import.

    Python puts the script's folder first on ``sys.path``; there our ``nodes`` and ``model`` would hide ComfyUI's
    modules of the same name, so that entry goes away. (``tests/conftest.py`` does the same for pytest.)
    """
    if sys.path and os.path.realpath(sys.path[0]) == os.path.realpath(root):
        del sys.path[0]
    package = types.ModuleType(PACKAGE)
    package.__path__ = [root]
    sys.modules[PACKAGE] = package


if __name__ == "__main__":
    if sys.version_info < (3, 10):
        sys.stderr.write(
            "error: Python 3.10 to 3.13 is needed and this is Python %d.%d; try python3.12 %s\n"
            % (sys.version_info[0], sys.version_info[1], " ".join([sys.argv[0]] + sys.argv[1:]))
        )
        sys.exit(2)
    register_package()
    from svdq.cli import main

    sys.exit(main(sys.argv[1:]))
