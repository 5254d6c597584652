"""One verb a module: what can be done with a checkpoint, whatever its format."""
