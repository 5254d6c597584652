"""What is wrong with a checkpoint, and what makes it fit."""
