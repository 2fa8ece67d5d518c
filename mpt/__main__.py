"""`python -m mpt` is the `mpt` command."""

from mpt import entry

entry.mpt()
