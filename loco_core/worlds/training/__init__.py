"""Training of the minis; see `recipe.train_mini`."""
