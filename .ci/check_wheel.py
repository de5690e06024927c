"""Checks that a wheel holds every file of the package that git knows: python .ci/check_wheel.py dist/bbfast-*.whl."""

import subprocess
import sys
import zipfile

tracked = set(subprocess.run(["git", "ls-files", "bbfast"], capture_output=True, text=True, check=True).stdout.split())
packed = set(zipfile.ZipFile(sys.argv[1]).namelist())
missing = sorted(tracked - packed)
if missing:
    sys.exit(f"{sys.argv[1]} lacks {len(missing)} files of the package: {', '.join(missing[:10])}")
print(f"{len(tracked)} files of the package are in the wheel")
