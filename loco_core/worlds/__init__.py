"""WORLDS whose answers are known, and the training of models in them."""
