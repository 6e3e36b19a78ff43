"""Models: found, read from their files, loaded; what they are made of, and how they read text."""
