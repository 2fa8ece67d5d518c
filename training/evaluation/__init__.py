"""Zero- and few-shot tasks of the MPT launch blog's Table 1: what is asked, how it is scored, how it is reported."""
