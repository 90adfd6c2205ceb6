"""Training: one run at a time, SFT or DPO, through an engine."""
