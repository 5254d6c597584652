"""State of optimizers and schedulers as facts, without torch: where it stands, whose it is, what of it differs from another's."""
