"""JUDGE a picture."""
