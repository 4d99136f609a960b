#!/bin/sh
# Starts a SuperLink: TLS, registered SuperNodes only, a database; nothing is installed, and nothing calls home.
#
#   deploy/superlink.sh KEYS STATE [options of flower-superlink]
#
# KEYS   holds ca.crt, superlink.crt and superlink.key
# STATE  gets the database, the apps that are sent, and the empty folder in which everything runs, since Python prefers
#        packages that it finds there
#
# It listens on 127.0.0.1:8000; to be reached from elsewhere add: --host 0.0.0.0 --port 9092
set -eu

[ $# -ge 2 ] || { sed -n '4,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
for file in "$1/ca.crt" "$1/superlink.crt" "$1/superlink.key"; do
    [ -r "$file" ] || { echo "superlink.sh: cannot read $file; python -m deploy.certificates makes one" >&2; exit 2; }
done
mkdir -p "$2/empty" || exit 2
keys=$(cd "$1" && pwd) state=$(cd "$2" && pwd)
shift 2

command -v flower-superlink >/dev/null || PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
command -v flower-superlink >/dev/null || { echo "superlink.sh: no flower-superlink; pip install 'fedlora[flower]'" >&2; exit 2; }
export PATH FLWR_HOME="$state/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
unset PYTHONPATH

umask 077 # the database holds every message of a run under way
cd "$state/empty"
exec flower-superlink --enable-supernode-auth --disable-runtime-dependency-installation --database "$state/state.db" \
    --ssl-ca-certfile "$keys/ca.crt" --ssl-certfile "$keys/superlink.crt" --ssl-keyfile "$keys/superlink.key" "$@"
