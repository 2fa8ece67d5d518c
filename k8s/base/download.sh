#!/bin/bash
# Put the checkpoints of a list on the cache volume: download.sh LIST CACHE STAGING.
# A model appears under its name only once every file matches the sha256 in its manifest, so whoever sees the folder may
# trust it. Running it again checks what is there and fetches what is missing. Lines of LIST: NAME SOURCE.
set -euo pipefail
list=$1 cache=$2 staging=$3

models() { grep -v -e '^[[:space:]]*#' -e '^[[:space:]]*$' "$list"; }

# Prints the folder a SOURCE is in by now. A path, a catalog name or a repository of the hub is found or downloaded as
# everywhere else (weights and JSON, never code); a URL is copied into FOLDER. A mistake leaves with `mpt`'s exit code.
folder_of() {  # SOURCE FOLDER
  python - "$1" "$2" <<'PYTHON'
import sys
from pathlib import Path

from mpt.catalog import resolve
from mpt.errors import MPTError
from training.remote import Remote

source, folder = sys.argv[1], Path(sys.argv[2])
try:
    if "://" not in source:
        print(resolve(source))
    else:
        folder.mkdir(parents=True)
        remote = Remote(source)
        for path in remote.find("*.*"):
            remote.get(str(path), folder / path.name)
        print(folder)
except MPTError as error:
    print(f"download: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
PYTHON
}

fetch() {  # NAME SOURCE
  local name=$1 source=$2 raw partial="$cache/$1.partial"
  rm -rf "$partial" "${staging:?}/$name"
  raw=$(folder_of "$source" "$staging/$name")
  if [ -f "$raw/manifest.json" ]; then
    cp -rL "$raw" "$partial"
  else
    # A copy no one of us wrote has no manifest yet: this writes one, with the weights in the layout that loads fastest.
    mpt convert "$raw" "$partial" --to hf --no-verify
  fi
  mpt verify "$partial"  # exit code 3 when a file is not what the manifest says
  mv "$partial" "$cache/$name"
  rm -rf "${staging:?}"/*
}

while read -r name _; do  # workers wait for this file; it must not promise a model that is still to come
  [ -d "$cache/$name" ] || rm -f "$cache/.complete"
done < <(models)
while read -r name source; do
  if [ -d "$cache/$name" ]; then
    mpt verify "$cache/$name"
  else
    fetch "$name" "$source"
  fi
  echo "$name is at $cache/$name"
done < <(models)
touch "$cache/.complete"
