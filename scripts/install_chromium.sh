#!/usr/bin/env bash
# Install Chromium for the tests of pages in a real browser, where apt-get and the right to use it are at hand.
# Elsewhere say so and end well: those tests are then skipped, with the reason.
set -uo pipefail

for name in chromium chromium-browser google-chrome; do
    if command -v "$name" >/dev/null; then
        echo "$name is there already"
        exit 0
    fi
done
if ! command -v apt-get >/dev/null; then
    echo "no apt-get here: install Chromium by hand, or the browser tests are skipped"
    exit 0
fi
as_root=()
if [[ $(id -u) -ne 0 ]]; then
    as_root=(sudo --non-interactive)
    if ! "${as_root[@]}" true 2>/dev/null; then
        echo "neither root nor sudo without a password: run 'apt-get install chromium', or the browser tests are skipped"
        exit 0
    fi
fi
export DEBIAN_FRONTEND=noninteractive
if "${as_root[@]}" apt-get update -qq && "${as_root[@]}" apt-get install -qq -y --no-install-recommends chromium >/dev/null; then
    echo "installed $(chromium --version)"
else
    echo "apt-get could not install chromium: the browser tests are skipped"
fi
