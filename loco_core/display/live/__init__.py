"""The live application: explorers, and the jobs that paint for them."""
