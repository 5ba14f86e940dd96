#!/bin/sh
# Writes the secrets that compose.yaml mounts, once; nothing that is there is changed.
# The files are readable by all, because each container has a user of its own; the folder is closed to all but its owner.
set -eu
cd "$(dirname "$0")"
mkdir -p secrets
chmod 700 secrets
random() { od -An -N24 -tx1 /dev/urandom | tr -d ' \n'; }
write() { [ -e "secrets/$1" ] || { umask 077; cat >"secrets/$1"; chmod 444 "secrets/$1"; }; }

[ -e secrets/postgres_password ] || random | write postgres_password
[ -e secrets/redis_password ] || { random >secrets/redis_password; chmod 400 secrets/redis_password; }
printf 'postgresql+psycopg://mu2:%s@postgres:5432/mu2' "$(cat secrets/postgres_password)" | write database_url
printf 'redis://:%s@redis:6379/0' "$(cat secrets/redis_password)" | write queue_url
write redis_conf <<END
requirepass $(cat secrets/redis_password)
appendonly yes
appendfsync everysec
save ""
maxmemory 256mb
maxmemory-policy noeviction
END

# A certificate of nobody's, so that the page can be tried; browsers warn. Put the hospital's own in its place.
if [ ! -e secrets/review_certificate ] && command -v openssl >/dev/null; then
    openssl req -x509 -newkey rsa:3072 -nodes -days 90 -subj /CN=mu2-review \
        -keyout secrets/review_key -out secrets/review_certificate 2>/dev/null
    chmod 444 secrets/review_key secrets/review_certificate
fi
