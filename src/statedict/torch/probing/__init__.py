"""Running a model on a probe: which of its tensors matter, whether its output is the expected one, and where it parts from a reference."""
