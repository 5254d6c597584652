"""The state of a training: captured whole into host memory, and brought back so that training goes on bit for bit."""
