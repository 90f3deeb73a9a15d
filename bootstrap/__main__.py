"""First code that `python ash.pyz` runs. Parses under any Python, so that one that is too old gets a plain answer."""

import sys

if sys.version_info < (3, 11):
    sys.exit("ash: this file needs Python 3.11 or newer; %s is Python %d.%d" % ((sys.executable,) + sys.version_info[:2]))

import _ash

_ash.run()
