"""State dicts of optimizers by the names of parameters: what is saved, and loading it where it belongs."""
