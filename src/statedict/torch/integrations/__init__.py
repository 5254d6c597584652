"""Trainers that have checkpoints of their own, one module each, imported by name: each imports the trainer that it is for."""
