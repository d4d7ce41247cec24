"""How the tables came to be what they are, a file a change. `storage.py` runs what is missing."""
