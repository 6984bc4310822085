#!/bin/sh
# Write the keys of the compose stack into secrets/, one file each; a key that exists stays.
#
# The files are readable by everybody, because a container reads them as uid 1000, and the folder by
# its owner only, so that on this machine nobody else gets to them.
set -eu
cd "$(dirname "$0")/.."
mkdir -p secrets
chmod 700 secrets
for name in rollout_api_key rollout_admin_key tool_api_key grafana_password; do
  if [ -s "secrets/$name" ]; then
    echo "keys: secrets/$name is kept"
    continue
  fi
  (umask 077 && od -An -tx1 -N24 /dev/urandom | tr -d ' \n' > "secrets/$name")
  chmod 444 "secrets/$name"
  echo "keys: secrets/$name is new"
done
