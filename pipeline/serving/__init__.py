"""A deployed model for other programs: an evaluation harness, a server."""
