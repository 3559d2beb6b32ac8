"""Compare a source distribution with what is tracked: nothing may be added, and only .ci/ and .github/ may be missing.

Usage: check_sdist.py FILE.tar.gz
"""

from __future__ import annotations

import subprocess
import sys
import tarfile

GENERATED = ("PKG-INFO", "setup.cfg")

with tarfile.open(sys.argv[1]) as archive:
    held = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
held = {name for name in held if name not in GENERATED and ".egg-info/" not in name}
tracked = set(subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines())
tracked = {name for name in tracked if not name.startswith((".ci/", ".github/"))}
missing, added = sorted(tracked - held), sorted(held - tracked)
assert not missing, f"not in the source distribution: {missing}"
assert not added, f"in the source distribution, and not tracked: {added}"
print(f"source distribution: {len(held)} files, as tracked")
