"""Learning from answers that were preferred to others: DPO, IPO, KTO and ORPO, on the one training loop."""
