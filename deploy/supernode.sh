#!/bin/sh
# Starts a site's SuperNode: TLS, its own key; nothing is installed, and nothing calls home.
#
#   deploy/supernode.sh HOST:PORT AUTHORITY KEY STATE NODE_CONFIG [options of flower-supernode]
#
# HOST:PORT    of the SuperLink; the name has to be in its certificate
# AUTHORITY    certificate of who signed the SuperLink's
# KEY          private key whose public half is registered at the SuperLink
# STATE        gets the apps that are sent, and the empty folder in which everything runs
# NODE_CONFIG  'partition-id=0 site="/run/fedlora-site/site.sock"': which client this is, and where its site listens
#
# Two on one machine need ports of their own: --port 9095
set -eu

[ $# -ge 5 ] || { sed -n '4,12s/^# \{0,1\}//p' "$0" >&2; exit 2; }
for file in "$2" "$3"; do
    [ -r "$file" ] || { echo "supernode.sh: cannot read $file" >&2; exit 2; }
done
mkdir -p "$4/empty" || exit 2
superlink=$1 authority=$(realpath "$2") key=$(realpath "$3") state=$(cd "$4" && pwd) node_config=$5
shift 5

command -v flower-supernode >/dev/null || PATH="$(cd "$(dirname "$0")/.." && pwd)/.venv/bin:$PATH"
command -v flower-supernode >/dev/null || { echo "supernode.sh: no flower-supernode; pip install 'fedlora[flower]'" >&2; exit 2; }
export PATH FLWR_HOME="$state/home" FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
# How often Flower looks for work that has arrived; its own second is half a second a round.
export FLWR_SUPEREXEC_TASK_POLL_INTERVAL="${FLWR_SUPEREXEC_TASK_POLL_INTERVAL:-0.1}"
unset PYTHONPATH

umask 077
cd "$state/empty"
exec flower-supernode --superlink "$superlink" --root-certificates "$authority" --auth-supernode-private-key "$key" \
    --node-config "$node_config" "$@"
