#!/bin/sh
# Copies into DIRECTORY what the reward service needs of the image in which it was installed, and nothing else: Python,
# the packages in /venv, the libraries that they link. No shell and no package tool: whoever gets out of a checker finds none.
#
# Usage: root.sh DIRECTORY
set -eu
root=$1
library=$(/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')

# Debian's /lib and /lib64 are links into /usr. Of a library that links nothing ldd says so, and ends with 1.
linked=$(find /venv "$library" \( -name '*.so*' -o -path /venv/bin/python \) -exec ldd {} + 2>/dev/null || true)
linked=$(echo "$linked" | grep -o '/[^ ]*\.so[^ :]*' | grep -v -e ^/venv -e "^$library" | sed 's,^/lib,/usr/lib,' | sort -u)

mkdir -p "$root/tmp" && chmod 1777 "$root/tmp"
cp --archive --parents /lib* /etc/ld.so.cache /etc/passwd /etc/group /usr/share/zoneinfo /venv "$library" "$root"
cp --parents $linked "$root"

# A venv of copies holds Python three times, and sympy brings 20 MB of tests.
cd "$root/venv/bin" && rm python3.* && ln -sf python python3
cd "$root$library" && rm -rf config-* ensurepip idlelib lib2to3 pydoc_data site-packages test
find "$root/venv" -type d -name tests -prune -exec rm -rf {} +
