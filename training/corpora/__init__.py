"""Text written by programs for the mpt-tiny family, and the novels it reads: every document a pure function of a seed."""
